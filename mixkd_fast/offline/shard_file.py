"""One shard: a safetensors file, written aside and renamed, read through a memory map.

Of kind "top_k": indices int32 [P, K], logprobs [P, K], and for fp16 log_mass fp32 [P], the logarithm of the kept
classes' mass before rounding. Of kind "hidden": hidden [P, H]. Of kind "nll": nll fp64 [N], tokens and source_rows
int64 [N]. Every kind: offsets int64 [N + 1], where the positions of each row begin; checksums int64 [N].

Legend of shape suffixes: N rows of the shard, P positions (targets) of these rows, K kept classes, H width.
"""

import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from mixkd_fast.checkpoint import file_sha256, sync
from mixkd_fast.errors import DataError
from mixkd_fast.offline.manifest import ASIDE

RECORDS = {
    "top_k": ("indices", "logprobs", "log_mass"),
    "hidden": ("hidden",),
    "nll": ("nll", "tokens", "source_rows"),
}
"""Tensors that a row's checksum covers, in this order, where they are there."""
_NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64, "I32": np.int32}


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file so that a kill leaves it absent or whole; returns its size and sha256.

    Raises: OSError if the disk refuses; what was written aside is then removed.
    """
    aside = path.with_name(f"{ASIDE}{path.name}")
    try:
        # Serialised by safetensors, written here: a full disk must come as an OSError.
        aside.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))
        sync(aside)
        facts = {"bytes": aside.stat().st_size, "sha256": file_sha256(aside)}
        os.replace(aside, path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)
    return facts


class MappedTensors:
    """A safetensors file as read-only views of a memory map: nothing is read before it is asked for.

    bf16 tensors are uint16 here, see `as_torch`.
    Raises: DataError if the file is no safetensors file of known dtypes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
            header.pop("__metadata__", None)
            # A plain view of the map: np.memmap itself makes every slice slow.
            content = np.memmap(path, np.uint8, "r", offset=8 + size).view(np.ndarray)
            self.arrays: dict[str, NDArray[Any]] = {}
            self.is_bf16 = set()
            for name, facts in header.items():
                start, end = facts["data_offsets"]
                self.arrays[name] = content[start:end].view(_NUMPY[facts["dtype"]]).reshape(facts["shape"])
                if facts["dtype"] == "BF16":
                    self.is_bf16.add(name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise DataError(f"{path} is damaged: it cannot be read as safetensors ({error})") from error

    def as_torch(self, name: str, values: NDArray[Any]) -> Tensor:
        """A tensor of copied values of the array `name`."""
        tensor = torch.from_numpy(values)
        return tensor.view(torch.bfloat16) if name in self.is_bf16 else tensor


def row_checksum(parts: list[NDArray[Any]]) -> int:
    """crc32 over the records of one row."""
    value = 0
    for part in parts:
        value = zlib.crc32(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data, value)
    return value


def with_checksums(kind: str, offsets: NDArray[np.int64], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a shard with offsets and checksums beside them."""
    names = [name for name in RECORDS[kind] if name in tensors]
    arrays = [_bytes_of(tensors[name]) for name in names]
    sums = [
        row_checksum([array[slice(*row_span(kind, offsets, row))] for array in arrays])
        for row in range(len(offsets) - 1)
    ]
    return tensors | {"offsets": torch.from_numpy(offsets.copy()), "checksums": torch.tensor(sums, dtype=torch.int64)}


def row_span(kind: str, offsets: NDArray[np.int64], row: int) -> tuple[int, int]:
    """First record of a row and the one after its last: of its positions, or the row's only one of kind "nll"."""
    return (row, row + 1) if kind == "nll" else (int(offsets[row]), int(offsets[row + 1]))


def _bytes_of(tensor: Tensor) -> NDArray[Any]:
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
