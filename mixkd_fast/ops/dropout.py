"""Dropout that costs little beside the layers: the op `mixkd_fast::dropout` on the CPU, PyTorch's own elsewhere."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mixkd_fast.ops import native
from mixkd_fast.ops.schema import LIBRARY

_DTYPES = (torch.float32, torch.bfloat16)


def dropout(values: Tensor, p: float) -> Tensor:
    """Each value is 0 with probability p, else divided by 1 - p (Srivastava et al. 2014).

    The mask is a function of a seed drawn from torch's generator and of the position: `torch.manual_seed` repeats it,
    and the backward makes it again instead of keeping it. Not the mask of `torch.nn.functional.dropout`.
    Args: values of any shape and floating dtype; p in [0, 1).
    """
    if p == 0:
        return values
    if values.device.type != "cpu" or values.dtype not in _DTYPES or native.load("cpu"):
        return F.dropout(values, p)
    seed = torch.randint(2**63 - 1, (1,))
    dropped: Tensor = torch.ops.mixkd_fast.dropout(values, seed, p)
    return dropped


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
    (seed,) = ctx.saved_tensors
    return torch.ops.mixkd_fast.dropout(grad_output, seed, ctx.p), None, None


def _fake(values: Tensor, seed: Tensor, p: float) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


LIBRARY.define("dropout(Tensor input, Tensor seed, float p) -> Tensor")
torch.library.register_fake("mixkd_fast::dropout", _fake, lib=LIBRARY)
torch.library.register_autograd("mixkd_fast::dropout", _backward, setup_context=_save, lib=LIBRARY)
