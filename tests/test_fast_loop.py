"""The loop that does not wait and does not repeat itself: kept teacher logits, planned batches, late reports."""

import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_non_finite import POISONED_ROW, PoisonedLoss
from tiny_models import tiny_encoder
from toy import ROOT, losses, records, save_toy_teacher, toy_rows, toy_tokenizer

from mixkd_fast import KD, MixKD, distill
from mixkd_fast.configuration import Training
from mixkd_fast.errors import ConfigurationError, NonFiniteError
from mixkd_fast.methods.base import supervised_loss
from mixkd_fast.model_preparation import fuse
from mixkd_fast.saving import load_model

METHOD = MixKD(kd_weight=1.0)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy_teacher(tmp_path_factory.mktemp("teacher"))


def train(folder: Path, teacher: Path, name: str, training: dict[str, Any] | None = None, **sections: Any) -> Any:
    method = sections.pop("method", METHOD)
    stored = sections.pop("store", True)
    return distill(
        teacher=sections.pop("teacher_section", None)
        or {"model": str(teacher), "store": stored, "store_dir": str(folder / "store")},
        student={"num_layers": 2},
        train=Dataset.from_dict(toy_rows(96, 1)),
        evaluation=Dataset.from_dict(toy_rows(24, 2)),
        method=method,
        task={"max_length": 32, "cache_dir": str(folder / "cache")},
        training={"epochs": 3, "batch_size": 8, "learning_rate": 1e-3, "threads": 1, **(training or {})},
        output={"directory": str(folder / name), "report": False},
        tokenizer=toy_tokenizer(),
        progress=False,
        **sections,
    )


def test_kept_logits_change_nothing_and_save_the_teacher_the_rows(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, teacher, "without", store=False)
    assert not (tmp_path / "store").exists()
    train(tmp_path, teacher, "cold")
    assert "96 of them computed now" in capsys.readouterr().err
    train(tmp_path, teacher, "warm")
    assert "all of them kept already" in capsys.readouterr().err
    plain, cold, warm = (losses(tmp_path / name) for name in ("without", "cold", "warm"))
    np.testing.assert_allclose(cold, plain, rtol=2e-6)
    assert cold == warm, "the same bits, whoever wrote them"


def test_kept_logits_belong_to_weights_rows_and_precision(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, teacher, "first")
    other = save_toy_teacher(tmp_path / "other", seed=5)
    train(tmp_path, other, "second")
    train(tmp_path, teacher, "third", {"precision": "bf16"})
    assert capsys.readouterr().err.count("96 of them computed now") == 3
    assert len([path for path in (tmp_path / "store").iterdir() if not path.name.startswith(".")]) == 3


def test_logits_are_not_kept_where_nobody_asks_twice(tmp_path: Path, teacher: Path) -> None:
    train(tmp_path, teacher, "one_epoch", {"epochs": 1})
    train(tmp_path, teacher, "mixed_only", method=MixKD())
    assert not (tmp_path / "store").exists()


def test_a_store_that_cannot_be_written_costs_one_line(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "store").write_text("in the way")
    train(tmp_path, teacher, "blocked", {"epochs": 2})
    assert "The teacher's logits are not kept" in capsys.readouterr().err
    plain = losses(tmp_path / "blocked")
    (tmp_path / "store").unlink()
    train(tmp_path, teacher, "without", {"epochs": 2}, store=False)
    assert plain == losses(tmp_path / "without")


def test_a_run_resumed_in_the_second_epoch_reads_the_same_logits(tmp_path: Path, teacher: Path) -> None:
    train(tmp_path, teacher, "whole", {"checkpoint_every": 4, "batching": "length"})
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for path in (tmp_path / "resumed" / "checkpoints").iterdir():
        if path.name > "step-00000020":
            shutil.rmtree(path)
    (tmp_path / "resumed" / "summary.json").unlink()
    whole = losses(tmp_path / "whole")
    config = json.loads((tmp_path / "resumed" / "config.json").read_text())
    config["output"]["directory"] = str(tmp_path / "resumed")
    (tmp_path / "resumed" / "config.json").write_text(json.dumps(config))
    train(tmp_path, teacher, "resumed", {"checkpoint_every": 4, "batching": "length"}, resume=True)
    assert losses(tmp_path / "resumed") == whole and len(whole) == 36


@pytest.mark.parametrize("training", [{}, {"batch_size": 16, "micro_batch_size": 4, "tokens_per_micro_batch": 48}])
def test_planned_batches_train(tmp_path: Path, teacher: Path, training: dict[str, Any]) -> None:
    result = train(
        tmp_path, teacher, "run", {"batching": "length", "epochs": 8, "learning_rate": 5e-3, **training}, method=KD()
    )
    values = losses(tmp_path / "run")
    assert sum(values[-6:]) < 0.9 * sum(values[:6])
    assert result.summary["training"]["epochs"] == 8.0
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    assert [r["epoch"] for r in evaluations] == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("stage", [0, 1])
def test_late_reports_say_what_early_ones_said(tmp_path: Path, teacher: Path, stage: int) -> None:
    zero = {"zero_optimization": {"stage": stage}}
    train(tmp_path, teacher, "each", {"prefetch": 0}, deepspeed=zero)
    train(tmp_path, teacher, "late", {"log_every": 5}, deepspeed=zero)
    each = {r["step"]: r for r in records(tmp_path / "each") if r["kind"] == "train"}
    late = {r["step"]: r for r in records(tmp_path / "late") if r["kind"] == "train"}
    assert sorted(late) == [5, 10, 15, 20, 25, 30, 35, 36]
    for step, record in late.items():
        assert [record[k] for k in ("loss", "terms", "grad_norm")] == [
            each[step][k] for k in ("loss", "terms", "grad_norm")
        ]


def test_a_late_report_names_the_first_bad_step(tmp_path: Path) -> None:
    """As test_non_finite, but looked at every tenth step: the weights were never touched by a bad one."""
    from test_non_finite import _run

    with pytest.raises(NonFiniteError, match=rf"loss term 'odd' = nan; rows {POISONED_ROW} ") as early:
        _run(tmp_path / "early", PoisonedLoss(), 0)
    with pytest.raises(NonFiniteError) as late:
        _run(tmp_path / "late", PoisonedLoss(), 0, log_every=10, evaluate_every=10)
    assert str(late.value) == str(early.value)


def test_skipped_steps_are_counted_when_they_are_known(tmp_path: Path) -> None:
    from test_non_finite import _run

    early = _run(tmp_path / "early", PoisonedLoss(), 0, non_finite="skip").summary["training"]["skipped_steps"]
    late = _run(tmp_path / "late", PoisonedLoss(), 0, non_finite="skip", log_every=10, evaluate_every=10)
    assert late.summary["training"]["skipped_steps"] == early == 2


def test_clipping_on_the_device_is_clipping(tmp_path: Path, teacher: Path) -> None:
    """AdamW does not see the size of gradients, but their ratio from step to step: against a written-out loop."""
    from mixkd_fast.configuration import Training
    from mixkd_fast.engine import Engine

    torch.manual_seed(0)
    values, results = torch.randn(6, 4) * torch.tensor([[0.01], [100.0], [1.0], [30.0], [0.1], [3.0]]), []
    for ours in (True, False):
        parameter = torch.nn.Parameter(torch.ones(4))
        optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
        for gradient in values:
            parameter.grad = gradient.clone()
            if ours:
                engine = object.__new__(Engine)
                module = torch.nn.ParameterList([parameter])
                engine.training, engine._guards_itself, engine._is_plain = Training(max_grad_norm=1.0), False, True
                engine._module, engine._engine = module, _Stepper(optimizer)
                norm, applied = engine._update()
                assert bool(applied) and norm is not None
                torch.testing.assert_close(norm, gradient.norm())
            else:
                torch.nn.utils.clip_grad_norm_([parameter], 1.0)
                optimizer.step()
        results.append(parameter.detach().clone())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


class _Stepper:
    """As much of DeepSpeed's engine as `_update` uses."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.step = optimizer.step


def test_compilation_needs_a_fused_student(tmp_path: Path, teacher: Path) -> None:
    with pytest.raises(ConfigurationError, match=r'training\.compile = "dynamic" compiles the fused layers'):
        train(tmp_path, teacher, "run", {"compile": "dynamic", "fused_encoder": False})


def test_a_loaded_teacher_answers_in_the_wanted_precision_and_stays_as_it_was(tmp_path: Path, teacher: Path) -> None:
    model, _ = load_model(teacher)
    train(tmp_path, teacher, "loaded", {"epochs": 1}, teacher_section={"model": model, "precision": "bf16"})
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    train(tmp_path, teacher, "named", {"epochs": 1}, teacher_section={"model": str(teacher), "precision": "bf16"})
    train(tmp_path, teacher, "fp32", {"epochs": 1})
    assert losses(tmp_path / "loaded") == losses(tmp_path / "named") != losses(tmp_path / "fp32")


def test_throughput_timers_of_deepspeed_are_off(tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed

    seen = []
    original = deepspeed.initialize
    monkeypatch.setattr(deepspeed, "initialize", lambda **fields: seen.append(fields["config"]) or original(**fields))
    train(tmp_path, teacher, "run", {"epochs": 1})
    assert [config["timers"] for config in seen] == [{"throughput": {"enabled": False}}]


def test_freed_memory_is_kept_for_the_run_and_given_back_after_it() -> None:
    """In a process of its own: tests turn the keeping off, because it would make them all as large as the largest."""
    code = """
import psutil, torch
from mixkd_fast.host_memory import give_back_freed_memory, keep_freed_memory
process = psutil.Process()
def faults():
    before = process.memory_full_info().rss
    torch.ones(96 << 18)
    return (process.memory_full_info().rss - before) / 2**20
torch.ones(96 << 18)
assert faults() < 8, "glibc gives a large block back at once"
keep_freed_memory()
faults()
assert process.memory_info().rss / 2**20 > 90
kept = process.memory_info().rss
blocks = [torch.ones(96 << 18) for _ in range(3)]
del blocks
grown = process.memory_info().rss
assert grown - kept > 150 << 20, (kept, grown)
give_back_freed_memory()
assert process.memory_info().rss < grown - (200 << 20), (grown, process.memory_info().rss)
"""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=plain, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr


def test_an_attention_that_somebody_chose_is_kept() -> None:
    device = torch.device("cpu")
    assert fuse(tiny_encoder("bert", attn_implementation="eager"), Training(), device) == 'its attention is "eager"'
    assert fuse(tiny_encoder("bert", attn_implementation="sdpa"), Training(), device) == ""


def test_the_fused_forward_and_the_models_own_train_alike(tmp_path: Path, teacher: Path) -> None:
    train(tmp_path, teacher, "fused")
    train(tmp_path, teacher, "own", {"fused_encoder": False})
    np.testing.assert_allclose(losses(tmp_path / "fused"), losses(tmp_path / "own"), rtol=1e-4)


def test_terms_may_change_between_late_reports(tmp_path: Path) -> None:
    from test_non_finite import _run

    result = _run(tmp_path, ChangingTerms(), 0, log_every=5, evaluate_every=10)
    assert result.summary["training"]["steps"] == 10 and len(losses(tmp_path / "run")) == 2


def test_after_step_is_told_of_applied_steps_only(tmp_path: Path) -> None:
    from test_non_finite import _run

    CountedSteps.seen.clear()
    _run(tmp_path, CountedSteps(), 0, non_finite="skip")
    assert len(CountedSteps.seen) == 8


class ChangingTerms(PoisonedLoss):
    """Fine-tuning with another term at every third step."""

    name: Literal["changing"] = "changing"

    def terms(self, batch: Any, student: Any, teacher: Any, extras: Any, moment: Any) -> dict[str, Any]:
        loss = supervised_loss(student.clean(batch).logits, batch)
        return {"mle": loss} | ({"more": loss * 0} if moment.step % 3 == 0 else {})


class CountedSteps(PoisonedLoss):
    """Remembers the steps that `after_step` is told of."""

    name: Literal["counted"] = "counted"
    seen: ClassVar[list[int]] = []

    def after_step(self, student: Any, extras: Any, moment: Any) -> None:
        self.seen.append(moment.step)


@pytest.mark.parametrize(
    "options", [{"deepspeed": {"zero_optimization": {"stage": 2}}}, {"training": {"precision": "bf16"}}], ids=str
)
def test_a_run_leaves_no_engine_behind(tmp_path: Path, teacher: Path, options: dict[str, Any]) -> None:
    """Autograd holds ZeRO's hooks, and they the engine: its weights, states and a bucket of 2 GB."""

    def alive() -> int:
        gc.collect()
        return sum(type(thing).__name__ == "DeepSpeedEngine" for thing in gc.get_objects())

    before = alive()
    train(tmp_path, teacher, "run", **{"training": {"epochs": 1}, **options})
    assert alive() <= before
