"""What happened in the steps since the last report, kept on the device until somebody asks: no step waits for it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixkd_fast import distributed
from mixkd_fast.errors import NonFiniteError


@dataclass(frozen=True)
class StepReport:
    """The last step, over all ranks, and how many steps since the report before were not applied."""

    loss: float
    terms: dict[str, float]
    grad_norm: float | None
    num_skipped: int


@dataclass
class StepRecord:
    """One optimizer step of this rank."""

    step: int
    batch_size: int
    """Rows of all ranks, by which losses are divided."""
    names: list[str] = field(default_factory=list)
    terms: list[Tensor] = field(default_factory=list)
    """Per micro-batch fp32 [terms, B]."""
    row_ids: list[Tensor] = field(default_factory=list)
    """Per micro-batch int64 [B], on the CPU."""
    grad_norm: Tensor | None = None
    applied: Tensor | None = None
    """bool []: whether the weights were updated."""

    def sums(self) -> Tensor:
        """fp64 [terms + 1]: the terms summed over this rank's rows; how many rows have one that is not finite."""
        sums = torch.stack([rows.sum(1, dtype=torch.float64) for rows in self.terms]).sum(0)
        bad = torch.stack([(~torch.isfinite(rows)).any(0).sum() for rows in self.terms]).sum()
        return torch.cat([sums, bad.to(torch.float64)[None]])


class StepRecords:
    """Collects the records of steps and reads them at a report, all at once."""

    def __init__(self, source_rows: NDArray[np.int64] | None, stops: bool, scales_losses: bool) -> None:
        """Args: source_rows = row number in the user's data of every training row, None if row ids are; stops = whether
        a value that is not finite ends the run; scales_losses = fp16, where a skipped step only lowers the scale."""
        self._source_rows, self._stops, self._scales_losses = source_rows, stops, scales_losses
        self._open: list[StepRecord] = []

    def add(self, record: StepRecord) -> None:
        """Keep a step's record, whose tensors may still be in the making."""
        self._open.append(record)

    def report(self) -> StepReport:
        """Wait for the device and say what happened. Collective.

        Raises: NonFiniteError for the first step with a term or gradient that is not finite, if that stops the run.
        """
        records, self._open = self._open, []
        # Joined and cut again: a method may have other terms from one step to the next.
        sums = [record.sums() for record in records]
        joined = distributed.sum_over_ranks(torch.cat(sums)).cpu().split([len(part) for part in sums])
        totals = [part.tolist() for part in joined]
        states = [(_number(record.grad_norm), _number(record.applied)) for record in records]
        num_skipped = 0
        for record, (*_, num_bad), (norm, applied) in zip(records, totals, states, strict=True):
            num_skipped += not applied
            if self._stops and num_bad:
                self._raise(record, self._bad_terms(record))
            if self._stops and not applied and not self._scales_losses:
                self._raise(record, [self._bad_gradient(record, norm)])
        *terms, _ = totals[-1]
        last = records[-1]
        means = {name: total / last.batch_size for name, total in zip(last.names, terms, strict=True)}
        return StepReport(sum(means.values()), means, states[-1][0], num_skipped)

    def _raise(self, record: StepRecord, complaints: list[str]) -> None:
        everyone = [text for texts in distributed.gather_objects(complaints) for text in texts]
        raise NonFiniteError(
            f"step {record.step + 1}: not finite: {'; '.join(everyone)} (row numbers of the training data, from 0). "
            "This step was not applied; the last checkpoint is intact. Lower training.learning_rate, look at these "
            'rows, or set training.non_finite to "skip".'
        )

    def _bad_terms(self, record: StepRecord) -> list[str]:
        complaints = []
        for rows, row_ids in zip(record.terms, record.row_ids, strict=True):
            for name, values in zip(record.names, rows.cpu(), strict=True):
                bad = ~torch.isfinite(values)
                if bool(bad.any()):
                    numbers = self._row_numbers(row_ids[bad])
                    complaints.append(f"loss term {name!r} = {values[bad][0].item()}; rows {numbers}")
        return complaints

    def _bad_gradient(self, record: StepRecord, norm: float | None) -> str:
        numbers = self._row_numbers(torch.cat(record.row_ids))
        return f"a gradient; rows {numbers} of rank {distributed.rank()}"

    def _row_numbers(self, row_ids: Tensor) -> str:
        ids = row_ids.numpy()
        numbers = (ids if self._source_rows is None else self._source_rows[ids]).tolist()
        return ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")


def _number(value: Tensor | None) -> float | None:
    return None if value is None else float(value)
