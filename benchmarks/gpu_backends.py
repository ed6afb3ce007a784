"""Are the kernels for a GPU really there? python -m benchmarks.gpu_backends

Prints the table of backends; exit status 1 if one that a GPU should have is missing, each with its reason.
"""

import os
import sys

import torch

from mixkd_fast.ops import backends

WITHOUT_KERNELS = {("relation_kl", "cuda")}
"""What has none by design: its kernels for GPUs are Triton's."""


def main() -> None:
    backends.main()
    reasons = missing()
    if reasons:
        sys.exit("missing on this machine: " + "; ".join(reasons))


def missing() -> list[str]:
    """What keeps the compiled kernels from being tested here; empty if nothing does."""
    if not torch.cuda.is_available():
        return ["PyTorch finds no CUDA device here"]
    found = [
        f"{row.op} by {row.backend}: {row.reason}"
        for row in backends.available()
        if row.backend in ("cuda", "triton") and not row.available and (row.op, row.backend) not in WITHOUT_KERNELS
    ]
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        found.append("TRITON_INTERPRET is set: Triton would interpret its kernels, not compile them")
    return found


if __name__ == "__main__":
    main()
