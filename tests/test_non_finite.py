"""A loss or gradient that is not finite stops the run before it harms the weights, or skips the step."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor, nn
from toy import losses, records, save_toy_teacher, toy_rows, toy_tokenizer

from mixkd_fast import distill
from mixkd_fast.errors import NonFiniteError
from mixkd_fast.methods import FineTune, Moment
from mixkd_fast.methods.base import Method, supervised_loss

POISONED_ROW = 21


class PoisonedLoss(Method):
    """Fine-tuning whose loss is NaN for one training row."""

    uses_teacher = False
    name: Literal["poisoned"] = "poisoned"

    def terms(
        self, batch: Any, student: Any, teacher: Any, extras: nn.Module | None, moment: Moment
    ) -> dict[str, Tensor]:
        loss = supervised_loss(student.clean(batch).logits, batch)
        bad = batch.row_ids[: batch.num_rows] == POISONED_ROW
        return {"mle": loss, "odd": torch.where(bad, torch.full_like(loss, float("nan")), torch.zeros_like(loss))}


class PoisonedGradient(PoisonedLoss):
    """A finite loss whose gradient is infinite for one training row: sqrt at 0."""

    name: Literal["poisoned_gradient"] = "poisoned_gradient"

    def terms(
        self, batch: Any, student: Any, teacher: Any, extras: nn.Module | None, moment: Moment
    ) -> dict[str, Tensor]:
        loss = supervised_loss(student.clean(batch).logits, batch)
        bad = batch.row_ids[: batch.num_rows] == POISONED_ROW
        zero_or_one = torch.where(bad, loss * 0, torch.ones_like(loss))
        return {"mle": loss + torch.where(bad, zero_or_one.sqrt(), torch.zeros_like(loss))}


def _run(folder: Path, method: Method, stage: int, **training: Any) -> Any:
    save_toy_teacher(folder / "model")
    rows = Dataset.from_dict(toy_rows(40))
    return distill(
        student=str(folder / "model"),
        train=rows,
        evaluation=rows,
        method=method,
        task={"max_length": 32, "cache_dir": str(folder / "cache")},
        training={"steps": 10, "batch_size": 8, "learning_rate": 1e-3, "evaluate_every": 5, "threads": 1, **training},
        output={"directory": str(folder / "run"), "report": False},
        deepspeed={"zero_optimization": {"stage": stage}},
        tokenizer=toy_tokenizer(),
        progress=False,
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_non_finite_loss_stops_with_step_rows_and_term(tmp_path: Path, stage: int) -> None:
    with pytest.raises(
        NonFiniteError, match=rf"step \d: not finite: loss term 'odd' = nan; rows {POISONED_ROW} "
    ) as caught:
        _run(tmp_path, PoisonedLoss(), stage)
    step = int(str(caught.value).removeprefix("step ")[0])
    assert len(losses(tmp_path / "run")) == step - 1, "the steps before are kept, the bad one is not logged"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_non_finite_gradient_stops_and_names_the_rows(tmp_path: Path, stage: int) -> None:
    with pytest.raises(NonFiniteError, match="not finite: a gradient; rows ") as caught:
        _run(tmp_path, PoisonedGradient(), stage)
    assert f" {POISONED_ROW}" in str(caught.value)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_non_finite_step_is_skipped_and_counted(tmp_path: Path, stage: int) -> None:
    result = _run(tmp_path, PoisonedLoss(), stage, non_finite="skip")
    assert result.summary["training"]["skipped_steps"] == 2  # 10 steps of 8 rows out of 40: the row comes twice
    weights = load_file(tmp_path / "run" / "student" / "model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
    assert [line["skipped_steps"] for line in records(tmp_path / "run")][-1] == 2


def test_a_skipped_step_leaves_the_weights_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "clean").mkdir()
    before = _run(tmp_path / "clean", FineTune(), 0, steps=1, learning_rate=1e-9, keep_best=False)
    # All rows poisoned: every step is skipped, so the weights are those of the model the run started from.
    (tmp_path / "poisoned").mkdir()

    class AllPoisoned(PoisonedLoss):
        def terms(self, *arguments: Any) -> dict[str, Tensor]:
            return {name: term * float("inf") for name, term in super().terms(*arguments).items()}

    after = _run(tmp_path / "poisoned", AllPoisoned(), 0, non_finite="skip", keep_best=False)
    assert after.summary["training"]["skipped_steps"] == 10
    for (name, one), two in zip(before.student.state_dict().items(), after.student.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-7, rtol=0, msg=name)
