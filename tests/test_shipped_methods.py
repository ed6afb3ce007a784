"""Every shipped configuration of a text classification method, with its options as they stand in the file, trains.

Models, rows and the length of the run are the toy task's; all else is the file's.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from method_runs import save_masked_lm
from test_configs import CONFIGS
from toy import records, save_toy_teacher, toy_config, toy_rows, toy_tokenizer
from transformers import BertForMaskedLM

from mixkd_fast import distill
from mixkd_fast.configuration import load_config
from mixkd_fast.methods import LanguageMethod

STEPS = 20
OWN_TERMS = {"pkd", "pkt", "relations", "attention", "hidden", "contrastive", "adversarial"}
"""What a method adds to labels and logits; it has to fall too. A schedule or an adversary moves the others."""
RANDOM_STUDENT = {
    "model_type": "bert",
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
}


def _is_classification(path: Path) -> bool:
    config = load_config(path)
    return config.task.kind != "causal_lm" and not isinstance(config.method, LanguageMethod) and not config.plan.teacher


def _what_it_trains(path: Path) -> str:
    shipped = json.loads(path.read_text())
    return json.dumps([shipped["method"], "extra_train_files" in shipped["task"], "extra_labels" in shipped["task"]])


# The tasks of MixKD's paper have one method: one of them stands for all.
SHIPPED = list({_what_it_trains(path): path for path in reversed(CONFIGS) if _is_classification(path)}.values())[::-1]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three teachers that know the task, of a width that 48 relation heads divide, with dropout."""
    folder = tmp_path_factory.mktemp("teachers")
    training = {"steps": 60, "batch_size": 32, "micro_batch_size": 32, "learning_rate": 2e-3, "evaluate_every": 60}
    for number in range(3):
        start = save_toy_teacher(folder / f"start{number}", number, hidden_size=48)
        student = {"model": str(start), "num_layers": None, "dropout": 0.1}
        config = toy_config(folder, f"run{number}", method={"name": "finetune"}, training=training, student=student)
        del config["teacher"]
        result = distill(**config, progress=False)
        assert result.metrics["validation"]["accuracy"] > 0.9
    return [str(folder / f"run{number}" / "student") for number in range(3)]


def _word_frequencies(folder: Path) -> str:
    """A masked language model that knows how frequent the toy task's words are."""
    save_masked_lm(folder, initializer_range=0.02)
    model = BertForMaskedLM.from_pretrained(folder)
    ids = toy_tokenizer()(" ".join(toy_rows(96, seed=1)["sentence"]), add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.cls.predictions.bias.copy_(
            (torch.bincount(torch.tensor(ids), minlength=model.config.vocab_size) + 0.1).log()
        )
    model.save_pretrained(folder)
    return str(folder)


def _sections(path: Path, folder: Path, teachers: list[str]) -> dict[str, Any]:
    """The file's sections with the toy task's models and rows."""
    shipped = json.loads(path.read_text())
    config = toy_config(folder, "run")
    if "extra_train_files" in shipped["task"]:
        options = ("extra_labels", "extra_min_confidence", "extra_agreement", "extra_max_rows")
        config["task"] |= {name: shipped["task"][name] for name in options if name in shipped["task"]}
        rows = toy_rows(64, seed=5)
        if config["task"].get("extra_labels") == "teacher":
            del rows["label"]
        lines = [json.dumps(dict(zip(rows, values, strict=True))) for values in zip(*rows.values(), strict=True)]
        (folder / "generated.jsonl").write_text("\n".join(lines) + "\n")
        config["task"]["extra_train_files"] = [str(folder / "generated.jsonl")]
    config["method"] = dict(shipped["method"])
    for name, value in (("teachers", teachers[1:]), ("generator", None), ("masked_lm_teacher", None)):
        if name in shipped["method"]:
            config["method"][name] = value or _word_frequencies(folder / "words")
    config["student"] = {"config": RANDOM_STUDENT, "dropout": 0.0, "num_layers": None}
    if "teacher" in shipped:
        config["teacher"] = {**shipped["teacher"], "model": teachers[0]}
    else:
        del config["teacher"]
    # Every step has all rows: its loss falls by what is learned, not by who is in it. RDD's second part needs rows that
    # its first has not learned.
    rate = 1e-3 if path.stem == "rdd" else 5e-3
    shape = {"steps": STEPS, "batch_size": 96, "learning_rate": rate, "log_every": 1, "evaluate_every": STEPS}
    shape["threads"] = 1
    left_out = ("epochs", "early_stopping", "checkpoint_every")
    config["training"] = {k: v for k, v in shipped.get("training", {}).items() if k not in left_out} | shape
    config["deepspeed"] = shipped.get("deepspeed", {})
    return config


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_twenty_steps_lower_its_loss(path: Path, tmp_path: Path, teachers: list[str]) -> None:
    """In each part of a run, which is as long as the terms are the same."""
    result = distill(**_sections(path, tmp_path, teachers), tokenizer=toy_tokenizer(), progress=False)
    lines = records(tmp_path / "run")
    if "extra_train_files" in json.loads(path.read_text())["task"]:
        assert result.summary["data"]["train_rows"] > 140, (
            "96, and of 64 further ones those that the teacher is sure of"
        )
    assert len(lines) == STEPS and result.summary["method"] == load_config(path).method.name
    parts: dict[frozenset[str], list[dict[str, float]]] = {}
    for line in lines:
        own = {name: value for name, value in line["terms"].items() if name in OWN_TERMS}
        parts.setdefault(frozenset(line["terms"]), []).append({"loss": _loss(line, path), **own})
    for steps in parts.values():
        third = len(steps) // 3
        for name in steps[0]:
            first, last = (sum(step[name] for step in some) for some in (steps[:third], steps[-third:]))
            assert last < 0.95 * first, name


def _loss(line: dict[str, Any], path: Path) -> float:
    """A step's loss; of `inheritance`, whose two parts change places over the run, both at their full weight."""
    if path.stem != "inheritance":
        return float(line["loss"])
    rate = 1 - (line["step"] - 1) / STEPS
    return float(line["terms"]["inheritance"] / rate + line["terms"]["mlm"] / max(1 - rate, 1 / STEPS))
