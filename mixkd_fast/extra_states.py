"""What modules keep through `get_extra_state`, in a file of its own beside DeepSpeed's.

checkpoints/step-00000120/state/extra_states.pt   name of the module -> its state, on the CPU

Such a state is the same on every rank, so it resumes on any number of them; DeepSpeed's converter knows tensors alone.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixkd_fast.errors import CheckpointError

FILE = "extra_states.pt"
_KEY = "_extra_state"


class ExtraStates:
    """The extra states of all modules within one, which its `state_dict` no longer holds."""

    def __init__(self, module: nn.Module) -> None:
        self._owners: dict[str, nn.Module] = {
            name: part
            for name, part in module.named_modules()
            if type(part).get_extra_state is not nn.Module.get_extra_state
        }
        self._missing = set(self._owners)
        # torch marks the hook, which a bound method does not allow.
        untyped: Any = module
        untyped.register_state_dict_post_hook(partial(self._leave_out))
        module.register_load_state_dict_post_hook(self._excuse)

    def save(self, folder: Path) -> None:
        """Write all states, if there are any."""
        if self._owners:
            torch.save({name: owner.get_extra_state() for name, owner in self._owners.items()}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Give every module its state, once the rest of the checkpoint is loaded.

        Raises: CheckpointError if there is none for one of them.
        """
        path = folder / FILE
        # Checkpoints without the file hold them in DeepSpeed's, which has given them to the modules.
        saved = torch.load(path, map_location="cpu", weights_only=False) if path.is_file() else {}
        lacking = sorted(self._missing - saved.keys())
        if lacking:
            raise CheckpointError(
                f"{folder} holds no state of {', '.join(lacking)} that could be read; resume on as many ranks as wrote "
                "it, with the same method"
            )
        for name, owner in self._owners.items():
            if name in saved:
                owner.set_extra_state(saved[name])

    def _keys(self) -> dict[str, str]:
        """Key in a state dict -> name of the module."""
        return {f"{name}.{_KEY}" if name else _KEY: name for name in self._owners}

    def _leave_out(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for key in self._keys():
            state.pop(prefix + key, None)

    def _excuse(self, module: nn.Module, incompatible: Any) -> None:
        keys = self._keys()
        self._missing = {keys[key] for key in incompatible.missing_keys if key in keys}
        incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in keys]
