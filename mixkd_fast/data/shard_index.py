"""Where the rows of many Parquet and JSONL files lie, so that any of them is found without reading what is before it.

A block is what is read at once: a row group of a Parquet file, or 4096 lines of a JSONL file. The index is built once
(Parquet: from the files' footers; JSONL: one pass over the lines) and kept in the cache folder. Every block of JSONL
files has the columns of all of them, null where its rows have no such field.
"""

import base64
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet
from numpy.typing import NDArray

from mixkd_fast.errors import DataError

_FORMAT_VERSION = 2
_LINES = 4096
_ENDINGS = (".parquet", ".jsonl")


@dataclass(frozen=True)
class ShardIndex:
    """The blocks of all files, in the order of the files."""

    paths: tuple[str, ...]
    files: NDArray[np.int64]
    """[blocks]: number of the block's file."""
    starts: NDArray[np.int64]
    """[blocks]: number of the row group, or first byte of the lines."""
    ends: NDArray[np.int64]
    """[blocks]: byte behind the lines; -1 for a row group."""
    rows: NDArray[np.int64]
    """[blocks]: rows of the block, at least 1."""
    digest: str
    """sha256 over the files' names, sizes and blocks."""
    columns: tuple[str, ...]
    """The columns of all files."""
    fields: pa.Schema
    """Those of the JSONL files whose values are of one type in all of them."""

    @property
    def num_rows(self) -> int:
        """Rows of all files."""
        return int(self.rows.sum())

    @cached_property
    def first_rows(self) -> NDArray[np.int64]:
        """[blocks]: number of the block's first row, counted through all files."""
        return np.cumsum(self.rows) - self.rows

    def place(self, block: int) -> tuple[str, int]:
        """The file of a block, and the number of its first row there."""
        file = int(self.files[block])
        first_block = int(np.searchsorted(self.files, file))
        return self.paths[file], int(self.first_rows[block] - self.first_rows[first_block])

    def read(self, block: int) -> pa.Table:
        """The rows of a block. Raises: DataError if the file is no longer as it was, or not what its name says."""
        path, first = self.place(block)
        start, end = int(self.starts[block]), int(self.ends[block])
        try:
            if end < 0:
                with pa.parquet.ParquetFile(path) as file:
                    table = file.read_row_group(start)
            else:
                with open(path, "rb") as lines:
                    lines.seek(start)
                    data = lines.read(end - start)
                table = _parsed(data, self.fields)
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f'file "{path}" (task.train_files), rows from {first} on: cannot be read: {error}'
            ) from error
        if len(table) != self.rows[block]:
            raise DataError(
                f'file "{path}" (task.train_files), rows from {first} on: there are {len(table)} where there were '
                f"{self.rows[block]}: the file was changed while it was in use"
            )
        return table


def open_shards(patterns: Sequence[str], cache_dir: Path | None) -> ShardIndex:
    """The index of the files that names or patterns (such as "corpus/*.parquet") stand for, read or made.

    Args: cache_dir = where it is kept; None, or one that cannot be written: it is made every time.
    Raises: DataError for what does not exist, is of another kind, or has no rows.
    """
    paths = [path for pattern in patterns for path in _matching(pattern)]
    facts = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths]
    key = hashlib.sha256(json.dumps([_FORMAT_VERSION, _LINES, facts]).encode()).hexdigest()
    kept = None if cache_dir is None else cache_dir / "stream_index" / f"{key}.json"
    found = None if kept is None else _load(kept)
    if found is None:
        found = [_FileIndex.of(path) for path in paths]
        if kept is not None:
            _save(kept, found)
    counts = [len(file.blocks) for file in found]
    flat = np.array([block for file in found for block in file.blocks], dtype=np.int64).reshape(-1, 3)
    if not len(flat):
        raise DataError(f"task.train_files: {', '.join(paths[:3])}: there are no rows; at least one is needed")
    # Times are left out: a copy of the files elsewhere is the same corpus.
    content = [(Path(path).name, size, file.blocks) for (path, size, _), file in zip(facts, found, strict=True)]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    files = np.repeat(np.arange(len(paths)), counts)
    columns = tuple(dict.fromkeys(name for file in found for name in file.columns))
    fields = _common_fields([file.fields for file in found])
    return ShardIndex(tuple(paths), files, flat[:, 0], flat[:, 1], flat[:, 2], digest, columns, fields)


def _matching(pattern: str) -> list[str]:
    path = str(Path(pattern).expanduser())
    found = sorted(glob(path)) if any(sign in path for sign in "*?[") else [path] * os.path.isfile(path)
    if not found:
        raise DataError(f'"{pattern}" (task.train_files) names no file; relative paths start at {Path.cwd()}')
    for name in found:
        if not name.endswith(_ENDINGS):
            raise DataError(f'file "{name}" (task.train_files): rows are streamed from {" and ".join(_ENDINGS)} files')
    return found


@dataclass(frozen=True)
class _FileIndex:
    """What the index knows of one file."""

    blocks: list[list[int]]
    """[start, end, rows] of every block; see `ShardIndex`."""
    columns: list[str]
    fields: pa.Schema
    """Of a JSONL file; see `ShardIndex`."""

    @classmethod
    def of(cls, path: str) -> "_FileIndex":
        """Raises: DataError for a file that cannot be read."""
        try:
            return _parquet_index(path) if path.endswith(".parquet") else _lines_index(path)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f'file "{path}" (task.train_files) cannot be read: {error}') from error


def _parquet_index(path: str) -> _FileIndex:
    with pa.parquet.ParquetFile(path) as file:
        groups = range(file.metadata.num_row_groups)
        found = [[group, -1, file.metadata.row_group(group).num_rows] for group in groups]
        return _FileIndex([block for block in found if block[2] > 0], file.schema_arrow.names, pa.schema([]))


def _lines_index(path: str) -> _FileIndex:
    blocks: list[list[int]] = []
    schemas: list[pa.Schema] = []
    block: list[bytes] = []
    start = rows = 0

    def end_block() -> None:
        data = b"".join(block)
        schemas.append(_parsed(data, pa.schema([])).schema)
        blocks.append([start, start + len(data), rows])

    with open(path, "rb") as lines:
        for line in lines:
            block.append(line)
            rows += not line.isspace()
            if rows == _LINES:
                end_block()
                start, rows, block = blocks[-1][1], 0, []
    if rows:
        end_block()
    names = dict.fromkeys(name for schema in schemas for name in schema.names)
    return _FileIndex(blocks, list(names), _common_fields(schemas))


def _parsed(data: bytes, fields: pa.Schema) -> pa.Table:
    """Lines as a table that has these fields, whatever they hold."""
    return pa.json.read_json(
        io.BytesIO(data),
        pa.json.ReadOptions(block_size=max(len(data), 1)),
        pa.json.ParseOptions(explicit_schema=fields),
    )


def _common_fields(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """The fields of all schemas; without those that are of one type here and of another, not to be united, there."""
    found: dict[str, pa.Schema | None] = {}
    for schema in schemas:
        for field in schema:
            one, before = pa.schema([field]), found.get(field.name, pa.schema([]))
            if before is None:
                continue
            try:
                found[field.name] = pa.unify_schemas([before, one], promote_options="permissive")
            except pa.ArrowException:
                found[field.name] = None
    return pa.schema([schema.field(0) for schema in found.values() if schema is not None])


def _load(path: Path) -> list[_FileIndex] | None:
    try:
        content: Any = json.loads(path.read_text())
        return [_FileIndex(blocks, names, _schema_of(fields)) for blocks, names, fields in content]
    except (OSError, ValueError, pa.ArrowException):
        return None


def _schema_of(text: str) -> pa.Schema:
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text)))


def _save(path: Path, found: Sequence[_FileIndex]) -> None:
    """Written aside and renamed; what cannot be kept is made again by the next run."""
    content = [(file.blocks, file.columns, base64.b64encode(file.fields.serialize()).decode()) for file in found]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".writing-", delete=False) as aside:
            json.dump(content, aside)
        os.replace(aside.name, path)
    except OSError:
        return
