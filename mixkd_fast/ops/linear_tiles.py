"""`linear_kd_loss` from tiles of the vocabulary: statistics of a row first, then its gradient from the tiles again.

Three passes over the tiles of a chunk of rows: maxima and sums of exponentials, merged as they come; the sums of D's
summands and of v = q dD/dq where the gradient needs them (not for forward KL, whose sum of v is -1, and mse); the
gradient tau (v - q sum v) with what it gives to hidden states and weight. D is summed over classes, so a tile's share
is the row function of `reference.py` on the tile, and its derivative by log q is v. Between the passes the ranks of a
process group, which hold a slice of the vocabulary each, add up what they have.

Legend of shape suffixes: N rows, n rows of a chunk, H width of hidden states, w classes of a tile.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mixkd_fast.ops import DivergenceName, RowOptions, reference
from mixkd_fast.ops import linear_products as products
from mixkd_fast.ops.linear_chunks import BIAS, HIDDEN, WEIGHT, Chunks, Gradients, RowValues, Side, hidden_of

INFINITY = float("inf")
LOGIT_FREE_BYTES = 32 * 2**20
"""A tile with all that is computed from it; the rows of a chunk and widened weights share the rest of 64 MiB."""
CHUNK_BYTES = 16 * 2**20
"""Copies of a chunk's hidden states and their gradient."""
MOST_ROWS = 1024
"""Of a chunk; its tiles are then thousands of classes wide, which the matrix products like."""
TENSORS_OF_A_TILE = {"forward_kl": 7, "mse": 6}
"""How many tensors [n, w] there are at a time; of the divergences that autograd differentiates more."""
TENSORS_OF_A_DERIVED_TILE = 16


class TiledJob(NamedTuple):
    """One call. values: labels and weights of all rows; start: the first class of this rank's slice."""

    student: Side
    teacher: Side | None
    values: RowValues
    keep: Tensor | None
    invalid: Tensor | None
    start: int | Tensor
    options: RowOptions
    dtype: torch.dtype
    max_bytes: int
    logit_free: bool
    group: Any

    @property
    def divergence(self) -> DivergenceName | Literal["none"]:
        """ "none" without a teacher; a two-sided formula at its end is another one."""
        name, beta, alpha = self.options.divergence, self.options.beta, self.options.alpha
        if self.teacher is None or self.options.kd_weight == 0:
            return "none"
        if (name == "jsd" and beta == 0) or (name == "skew_forward_kl" and alpha == 0):
            return "forward_kl"
        return "reverse_kl" if (name == "jsd" and beta == 1) or (name == "skew_reverse_kl" and alpha == 0) else name

    @property
    def has_ce(self) -> bool:
        """Whether hard labels count."""
        return self.options.ce_weight != 0 and self.values.labels is not None

    def sizes(self) -> tuple[int, int]:
        """(rows of a chunk, classes of a tile) that keep the limit.

        The rows follow from what all ranks of a process group have in common: they sum up chunk by chunk.
        """
        item = self.dtype.itemsize
        of_pair = item * TENSORS_OF_A_TILE.get(self.divergence, TENSORS_OF_A_DERIVED_TILE)
        budget = min(LOGIT_FREE_BYTES, self.max_bytes // 2) if self.logit_free else self.max_bytes
        pairs = max(1, budget // of_pair)
        rows = max(1, min(self.student.hidden.shape[0], MOST_ROWS, math.isqrt(pairs)))
        if self.logit_free:
            width = 2 * self.student.hidden.shape[1]
            width += 0 if self.teacher is None else self.teacher.hidden.shape[1]
            rows = max(1, min(rows, CHUNK_BYTES // (width * item)))
        classes = max(1, pairs // rows)
        if self.logit_free:
            # A tile of the head may have to be widened.
            classes = min(classes, max(64, CHUNK_BYTES // (self.student.hidden.shape[1] * item)))
        return rows, classes


class Tile(NamedTuple):
    """Classes [begin, end) of this rank's slice; `shared`: both sides have them."""

    begin: int
    end: int
    shared: bool


class Sums(NamedTuple):
    """A running softmax of n rows: largest value and the sum of exp((value - largest) / tau)."""

    high: Tensor
    total: Tensor

    @property
    def shift(self) -> Tensor:
        """`high` where it is finite; 0 where no class is there, or one is NaN."""
        return torch.where(self.high == -INFINITY, 0.0, self.high)

    def log_total(self, tau: float) -> Tensor:
        """log sum exp(value / tau), [n, 1]."""
        return (self.shift / tau + self.total.log()).unsqueeze(-1)

    def raised(self, high: Tensor, tau: float) -> "Sums":
        """The same relative to a larger maximum."""
        shift = torch.where(high == -INFINITY, 0.0, high)
        factor = torch.where(self.high == -INFINITY, 0.0, ((self.high - shift) / tau).exp())
        return Sums(high, self.total * factor)

    def plus(self, values: Tensor, tau: float) -> "Sums":
        """With the values [n, w] of one more tile."""
        top = values.amax(-1)
        # NaN is no maximum; the sum has it.
        high = torch.maximum(self.high, torch.where(top.isnan(), -INFINITY, top))
        raised = self.raised(high, tau)
        part = ((values - raised.shift.unsqueeze(-1)) / tau).exp_().sum(-1)
        return Sums(high, raised.total + part)


class Pass:
    """The passes over one chunk of rows."""

    def __init__(self, job: TiledJob, rows: Tensor | slice, keep: Tensor | None, width: int) -> None:
        self.job, self.tau, self.width = job, job.options.temperature, width
        self.hidden = hidden_of(job.student, rows, keep)
        self.teacher_hidden = None if job.teacher is None else hidden_of(job.teacher, rows, keep)
        self.values = job.values.of(rows)
        self.num_rows = self.hidden.shape[0]
        self.keep, self.invalid = keep, None if job.invalid is None else job.invalid[rows]
        self._kept_tile: tuple[Tensor, Tensor | None] | None = None
        self._tiles = list(self.tiles())

    def tiles(self) -> Iterator[Tile]:
        """Tiles of the shared classes, then, for the cross entropy, of those that the student alone has."""
        classes = self.job.student.weight.shape[0]
        teacher = self.job.teacher
        shared = 0 if self.job.divergence == "none" or teacher is None else min(classes, teacher.weight.shape[0])
        for first, last, both in ((0, shared, True), (shared, classes if self.job.has_ce else shared, False)):
            for begin in range(first, last, self.width):
                yield Tile(begin, min(last, begin + self.width), both)

    def logits(self, tile: Tile) -> tuple[Tensor, Tensor | None]:
        """(student's [n, w], teacher's or None) of a tile; a lone tile is kept from pass to pass."""
        if self._kept_tile is not None:
            return self._kept_tile
        student = self._logits(self.job.student, self.hidden, tile)
        teacher = None
        if tile.shared and self.job.teacher is not None and self.teacher_hidden is not None:
            teacher = self._logits(self.job.teacher, self.teacher_hidden, tile)
        if len(self._tiles) == 1:
            self._kept_tile = student, teacher
        return student, teacher

    def _logits(self, side: Side, hidden: Tensor, tile: Tile) -> Tensor:
        part = slice(tile.begin, tile.end)
        out = hidden.new_empty((self.num_rows, tile.end - tile.begin), dtype=side.logits_dtype)
        products.multiply(hidden, side.weight[part], None if side.bias is None else side.bias[part], side.scale, out)
        if side.softcap is not None:
            out.div_(side.softcap).tanh_().mul_(side.softcap)
        return out.to(self.job.dtype)

    def read_statistics(self) -> None:
        """The first pass: softmaxes, logits at labels, and of mse everything."""
        new = self.hidden.new_zeros
        empty = Sums(new(self.num_rows, dtype=self.job.dtype) - INFINITY, new(self.num_rows, dtype=self.job.dtype))
        student = teacher = plain = empty
        at_labels = [new(self.num_rows, dtype=self.job.dtype) for _ in self._labels()]
        value, count = empty.total, empty.total
        for tile in self._tiles:
            s, t = self.logits(tile)
            if t is not None and self.job.divergence == "mse":
                gap, masked = _gap(s, t)
                value, count = value + gap.square_().sum(-1), count + (~masked).sum(-1)
            elif t is not None:
                student, teacher = student.plus(s, self.tau), teacher.plus(t, self.tau)
            if self.job.has_ce:
                plain = plain.plus(s, 1.0)
                for index, labels in enumerate(self._labels()):
                    place, here = self._place(labels, tile)
                    found = s.gather(1, place.unsqueeze(-1)).squeeze(-1)
                    at_labels[index] = at_labels[index] + torch.where(here, found, 0.0)
        taus = (self.tau, self.tau, 1.0)
        softmaxes = (student, teacher, plain)
        if self.job.group is not None:
            highs = self._reduced([sums.high for sums in softmaxes], dist.ReduceOp.MAX)
            raised = [sums.raised(high, tau) for sums, high, tau in zip(softmaxes, highs, taus, strict=True)]
            added = self._reduced([*(sums.total for sums in raised), value, count, *at_labels])
            softmaxes = (Sums(highs[0], added[0]), Sums(highs[1], added[1]), Sums(highs[2], added[2]))
            value, count, at_labels = added[3], added[4], added[5:]
        self.student, self.teacher, self.plain = softmaxes
        self.value, self.count = value / count.clamp(min=1), count.clamp(min=1)
        self.ce = self._cross_entropy(at_labels)

    def _reduced(self, values: list[Tensor], op: Any = dist.ReduceOp.SUM) -> list[Tensor]:
        """Values [n] summed over the ranks."""
        if self.job.group is None:
            return values
        together = torch.stack(values)
        dist.all_reduce(together, op, group=self.job.group)
        return list(together.unbind())

    def _labels(self) -> list[Tensor]:
        return [labels for labels in self.values[2:4] if labels is not None] if self.job.has_ce else []

    def _place(self, labels: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        """(places of labels in a tile, safe to read at; whether they are in it)."""
        place = labels - self.job.start - tile.begin
        here = (place >= 0) & (place < tile.end - tile.begin)
        return torch.where(here, place, 0), here

    def _shares(self) -> list[Tensor | float]:
        """Weights of labels and partner labels in the cross entropy."""
        lam, number = self.values.lam, len(self._labels())
        return [lam, 1 - lam] if lam is not None and number == 2 else [1.0] * number

    def _cross_entropy(self, at_labels: list[Tensor]) -> Tensor:
        total = torch.zeros_like(self.plain.total)
        log_total = self.plain.log_total(1.0).squeeze(-1)
        for share, logit in zip(self._shares(), at_labels, strict=True):
            loss = log_total - logit
            total = total + (loss if isinstance(share, float) else torch.where(share == 0, 0.0, share * loss))
        return total

    def terms(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(D's share [n], v [n, w], q [n, w]) of a tile."""
        log_p, log_q = self._logarithms(s, t)
        if self.job.divergence == "forward_kl":
            value = reference.forward_kl(log_p, log_q, self.job.options)
            return value, log_p.exp_().neg_(), log_q.exp_()
        with torch.enable_grad():
            leaf = log_q.detach().requires_grad_()
            value = self._formula(log_p, leaf, self.job.options)
            (v,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), v, log_q.exp_()

    def _logarithms(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(log p, log q) of a tile, [n, w]."""
        log_q = s / self.tau - self.student.log_total(self.tau)
        return t / self.tau - self.teacher.log_total(self.tau), log_q

    @property
    def _formula(self) -> Callable[[Tensor, Tensor, RowOptions], Tensor]:
        name = self.job.divergence
        assert name != "none"
        return reference.DIVERGENCES[name]

    def sum_terms(self, needs: int) -> None:
        """The second pass, where there is one: D, and the sum of v if a gradient needs it.

        Without a gradient nothing is derived: in inference mode nothing could be.
        """
        value = torch.zeros_like(self.student.total)
        sum_v = torch.zeros_like(value)
        for tile in self._tiles:
            if tile.shared:
                s, t = self.logits(tile)
                assert t is not None
                if needs:
                    part, v, _ = self.terms(s, t)
                    sum_v = sum_v + v.sum(-1)
                else:
                    part = self._formula(*self._logarithms(s, t), self.job.options)
                value = value + part
        self.value, self.sum_v = self._reduced([value, sum_v])

    def row_losses(self) -> tuple[Tensor, Tensor]:
        """(kd, ce) [n], weighted; 0 for rows that do not count, NaN for one with a class that is not there."""
        options, weights = self.job.options, self.values.row_weights
        tau = 1.0 if self.job.divergence == "mse" else self.tau
        kd, ce = self.value * (options.kd_weight * tau**2), self.ce * options.ce_weight
        if self.job.divergence == "none":
            kd = torch.zeros_like(kd)
        if not self.job.has_ce:
            ce = torch.zeros_like(ce)
        factor = self._factor()
        if self.job.divergence not in ("none", "mse"):
            kd = kd + self._poison()
        kd, ce = kd * factor, ce * factor
        if weights is not None:
            kd, ce = kd * weights, ce * weights
        return (kd, ce) if self.keep is None else (kd.masked_fill(~self.keep, 0.0), ce.masked_fill(~self.keep, 0.0))

    def _factor(self) -> Tensor | float:
        return 1.0 if self.invalid is None else torch.where(self.invalid, torch.nan, 1.0).to(self.job.dtype)

    def _poison(self) -> Tensor:
        """NaN for a row of which one side has no softmax: NaN, or all classes masked. Else 0."""
        whole = (self.student.total > 0) & (self.teacher.total > 0)
        return torch.where(whole, 0.0, torch.nan).to(self.job.dtype)

    def add_gradients(self, rows: Tensor | slice, gradients: Gradients, needs: int) -> None:
        """The last pass; of forward KL it also finds D."""
        student = self.job.student
        value = torch.zeros_like(self.student.total)
        sums = self.hidden.new_zeros(self.hidden.shape, dtype=student.logits_dtype) if needs & HIDDEN else None
        for tile in self._tiles:
            s, t = self.logits(tile)
            gradient, part = self._tile_gradient(tile, s, t)
            value = value if part is None else value + part
            self._chain(gradient, s)
            slope_scale = student.scale if student.softcap is None else 1.0
            if gradients.bias is not None:
                gradients.bias[tile.begin : tile.end].add_(gradient.sum(0), alpha=slope_scale)
            factor = gradient.to(student.dtype)
            if sums is not None:
                weight = student.weight[tile.begin : tile.end].to(student.dtype)
                products.add_product(factor, weight, slope_scale, sums)
            if gradients.weight is not None:
                own = gradients.weight[tile.begin : tile.end]
                products.add_product(factor.T, self.hidden, slope_scale, own)
        if self.job.divergence == "forward_kl":
            (self.value,) = self._reduced([value])
        if sums is not None and gradients.hidden is not None:
            if self.job.group is not None:
                dist.all_reduce(sums, group=self.job.group)
            gradients.hidden[rows] = sums.to(gradients.hidden.dtype)

    def _tile_gradient(self, tile: Tile, s: Tensor, t: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(d logits [n, w], D's share or None)."""
        options, value = self.job.options, None
        if t is None:
            gradient = torch.zeros_like(s)
        elif self.job.divergence == "mse":
            gradient, _ = _gap(s, t)
            gradient.mul_((2 * options.kd_weight) / self.count.unsqueeze(-1))
        else:
            value, v, q = self.terms(s, t)
            sum_v = -1.0 if self.job.divergence == "forward_kl" else self.sum_v.unsqueeze(-1)
            gradient = v.sub_(q.mul_(sum_v)).mul_(self.tau * options.kd_weight)
            gradient.add_(self._poison().unsqueeze(-1))
        if self.job.has_ce:
            softmax = (s - self.plain.log_total(1.0)).exp_()
            for share, labels in zip(self._shares(), self._labels(), strict=True):
                place, here = self._place(labels, tile)
                taken = torch.where(here, torch.as_tensor(share, dtype=s.dtype, device=s.device), 0.0)
                softmax.scatter_add_(1, place.unsqueeze(-1), -taken.unsqueeze(-1))
            gradient.add_(softmax, alpha=options.ce_weight)
        factor = self._factor()
        if self.values.row_weights is not None:
            factor = factor * self.values.row_weights
        if isinstance(factor, Tensor):
            gradient.mul_(factor.unsqueeze(-1))
        if self.keep is not None:
            gradient.masked_fill_(~self.keep.unsqueeze(-1), 0.0)
        return gradient, value

    def _chain(self, gradient: Tensor, s: Tensor) -> None:
        """From d logits to d product, but for a scale that the products take along."""
        cap = self.job.student.softcap
        if cap is not None:
            gradient.mul_((s / cap).square_().neg_().add_(1).mul_(self.job.student.scale))


def _gap(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(s - t, masked): 0 where either side masks the class."""
    masked = (s == -INFINITY) | (t == -INFINITY)
    return (s - t).masked_fill_(masked, 0.0), masked


def linear_kd_loss(job: TiledJob, needs: int) -> tuple[Tensor, Tensor, Gradients]:
    """(kd rows [N], ce rows [N], gradients of their sum)."""
    student = job.student
    num_rows, width = student.hidden.shape
    new, sums = student.hidden.new_zeros, student.logits_dtype
    kd, ce = (new(num_rows, dtype=job.dtype) for _ in range(2))
    gradients = Gradients(
        new((num_rows, width)) if needs & HIDDEN else None,
        new(student.weight.shape, dtype=sums) if needs & WEIGHT else None,
        new(student.weight.shape[0], dtype=sums) if needs & BIAS else None,
    )
    most_rows, most_classes = job.sizes()
    chunks = Chunks(job.keep, num_rows, most_rows)
    for begin in chunks.begins():
        if chunks.is_behind_the_last(begin):
            break
        rows = chunks.rows_of(begin)
        work = Pass(job, rows, chunks.keep_of(begin), most_classes)
        work.read_statistics()
        in_gradient = job.divergence == "forward_kl" and needs
        if job.divergence not in ("none", "mse") and not in_gradient:
            work.sum_terms(needs)
        if needs:
            work.add_gradients(rows, gradients, needs)
        kd[rows], ce[rows] = work.row_losses()
    return kd, ce, gradients
