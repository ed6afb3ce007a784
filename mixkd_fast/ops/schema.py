"""The op `mixkd_fast::kd_loss`: its schema, fake kernel and autograd, once for every backend of compiled code.

The kernels of csrc/ register themselves for CPU and CUDA when their library is loaded (`native.py`);
`mixkd_fast::kd_loss_triton` is the same op by Triton. The loss and its gradient come from one call: the backward only
multiplies. Legend of shape suffixes: N rows, C classes, K kept classes of a top-k teacher.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("mixkd_fast", "FRAGMENT")

ARGUMENTS = (
    "Tensor student_logits, Tensor? teacher_logits, Tensor? teacher_indices, Tensor? labels, Tensor? partner_labels, "
    "Tensor? lam, Tensor? row_weights, Tensor? normalizer, int divergence, float temperature, float beta, float alpha, "
    "float ab_alpha, float ab_beta, bool detach_mixture, float kd_weight, float ce_weight, bool tail_mass, "
    "int ignore_index, int reduction, bool need_grad, bool raise_invalid"
)
NUM_ARGUMENTS = ARGUMENTS.count(",") + 1
RESULTS = "(Tensor loss, Tensor kd, Tensor ce, Tensor grad_logits)"
OPS = ("kd_loss", "kd_loss_triton")
IN_PLACE_ARGUMENTS = ARGUMENTS.replace("Tensor student_logits", "Tensor(a!) student_logits").replace(
    "bool need_grad, ", ""
)
IN_PLACE_RESULTS = "(Tensor loss, Tensor kd, Tensor ce)"
NONE = 2
"""`reduction`: 0 mean, 1 sum, 2 none."""


def _fake(student_logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes of the results, as the kernels allocate them."""
    teacher_logits, reduction, need_grad = arguments[0], arguments[18], arguments[19]
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    if teacher_logits is not None:
        dtype = torch.promote_types(dtype, teacher_logits.dtype)
    shape = student_logits.shape[:1] if reduction == NONE else ()
    loss, kd, ce = (student_logits.new_empty(shape, dtype=dtype) for _ in range(3))
    gradient = student_logits.new_empty(student_logits.shape if need_grad else (0,))
    return loss, kd, ce, gradient


def _in_place_fake(student_logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The same without a gradient of its own."""
    return _fake(student_logits, *arguments[:-1], False, False)[:3]


def _backward(grad_logits: Tensor, grad_output: Tensor) -> Tensor:
    """d / d student_logits: the gradient that the forward saved, times grad_output.

    If this backward keeps the graph, the saved gradient may be asked for again: the caller gets a copy. Else it is
    handed on itself: where grad_output is 1 nothing is moved. The CPU looks at it here, a GPU in the kernel.
    """
    is_plain = type(grad_output) is Tensor and not torch.compiler.is_compiling()
    if is_plain and not graph_is_kept():
        if grad_output.device.type == "cpu" and grad_output.dim() == 0 and grad_output.item() == 1:
            return grad_logits
        if grad_output.device.type == "cuda":
            torch.ops.mixkd_fast.scale_gradient_(grad_logits, grad_output)
            return grad_logits
    scaled: Tensor = torch.ops.mixkd_fast.scaled_gradient(grad_logits, grad_output)
    return scaled


def graph_is_kept() -> bool:
    """Whether the backward that is running may be repeated; True if torch does not say."""
    keep: Callable[[], bool] | None = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keep is None or keep()


def _scaled_gradient_eager(grad_logits: Tensor, grad_output: Tensor) -> Tensor:
    """grad_logits [N, C] * grad_output ([] or [N]) in the wider of both dtypes, rounded once."""
    factor = grad_output if grad_output.dim() == 0 else grad_output.unsqueeze(-1)
    return (grad_logits.to(factor.dtype) * factor).to(grad_logits.dtype)


def call_kernel(name: str, student_logits: Tensor, arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op's kernel for these tensors, past its registered autograd: two layers of Python less."""
    with torch._C._AutoDispatchBelowAutograd():
        results: tuple[Tensor, Tensor, Tensor, Tensor] = OVERLOADS[name](student_logits, *arguments)
    return results


def call_in_place(
    name: str, student_logits: Tensor, arguments: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`call_kernel` with the gradient in the place of student_logits, which must fit: see `fits_in_place`.

    The fourth result is student_logits, detached; whoever saved the logits for a backward will be told.
    """
    with torch._C._AutoDispatchBelowAutograd():
        loss, kd, ce = IN_PLACE_OVERLOADS[name](student_logits, *arguments[:-2], arguments[-1])
    torch.autograd.graph.increment_version(student_logits)
    return loss, kd, ce, student_logits.detach()


def fits_in_place(name: str, student_logits: Tensor, arguments: tuple[Any, ...]) -> bool:
    """Whether a gradient can overwrite these logits: they lie without gaps, and the kernel reads each before.

    With a top-k teacher the CPU's alone does.
    """
    has_top = arguments[1] is not None and (name != "kd_loss" or student_logits.device.type != "cpu")
    return student_logits.is_contiguous() and not has_top


def _scale_gradient_eager(grad_logits: Tensor, grad_output: Tensor) -> None:
    """The same in place."""
    grad_logits.copy_(_scaled_gradient_eager(grad_logits, grad_output))


class KDLossFunction(torch.autograd.Function):
    """The op with its gradient, for callers in Python: half the overhead of the op's own registration.

    The gradient that it saves is an intermediate and not an output, so that the saved tensor itself can be handed on:
    autograd makes it a leaf's `.grad` only once the graph has let go of it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,
        arguments: tuple[Any, ...],
        name: str,
        parts: list[Tensor],
        in_place: bool = False,
    ) -> Tensor:
        """The loss of the op `name`; kd and ce are appended to `parts`. in_place: the logits become their gradient.

        `arguments` are the op's, behind student_logits: in a tuple, for autograd looks at each of its own; as it does
        at each result.
        """
        call = call_in_place if in_place else call_kernel
        loss, kd, ce, grad_logits = call(name, student_logits, arguments)
        ctx.save_for_backward(grad_logits, loss)
        parts += (kd, ce)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """The saved gradient times grad_output; there is no second derivative."""
        grad_logits, loss = ctx.saved_tensors
        gradient = _backward(grad_logits, grad_output)
        if torch.is_grad_enabled():
            (gradient,) = refusing_a_second_derivative("kd_loss", [gradient], [loss, grad_output])
        return gradient, None, None, None, None


def refusing_a_second_derivative(op: str, gradients: Sequence[Tensor], sources: Sequence[Tensor]) -> list[Tensor]:
    """For create_graph=True: gradients that raise where they are differentiated again; constants would be wrong.

    Args: sources = what the gradients depend on, with its graph: whoever differentiates back to it must come by here.
    """
    message = f"{op} is differentiable once; backend='reference' knows no limit"
    refuse = torch._C._functions.DelayedError(message.encode(), len(gradients) + len(sources))
    refusing: tuple[Tensor, ...] = refuse(*(gradient.detach() for gradient in gradients), *sources)
    return list(refusing[: len(gradients)])


def refuse_forward_mode(op: str, tensors: Sequence[Tensor | None]) -> None:
    """Raise for a tensor with a tangent (torch.func.jvp, forward_ad): the op would drop it without a word."""
    if forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(f"{op} has no forward-mode derivative; backend='reference' has one")


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    loss, kd, ce, grad_logits = output
    ctx.save_for_backward(grad_logits, loss)
    ctx.mark_non_differentiable(kd, ce, grad_logits)


def _registered_backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    # Always a new tensor: the saved one is an output, which belongs to the caller.
    grad_logits, loss = ctx.saved_tensors
    gradient = torch.ops.mixkd_fast.scaled_gradient(grad_logits, grad_output)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        (gradient,) = refusing_a_second_derivative("kd_loss", [gradient], [loss, grad_output])
    return gradient, *(None,) * (NUM_ARGUMENTS - 1)


def _triton(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from mixkd_fast.ops.triton_kd_loss import kd_loss

    results: tuple[Tensor, Tensor, Tensor, Tensor] = kd_loss(*arguments)
    return results


def _triton_in_place(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from mixkd_fast.ops.triton_kd_loss import kd_loss_

    return kd_loss_(*arguments)


for _name in OPS:
    LIBRARY.define(f"{_name}_({IN_PLACE_ARGUMENTS}) -> {IN_PLACE_RESULTS}")
    torch.library.register_fake(f"mixkd_fast::{_name}_", _in_place_fake, lib=LIBRARY)
    LIBRARY.define(f"{_name}({ARGUMENTS}) -> {RESULTS}")
    torch.library.register_fake(f"mixkd_fast::{_name}", _fake, lib=LIBRARY)
    torch.library.register_autograd(f"mixkd_fast::{_name}", _registered_backward, setup_context=_save, lib=LIBRARY)
LIBRARY.impl("kd_loss_triton", _triton, "CUDA")
# On the CPU Triton's interpreter runs it, for tests.
LIBRARY.impl("kd_loss_triton", _triton, "CPU")
LIBRARY.impl("kd_loss_triton_", _triton_in_place, "CUDA")
LIBRARY.impl("kd_loss_triton_", _triton_in_place, "CPU")
LIBRARY.define("scaled_gradient(Tensor grad_logits, Tensor grad_output) -> Tensor")
LIBRARY.impl("scaled_gradient", _scaled_gradient_eager, "CompositeExplicitAutograd")
LIBRARY.define("scale_gradient_(Tensor(a!) grad_logits, Tensor grad_output) -> ()")
LIBRARY.impl("scale_gradient_", _scale_gradient_eager, "CompositeExplicitAutograd")
torch.library.register_fake("mixkd_fast::scale_gradient_", lambda grad_logits, grad_output: None, lib=LIBRARY)
torch.library.register_fake(
    "mixkd_fast::scaled_gradient", lambda grad_logits, grad_output: torch.empty_like(grad_logits), lib=LIBRARY
)
OVERLOADS = {_name: getattr(torch.ops.mixkd_fast, _name).default for _name in OPS}
IN_PLACE_OVERLOADS = {_name: getattr(torch.ops.mixkd_fast, f"{_name}_").default for _name in OPS}
