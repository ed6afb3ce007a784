"""Two processes give what one gives, whatever stage student and teacher are partitioned at."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy import losses, must_run, must_run_ranks, records, toy_config

STAGES = [(student, teacher) for student in (0, 1, 2, 3) for teacher in (0, 3)]
WORKER = "tests/workers/zero_stages.py"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages with one process and with two: the same global batch, cut differently."""
    folder = tmp_path_factory.mktemp("stages")
    config = toy_config(folder, training={"steps": 6, "batch_size": 16, "evaluate_every": 3})
    (folder / "config.json").write_text(json.dumps(config))
    must_run([sys.executable, WORKER, str(folder), "one", "8"])
    must_run_ranks(2, str(folder), "two", "4", script=WORKER)
    return folder


@pytest.mark.parametrize(("student", "teacher"), STAGES)
def test_two_ranks_give_the_losses_of_one(runs: Path, student: int, teacher: int) -> None:
    one = losses(runs / "one-student0-teacher0")
    assert len(one) == 6 and max(one) - min(one) > 1e-3, "the losses must move for the comparison to mean anything"
    two = losses(runs / f"two-student{student}-teacher{teacher}")
    assert two == pytest.approx(one, abs=1e-5)
    alone = losses(runs / f"one-student{student}-teacher{teacher}")
    assert alone == pytest.approx(one, abs=1e-5)


@pytest.mark.parametrize(("student", "teacher"), STAGES)
def test_two_ranks_give_the_gradient_norms_and_metrics_of_one(runs: Path, student: int, teacher: int) -> None:
    expected, found = runs / "one-student0-teacher0", runs / f"two-student{student}-teacher{teacher}"
    norms = [[line["grad_norm"] for line in records(folder)] for folder in (expected, found)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    first, second = (records(folder, "evaluation")[-1]["metrics"] for folder in (expected, found))
    assert second == pytest.approx(first, abs=1e-5)


@pytest.mark.parametrize(("student", "teacher"), STAGES)
def test_two_ranks_save_the_weights_of_one(runs: Path, student: int, teacher: int) -> None:
    one = load_file(runs / "one-student0-teacher0" / "student" / "model.safetensors")
    two = load_file(runs / f"two-student{student}-teacher{teacher}" / "student" / "model.safetensors")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(
            two[name], tensor, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
