"""One part of a step, as the plan counts it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A part of one rank's step."""

    name: str
    flops: float
    bytes_moved: float
    """Bytes read and written in device memory, or sent to other ranks or from the host."""
    seconds: float
