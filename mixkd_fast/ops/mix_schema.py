"""The op `mixkd_fast::mix_embeddings`: schema, fake kernels and autograd, once for every backend of compiled code.

Legend of shape suffixes: R rows of ids, B clean rows, M mixed rows, O rows of the output, L positions, H width.
"""

from typing import Any

import torch
from torch import Tensor

from mixkd_fast.ops import MixInputs, mix_backward
from mixkd_fast.ops.schema import LIBRARY, refuse_forward_mode, refusing_a_second_derivative

ARGUMENTS = (
    "Tensor input_ids, Tensor weight, Tensor partner, Tensor lam, Tensor? padding_mask, Tensor? position_weight, "
    "Tensor? token_type_ids, Tensor? token_type_weight, Tensor? position_ids, Tensor? norm_weight, Tensor? norm_bias, "
    "float norm_eps, bool use_norm, int num_rows, bool include_clean"
)
BACKWARD_ARGUMENTS = f"Tensor grad_output, {ARGUMENTS}, Tensor mean, Tensor rstd, int needs, bool deterministic"
TABLES = ("weight", "position_weight", "token_type_weight", "norm_weight", "norm_bias")
"""What receives a gradient, in the order of the backward's results; bit k of `needs` asks for the k-th."""
PLACES = tuple(MixInputs._fields.index(name) for name in TABLES)
OPS = ("mix_embeddings", "mix_embeddings_triton")


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Output [O, L, H] in the dtype of the tables; mean and rstd [O * L] in fp32 or fp64, [0] without LayerNorm."""
    inputs = MixInputs(*arguments)
    rows = inputs.partner.shape[0] + (inputs.num_rows if inputs.include_clean else 0)
    length = inputs.input_ids.shape[1]
    compute = torch.promote_types(inputs.weight.dtype, torch.float32)
    moments = (rows * length if inputs.use_norm else 0,)
    return (
        inputs.weight.new_empty((rows, length, inputs.weight.shape[1])),
        inputs.weight.new_empty(moments, dtype=compute),
        inputs.weight.new_empty(moments, dtype=compute),
    )


def _backward_fake(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """One gradient per table, of its shape; [0] for one that is not needed."""
    inputs, needs = MixInputs(*arguments[: len(MixInputs._fields)]), arguments[-2]
    gradients = []
    for bit, name in enumerate(TABLES):
        table = getattr(inputs, name)
        needed = table is not None and bool(needs >> bit & 1) and (inputs.use_norm or not name.startswith("norm"))
        gradients.append(torch.empty_like(table) if needed else inputs.weight.new_empty((0,)))
    return tuple(gradients)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.options = tuple(None if isinstance(value, Tensor) else value for value in inputs)
    ctx.tensors_at = tuple(place for place, value in enumerate(inputs) if isinstance(value, Tensor))
    ctx.save_for_backward(*(inputs[place] for place in ctx.tensors_at), mean, rstd)


def _gradients(name: str, ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    *saved, mean, rstd = ctx.saved_tensors
    arguments = list(ctx.options)
    for place, tensor in zip(ctx.tensors_at, saved, strict=True):
        arguments[place] = tensor
    needs = sum(1 << bit for bit, place in enumerate(PLACES) if ctx.needs_input_grad[place])
    backward = getattr(torch.ops.mixkd_fast, name.replace("mix_embeddings", "mix_embeddings_backward"))
    deterministic = torch.are_deterministic_algorithms_enabled()
    found = backward(grad_output.contiguous(), *arguments, mean, rstd, needs, deterministic)
    gradients: list[Tensor | None] = [None] * len(arguments)
    for bit, place in enumerate(PLACES):
        if needs >> bit & 1:
            gradients[place] = found[bit]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        wanted = [place for place in PLACES if gradients[place] is not None]
        sources = [tensor for tensor in (*saved, grad_output) if tensor.requires_grad]
        plain = [gradient for place in wanted if (gradient := gradients[place]) is not None]
        for place, gradient in zip(wanted, refusing_a_second_derivative("mix_embeddings", plain, sources), strict=True):
            gradients[place] = gradient
    return tuple(gradients)


def _triton(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from mixkd_fast.ops.triton_mix_embeddings import mix_embeddings

    results: tuple[Tensor, Tensor, Tensor] = mix_embeddings(*arguments)
    return results


def _triton_backward(*arguments: Any) -> tuple[Tensor, ...]:
    from mixkd_fast.ops.triton_mix_embeddings import mix_embeddings_backward

    results: tuple[Tensor, ...] = mix_embeddings_backward(*arguments)
    return results


def _cuda_backward(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """The backward around the CUDA kernels; the CPU library registers its own, in one piece."""
    *given, mean, rstd, needs, _ = arguments

    def norm_backward(grad_output: Tensor, inputs: MixInputs, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
        parts: tuple[Tensor, Tensor] = torch.ops.mixkd_fast.mix_norm_backward(grad_output, *inputs, mean, rstd)
        return parts

    sum_rows = torch.ops.mixkd_fast.sum_rows_
    return mix_backward.gradients(grad_output, MixInputs(*given), mean, rstd, needs, norm_backward, sum_rows)


def fused(inputs: MixInputs) -> Tensor:
    """The mixed embeddings [O, L, H] by the C++ kernels of the tables' device."""
    return _call(torch.ops.mixkd_fast.mix_embeddings, inputs)


def fused_triton(inputs: MixInputs) -> Tensor:
    """The mixed embeddings [O, L, H] by the Triton kernels."""
    return _call(torch.ops.mixkd_fast.mix_embeddings_triton, inputs)


def _call(op: Any, inputs: MixInputs) -> Tensor:
    if not torch.compiler.is_compiling():
        refuse_forward_mode("mix_embeddings", [getattr(inputs, name) for name in TABLES])
    output: Tensor = op(*inputs)[0]
    return output


def _register(name: str) -> None:
    backward = name.replace("mix_embeddings", "mix_embeddings_backward")
    LIBRARY.define(f"{name}({ARGUMENTS}) -> (Tensor output, Tensor mean, Tensor rstd)")
    LIBRARY.define(f"{backward}({BACKWARD_ARGUMENTS}) -> ({', '.join(f'Tensor grad_{table}' for table in TABLES)})")
    torch.library.register_fake(f"mixkd_fast::{name}", _fake, lib=LIBRARY)
    torch.library.register_fake(f"mixkd_fast::{backward}", _backward_fake, lib=LIBRARY)
    torch.library.register_autograd(
        f"mixkd_fast::{name}",
        lambda ctx, grad_output, *_: _gradients(name, ctx, grad_output),
        setup_context=_save,
        lib=LIBRARY,
    )


for _name in OPS:
    _register(_name)
LIBRARY.define(
    f"mix_norm_backward(Tensor grad_output, {ARGUMENTS}, Tensor mean, Tensor rstd) -> (Tensor grad_x, Tensor norm_sums)"
)
LIBRARY.define("sum_rows_(Tensor source, Tensor rows, Tensor tokens, Tensor shares, Tensor(a!) table) -> ()")
LIBRARY.impl("mix_embeddings_backward", _cuda_backward, "CUDA")
for _device in ("CPU", "CUDA"):
    # On the CPU Triton's interpreter runs them, for tests.
    LIBRARY.impl("mix_embeddings_triton", _triton, _device)
    LIBRARY.impl("mix_embeddings_backward_triton", _triton_backward, _device)
