"""A frozen model's linear layers in 8 bits: int8 on the CPU, fp8 on a GPU (and, slowly, on a CPU)."""

import copy
import warnings
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import ScalingType

Quantization = Literal["int8", "fp8"]
FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max
_MULTIPLE = 16
"""What the products of 8-bit numbers want both widths of a matrix to be a multiple of."""


def why_not(quantization: Quantization, device: torch.device) -> str:
    """What keeps a device from running it, or ""."""
    if quantization == "int8":
        return "" if device.type == "cpu" else f"runs on the CPU only, and this is {device}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return f"needs a GPU of compute capability 9.0, and {torch.cuda.get_device_name(device)} has less"
    return ""


def quantize(model: nn.Module, quantization: Quantization) -> nn.Module:
    """A copy of the model in eval mode; int8: of fp32 linear layers and all else; fp8: in bf16 but for those layers.

    Weights are rounded once, inputs as they come: int8 by torch.ao's dynamic quantisation, fp8 by `Fp8Linear`.
    """
    if quantization == "fp8":
        narrow = copy.deepcopy(model).bfloat16()
        for name, module in list(narrow.named_modules()):
            if type(module) is nn.Linear and not (module.in_features % _MULTIPLE or module.out_features % _MULTIPLE):
                narrow.set_submodule(name, Fp8Linear(model.get_submodule(name)))
        return narrow.eval()
    with warnings.catch_warnings():
        # torch names torchao as its successor, which needs packages of its own for the CPU.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        from torch.ao.quantization import quantize_dynamic

        quantized: nn.Module = quantize_dynamic(copy.deepcopy(model).float(), {nn.Linear}, dtype=torch.qint8)
    return quantized.eval()


class Fp8Linear(nn.Module):
    """y = x W^T + b with W and x in e4m3, each row of both scaled to e4m3's range; sums in fp32, y in bf16."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Module) -> None:
        """Args: linear = an nn.Linear, whose widths are multiples of 16."""
        super().__init__()
        assert isinstance(linear, nn.Linear)
        weight, scale = _rounded(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.reshape(1, -1))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().bfloat16())

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in] of any floating dtype -> bf16 [..., out]."""
        rows, scales = _rounded(inputs.reshape(-1, inputs.shape[-1]))
        outputs = F.scaled_mm(
            rows,
            self.weight.t(),
            scales,
            ScalingType.RowWise,
            self.scale,
            ScalingType.RowWise,
            output_dtype=torch.bfloat16,
        )
        outputs = outputs.view(*inputs.shape[:-1], -1)
        return outputs if self.bias is None else outputs + self.bias


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 [N, K] and the scales [N, 1], fp32, that give the rows back."""
    wide = rows.float()
    scales = wide.abs().amax(1, keepdim=True).clamp(min=1e-12) / _LARGEST
    return (wide / scales).clamp(-_LARGEST, _LARGEST).to(FP8), scales
