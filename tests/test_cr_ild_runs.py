"""CR-ILD through the whole program: ZeRO stages, ranks, resuming, other widths, a supplementary task."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from layer_runs import WIDER, falls, toy_run
from toy import launched, losses, must_run, save_toy_teacher, toy_config
from transformers import AutoModelForSequenceClassification

from mixkd_fast import distill
from mixkd_fast.errors import ConfigurationError, Interrupted, ModelError
from mixkd_fast.methods.moving_average import MovingAverage

ILD: dict[str, Any] = {"name": "cr_ild", "ild_share": 1.0}
EMA = {"consistency_target": "ema", "ema_decay": 0.9}
BOTH_PARTS: dict[str, Any] = {"name": "cr_ild", "ild_share": 0.5, "sm_weight": 0.5, "tmkd_weight": 0.5}


def test_other_numbers_of_heads_need_relations_that_fit(tmp_path: Path) -> None:
    refusal = r'method.attention = "maps": the student has 3 heads and the teacher 2.*"relations"'
    with pytest.raises(ModelError, match=refusal):
        toy_run(tmp_path, ILD, "maps", student=WIDER)
    refusal = r"method.relation_heads = 3: must divide the student's width 24 and the teacher's 32; .* divisor of 8"
    with pytest.raises(ModelError, match=refusal):
        toy_run(tmp_path, ILD | {"attention": "relations"}, "heads", student=WIDER)
    options = {"attention": "relations", "relation_heads": 4, "attention_weight": 10.0, "hidden_weight": 0.1}
    terms = toy_run(tmp_path, ILD | options, student=WIDER, learning_rate=1e-2)
    assert falls(terms, "attention") and falls(terms, "hidden")


def test_stages_of_zero_agree_from_one_part_to_the_next(tmp_path: Path) -> None:
    """Up to the first step of the KD part: what the ILD part did not train has other Adam moments afterwards, none
    in one process without ZeRO and zeros elsewhere."""
    whole = toy_run(tmp_path, BOTH_PARTS, "stage0")
    for stage in (2, 3):
        terms = toy_run(tmp_path, BOTH_PARTS, f"stage{stage}", stage)
        for step, other in zip(whole[:11], terms[:11], strict=True):
            assert other == pytest.approx(step, rel=5e-3, abs=1e-4)
        assert terms[10].keys() == {"kd", "sm", "tmkd"}


def test_the_average_works_with_zero_2_and_refuses_zero_3(tmp_path: Path) -> None:
    whole = toy_run(tmp_path, ILD | EMA, "stage0", steps=8)
    for step, other in zip(whole, toy_run(tmp_path, ILD | EMA, "stage2", 2, steps=8), strict=True):
        assert other == pytest.approx(step, rel=5e-3, abs=1e-5)
    refusal = 'method.consistency_target = "ema" needs .*stage is 3; allowed: a stage of 0 to 2, or "self"'
    with pytest.raises(ConfigurationError, match=refusal):
        toy_run(tmp_path, ILD | EMA, "stage3", 3, steps=8)


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "bf16")])
def test_a_resumed_run_has_the_same_average(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, precision: str
) -> None:
    options: dict[str, Any] = {"steps": 10, "evaluate_every": 10, "precision": precision}
    toy_run(tmp_path, ILD | EMA, "whole", stage, **options)
    follow, calls = MovingAverage.follow, 0

    def follow_and_stop(self: MovingAverage, encoder: Any) -> None:
        nonlocal calls
        calls += 1
        follow(self, encoder)
        if calls == 5:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(MovingAverage, "follow", follow_and_stop)
    with pytest.raises(Interrupted, match="after step 5 of 10"):
        toy_run(tmp_path, ILD | EMA, "resumed", stage, **options)
    sections = json.loads((tmp_path / "resumed" / "config.json").read_text())
    sections.pop("$schema", None)
    distill(**sections, resume=True, progress=False)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")


def test_bf16_trains_what_the_targets_read_too(tmp_path: Path) -> None:
    """A forward without gradients inside autocast must not take the gradients of the others away."""
    terms = toy_run(tmp_path, ILD, precision="bf16", micro_batch_size=4)
    assert falls(terms, "attention") and falls(terms, "hidden")


@pytest.mark.slow
def test_two_ranks_are_one_under_zero_3(tmp_path: Path) -> None:
    """Some ranks have partners of their own to read and others none: all take part in gathering the weights."""
    sizes = {"batch_size": 4, "micro_batch_size": 1, "learning_rate": 3e-3, "steps": 6, "evaluate_every": 6}
    config = toy_config(tmp_path, "ranks", method=ILD, training=sizes, deepspeed={"zero_optimization": {"stage": 3}})
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    must_run(launched(2, "--config", str(path)), DS_ACCELERATOR="cpu")
    config |= {"output": {"directory": str(tmp_path / "alone"), "report": False}, "deepspeed": {}}
    distill(**config, progress=False)
    assert losses(tmp_path / "ranks") == pytest.approx(losses(tmp_path / "alone"), rel=5e-3, abs=1e-5)


def test_a_supplementary_task_comes_first(tmp_path: Path) -> None:
    """ILD on rows of three labels with a teacher of two, then KD on the teacher's own task."""
    target = toy_config(tmp_path, "kd", method={"name": "cr_ild", "ild_share": 0.0})
    (tmp_path / "other").mkdir()
    save_toy_teacher(tmp_path / "other" / "teacher")
    supplementary = toy_config(tmp_path / "other", "ild", method=ILD, teacher={"model": str(tmp_path / "teacher")})
    for path in supplementary["task"]["train_files"] + supplementary["task"]["evaluation_files"]["validation"]:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        Path(path).write_text("\n".join(json.dumps(row | {"label": n % 3}) for n, row in enumerate(rows)) + "\n")
    distill(**supplementary, progress=False)
    first = AutoModelForSequenceClassification.from_pretrained(tmp_path / "other" / "ild" / "student")
    assert first.config.num_labels == 3
    target["student"] = {"model": str(tmp_path / "other" / "ild" / "student")}
    result = distill(**target, progress=False)
    assert result.student.config.num_labels == 2
    assert "teacher_agreement" in result.metrics["validation"]
    start = AutoModelForSequenceClassification.from_pretrained(tmp_path / "teacher", num_hidden_layers=2)
    moved = first.bert.encoder.layer[1].output.dense.weight - start.bert.encoder.layer[1].output.dense.weight
    assert float(moved.detach().abs().max()) > 1e-4, "the layers were trained"
