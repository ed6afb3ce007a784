"""A finished store, read row by row through memory maps.

Legend of shape suffixes: B rows asked for, P their positions, K kept classes, H width, L padded positions.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixkd_fast.causal_lm import Head
from mixkd_fast.checkpoint import file_sha256
from mixkd_fast.data.next_tokens import IGNORED
from mixkd_fast.errors import DataError
from mixkd_fast.offline.manifest import HEAD, MANIFEST, WRITING, differences, origin_of, read_json, shard_name
from mixkd_fast.offline.shard_file import RECORDS, MappedTensors, row_checksum, row_span

if TYPE_CHECKING:
    from mixkd_fast.data.batching import Batch

_MOST_OPEN = 256


class OfflineStore:
    """What a teacher said of every row, by row number. Reading maps files; nothing is loaded whole."""

    def __init__(self, folder: str | Path, field: str) -> None:
        """Open a store. Sizes of files are checked here, every row's checksum when the row is read.

        Args: field = the configuration's, for messages.
        Raises: DataError if it is not there, not finished, or a file is not as long as it was.
        """
        self.folder, self._field = Path(folder), field
        content = read_json(self.folder / MANIFEST)
        if content is None:
            state = "holds no teacher store: manifest.json is missing; `mixkd-fast teach` makes one"
            if (self.folder / WRITING).exists():
                state = "is not finished; run the same `mixkd-fast teach` command again"
            raise DataError(f"{field} = {str(folder)!r} {state}")
        self.origin = origin_of(content["origin"], self.folder / MANIFEST)
        self._facts: dict[str, dict[str, Any]] = {shard_name(i): facts for i, facts in enumerate(content["shards"])}
        if "head" in content:
            self._facts[HEAD] = content["head"]
        for name, facts in self._facts.items():
            path = self.folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != facts["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise self._damaged(name, f"{found}, and the manifest says {facts['bytes']}")
        self._ends = np.asarray(self.origin.shard_rows[1:])
        self._shards: dict[int, MappedTensors] = {}

    def _damaged(self, name: str, what: str) -> DataError:
        return DataError(
            f"{self._field}: {self.folder / name} is damaged: it {what}. Run the same `mixkd-fast teach` command "
            "again, which makes damaged shards anew"
        )

    def require(self, wanted: dict[str, Any]) -> None:
        """Raise DataError that names every fact of `Origin` in which the store differs from what is wanted."""
        wrong = differences(self.origin, wanted)
        if wrong:
            raise DataError(f"{self._field} = {str(self.folder)!r} does not fit this run: {'; '.join(wrong)}")

    @property
    def num_bytes(self) -> int:
        """Of all shards and the head."""
        return sum(int(facts["bytes"]) for facts in self._facts.values())

    @property
    def record_bytes(self) -> int:
        """Of the shards alone."""
        return self.num_bytes - int(self._facts.get(HEAD, {"bytes": 0})["bytes"])

    def _shard(self, number: int) -> MappedTensors:
        if number not in self._shards:
            # Every map holds a file open, of which a process may not have many.
            while len(self._shards) >= _MOST_OPEN:
                del self._shards[next(iter(self._shards))]
            self._shards[number] = MappedTensors(self.folder / shard_name(number))
        return self._shards[number]

    def rows(self, row_ids: NDArray[np.int64]) -> dict[str, Tensor]:
        """Copies of the records of some rows, end to end: name -> [P, ...], or [B] of kind "nll".

        Raises: DataError for a row whose records are damaged.
        """
        found: dict[str, list[NDArray[Any]]] = {}
        shard = None
        for row in row_ids.tolist():
            number = int(np.searchsorted(self._ends, row, side="right"))
            shard = self._shard(number)
            local = row - self.origin.shard_rows[number]
            names = [name for name in RECORDS[self.origin.kind] if name in shard.arrays]
            start, end = row_span(self.origin.kind, shard.arrays["offsets"], local)
            parts = [shard.arrays[name][start:end] for name in names]
            if row_checksum(parts) != shard.arrays["checksums"][local]:
                raise self._damaged(shard_name(number), f"holds row {row} with another checksum")
            for name, part in zip(names, parts, strict=True):
                found.setdefault(name, []).append(part)
        assert shard is not None, "no rows are asked for"
        return {name: shard.as_torch(name, np.concatenate(parts)) for name, parts in found.items()}

    def attach(self, batch: Batch) -> None:
        """Put the records of a training batch's clean rows beside them: [B, L, ...], on the CPU.

        Raises: DataError for damaged rows, or rows whose targets are not those of the store.
        """
        assert self.origin.kind != "nll"
        records = self.rows(batch.row_ids[: batch.num_rows].numpy())
        targets_BL = batch.labels[: batch.num_rows] != IGNORED
        length = len(next(iter(records.values())))
        if int(targets_BL.sum()) != length:
            raise DataError(f"{self._field}: the store has {length} targets for rows with {int(targets_BL.sum())}")
        if self.origin.kind == "hidden":
            batch.teacher_hidden = _spread(records["hidden"], targets_BL, torch.zeros(1, dtype=torch.float32))
            return
        logprobs = records["logprobs"].float()
        if "log_mass" in records:
            # Rounding to fp16 changes the sum, from which the mass of all other classes follows.
            logprobs += (records["log_mass"] - logprobs.logsumexp(-1))[:, None]
        k = logprobs.shape[1]
        batch.teacher_indices = _spread(records["indices"], targets_BL, torch.arange(k))
        batch.teacher_logprobs = _spread(logprobs, targets_BL, torch.full((k,), -float(np.log(k))))

    def head(self, device: torch.device) -> Head:
        """The teacher's output layer, of kind "hidden". Raises: DataError if the file is damaged."""
        if file_sha256(self.folder / HEAD) != self._facts[HEAD]["sha256"]:
            raise self._damaged(HEAD, "does not have the sha256 of the manifest")
        mapped = MappedTensors(self.folder / HEAD)
        tensors = {name: mapped.as_torch(name, array.copy()).to(device) for name, array in mapped.arrays.items()}
        return Head(tensors["weight"], tensors.get("bias"), self.origin.softcap, self.origin.scale)

    def facts(self) -> dict[str, Any]:
        """For people: the origin but for the cuts, and sizes."""
        shown = {
            name: value for name, value in asdict(self.origin).items() if name != "shard_rows" and value is not None
        }
        return shown | {
            "num_shards": self.origin.num_shards,
            "bytes": self.num_bytes,
            "bytes_per_token": self.record_bytes / self.origin.num_tokens,
        }

    def describe(self) -> str:
        """One line for the start of a run."""
        origin = self.origin
        what = f"top {origin.k} classes at temperature {origin.temperature}" if origin.k else origin.kind
        return f"{what} of {origin.teacher}, {origin.dtype}, {self.num_bytes / 2**20:,.1f} MiB in {self.folder}"

    def verify(self) -> Reading:
        """Read every row through the memory maps and check all sums.

        Raises: DataError that names the first damaged file.
        """
        started = time.perf_counter()
        for start in range(0, self.origin.num_rows, 64):
            self.rows(np.arange(start, min(start + 64, self.origin.num_rows)))
        seconds = time.perf_counter() - started
        for name, facts in self._facts.items():
            if file_sha256(self.folder / name) != facts["sha256"]:
                raise self._damaged(name, "does not have the sha256 of the manifest")
        return Reading(self.record_bytes, self.origin.num_tokens, seconds)


@dataclass(frozen=True)
class Reading:
    """How fast all rows were read."""

    num_bytes: int
    num_tokens: int
    seconds: float

    def describe(self) -> str:
        """One line."""
        rate = self.num_bytes / 2**20 / self.seconds
        return f"{rate:,.0f} MiB/s, {self.num_tokens / self.seconds:,.0f} tokens/s, checksums included"


def _spread(values_P: Tensor, targets_BL: Tensor, filler: Tensor) -> Tensor:
    """Records at the targets, the filler elsewhere, where no loss reads: [B, L, ...]."""
    spread = filler.to(values_P.dtype).expand(*targets_BL.shape, values_P.shape[1]).clone()
    spread[targets_BL] = values_P
    return spread
