"""The matrix products of `linear_kd_loss`: a chunk of logits, and what its gradient gives to hidden states and weight.

Logits are fp32 (fp64 for fp64 inputs) whatever the head's dtype, and so are the sums of the weight's gradient. On a GPU
the products of half precision run on its matrix units and add up in fp32. On a CPU PyTorch has no such product:
`bf16_product` is one for bf16 where the processor multiplies it; elsewhere, and in fp16, the head is widened a tile at
a time, which costs one reading of it per chunk.

Legend of shape suffixes: n rows of a chunk, H width of hidden states, C classes.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from mixkd_fast.ops import bf16_product

WIDENED_BYTES = 8 * 2**20
"""A tile of a head in fp32: the second-level caches of a few cores."""
FEW_ROWS = 32
"""Up to which a CPU multiplies the head by the rows faster than the rows by the head."""
SWAPPED_CLASSES = 4096
"""Of a tile that is multiplied so, and then transposed."""


def product_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """Of the factors: the wider one's; on a GPU under autocast its own; fp64 if the bias is.

    On a CPU fp32 at least, or bf16 where the processor multiplies it.
    """
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if bias is not None and bias.dtype == torch.float64:
        dtype = bias.dtype
    device_type = hidden.device.type
    if device_type == "cpu":
        if dtype == torch.bfloat16 and bf16_product.is_available():
            return dtype
        return torch.promote_types(dtype, torch.float32)
    if torch.is_autocast_enabled(device_type) and dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return dtype


def logits_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the logits from factors of `dtype`, and of the sums of a weight's gradient."""
    return torch.promote_types(dtype, torch.float32)


def rounds(dtype: torch.dtype, weight: Tensor) -> bool:
    """Whether a product of factors of `dtype` can be rounded to the weight's dtype as it is written, from fp32 sums."""
    return weight.device.type == "cpu" and weight.dtype == dtype == torch.bfloat16


def prepared_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight as the products take it: on a GPU in `dtype`, on a CPU as it is, with columns or rows without gaps."""
    if weight.device.type == "cpu":
        return weight if dtype != torch.bfloat16 or 1 in weight.stride() else weight.contiguous()
    return weight.to(dtype)


def multiply(hidden_nH: Tensor, weight_CH: Tensor, bias_C: Tensor | None, scale: float, out_nC: Tensor) -> None:
    """out = scale (hidden weight^T + bias). out: [n, C] of `logits_dtype`, classes next to each other."""
    if hidden_nH.dtype == out_nC.dtype and hidden_nH.device.type == "cpu" and hidden_nH.shape[0] <= FEW_ROWS:
        for begin, end, tile in _tiles(weight_CH, out_nC.dtype, SWAPPED_CLASSES):
            part = out_nC[:, begin:end]
            torch.mul(torch.mm(tile, hidden_nH.T).T, scale, out=part)
            if bias_C is not None:
                part.add_(bias_C[begin:end], alpha=scale)
        return
    if hidden_nH.dtype == out_nC.dtype:
        for begin, end, tile in _tiles(weight_CH, out_nC.dtype):
            part = out_nC[:, begin:end]
            if bias_C is None:
                torch.addmm(part, hidden_nH, tile.T, beta=0, alpha=scale, out=part)
            else:
                bias = bias_C[begin:end].to(out_nC.dtype)
                torch.addmm(bias, hidden_nH, tile.T, beta=scale, alpha=scale, out=part)
        return
    if hidden_nH.device.type == "cpu":
        bf16_product.multiply(hidden_nH, weight_CH.T, scale, out_nC)
        if bias_C is not None:
            out_nC.add_(bias_C, alpha=scale)
        return
    torch.mm(hidden_nH, weight_CH.T, out_dtype=out_nC.dtype, out=out_nC)
    if bias_C is not None:
        out_nC.add_(bias_C)
    if scale != 1:
        out_nC.mul_(scale)


def multiply_gradient(gradient_nC: Tensor, weight_CH: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """d hidden [n, H] = scale gradient weight; gradient in the dtype of the factors."""
    if gradient_nC.device.type == "cpu" and gradient_nC.dtype == torch.bfloat16:
        kept = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        out = gradient_nC.new_empty((gradient_nC.shape[0], weight_CH.shape[1]), dtype=kept)
        bf16_product.multiply(gradient_nC, weight_CH, scale, out)
        return out.to(dtype)
    out = gradient_nC.new_empty((gradient_nC.shape[0], weight_CH.shape[1]))
    for begin, end, tile in _tiles(weight_CH, gradient_nC.dtype):
        torch.addmm(out, gradient_nC[:, begin:end], tile, beta=int(begin > 0), alpha=scale, out=out)
    return out.to(dtype)


def add_product(left: Tensor, right: Tensor, scale: float, sums: Tensor, first: bool = False) -> None:
    """sums += scale left right, in the dtype of the sums; both factors are of one dtype. first: whatever sums
    held before is gone."""
    beta = 0 if first else 1
    if left.device.type == "cpu" and left.dtype == torch.bfloat16:
        bf16_product.multiply(left, right, scale, sums, add=not first)
    elif left.dtype == sums.dtype:
        torch.addmm(sums, left, right, beta=beta, alpha=scale, out=sums)
    else:
        torch.addmm(sums, left, right, out_dtype=sums.dtype, beta=beta, alpha=scale, out=sums)


def _tiles(weight_CH: Tensor, dtype: torch.dtype, most: int | None = None) -> Iterator[tuple[int, int, Tensor]]:
    """(begin, end, rows of the weight in `dtype`): all or `most` at once if they are in it already."""
    classes, width = weight_CH.shape
    size = max(64, WIDENED_BYTES // (width * dtype.itemsize)) if weight_CH.dtype != dtype else classes
    size = max(1, size if most is None else min(size, most))
    for begin in range(0, classes, size):
        end = min(classes, begin + size)
        yield begin, end, weight_CH[begin:end].to(dtype)
