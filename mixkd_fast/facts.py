"""Facts about the machine that the start-up summary and summary.json both state."""

import torch

from mixkd_fast.ops import backends

_OPS = ("kd_loss", "mix_embeddings")


def used_backends(device: torch.device) -> dict[str, dict[str, str]]:
    """Op -> the implementation it uses on this device, and why."""
    chosen = {op: backends.select(op, device) for op in _OPS}
    return {op: {"name": selection.name, "reason": selection.reason} for op, selection in chosen.items()}


def device_name(device: torch.device) -> str:
    """cuda (name of the GPU), or cpu with its threads."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"
