"""What a plan takes from the teacher store of a run, if it is here."""

from dataclasses import dataclass
from pathlib import Path

from mixkd_fast.configuration import Config
from mixkd_fast.offline.manifest import MANIFEST, origin_of, read_json

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_BYTES_OF_CLASS = 8
"""Of a kept class in a batch: its number, and its log-probability in fp32."""


@dataclass(frozen=True)
class StoredAnswers:
    """A teacher's answers that are read and not computed."""

    position_bytes: int
    """Beside every position of the clean rows."""
    head_bytes: int = 0
    """Of the kept output layer, kind "hidden"."""
    num_classes: int = 0
    """Of that layer."""
    width: int = 0
    """Of its hidden states."""


def stored_answers(config: Config) -> StoredAnswers | None:
    """Of `teacher.offline`; None without it, or where it cannot be read here. Raises: DataError if it is no store."""
    if config.teacher is None or config.teacher.offline is None:
        return None
    path = Path(config.teacher.offline) / MANIFEST
    content = read_json(path)
    if content is None:
        return None
    origin = origin_of(content.get("origin", {}), path)
    if origin.kind != "hidden":
        return StoredAnswers((origin.k or 0) * _BYTES_OF_CLASS)
    width = origin.width or 0
    return StoredAnswers(width * _BYTES[origin.dtype], int(content["head"]["bytes"]), origin.num_classes, width)
