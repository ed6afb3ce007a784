"""This project's losses in other people's trainers. Each class loads its trainer's package when it is first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixkd_fast.integrations.transformers_trainer import DistillTrainer
    from mixkd_fast.integrations.trl_gkd import GKDTrainer

__all__ = ["DistillTrainer", "GKDTrainer"]

# Class -> (module, extra of this package that brings what the module needs).
_HOMES = {
    "DistillTrainer": ("mixkd_fast.integrations.transformers_trainer", "transformers"),
    "GKDTrainer": ("mixkd_fast.integrations.trl_gkd", "trl"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, extra = _HOMES[name]
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "mixkd_fast":
            raise
        raise ModuleNotFoundError(
            f"{name} needs the package {error.name!r}, which is not installed: pip install 'mixkd-fast[{extra}]'",
            name=error.name,
        ) from error
