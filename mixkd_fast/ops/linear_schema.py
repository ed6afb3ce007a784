"""The op `mixkd_fast::linear_kd_loss`: schema, fake kernel and autograd around `linear_chunks`.

The loss and its gradients come from one call, and the backward multiplies them by grad_output. Where rows are weighted
from above (reduction "none": `linear_kd_loss_rows`) the forward finds the rows alone, and the backward calls the op
with what arrives as weights of rows. Legend of shape suffixes: N rows, H width of hidden states, C classes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixkd_fast.ops import linear_products as products
from mixkd_fast.ops.linear_chunks import BIAS, HIDDEN, WEIGHT, RowValues, Side, linear_kd_loss
from mixkd_fast.ops.schema import LIBRARY, graph_is_kept, refusing_a_second_derivative

ARGUMENTS = (
    "Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor? teacher_hidden, "
    "Tensor? teacher_weight, Tensor? teacher_bias, Tensor? logprobs, Tensor? indices, Tensor? labels, "
    "Tensor? partner_labels, Tensor? lam, Tensor? row_weights, float? student_softcap, float? teacher_softcap, "
    "float student_scale, float teacher_scale, ScalarType student_dtype, ScalarType teacher_dtype, int divergence, "
    "float temperature, float beta, float alpha, float ab_alpha, float ab_beta, bool detach_mixture, float kd_weight, "
    "float ce_weight, bool tail_mass, int ignore_index, str kernel, int max_bytes, bool raise_invalid"
)
NUM_ARGUMENTS = ARGUMENTS.count(",") + 1
ROW_WEIGHTS = 11
"""Where row_weights is among the arguments."""
RESULTS = "(Tensor loss, Tensor kd_rows, Tensor ce_rows, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"


class Arguments(NamedTuple):
    """The op's arguments, in their order. All of [N] are contiguous, int64 or of the dtype of the rows."""

    student_hidden: Tensor
    student_weight: Tensor
    student_bias: Tensor | None
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    logprobs: Tensor | None
    indices: Tensor | None
    labels: Tensor | None
    partner_labels: Tensor | None
    lam: Tensor | None
    row_weights: Tensor | None
    student_softcap: float | None
    teacher_softcap: float | None
    student_scale: float
    teacher_scale: float
    student_dtype: torch.dtype
    teacher_dtype: torch.dtype
    divergence: int
    temperature: float
    beta: float
    alpha: float
    ab_alpha: float
    ab_beta: float
    detach_mixture: bool
    kd_weight: float
    ce_weight: float
    tail_mass: bool
    ignore_index: int
    kernel: str
    max_bytes: int
    raise_invalid: bool

    def detached(self) -> "Arguments":
        """Without their graphs."""
        return Arguments._make(value.detach() if isinstance(value, Tensor) else value for value in self)

    def row_dtype(self) -> torch.dtype:
        """Of the rows' losses: fp64 if the logits of a side are."""
        both = [products.logits_dtype(self.student_dtype)]
        if self.teacher_hidden is not None:
            both.append(products.logits_dtype(self.teacher_dtype))
        elif self.logprobs is not None:
            both.append(self.logprobs.dtype)
        return torch.float64 if torch.float64 in both else torch.float32

    def keep(self) -> Tensor | None:
        """bool [N], the rows that count; None if all do."""
        keep = None if self.row_weights is None else self.row_weights != 0
        for labels in (self.labels, self.partner_labels):
            if labels is not None:
                counted = labels != self.ignore_index
                keep = counted if keep is None else keep & counted
        return keep

    def sides(self) -> tuple[Side, Side | None]:
        """Both heads in the dtype of their products."""

        def side(hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> Side:
            return Side(hidden, products.prepared_weight(weight, others[-1]), bias, *others)

        student = side(*self[:3], self.student_softcap, self.student_scale, self.student_dtype)
        if self.teacher_hidden is None or self.teacher_weight is None or self.kd_weight == 0:
            return student, None
        others = self.teacher_softcap, self.teacher_scale, self.teacher_dtype
        return student, side(self.teacher_hidden, self.teacher_weight, self.teacher_bias, *others)


@contextmanager
def computing_on(tensor: Tensor) -> Iterator[None]:
    """No graph, no autocast (which would round products to its dtype), and the tensor's GPU as the current one, whose
    streams are then those that are asked and recorded on."""
    with torch.no_grad(), torch.autocast(tensor.device.type, enabled=False), torch.cuda.device_of(tensor):
        yield


def _kernel(*arguments: Any, round_weight: bool = False) -> tuple[Tensor, ...]:
    """The op: see RESULTS; a gradient that `needs` does not name is [0]. round_weight: see `Gradients`."""
    *given, needs = arguments
    call = Arguments._make(given).detached()
    values = RowValues(*call[6:12])
    new_empty = call.student_hidden.new_empty
    with computing_on(call.student_hidden):
        student, teacher = call.sides()
        kd, ce, gradients = linear_kd_loss(
            student,
            teacher,
            values,
            call.keep(),
            call.kernel,
            call[18:29],
            call.max_bytes,
            call.row_dtype(),
            needs,
            call.raise_invalid,
            round_weight,
        )
        return kd.sum() + ce.sum(), kd, ce, *(new_empty(0) if g is None else g for g in gradients)


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    *given, needs = arguments
    call = Arguments._make(given)
    new_empty, rows = call.student_hidden.new_empty, call.student_hidden.shape[0]
    dtype, sums = call.row_dtype(), products.logits_dtype(call.student_dtype)
    hidden = new_empty(call.student_hidden.shape if needs & HIDDEN else (0,))
    weight = new_empty(call.student_weight.shape, dtype=sums) if needs & WEIGHT else new_empty(0)
    bias = new_empty(call.student_weight.shape[:1], dtype=sums) if needs & BIAS else new_empty(0)
    return new_empty((), dtype=dtype), new_empty(rows, dtype=dtype), new_empty(rows, dtype=dtype), hidden, weight, bias


def needs_of(call: Any) -> int:
    """Which gradients somebody may ask for."""
    if not torch.is_grad_enabled():
        return 0
    bits = zip(call[:3], (HIDDEN, WEIGHT, BIAS), strict=True)
    return sum(bit for tensor, bit in bits if tensor is not None and tensor.requires_grad)


def _scaled(gradient: Tensor, grad_output: Tensor, dtype: torch.dtype, reuse: bool) -> Tensor:
    """gradient * grad_output, rounded to `dtype`; in its own memory if nobody may ask for it again."""
    if reuse and gradient.dtype == dtype:
        # A CPU's number can be looked at: 1 costs nothing.
        is_one = grad_output.device.type == "cpu" and grad_output.item() == 1
        return gradient if is_one else gradient.mul_(grad_output)
    if gradient.is_cuda:
        # In one pass; a CPU would make the wider result first.
        return torch.mul(gradient, grad_output, out=torch.empty_like(gradient, dtype=dtype))
    scaled = gradient.mul_(grad_output) if reuse else gradient * grad_output
    return scaled.to(dtype)


class LinearKDLossFunction(torch.autograd.Function):
    """The sum of the rows with its gradients, for callers in Python; kd and ce rows are appended to `parts`.

    The saved gradients are intermediates, so that they can be scaled in place: a weight's is as large as the head.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        call: Arguments,
        needs: int,
        parts: list[Tensor],
    ) -> Tensor:
        """The op's kernel; the first three are those of `call`, given by themselves for autograd to see."""
        loss, kd, ce, *gradients = _kernel(*call, needs, round_weight=True)
        ctx.save_for_backward(loss, *gradients)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in call[:3]]
        ctx.needs = needs
        parts += (kd, ce)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """The saved gradients times grad_output; there is no second derivative."""
        loss, *saved = ctx.saved_tensors
        reuse = type(grad_output) is Tensor and not graph_is_kept() and not torch.is_grad_enabled()
        return *scaled_gradients(ctx.needs, saved, ctx.dtypes, loss, grad_output, reuse), None, None, None


def scaled_gradients(
    needs: int, saved: Any, dtypes: Any, loss: Tensor, grad_output: Tensor, reuse: bool
) -> list[Tensor | None]:
    """Gradients by hidden states, weight and bias; None where not needed."""
    with torch.no_grad():
        wanted = [
            _scaled(gradient, grad_output, dtype, reuse)
            for gradient, dtype, bit in zip(saved, dtypes, (HIDDEN, WEIGHT, BIAS), strict=True)
            if needs & bit
        ]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        wanted = refusing_a_second_derivative("linear_kd_loss", wanted, [loss, grad_output])
    found = iter(wanted)
    return [next(found) if needs & bit else None for bit in (HIDDEN, WEIGHT, BIAS)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    loss, kd, ce, *gradients = output
    ctx.save_for_backward(loss, *gradients)
    ctx.mark_non_differentiable(kd, ce, *gradients)
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:3]]
    ctx.needs = inputs[-1]


def _registered_backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    # The saved gradients are outputs, which belong to the caller.
    loss, *saved = ctx.saved_tensors
    found = scaled_gradients(ctx.needs, saved, ctx.dtypes, loss, grad_output, reuse=False)
    return *found, *(None,) * (NUM_ARGUMENTS + 1 - 3)


def _rows_kernel(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(kd + ce, kd, ce) by row."""
    _, kd, ce, *_ = _kernel(*arguments, 0)
    return kd + ce, kd, ce


def _rows_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, kd, ce, *_ = _fake(*arguments, 0)
    return torch.empty_like(kd), kd, ce


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    save_arguments(ctx, inputs)
    ctx.mark_non_differentiable(*output[1:])


def save_arguments(ctx: Any, arguments: Sequence[Any]) -> None:
    """Keep the op's arguments for a backward, which is told if one has been overwritten by then.

    Autograd saves no tensor that was made in inference mode: of such a one it gets a copy.
    """
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    ctx.save_for_backward(*(value.clone() if value.is_inference() else value for value in tensors))
    ctx.others = [None if isinstance(value, Tensor) else value for value in arguments]
    ctx.is_tensor = [isinstance(value, Tensor) for value in arguments]


def saved_arguments(ctx: Any) -> Arguments:
    """What `save_arguments` kept."""
    tensors = iter(ctx.saved_tensors)
    pairs = zip(ctx.others, ctx.is_tensor, strict=True)
    return Arguments._make(next(tensors) if is_tensor else value for value, is_tensor in pairs)


def _rows_backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    call = saved_arguments(ctx)
    needs = sum(bit for bit, needed in zip((HIDDEN, WEIGHT, BIAS), ctx.needs_input_grad[:3], strict=True) if needed)
    grad_output = grad_output.contiguous()
    weights = grad_output if call.row_weights is None else call.row_weights * grad_output
    # Labels were looked at in the forward. Nothing of a graph is built here but the refusal.
    call = call._replace(row_weights=weights.detach(), raise_invalid=False)
    with torch.no_grad():
        _, _, _, *gradients = torch.ops.mixkd_fast.linear_kd_loss(*call, needs)
    wanted = [
        gradient.to(tensor.dtype)
        for gradient, tensor, bit in zip(gradients, call[:3], (HIDDEN, WEIGHT, BIAS), strict=True)
        if needs & bit and tensor is not None
    ]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        sources = [tensor for tensor in (*call[:3], grad_output) if tensor is not None and tensor.requires_grad]
        wanted = refusing_a_second_derivative("linear_kd_loss", wanted, sources)
    found = iter(wanted)
    given = [next(found) if needs & bit else None for bit in (HIDDEN, WEIGHT, BIAS)]
    return *given, *(None,) * (NUM_ARGUMENTS - 3)


for _name, _schema, _run, _shape in (
    ("linear_kd_loss", f"({ARGUMENTS}, int needs) -> {RESULTS}", _kernel, _fake),
    (
        "linear_kd_loss_rows",
        f"({ARGUMENTS}) -> (Tensor loss_rows, Tensor kd_rows, Tensor ce_rows)",
        _rows_kernel,
        _rows_fake,
    ),
):
    LIBRARY.define(_name + _schema)
    LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mixkd_fast::{_name}", _shape, lib=LIBRARY)
torch.library.register_autograd("mixkd_fast::linear_kd_loss", _registered_backward, setup_context=_save, lib=LIBRARY)
torch.library.register_autograd(
    "mixkd_fast::linear_kd_loss_rows", _rows_backward, setup_context=_save_rows, lib=LIBRARY
)
