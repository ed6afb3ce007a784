"""Which implementation of an op runs on a device, and why another one does not.

`python -m mixkd_fast.ops.backends` prints the table. A new backend is one module and one row of `TABLE`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from mixkd_fast.ops import RowLosses


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


def _reference_kd_loss() -> RowLosses:
    from mixkd_fast.ops.reference import row_losses

    return row_losses


NOT_IN_THIS_VERSION = "not part of this version"
TABLE: dict[tuple[str, str], Callable[[], RowLosses] | str] = {
    ("kd_loss", "reference"): _reference_kd_loss,
    ("kd_loss", "cpu"): NOT_IN_THIS_VERSION,
    ("kd_loss", "triton"): NOT_IN_THIS_VERSION,
    ("kd_loss", "cuda"): NOT_IN_THIS_VERSION,
}
"""(op, backend) -> what loads it, or why it is missing."""


def available(op: str | None = None) -> list[Row]:
    """The table, of one op or of all."""
    return [
        Row(row_op, backend, False, entry) if isinstance(entry, str) else Row(row_op, backend, True, "")
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
        return Selection(requested, "requested")
    tried = [rows[name] for name in preferred(device) if name in rows]
    passed: list[str] = []
    for row in tried:
        if row.available:
            return Selection(row.backend, "; ".join(passed) or "first choice on this device")
        passed.append(f"{row.backend}: {row.reason}")
    raise RuntimeError(f"no backend of {op} is available on {device}: {'; '.join(passed)}")


def load(op: str, name: str) -> RowLosses:
    """The function of a backend that `select` returned."""
    entry = TABLE[op, name]
    if isinstance(entry, str):
        raise RuntimeError(f"backend {name!r} of {op} is not available: {entry}")
    return entry()


def main() -> None:
    """Print the table and what "auto" takes on this machine."""
    for row in available():
        print(f"{row.op:10} {row.backend:10} {'available' if row.available else 'missing: ' + row.reason}")
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for op in sorted({key[0] for key in TABLE}):
        for device in devices:
            selection = select(op, device)
            print(f'{op} on {device}: "auto" takes {selection.name} ({selection.reason})')


if __name__ == "__main__":
    main()
