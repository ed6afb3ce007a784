"""Which rows each step trains on, who is mixed with whom, and how a rank's share becomes padded tensors.

Everything random is drawn for the global batch of an optimizer step and depends on (seed, step) alone, so that any
number of ranks, any micro-batch size and a resumed run see the same rows, partners and lam.

Legend of shape suffixes: N clean rows of the global batch, B of the micro-batch, k mixed rows per clean row,
R rows of a micro-batch with partners, M = B * k, L positions, C classes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixkd_fast.data.next_tokens import next_token_labels, response_mask
from mixkd_fast.data.tokenization import TokenRows
from mixkd_fast.errors import ConfigurationError, ModelError
from mixkd_fast.mix import first_rows
from mixkd_fast.mixing import Mixing, draw_lam

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ON_HOST = ("row_ids", "row_lengths", "mixed_lengths", "prompt_lengths")
# One stream of random numbers per purpose: an option that draws more of one kind leaves the others alone.
_ORDER, _PARTNERS, _LAM = 0, 1, 2


@dataclass
class Batch:
    """A padded micro-batch. Rows 0..B-1 are the clean rows, rows B.. exist only as partners."""

    input_ids: Tensor
    """int64 [R, L]"""
    attention_mask: Tensor
    """int64 [R, L], 1 = token"""
    token_type_ids: Tensor | None
    """int64 [R, L]; None if the tokenizer makes none."""
    labels: Tensor
    """int64 [R] for a classification, float32 [R] for a regression; for a causal language model int64 [R, L], already
    shifted: the token that position t predicts, or -100 (see `next_tokens`)."""
    soft_labels: Tensor | None
    """float32 [R, C]; one-hot for rows with a hard label only; None if no row of the data set has its own."""
    row_ids: Tensor
    """int64 [R]: number in the TokenRows; -1 for a row that only keeps an idle rank busy in evaluation."""
    partner: Tensor | None
    """int64 [M]: index into R of the second row of mixed row m; its first row is clean row m % B."""
    lam: Tensor | None
    """float32 [M]: weight of the first row."""
    num_rows: int
    """B"""
    num_tokens: int
    """Tokens of the clean rows."""
    teacher_logits: Tensor | None = None
    """float32 [B, C]: the teacher's logits of the clean rows, where a store has them."""
    teacher_hidden: Tensor | None = None
    """[B, L, H]: a language model's hidden states at the targets of the clean rows, where an offline store has them."""
    teacher_indices: Tensor | None = None
    """int32 [B, L, K]: the classes that an offline store has kept, at the targets of the clean rows."""
    teacher_logprobs: Tensor | None = None
    """float32 [B, L, K]: their log-probabilities, at the store's temperature."""
    row_lengths: Tensor | None = None
    """int64 [R], on the CPU: tokens of each row; None where padding is not on the right."""
    mixed_lengths: Tensor | None = None
    """int64 [M], on the CPU: positions that a mixed row keeps; None where row_lengths is."""
    mean_tokens: float | None = None
    """Tokens per clean row of the step's whole batch, over all micro-batches and ranks; None in evaluation."""
    mean_mixed_tokens: float | None = None
    """Positions that a mixed row of the step's whole batch keeps, on average."""
    prompt_lengths: Tensor | None = None
    """int64 [R], on the CPU: tokens of a causal language model's row that are not learnt; None for other kinds."""
    mean_targets: float | None = None
    """Labels that are not -100 per clean row of the step's whole batch, over all micro-batches and ranks; None in
    evaluation and for other kinds."""
    mean_mixed_targets: float | None = None
    """Positions that both rows of a mixed pair learn from, per mixed row of the step's whole batch."""
    companion: "Batch | None" = None
    """As many further rows that a method's `prepare_batch` sets beside these, with a mean_targets of their own."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch with every tensor on `device`, but for row_ids and lengths, which the host asks for."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in values.items():
            if isinstance(value, (Tensor, Batch)) and name not in _ON_HOST:
                values[name] = value.to(device, non_blocking=non_blocking)
        return Batch(**values)

    @property
    def valid(self) -> Tensor:
        """bool [B]: rows that count; only evaluation has others."""
        return self.row_ids[: self.num_rows] >= 0


@dataclass(frozen=True)
class Padding:
    """How rows are brought to one length."""

    token_id: int
    side: Literal["right", "left"] = "right"
    multiple: int = 8
    """The width is rounded up to a multiple of this, but not above the rows' max_length; 1 keeps it."""

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase", multiple: int = 8) -> "Padding":
        """The tokenizer's own pad token and side. Raises: ModelError if it has no pad token."""
        if tokenizer.pad_token_id is None:
            raise ModelError(
                f'the tokenizer "{tokenizer.name_or_path}" has pad_token null; '
                "allowed: a tokenizer with a pad token (set one and save the tokenizer anew)"
            )
        return cls(tokenizer.pad_token_id, "left" if tokenizer.padding_side == "left" else "right", multiple)


@dataclass(frozen=True)
class Draw:
    """The global batch of one optimizer step."""

    row_ids: NDArray[np.int64]
    """[N]: row numbers of the data set."""
    partner_ids: NDArray[np.int64] | None
    """[N * k]: row number of the partner of mixed row k * N + n, whose first row is row_ids[n]."""
    lam: NDArray[np.float32] | None
    """[N * k]: weight of the first row."""
    cuts: NDArray[np.int64] | None = None
    """[micro-batches + 1]: where micro-batches end, if they differ in size."""
    turn: int | None = None
    """Where rows are sorted: a number that changes from step to step, so that no rank always gets the longest."""


class RowOrder:
    """The endless stream of row numbers: seeded permutations of all rows, one per epoch, end to end."""

    def __init__(self, num_rows: int, seed: int) -> None:
        if num_rows < 1:
            raise ValueError(f"num_rows is {num_rows}; allowed: at least 1")
        self.num_rows = num_rows
        self._seed = seed
        self._permutations: dict[int, NDArray[np.int64]] = {}

    def permutation(self, epoch: int) -> NDArray[np.int64]:
        """Row numbers of an epoch: int64 [num_rows]."""
        if epoch not in self._permutations:
            # A batch may straddle two epochs; older ones are not needed again.
            while len(self._permutations) >= 2:
                del self._permutations[min(self._permutations)]
            self._permutations[epoch] = _generator(self._seed, _ORDER, epoch).permutation(self.num_rows)
        return self._permutations[epoch]

    def rows(self, start: int, count: int) -> NDArray[np.int64]:
        """Rows start .. start + count - 1 of the stream: int64 [count]."""
        parts = []
        while count > 0:
            epoch, first = divmod(start, self.num_rows)
            part = self.permutation(epoch)[first : first + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts)


class GlobalBatches:
    """The global batch of every optimizer step, as a pure function of (seed, step)."""

    def __init__(self, num_rows: int, batch_size: int, seed: int, mixing: Mixing | None = None) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; allowed: at least 1")
        self.order = RowOrder(num_rows, seed)
        self.batch_size = batch_size
        self._seed = seed
        self._mixing = mixing

    def draw(self, step: int) -> Draw:
        """Rows, partners and lam of step 0, 1, 2, ..."""
        row_ids_N = self.order.rows(step * self.batch_size, self.batch_size)
        partner_ids, lam = draw_pairs(self._mixing, row_ids_N, self.order.num_rows, self._seed, step)
        return Draw(row_ids_N, partner_ids, lam)

    def rows_seen(self, step: int) -> int:
        """Rows of all steps before this one."""
        return step * self.batch_size

    def epoch(self, step: int) -> float:
        """Epochs that are over when this step begins."""
        return step * self.batch_size / self.order.num_rows

    def steps_in(self, epochs: float) -> int:
        """Optimizer steps that see so many epochs of rows, at least 1."""
        return max(1, math.ceil(epochs * self.order.num_rows / self.batch_size))


def draw_pairs(
    mixing: Mixing | None,
    row_ids_N: NDArray[np.int64],
    num_rows: int,
    seed: int,
    step: int,
    circles: list[NDArray[np.int64]] | None = None,
) -> tuple[NDArray[np.int64] | None, NDArray[np.float32] | None]:
    """Partners [N * k] and lam [N * k] of a step's rows, (None, None) without mixing; see `Draw`.

    Args: circles = places in row_ids_N, each in one of them: pairing "batch" takes partners of the same circle; None is
    one circle of all rows.
    """
    if mixing is None:
        return None, None
    count = len(row_ids_N)
    rng = _generator(seed, _PARTNERS, step)
    if mixing.pairing == "batch":
        partner_places = np.empty((mixing.mixed_rows, count), dtype=np.int64)
        for partner_places_N in partner_places:
            for circle in circles if circles is not None else [np.arange(count)]:
                partner_places_N[circle] = circle[rng.permutation(len(circle))]
        partner_ids = row_ids_N[partner_places.ravel()]
    else:
        partner_ids = rng.integers(0, num_rows, size=count * mixing.mixed_rows, dtype=np.int64)
    return partner_ids, draw_lam(mixing, count * mixing.mixed_rows, _generator(seed, _LAM, step))


def micro_batches(
    rows: TokenRows, draw: Draw, rank: int, world: int, micro_batch_size: int, padding: Padding
) -> list[Batch]:
    """This rank's micro-batches of a global batch, in the order of accumulation.

    Micro-batch a of rank r takes the B rows from (a * world + r) * B on, or the piece a * world + r of a draw that is
    cut already, with their partners and lam; of sorted rows (`Draw.turn`) pieces are dealt there and back. Partners not
    among its clean rows are appended once each.
    Raises: ConfigurationError if the global batch is not a multiple of micro_batch_size * world.
    """
    num_rows = len(draw.row_ids)
    if draw.cuts is None and (micro_batch_size < 1 or num_rows % (micro_batch_size * world)):
        raise ConfigurationError(
            f"training.batch_size is {num_rows}, which is not a multiple of training.micro_batch_size "
            f"{micro_batch_size} times {world} ranks"
        )
    cuts = range(0, num_rows + 1, micro_batch_size) if draw.cuts is None else draw.cuts.tolist()
    means = _means(rows, draw)
    batches = []
    for start, end in _share(list(pairwise(cuts)), rank, world, draw.turn):
        here, size = slice(start, end), end - start
        row_ids = draw.row_ids[here]
        if draw.partner_ids is None or draw.lam is None:
            batches.append(_collate(rows, row_ids, size, padding))
            batches[-1] = replace(batches[-1], **means)
            continue
        partner_ids_M = draw.partner_ids.reshape(-1, num_rows)[:, here].ravel()
        lam_M = draw.lam.reshape(-1, num_rows)[:, here].ravel()
        place = _places(row_ids, partner_ids_M)
        extra = [row_id for row_id, index in place.items() if index >= size]
        batch = _collate(rows, np.concatenate([row_ids, np.array(extra, dtype=np.int64)]), size, padding)
        batch.partner = torch.tensor([place[row_id] for row_id in partner_ids_M.tolist()], dtype=torch.int64)
        batch.lam = torch.from_numpy(np.ascontiguousarray(lam_M))
        if batch.row_lengths is not None:
            own = first_rows(batch.row_lengths, len(batch.lam), size)
            other = batch.row_lengths[batch.partner]
            # As `mixed_attention_mask`: a row of weight 0 keeps nothing.
            batch.mixed_lengths = torch.maximum(own * (batch.lam > 0), other * (batch.lam < 1))
        batches.append(replace(batch, **means))
    return batches


def _share(pieces: list[tuple[int, int]], rank: int, world: int, turn: int | None) -> list[tuple[int, int]]:
    """This rank's pieces of a step, one of each `world` in a row."""
    if turn is None:
        return pieces[rank::world]
    place = (rank + turn) % world
    # There and back: who has the longest of one lot has the shortest of the next.
    return [
        pieces[first + (place if first // world % 2 == 0 else world - 1 - place)]
        for first in range(0, len(pieces), world)
    ]


def _means(rows: TokenRows, draw: Draw) -> dict[str, Any]:
    """Tokens per clean row and positions that a mixed row keeps, on average over a whole step; targets likewise."""
    lengths_N = rows.lengths[draw.row_ids]
    means: dict[str, Any] = {"mean_tokens": float(lengths_N.mean())}
    if rows.prompt_lengths is not None:
        means["mean_targets"] = float(rows.num_targets[draw.row_ids].mean())
    if draw.partner_ids is None or draw.lam is None:
        return means
    own_ids_M = np.tile(draw.row_ids, len(draw.partner_ids) // len(lengths_N))
    own_M, other_M = rows.lengths[own_ids_M], rows.lengths[draw.partner_ids]
    means["mean_mixed_tokens"] = float(np.maximum(own_M * (draw.lam > 0), other_M * (draw.lam < 1)).mean())
    if rows.prompt_lengths is not None:
        starts_M = np.maximum(rows.prompt_lengths[own_ids_M], rows.prompt_lengths[draw.partner_ids]).clip(min=1)
        means["mean_mixed_targets"] = float((np.minimum(own_M, other_M) - starts_M).clip(min=0).mean())
    return means


class EvaluationBatches:
    """A rank's share of all rows, longest first, in batches of rows of like length.

    Batches are the same for every number of ranks and are dealt out in turn. Every rank gets equally many: one that
    runs short gets a batch of row 0 alone, marked by row_ids = -1. row_ids say where results belong.
    """

    def __init__(
        self,
        rows: TokenRows,
        batch_size: int,
        rank: int,
        world: int,
        padding: Padding,
        chosen: NDArray[np.int64] | None = None,
    ) -> None:
        """Args: chosen = the row numbers to take, None for all."""
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; allowed: at least 1")
        self._rows = rows
        self._padding = padding
        chosen = np.arange(len(rows)) if chosen is None else chosen
        # Longest first, so that memory is short at once or never.
        order = chosen[np.argsort(-rows.lengths[chosen], kind="stable")]
        chunks = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        self._num_batches = -(-len(chunks) // world)
        self._chunks = chunks[rank::world]

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        for chunk in self._chunks:
            yield _collate(self._rows, chunk, len(chunk), self._padding)
        for _ in range(self._num_batches - len(self._chunks)):
            idle = _collate(self._rows, np.zeros(1, dtype=np.int64), 1, self._padding)
            idle.row_ids.fill_(-1)
            yield idle


def _places(row_ids: NDArray[np.int64], partner_ids: NDArray[np.int64]) -> dict[int, int]:
    """Row number -> index into R: clean rows first, then each further partner once, in order of appearance."""
    place: dict[int, int] = {}
    # A row number may come twice where a batch straddles two epochs; the first copy stands for both.
    for index, row_id in enumerate(row_ids.tolist()):
        place.setdefault(row_id, index)
    following = len(row_ids)
    for row_id in partner_ids.tolist():
        if row_id not in place:
            place[row_id] = following
            following += 1
    return place


def _collate(rows: TokenRows, row_ids_R: NDArray[np.int64], num_rows: int, padding: Padding) -> Batch:
    """Pad rows to the longest of them, rounded up."""
    starts_R = rows.offsets[row_ids_R]
    lengths_R = rows.offsets[row_ids_R + 1] - starts_R
    longest = int(lengths_R.max())
    rounded = -(-longest // padding.multiple) * padding.multiple
    width = max(longest, min(rounded, rows.max_length))
    positions_L = np.arange(width)
    if padding.side == "left":
        within_RL = positions_L - (width - lengths_R)[:, None]
        mask_RL = within_RL >= 0
    else:
        within_RL = np.broadcast_to(positions_L, (len(row_ids_R), width))
        mask_RL = within_RL < lengths_R[:, None]
    flat_RL = starts_R[:, None] + np.where(mask_RL, within_RL, 0)
    token_types = None
    if rows.token_types is not None:
        token_types = torch.from_numpy(np.where(mask_RL, rows.token_types[flat_RL], 0).astype(np.int64))
    input_ids = torch.from_numpy(np.where(mask_RL, rows.tokens[flat_RL], padding.token_id).astype(np.int64))
    attention_mask = torch.from_numpy(mask_RL.astype(np.int64))
    prompt_lengths = None
    if rows.prompt_lengths is None:
        labels = torch.from_numpy(rows.labels[row_ids_R])
    else:
        prompt_lengths = torch.from_numpy(rows.prompt_lengths[row_ids_R])
        labels = next_token_labels(input_ids, response_mask(prompt_lengths, attention_mask), attention_mask)
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        token_type_ids=token_types,
        labels=labels,
        soft_labels=torch.from_numpy(rows.soft_labels[row_ids_R]) if rows.soft_labels is not None else None,
        row_ids=torch.from_numpy(row_ids_R.copy()),
        partner=None,
        lam=None,
        num_rows=num_rows,
        num_tokens=int(lengths_R[:num_rows].sum()),
        row_lengths=None if padding.side == "left" else torch.from_numpy(lengths_R),
        prompt_lengths=prompt_lengths,
    )


def _generator(seed: int, purpose: int, index: int) -> np.random.Generator:
    """The random numbers of one purpose at one step or epoch; independent of all others."""
    sequence = np.random.SeedSequence(seed % 2**64, spawn_key=(purpose, index))
    return np.random.Generator(np.random.Philox(sequence))
