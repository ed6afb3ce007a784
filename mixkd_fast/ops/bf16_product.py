"""Products of bf16 matrices on the CPU with fp32 sums, which PyTorch has on GPUs alone: the op `bf16_product_`.

Only where the processor multiplies bf16 (AMX or AVX512_BF16, Linux on x86) and the compiled library is there:
see `is_available`.
"""

import functools

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from mixkd_fast.ops import native
from mixkd_fast.ops.schema import LIBRARY


def is_available() -> bool:
    """Whether `multiply` works on this machine's CPU. A constant for torch.compile."""
    return _found()


@functools.cache
def _found() -> bool:
    if native.load("cpu"):
        return False
    with _disable_current_modes():  # fake tensors know nothing of processors
        return bool(torch.ops.mixkd_fast.has_bf16_product(torch.empty(0, device="cpu")))


vars(is_available)["_dynamo_marked_constant"] = True


def multiply(left: Tensor, right: Tensor, scale: float, out: Tensor, add: bool = False) -> None:
    """out = scale left right, or out += scale left right.

    Args: left [m, k] and right [k, n] bf16, rows or columns next to each other; out [m, n] fp32, or bf16 if not `add`,
    rounded once; its columns next to each other.
    """
    torch.ops.mixkd_fast.bf16_product_(out, _dense(left), _dense(right), scale, add)


def prefer_large_pages(fresh: Tensor) -> Tensor:
    """The tensor, for which the system is asked for huge pages where that helps: of memory not yet written."""
    if fresh.device.type == "cpu" and not native.load("cpu"):
        torch.ops.mixkd_fast.prefer_large_pages_(fresh)
    return fresh


def _dense(matrix: Tensor) -> Tensor:
    return matrix if 1 in matrix.stride() else matrix.contiguous()


LIBRARY.define("bf16_product_(Tensor(a!) out, Tensor left, Tensor right, float scale, bool add) -> ()")
LIBRARY.define("has_bf16_product(Tensor like) -> bool")
LIBRARY.define("prefer_large_pages_(Tensor(a!) fresh) -> ()")
