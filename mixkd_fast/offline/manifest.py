"""What a teacher store says of itself: of what it was made, and of which files it consists.

folder/manifest.json             there once the store is whole: origin, and size, rows, tokens and sha256 of every shard
folder/shard-00000.safetensors   the records of some consecutive rows
folder/head.safetensors          kind "hidden": the teacher's output layer
folder/writing.json              while it is being written: the origin; beside each finished shard stands a .json
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from mixkd_fast.checkpoint import sync
from mixkd_fast.errors import DataError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
WRITING = "writing.json"
HEAD = "head.safetensors"
ASIDE = ".writing-"

StoreKind = Literal["top_k", "hidden", "nll"]
KINDS: tuple[str, ...] = get_args(StoreKind)
StoreDtype = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Origin:
    """What decides about every byte of a store, and what a run compares with its own."""

    kind: StoreKind
    dtype: StoreDtype
    """Of log-probabilities or hidden states; "fp32" of sums of negative log-likelihoods."""
    teacher: str
    """Its name, for people."""
    teacher_hash: str
    precision: str
    """Arithmetic of the teacher."""
    tokenizer_hash: str
    corpus_hash: str
    """Of texts and row numbers."""
    rows_hash: str
    """`TokenRows.content_hash`: of texts, tokenizer, max_length, and how instructions are written."""
    max_length: int
    num_rows: int
    num_tokens: int
    """Targets of all rows: each has one record (of kind "nll" they are summed per row)."""
    num_classes: int
    """Of the teacher's head."""
    shard_rows: tuple[int, ...]
    """Where shards end: shard i holds the rows shard_rows[i] to shard_rows[i + 1] - 1."""
    k: int | None = None
    temperature: float | None = None
    """Of the log-probabilities of kind "top_k"."""
    width: int | None = None
    """Of hidden states."""
    softcap: float | None = None
    scale: float = 1.0
    format: int = FORMAT_VERSION

    @property
    def num_shards(self) -> int:
        """Number of shard files."""
        return len(self.shard_rows) - 1


_NAMES = {
    "format": "format version",
    "teacher_hash": "teacher",
    "tokenizer_hash": "tokenizer",
    "corpus_hash": "corpus (texts and row numbers)",
    "rows_hash": "tokenised rows (prompt template, packing)",
    "shard_rows": "sizes of shards",
    "precision": "teacher's precision",
}
# A difference in the first of these explains differences in those that follow it.
_CAUSES = {"rows_hash": ("tokenizer_hash", "corpus_hash", "max_length"), "shard_rows": ("rows_hash", "k", "dtype")}
_CONSEQUENCES = ("num_rows", "num_tokens", "teacher")


def differences(found: Origin, wanted: dict[str, Any]) -> list[str]:
    """What is not as wanted, in words; facts that follow from others that differ are left out."""
    have = asdict(found)
    names = [name for name, value in wanted.items() if have[name] != value and name not in _CONSEQUENCES]
    if "rows_hash" in names and set(names) & set(_CAUSES["rows_hash"]):
        names.remove("rows_hash")
    if "shard_rows" in names and len(names) > 1:
        names.remove("shard_rows")
    texts = []
    for name in names:
        theirs, ours = have[name], wanted[name]
        if name == "teacher_hash" and "teacher" in wanted:
            theirs, ours = f"{have['teacher']} {theirs}", f"{wanted['teacher']} {ours}"
        texts.append(f"{_NAMES.get(name, name)}: {_brief(theirs)} in the store, {_brief(ours)} here")
    return texts


def _brief(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{len(value) - 1} shards"
    words = str(value).split(" ")
    words[-1] = words[-1][:12] if len(words[-1]) == 64 else words[-1]
    return " ".join(words)


def shard_name(number: int) -> str:
    """File of a shard."""
    return f"shard-{number:05d}.safetensors"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write aside and rename, flushed to disk."""
    aside = path.with_name(f"{ASIDE}{path.name}")
    aside.write_text(json.dumps(content, indent=1))
    sync(aside)
    os.replace(aside, path)
    sync(path.parent)


def origin_of(content: dict[str, Any], where: Path) -> Origin:
    """The origin in a manifest. Raises: DataError if it is another format's."""
    facts = dict(content)
    if facts.get("format") != FORMAT_VERSION:
        raise DataError(f"{where} is a teacher store of format {facts.get('format')!r}; allowed: {FORMAT_VERSION}")
    try:
        return Origin(**{**facts, "shard_rows": tuple(facts["shard_rows"])})
    except (TypeError, KeyError) as error:
        raise DataError(f"{where} is not a teacher store's manifest ({error})") from error


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a file, None if it is not there or unreadable."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        return content
    except (OSError, ValueError):
        return None
