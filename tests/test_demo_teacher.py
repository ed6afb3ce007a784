"""The shipped teacher of the demo: the weights that configs/demo_teacher.json made, as good as they were measured."""

import json
from pathlib import Path

import pytest
from toy import ROOT

from mixkd_fast.checkpoint import file_sha256
from mixkd_fast.cli_evaluate import evaluate_saved
from mixkd_fast.configuration import Task, load_config
from mixkd_fast.data.demo import train_demo_tokenizer
from mixkd_fast.saving import load_model

FOLDER = ROOT / "mixkd_fast" / "data" / "demo" / "teacher"
SHA256 = "78fa6afb1149867714f18052c0efda77631d9f4d057f8bfc8972cd91b1c86d6e"
LARGEST_BYTES = 8 * 2**20


def test_weights_are_the_ones_that_were_measured() -> None:
    assert file_sha256(FOLDER / "model.safetensors") == SHA256
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < LARGEST_BYTES


def test_teacher_reaches_85_percent(tmp_path: Path) -> None:
    results = evaluate_saved(FOLDER, Task(name="demo", max_length=64, cache_dir=str(tmp_path)), 256)
    assert results["validation"][0].metrics["accuracy"] == pytest.approx(0.917, abs=2e-3)
    assert results["validation"][0].metrics["accuracy"] >= 0.85


def test_shipped_tokenizer_is_the_one_trained_on_the_demo() -> None:
    _, shipped = load_model(FOLDER)
    trained = train_demo_tokenizer()
    assert shipped.get_vocab() == trained.get_vocab()
    pair = ("all red foxes run .", "exactly seven foxes run .")
    assert dict(shipped(*pair)) == dict(trained(*pair))


def test_the_students_have_the_same_budget() -> None:
    configs = [load_config(ROOT / "configs" / f"demo_{name}.json") for name in ("finetune", "kd", "mixkd")]
    assert len({json.dumps(config.training.model_dump()) for config in configs}) == 1
    assert len({config.task.model_dump_json() for config in configs}) == 1
    assert len({config.student.model_dump_json() for config in configs}) == 1
