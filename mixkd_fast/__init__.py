"""mixkd_fast: a training engine for knowledge distillation with MixKD at its heart.

The losses need torch alone; `distill` and the methods load what extra [train] brings when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mixkd_fast.losses import KDLoss, LinearKDLoss, kd_loss, linear_kd_loss
from mixkd_fast.version import __version__

if TYPE_CHECKING:
    from mixkd_fast.distillation import Result, distill
    from mixkd_fast.methods import KD, FineTune, MixKD


__all__ = [
    "KD",
    "FineTune",
    "KDLoss",
    "LinearKDLoss",
    "MixKD",
    "Result",
    "__version__",
    "distill",
    "kd_loss",
    "linear_kd_loss",
]

_HOMES = {
    "distill": "mixkd_fast.distillation",
    "Result": "mixkd_fast.distillation",
    "FineTune": "mixkd_fast.methods",
    "KD": "mixkd_fast.methods",
    "MixKD": "mixkd_fast.methods",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
