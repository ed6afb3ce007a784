"""`linear_kd_loss` a chunk of rows at a time: both heads' products, then the fused kernel of kd_loss in place.

Only rows that count are multiplied. The CPU picks them out. On a GPU their number is not known to the host: they are
sorted to the front, the first chunk is launched, and only then, while the device has that to do, the host asks how many
there are, so as not to launch the chunks behind the last one; the device never runs dry. A call of one chunk asks
nothing, and while a CUDA graph is captured all chunks are launched: rows that are dropped then cost their product.

Legend of shape suffixes: N rows, n rows of a chunk, H width of hidden states, C classes, K kept classes of a TopK.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mixkd_fast.ops import bf16_product
from mixkd_fast.ops import linear_products as products
from mixkd_fast.ops.schema import NONE, call_in_place, call_kernel, fits_in_place

HIDDEN, WEIGHT, BIAS = 1, 2, 4
"""Bits of `needs`: which of the student's tensors wants a gradient."""
ROWS_MULTIPLE = 64
"""Chunks are cut to multiples of it, which the matrix units like."""


class Side(NamedTuple):
    """One head in the dtype of its products. hidden [N, H] as it came; softcap and scale as in `HeadInputs`."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float
    dtype: torch.dtype

    @property
    def logits_dtype(self) -> torch.dtype:
        """Of its logits."""
        return products.logits_dtype(self.dtype)


class RowValues(NamedTuple):
    """What a row has besides hidden states: the op's tensors of [N] or [N, K], contiguous."""

    logprobs: Tensor | None
    indices: Tensor | None
    labels: Tensor | None
    partner_labels: Tensor | None
    lam: Tensor | None
    row_weights: Tensor | None

    def computed_in(self, dtype: torch.dtype) -> "RowValues":
        """With weights of `dtype`."""
        return self._replace(
            lam=None if self.lam is None else self.lam.to(dtype),
            row_weights=None if self.row_weights is None else self.row_weights.to(dtype),
        )

    def of(self, rows: Tensor | slice) -> "RowValues":
        """Those of a chunk."""
        return RowValues(*(None if value is None else value[rows] for value in self))


class Gradients(NamedTuple):
    """Sums over the chunks; None where nobody asks. hidden [N, H] in its own dtype, weight and bias in the logits'.

    Where one chunk is all and `round_weight` was asked for, the weight's is in the weight's dtype, rounded once.
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Chunks:
    """The rows that count, in chunks: `rows_of(i)` and, of dropped ones that are among them, `keep_of(i)`."""

    def __init__(self, keep: Tensor | None, num_rows: int, most_rows: int) -> None:
        self.order: Tensor | None = None
        self.keep: Tensor | None = None
        self.count: Tensor | None = None
        self.copied: torch.cuda.Event | None = None
        if keep is not None and keep.device.type == "cpu":
            kept = keep.nonzero()[:, 0]
            self.order = kept if kept.numel() < num_rows else None
            num_rows = kept.numel()
        elif keep is not None:
            self.order = torch.argsort(keep, descending=True, stable=True)
            self.keep = keep[self.order]
        number = -(-num_rows // max(1, most_rows))
        size = -(-num_rows // max(1, number))
        self.size = max(1, min(most_rows, -(-size // ROWS_MULTIPLE) * ROWS_MULTIPLE))
        self.num_rows = num_rows
        if self.keep is not None and num_rows > self.size and not torch.cuda.is_current_stream_capturing():
            self.count = torch.empty((), dtype=torch.int64, pin_memory=True)
            self.count.copy_(self.keep.sum(), non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()

    def begins(self) -> "list[int]":
        """First rows of the chunks."""
        return list(range(0, self.num_rows, self.size))

    def is_behind_the_last(self, begin: int) -> bool:
        """Whether no row from `begin` on counts. Waits for the device where the class says so."""
        if begin == 0 or self.count is None or self.copied is None:
            return False
        self.copied.synchronize()
        return begin >= int(self.count)

    def rows_of(self, begin: int) -> Tensor | slice:
        """Rows of the chunk that starts at `begin`, as numbers or as a slice."""
        chunk = slice(begin, min(self.num_rows, begin + self.size))
        return chunk if self.order is None else self.order[chunk]

    def keep_of(self, begin: int) -> Tensor | None:
        """bool [n] of a chunk that may hold rows that do not count."""
        return None if self.keep is None else self.keep[begin : begin + self.size]


def bytes_of_row(student: Side, teacher: Side | None, values: RowValues, needs: int) -> int:
    """Logits of a row that exist at a time: both sides, and what of the gradient is not in their place."""
    classes, item = student.weight.shape[0], student.logits_dtype.itemsize
    own = classes * item
    of_teacher = 0 if teacher is None else teacher.weight.shape[0] * teacher.logits_dtype.itemsize
    extra = 0
    if needs and student.softcap is not None:
        extra += own
    if needs and values.indices is not None:
        # Of a top-k teacher most kernels write the gradient beside the logits.
        extra += own
    if needs and student.dtype != student.logits_dtype and of_teacher < classes * student.dtype.itemsize:
        extra += classes * student.dtype.itemsize
    return own + of_teacher + extra


def linear_kd_loss(
    student: Side,
    teacher: Side | None,
    values: RowValues,
    keep: Tensor | None,
    kernel: str,
    options: tuple[float | int | bool, ...],
    max_bytes: int,
    row_dtype: torch.dtype,
    needs: int,
    raise_invalid: bool,
    round_weight: bool = False,
) -> tuple[Tensor, Tensor, Gradients]:
    """(kd rows [N], ce rows [N], gradients of their sum).

    Args: kernel = an op of `schema.OPS`; options = its arguments from divergence to ignore_index; row_dtype of the
    results; round_weight: see `Gradients`.
    """
    num_rows, width = student.hidden.shape
    classes = student.weight.shape[0]
    most_rows = max(1, max_bytes // bytes_of_row(student, teacher, values, needs))
    chunks = Chunks(keep, num_rows, most_rows)
    new = student.hidden.new_zeros
    kd, ce = (new(num_rows, dtype=row_dtype) for _ in range(2))
    sums = student.logits_dtype
    is_rounded = round_weight and len(chunks.begins()) == 1 and products.rounds(student.dtype, student.weight)
    of_weight = student.weight.dtype if is_rounded else sums
    gradients = Gradients(
        new((num_rows, width)) if needs & HIDDEN else None,
        # Filled by the first chunk.
        fresh(student.hidden, (classes, width), of_weight) if needs & WEIGHT else None,
        new(classes, dtype=sums) if needs & BIAS else None,
    )
    if gradients.weight is not None and chunks.num_rows == 0:
        gradients.weight.zero_()
    # A teacher that has no weight is not multiplied, and the kernel then does not know of its dtype.
    kernel_dtype = student.logits_dtype if teacher is None and values.logprobs is None else row_dtype
    values = values.computed_in(kernel_dtype)
    buffers = Buffers(student, teacher, min(chunks.size, max(chunks.num_rows, 1)), needs)
    for begin in chunks.begins():
        if chunks.is_behind_the_last(begin):
            break
        rows, kept = chunks.rows_of(begin), chunks.keep_of(begin)
        hidden = hidden_of(student, rows, kept)
        logits = buffers.student_logits(hidden)
        chunk = values.of(rows)
        teacher_logits = chunk.logprobs
        if teacher is not None:
            teacher_logits = buffers.teacher_logits(hidden_of(teacher, rows, kept))
        arguments = (teacher_logits, *chunk[1:], None, *options, NONE, needs != 0, raise_invalid)
        slope = buffers.slope(logits) if needs else None
        in_place = needs != 0 and fits_in_place(kernel, logits, arguments)
        _, kd_n, ce_n, gradient = (call_in_place if in_place else call_kernel)(kernel, logits, arguments)
        kd[rows], ce[rows] = kd_n, ce_n
        if needs:
            buffers.add_gradients(gradient, slope, hidden, rows, gradients, first=begin == 0)
    return kd, ce, gradients


def fresh(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory that nothing has been written to, on the device of `like`; on a CPU on huge pages."""
    return bf16_product.prefer_large_pages(like.new_empty(shape, dtype=dtype))


def hidden_of(side: Side, rows: Tensor | slice, keep: Tensor | None) -> Tensor:
    """A chunk's hidden states in the dtype of the products; those of rows that do not count as 0, for 0 NaN is NaN."""
    hidden = side.hidden[rows].to(side.dtype)
    return hidden if keep is None else hidden.masked_fill(~keep.unsqueeze(-1), 0.0)


class Buffers:
    """The logits of one chunk at a time, in memory that all chunks of a call use."""

    def __init__(self, student: Side, teacher: Side | None, most_rows: int, needs: int) -> None:
        self.student, self.teacher, self.needs = student, teacher, needs
        hidden, classes = student.hidden, student.weight.shape[0]
        self._student = fresh(hidden, (most_rows, classes), student.logits_dtype)
        self._teacher = None
        if teacher is not None:
            self._teacher = fresh(hidden, (most_rows, teacher.weight.shape[0]), teacher.logits_dtype)
        self._slope = torch.empty_like(self._student) if needs and student.softcap is not None else None
        self._rounded: Tensor | None = None
        if needs and student.dtype != student.logits_dtype:
            room = 0 if self._teacher is None else self._teacher.numel() * self._teacher.element_size()
            if self._teacher is not None and room >= most_rows * classes * student.dtype.itemsize:
                # The teacher's logits are of no use any more once there is a gradient.
                self._rounded = self._teacher.view(-1).view(student.dtype)[: most_rows * classes]
            else:
                self._rounded = fresh(hidden, (most_rows * classes,), student.dtype)

    def student_logits(self, hidden_nH: Tensor) -> Tensor:
        """[n, C] of the chunk."""
        return self._logits(self.student, hidden_nH, self._student)

    def teacher_logits(self, hidden_nH: Tensor) -> Tensor:
        """[n, C_T] of the chunk."""
        assert self.teacher is not None and self._teacher is not None
        return self._logits(self.teacher, hidden_nH, self._teacher)

    @staticmethod
    def _logits(side: Side, hidden_nH: Tensor, buffer: Tensor) -> Tensor:
        out = buffer[: hidden_nH.shape[0]]
        products.multiply(hidden_nH, side.weight, side.bias, side.scale, out)
        if side.softcap is not None:
            out.div_(side.softcap).tanh_().mul_(side.softcap)
        return out

    def slope(self, logits_nC: Tensor) -> Tensor | None:
        """d logits / d product where that is not `scale` alone: scale (1 - (z / cap)^2)."""
        cap = self.student.softcap
        if self._slope is None or cap is None:
            return None
        out = self._slope[: logits_nC.shape[0]]
        torch.mul(logits_nC, logits_nC, out=out)
        return out.mul_(-self.student.scale / cap**2).add_(self.student.scale)

    def add_gradients(
        self,
        gradient_nC: Tensor,
        slope_nC: Tensor | None,
        hidden_nH: Tensor,
        rows: Tensor | slice,
        sums: Gradients,
        first: bool,
    ) -> None:
        """From d logits to hidden states, weight and bias; `first`: of the chunks."""
        scale = self.student.scale if slope_nC is None else 1.0
        if slope_nC is not None:
            gradient_nC.mul_(slope_nC)
        if sums.bias is not None:
            sums.bias.add_(gradient_nC.sum(0), alpha=scale)
        if self._rounded is not None:
            rounded = self._rounded[: gradient_nC.numel()].view(gradient_nC.shape)
            gradient_nC = rounded.copy_(gradient_nC)
        if sums.hidden is not None:
            sums.hidden[rows] = products.multiply_gradient(gradient_nC, self.student.weight, scale, sums.hidden.dtype)
        if sums.weight is not None:
            products.add_product(gradient_nC.T, hidden_nH, scale, sums.weight, first)
