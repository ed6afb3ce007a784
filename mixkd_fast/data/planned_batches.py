"""The batch of every optimizer step, in micro-batches of equally long rows: what `training.batching` "length" asks for.

As `GlobalBatches`, a pure function of (seed, step), so that a resumed run and any number of ranks see the same.
"""

import bisect
import math
import threading
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mixkd_fast.data.batching import Draw, draw_pairs
from mixkd_fast.data.length_batches import BatchPlan, plan_batches
from mixkd_fast.errors import ConfigurationError
from mixkd_fast.mixing import Mixing

_LEAST_CIRCLE = 8


class PlannedBatches:
    """Every epoch is planned anew by `plan_batches`.

    Without tokens_per_micro_batch every step has batch_size rows, all of like length; rows that fill no last step sit
    that epoch out, random ones. With it a micro-batch takes as many rows as its padded width leaves room for
    (micro_batch_size at most). The micro-batches of a step then are of all lengths, so that steps have like numbers of
    rows, and a row's weight in the mean of its step hardly depends on its length. All rows are in every epoch, unless
    micro-batches have one row each: then rows that fill no last step sit it out, random ones. Pairing "batch" joins
    rows of one micro-batch, or of neighbours in length where one has less than 8 rows.
    """

    def __init__(
        self,
        lengths: NDArray[np.int64],
        batch_size: int,
        seed: int,
        mixing: Mixing | None = None,
        *,
        window: int = 8192,
        pad_multiple: int = 8,
        tokens_per_micro_batch: int | None = None,
        micro_batches: int = 1,
    ) -> None:
        """Args: micro_batches = of one step over all ranks; they differ in size with tokens_per_micro_batch only.

        Raises: ConfigurationError when there are too few rows for one batch, or one is longer than the token budget.
        """
        self._lengths, self._batch_size, self._seed, self._mixing = lengths, batch_size, seed, mixing
        self._window, self._pad_multiple = window, pad_multiple
        self._tokens, self._group_size = tokens_per_micro_batch, 1 if tokens_per_micro_batch is None else micro_batches
        self._plans: dict[int, BatchPlan] = {}
        # The loop and the thread that makes its batches ahead may be in different epochs.
        self._lock = threading.RLock()
        self._first_steps, self._first_rows = [0], [0]
        if self._steps_of(0) == 0:
            needed = f"{batch_size} rows" if tokens_per_micro_batch is None else f"{micro_batches} micro-batches"
            raise ConfigurationError(
                f'training.batching = "length": the {len(lengths)} training rows do not fill one step of '
                f'{needed}; lower training.batch_size, or use "random"'
            )

    def draw(self, step: int) -> Draw:
        """Rows, partners and lam of step 0, 1, 2, ..."""
        epoch, batch = self._place(step)
        plan = self._plan(epoch)
        offsets = plan.offsets[batch : batch + self._group_size + 1]
        row_ids_N = plan.order[offsets[0] : offsets[-1]]
        if self._tokens is None:
            return Draw(row_ids_N, *self._pairs(row_ids_N, step, None), turn=step)
        cuts = offsets - offsets[0]
        return Draw(row_ids_N, *self._pairs(row_ids_N, step, _circles(self._lengths[row_ids_N], cuts)), cuts)

    def _pairs(
        self, row_ids_N: NDArray[np.int64], step: int, circles: list[NDArray[np.int64]] | None
    ) -> tuple[NDArray[np.int64] | None, NDArray[np.float32] | None]:
        return draw_pairs(self._mixing, row_ids_N, len(self._lengths), self._seed, step, circles)

    def rows_seen(self, step: int) -> int:
        """Rows of all steps before this one."""
        epoch, batch = self._place(step)
        return self._first_rows[epoch] + int(self._plan(epoch).offsets[batch])

    def epoch(self, step: int) -> float:
        """Epochs that are over when this step begins."""
        epoch, batch = self._place(step)
        return epoch + batch / self._group_size / self._steps_of(epoch)

    def steps_in(self, epochs: float) -> int:
        """Optimizer steps of so many epochs, at least 1."""
        whole = math.floor(epochs)
        self._reach_epoch(whole)
        return max(1, self._first_steps[whole] + math.ceil((epochs - whole) * self._steps_of(whole)))

    def _place(self, step: int) -> tuple[int, int]:
        """Epoch of a step, and its first batch there."""
        while self._first_steps[-1] <= step:
            self._reach_epoch(len(self._first_steps))
        epoch = bisect.bisect_right(self._first_steps, step) - 1
        return epoch, (step - self._first_steps[epoch]) * self._group_size

    def _reach_epoch(self, epoch: int) -> None:
        with self._lock:
            while len(self._first_steps) <= epoch:
                last = len(self._first_steps) - 1
                steps = self._steps_of(last)
                self._first_rows.append(
                    self._first_rows[last] + int(self._plan(last).offsets[steps * self._group_size])
                )
                self._first_steps.append(self._first_steps[last] + steps)

    def _steps_of(self, epoch: int) -> int:
        return self._plan(epoch).num_batches // self._group_size

    def _plan(self, epoch: int) -> BatchPlan:
        with self._lock:
            return self._plan_alone(epoch)

    def _plan_alone(self, epoch: int) -> BatchPlan:
        if epoch not in self._plans:
            while len(self._plans) >= 3:
                del self._plans[max(self._plans, key=lambda other: abs(other - epoch))]
            budget = self._tokens is not None
            try:
                self._plans[epoch] = plan_batches(
                    self._lengths,
                    tokens_per_batch=self._tokens,
                    rows_per_batch=max(1, self._batch_size // self._group_size) if budget else self._batch_size,
                    seed=self._seed % 2**64,
                    epoch=epoch,
                    window=self._window,
                    pad_multiple=self._pad_multiple,
                    group_size=self._group_size,
                    drop_last=True,
                )
            except ValueError as error:
                raise ConfigurationError(f"training.tokens_per_micro_batch: {error}") from error
        return self._plans[epoch]


def _circles(lengths_N: NDArray[np.int64], cuts: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Places of a step's rows in circles of like length: a micro-batch each, or neighbours where they are small.

    Args: cuts = [micro-batches + 1], where each begins and ends.
    """
    pieces = [np.arange(start, end) for start, end in pairwise(cuts.tolist())]
    pieces.sort(key=lambda piece: int(lengths_N[piece].max()))
    circles = pieces[:1]
    for piece in pieces[1:]:
        if len(circles[-1]) < _LEAST_CIRCLE:
            circles[-1] = np.concatenate([circles[-1], piece])
        else:
            circles.append(piece)
    if len(circles) > 1 and len(circles[-1]) < _LEAST_CIRCLE:
        last = circles.pop()
        circles[-1] = np.concatenate([circles[-1], last])
    return circles
