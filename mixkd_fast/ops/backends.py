"""Which implementation of an op runs on a device, and why another one does not.

`python -m mixkd_fast.ops.backends` prints the table. A new backend is one module and one row of `TABLE`.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from mixkd_fast.ops import native


class Selection(NamedTuple):
    """The backend that was chosen, and why."""

    name: str
    reason: str


class Row(NamedTuple):
    """Whether `backend` of `op` can be used here; if not, `reason` says why."""

    op: str
    backend: str
    available: bool
    reason: str


class Entry(NamedTuple):
    """A backend of an op: what imports its function, and what says why it cannot be used ("" if it can)."""

    load: Callable[[], Callable[..., Any]]
    missing: Callable[[], str]


def _always_there() -> str:
    return ""


def _cpu_missing() -> str:
    return native.load("cpu")


def _cuda_missing() -> str:
    return native.load("cuda")


@functools.cache
def _triton_missing() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install mixkd-fast[triton]"
    return "" if torch.cuda.is_available() else "torch sees no CUDA device"


def _reference_kd_loss() -> Callable[..., Any]:
    from mixkd_fast.ops.reference import kd_loss

    return kd_loss


def _fused_kd_loss() -> Callable[..., Any]:
    from mixkd_fast.ops.fused import kd_loss

    return kd_loss


def _triton_kd_loss() -> Callable[..., Any]:
    from mixkd_fast.ops.fused import kd_loss_triton

    return kd_loss_triton


def _reference_linear_kd_loss() -> Callable[..., Any]:
    from mixkd_fast.ops.linear_reference import linear_kd_loss

    return linear_kd_loss


def _fused_linear_kd_loss() -> Callable[..., Any]:
    from mixkd_fast.ops.linear_fused import linear_kd_loss

    return linear_kd_loss


def _triton_linear_kd_loss() -> Callable[..., Any]:
    from mixkd_fast.ops.linear_fused import linear_kd_loss_triton

    return linear_kd_loss_triton


def _reference_mix_embeddings() -> Callable[..., Any]:
    from mixkd_fast.ops.mix_reference import mix_embeddings

    return mix_embeddings


def _fused_mix_embeddings() -> Callable[..., Any]:
    from mixkd_fast.ops.mix_schema import fused

    return fused


def _triton_mix_embeddings() -> Callable[..., Any]:
    from mixkd_fast.ops.mix_schema import fused_triton

    return fused_triton


def _reference_relation_kl() -> Callable[..., Any]:
    from mixkd_fast.ops.relation_reference import relation_kl

    return relation_kl


def _fused_relation_kl() -> Callable[..., Any]:
    from mixkd_fast.ops.relation_schema import fused

    return fused


def _triton_relation_kl() -> Callable[..., Any]:
    from mixkd_fast.ops.relation_schema import fused_triton

    return fused_triton


def _no_cuda_relation_kl() -> str:
    return "relation_kl has no CUDA kernel; its kernels for GPUs are Triton's"


TABLE: dict[tuple[str, str], Entry] = {
    ("kd_loss", "reference"): Entry(_reference_kd_loss, _always_there),
    ("kd_loss", "cpu"): Entry(_fused_kd_loss, _cpu_missing),
    ("kd_loss", "triton"): Entry(_triton_kd_loss, _triton_missing),
    ("kd_loss", "cuda"): Entry(_fused_kd_loss, _cuda_missing),
    ("linear_kd_loss", "reference"): Entry(_reference_linear_kd_loss, _always_there),
    ("linear_kd_loss", "cpu"): Entry(_fused_linear_kd_loss, _cpu_missing),
    ("linear_kd_loss", "triton"): Entry(_triton_linear_kd_loss, _triton_missing),
    ("linear_kd_loss", "cuda"): Entry(_fused_linear_kd_loss, _cuda_missing),
    ("mix_embeddings", "reference"): Entry(_reference_mix_embeddings, _always_there),
    ("mix_embeddings", "cpu"): Entry(_fused_mix_embeddings, _cpu_missing),
    ("mix_embeddings", "triton"): Entry(_triton_mix_embeddings, _triton_missing),
    ("mix_embeddings", "cuda"): Entry(_fused_mix_embeddings, _cuda_missing),
    ("relation_kl", "reference"): Entry(_reference_relation_kl, _always_there),
    ("relation_kl", "cpu"): Entry(_fused_relation_kl, _cpu_missing),
    ("relation_kl", "triton"): Entry(_triton_relation_kl, _triton_missing),
    ("relation_kl", "cuda"): Entry(_triton_relation_kl, _no_cuda_relation_kl),
}
"""(op, backend) -> what it is and why it may be missing. Its functions are plain imports: torch.compile traces them."""
REFERENCE_ONLY_IN_DOUBLE = ("triton", "cuda")


def available(op: str | None = None) -> list[Row]:
    """The table, of one op or of all."""
    return [
        Row(row_op, backend, not (reason := entry.missing()), reason)
        for (row_op, backend), entry in TABLE.items()
        if op in (None, row_op)
    ]


def preferred(device: torch.device | str) -> tuple[str, ...]:
    """The order in which "auto" tries backends on a device."""
    if torch.device(device).type == "cpu":
        return ("cpu", "reference")
    return ("cuda", "triton", "reference")


def select(op: str, device: torch.device | str, requested: str = "auto") -> Selection:
    """The backend that `op` uses on `device`.

    Args: requested is "auto" or a backend's name.
    Raises: ValueError for an unknown op or backend; RuntimeError, with the reason, for a missing backend.
    """
    rows = {row.backend: row for row in available(op)}
    if not rows:
        raise ValueError(f"op is {op!r}; allowed: {', '.join(sorted({key[0] for key in TABLE}))}")
    if requested != "auto":
        if requested not in rows:
            raise ValueError(f"backend is {requested!r}; allowed: auto, {', '.join(rows)}")
        if not rows[requested].available:
            raise RuntimeError(f"backend {requested!r} of {op} is not available: {rows[requested].reason}")
        if requested in ("cpu", "cuda") and torch.device(device).type != requested:
            raise RuntimeError(f"backend {requested!r} of {op} is for tensors on {requested}; these are on {device}")
        return Selection(requested, "requested")
    tried = [rows[name] for name in preferred(device) if name in rows]
    passed: list[str] = []
    for row in tried:
        if row.available:
            return Selection(row.backend, "; ".join(passed) or "first choice on this device")
        passed.append(f"{row.backend}: {row.reason}")
    raise RuntimeError(f"no backend of {op} is available on {device}: {'; '.join(passed)}")


def load(op: str, name: str) -> Callable[..., Any]:
    """The function of a backend that `select` or `resolve` named."""
    return TABLE[op, name].load()


_resolved: dict[tuple[str, str, str, bool], str] = {}


def resolve(op: str, device_type: str, requested: str, double: bool) -> str:
    """The backend `select` chooses, remembered; "auto" takes the reference for fp64 where no kernel computes in it."""
    key = (op, device_type, requested, double)
    name = _resolved.get(key)
    if name is None:
        name = select(op, device_type, requested).name
        if double and requested == "auto" and name in REFERENCE_ONLY_IN_DOUBLE:
            name = "reference"
        _resolved[key] = name
    return name


# What torch.compiler.assume_constant_result sets, without loading the compiler for those who do not use it.
vars(resolve)["_dynamo_marked_constant"] = True


def main() -> None:
    """Print the table and what "auto" takes on this machine."""
    for row in available():
        print(f"{row.op:14} {row.backend:10} {'available' if row.available else 'missing: ' + row.reason}")
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for op in sorted({key[0] for key in TABLE}):
        for device in devices:
            selection = select(op, device)
            print(f'{op} on {device}: "auto" takes {selection.name} ({selection.reason})')


if __name__ == "__main__":
    main()
