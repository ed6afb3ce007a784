"""The compiled libraries beside this package: loaded on first use, with the reason kept if one cannot be.

`setup.py` builds them: `_cpu` and `_cuda` hold the ops of csrc/ on LibTorch's stable ABI.
"""

import functools
import json
from pathlib import Path
from typing import Literal

import torch

Kind = Literal["cpu", "cuda"]
PACKAGE = Path(__file__).resolve().parent.parent
BUILD_REPORT = "_build.json"
"""What setup.py built and why it left something out: {kind: reason, empty if built}."""


@functools.cache
def load(kind: Kind) -> str:
    """Load a library once; returns why that is not possible, or "" when its ops are registered."""
    if kind == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    found = sorted(PACKAGE.glob(f"_{kind}.*so")) + sorted(PACKAGE.glob(f"_{kind}.*pyd"))
    if not found:
        return f"not built: {_why_not_built(kind)}"
    # The schemas come first: a kernel cannot be checked against one that is not there.
    from mixkd_fast.ops import bf16_product, dropout, mix_schema, relation_schema, schema  # noqa: F401

    try:
        torch.ops.load_library(str(found[0]))
    except (OSError, RuntimeError) as error:
        return f"{found[0].name} cannot be loaded: {str(error).splitlines()[0]}"
    return ""


def _why_not_built(kind: Kind) -> str:
    report = PACKAGE / BUILD_REPORT
    if not report.exists():
        return "the package was installed without its extensions: install with --no-build-isolation beside torch"
    reason: str = json.loads(report.read_text(encoding="utf-8")).get(kind) or "its library is missing; install again"
    return reason
