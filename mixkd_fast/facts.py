"""Facts about the machine that the start-up summary and summary.json both state."""

import torch

from mixkd_fast.ops import backends


def used_backends(device: torch.device, language: bool = False) -> dict[str, dict[str, str]]:
    """Op -> the implementation it uses on this device, and why. Args: language = for causal language models."""
    ops = ("linear_kd_loss" if language else "kd_loss", "mix_embeddings")
    chosen = {op: backends.select(op, device) for op in ops}
    return {op: {"name": selection.name, "reason": selection.reason} for op, selection in chosen.items()}


def device_name(device: torch.device) -> str:
    """cuda (name of the GPU), or cpu with its threads."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"
