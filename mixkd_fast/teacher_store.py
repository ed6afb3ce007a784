"""The teacher's logits of clean rows on disk: computed once, read by later epochs, resumed runs and other students.

folder/<key>/logits.rows     [rows, C + 1] words of 4 bytes: the logits of a row in fp32, then its checksum

Every process that uses an entry maps the same file and writes to it without locks. What keeps that right is the
checksum, over row number and logits, written after them: a row that is torn (by a kill, a power loss or two writers
at once), altered or not there yet fails it, and counts as missing. The store is a cache; nothing is lost with it.
"""

import contextlib
import hashlib
import io
import json
import mmap
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mixkd_fast import distributed, store_entries
from mixkd_fast.checkpoint import file_sha256

_BLOCK_BYTES = 1 << 24  # of rows that are counted or exchanged at once


class TeacherStore:
    """Logits [rows, C] fp32 by row number, memory-mapped, each row with a checksum.

    What `read` gives for a row is what was first written, which may differ in the last bits from what the teacher
    gives for it in another batch. A run that is to resume bit for bit therefore uses what `read` gives after `write`
    too, and calls `share` before each checkpoint. A closed store has no rows.
    """

    def __init__(self, entry: Path, num_rows: int, num_classes: int) -> None:
        """Map an entry that is whole. Callers want `open`. Raises: OSError if it cannot be mapped."""
        self._entry = entry
        self._num_rows, self._num_classes = num_rows, num_classes
        with (entry / store_entries.ROWS).open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), num_rows * (num_classes + 1) * 4)
            status = os.fstat(file.fileno())
        self._file = (_machine(), status.st_dev, status.st_ino)
        self._files = [self._file]  # of every rank
        self._records: NDArray[np.uint32] = np.frombuffer(self._map, np.uint32).reshape(num_rows, num_classes + 1)
        self._fresh: list[NDArray[np.int64]] = []
        stream = hashlib.shake_256(b"mixkd_fast teacher store").digest(8 * (num_classes + 2))
        self._offset, self._row_factor, *_ = numbers = np.frombuffer(stream, "<u8").astype(np.uint64)
        self._factors: NDArray[np.uint64] = numbers[2:]

    @classmethod
    def open(cls, folder: Path, key: str, num_rows: int, num_classes: int, max_bytes: int) -> "TeacherStore | None":
        """The entry `key` of a folder, made if it is not there or of another shape. Collective.

        A row takes 4 * C + 4 bytes (the manifest, some 100 bytes, comes on top). Of more rows than max_bytes holds
        the first are kept. Other entries are removed, least recently used first, until all fit in max_bytes.
        Returns: None on every rank if max_bytes holds no row or, with one warning, if any rank cannot write.
        """
        kept = min(num_rows, max_bytes // (4 * num_classes + 4))
        if kept < 1:
            return None
        store: TeacherStore | None = None
        error: OSError | None = None
        for first in (True, False):  # one rank of a machine makes what the others then find
            try:
                if first == (distributed.local_rank() == 0):
                    folder.mkdir(parents=True, exist_ok=True)
                    store_entries.make_room(folder, key, max_bytes - kept * (4 * num_classes + 4))
                    store_entries.make_entry(folder / key, kept, num_classes)
                    store = cls(folder / key, kept, num_classes)
            except OSError as caught:
                error = caught
            message = distributed.first_error(error)
            if message is not None:
                distributed.say(
                    f"The teacher's logits are not kept: {folder} cannot be written ({message}). "
                    "Training goes on and runs the teacher in every epoch."
                )
                return None
        assert store is not None
        store._files = distributed.gather_objects(store._file)
        return store

    def read(self, row_ids: NDArray[np.int64]) -> NDArray[np.float32] | None:
        """A copy of the logits [len(row_ids), C] of these rows, or None unless all are there and intact."""
        if not self._has_place(row_ids).all():
            return None
        words, intact = self._rows(row_ids)
        return words.view(np.float32) if intact.all() else None

    def write(self, row_ids: NDArray[np.int64], logits: NDArray[np.float32]) -> None:
        """Keep the logits [len(row_ids), C] of rows that are not there yet; others keep what they have.

        Rows with a value that is not finite, and rows beyond max_bytes, are not kept.
        """
        self._fresh.append(self._put(row_ids, logits))

    def share(self) -> None:
        """Exchange what was written since the last call with ranks that see another file, and flush. Collective."""
        if len(set(self._files)) > 1:
            self._exchange(np.concatenate([np.empty(0, np.int64), *self._fresh]))
        self._fresh.clear()
        # A disk that fails later costs rows, which the checksums notice; an entry that was removed is used on.
        with contextlib.suppress(OSError):
            self._map.flush()
            os.utime(self._entry)

    @property
    def num_filled(self) -> int:
        """Rows that are there and intact. Reads the whole file."""
        return int(np.count_nonzero(self.filled()))

    def filled(self) -> NDArray[np.bool_]:
        """Which rows are there and intact, [kept rows]. Reads the whole file."""
        block = self._rows_per_block
        starts = range(0, self._num_rows, block)
        parts = [self._rows(np.arange(start, min(start + block, self._num_rows)))[1] for start in starts]
        return np.concatenate([np.empty(0, np.bool_), *parts])

    def close(self) -> None:
        """Unmap the file."""
        self._num_rows = 0
        self._records = np.empty((0, self._num_classes + 1), np.uint32)
        self._map.close()

    @property
    def _rows_per_block(self) -> int:
        return max(1, _BLOCK_BYTES // (4 * self._num_classes + 4))

    def _has_place(self, row_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        return row_ids.view(np.uint64) < self._num_rows  # negative ones are huge

    def _rows(self, row_ids: NDArray[np.int64]) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        """Copies of the rows' words [N, C], and which of them pass their checksums [N]."""
        records = self._records.take(row_ids, axis=0)
        words = np.ascontiguousarray(records[:, :-1])
        return words, self._checksums(row_ids, words) == records[:, -1]

    def _checksums(self, row_ids: NDArray[np.int64], words: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """uint32 [N], never 0: multilinear hashing modulo 2^64, high half; two given rows collide by chance 2^-32."""
        sums: NDArray[np.uint64] = words @ self._factors
        sums += row_ids.view(np.uint64) * self._row_factor
        sums += self._offset
        sums >>= np.uint64(32)
        # A file of zeros is one of missing rows.
        checksums: NDArray[np.uint32] = np.maximum(sums, 1).astype(np.uint32)
        return checksums

    def _put(self, row_ids: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.int64]:
        """Write what is missing and may be kept; returns the numbers of the rows that were written."""
        shape = (len(row_ids), self._num_classes)
        if logits.shape != shape or logits.dtype != np.float32:
            raise ValueError(f"logits are {logits.dtype} {list(logits.shape)}; allowed: float32 {list(shape)}")
        # A batch that straddles two epochs may hold a row twice: the first one counts.
        ids, first = np.unique(row_ids, return_index=True)
        values = logits[first]
        wanted = self._has_place(ids) & np.isfinite(values).all(1)
        ids, values = ids[wanted], values[wanted]
        missing = ~self._rows(ids)[1]
        ids, words = ids[missing], values[missing].view(np.uint32)
        self._records[ids, :-1] = words
        self._records[ids, -1] = self._checksums(ids, words)
        return ids

    def _exchange(self, row_ids: NDArray[np.int64]) -> None:
        writes_here = self._files.index(self._file) == distributed.rank()
        block = self._rows_per_block
        for start in range(0, max(distributed.gather_objects(len(row_ids))), block):
            part = row_ids[start : start + block]
            words, intact = self._rows(part)
            parts = distributed.gather_objects((part[intact], words[intact].view(np.float32)))
            for file, (their_ids, their_logits) in zip(self._files, parts, strict=True):
                if writes_here and file != self._file:
                    self._put(their_ids, their_logits)


def store_key(model: nn.Module, content_hash: str, *facts: str) -> str:
    """What decides about the logits, as hex sha256: the model's class, configuration and state, the rows, the facts.

    Args: content_hash of the TokenRows; facts = whatever else decides (precision, quantisation, ...).
    Raises: ValueError if parameters are partitioned by ZeRO-3.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError("the model's parameters are partitioned by ZeRO-3; allowed: whole ones, or store_key_of_files")
    to_dict = getattr(getattr(model, "config", None), "to_dict", dict)
    settings = {name: value for name, value in to_dict().items() if name != "_name_or_path"}
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    digest = _digest(content_hash, *facts, kind, json.dumps(settings, sort_keys=True, default=str))
    # The state has what quantised layers keep beside parameters; buffers that are not saved are not in it.
    state = {**model.state_dict(), **dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, value in sorted(state.items()):
        digest.update(f"\n{name} ".encode())
        if type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided and not value.is_quantized:
            digest.update(f"{value.dtype} {list(value.shape)} ".encode())
            # As bytes, because numpy has no bf16.
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            stream = io.BytesIO()
            torch.save(value, stream)
            digest.update(stream.getbuffer())
    return digest.hexdigest()


def store_key_of_files(paths: Sequence[Path], content_hash: str, *facts: str) -> str:
    """The same of a model by its files (weights and config.json), whatever folder they lie in."""
    files = [f"{path.name} {file_sha256(path)}" for path in sorted(paths, key=lambda path: path.name)]
    return _digest(content_hash, *facts, *files).hexdigest()


def _digest(*parts: str) -> "hashlib._Hash":
    return hashlib.sha256(json.dumps([store_entries.FORMAT_VERSION, *parts]).encode())


def _machine() -> str:
    """A name that this machine shares with no other, and all its containers with it."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text() if boot.exists() else platform.node()
