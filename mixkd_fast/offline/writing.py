"""A store being written: which shards are still to be made, and what is left when something goes wrong."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mixkd_fast import distributed
from mixkd_fast.checkpoint import file_sha256
from mixkd_fast.errors import DataError, MixKDError
from mixkd_fast.offline.manifest import (
    ASIDE,
    HEAD,
    MANIFEST,
    WRITING,
    Origin,
    differences,
    origin_of,
    read_json,
    shard_name,
    write_json,
)
from mixkd_fast.offline.shard_file import with_checksums, write_tensors
from mixkd_fast.shared_folder import PREFIX, require_shared


class StoreWriter:
    """Writes the shards of one store, and its manifest when all are there. Collective, but for `write`."""

    def __init__(self, folder: Path, origin: Origin) -> None:
        self.folder, self.origin = folder, origin

    def begin(self) -> list[int]:
        """The shards that are still to be made: those that are not there, or do not have their sha256 any more.

        Raises: DataError where the folder holds a store of something else, or other files; MixKDError if the disk
        refuses; ConfigurationError where the ranks do not share the folder.
        """
        pending: list[int] = []
        error: Exception | None = None
        if distributed.rank() == 0:
            try:
                pending = self._begin()
            except (OSError, MixKDError) as caught:
                error = caught
        self.agree(error)
        require_shared(self.folder, "--output")
        found: list[int] = distributed.broadcast_object(pending)
        return found

    def _begin(self) -> list[int]:
        folder = self.folder
        folder.mkdir(parents=True, exist_ok=True)
        manifest, writing = read_json(folder / MANIFEST), read_json(folder / WRITING)
        if manifest is None and writing is None:
            others = [path.name for path in folder.iterdir() if not path.name.startswith((ASIDE, PREFIX))]
            if others:
                raise DataError(f"{folder} holds other files ({min(others)}, ...); name a new or empty folder")
            write_json(folder / WRITING, asdict(self.origin))
            return list(range(self.origin.num_shards))
        content = writing if manifest is None else manifest["origin"]
        assert content is not None
        self._check_same(origin_of(content, folder))
        for path in folder.glob(f"{ASIDE}*"):
            path.unlink()
        if manifest is not None:
            return self._reopen(manifest)
        return [number for number in range(self.origin.num_shards) if not self._is_intact(number)]

    def _check_same(self, found: Origin) -> None:
        wrong = differences(found, {**asdict(self.origin), "shard_rows": self.origin.shard_rows})
        if wrong:
            raise DataError(f"{self.folder} holds a store of something else: {'; '.join(wrong)}. Name another folder")

    def _reopen(self, manifest: dict[str, Any]) -> list[int]:
        """Of a store that was whole: damaged shards become missing ones."""
        for number, facts in enumerate(manifest["shards"]):
            write_json(self._facts(number), facts)
        pending = [number for number in range(self.origin.num_shards) if not self._is_intact(number)]
        head = manifest.get("head")
        whole = head is None or _has(self.folder / HEAD, head)
        if pending or not whole:
            write_json(self.folder / WRITING, asdict(self.origin))
            (self.folder / MANIFEST).unlink()
        return pending

    def _facts(self, number: int) -> Path:
        return self.folder / f"{shard_name(number)}.json"

    def _is_intact(self, number: int) -> bool:
        facts = read_json(self._facts(number))
        return facts is not None and _has(self.folder / shard_name(number), facts)

    def write(self, number: int, offsets: NDArray[np.int64], tensors: dict[str, Tensor]) -> None:
        """Write one shard. Raises: OSError if the disk refuses; shards that are finished stay as they are."""
        tensors = with_checksums(self.origin.kind, offsets, tensors)
        facts = write_tensors(self.folder / shard_name(number), tensors)
        write_json(self._facts(number), {**facts, "rows": len(offsets) - 1, "tokens": int(offsets[-1])})

    def agree(self, error: Exception | None) -> None:
        """Raise on every rank what any rank met.

        Raises: MixKDError: this rank's own as it is, another's with its message; for an error of the disk, one that
        says what is finished.
        """
        failure = None if error is None else (isinstance(error, OSError), str(error))
        # One rank's shard may take long while another has none left.
        failures = [found for found in distributed.gather_objects(failure, patient=True) if found is not None]
        if isinstance(error, MixKDError):
            raise error
        if not failures:
            return
        is_of_disk, message = failures[0]
        if is_of_disk:
            done = sum(self._facts(number).exists() for number in range(self.origin.num_shards))
            message = (
                f"cannot write to {self.folder} ({message}). {done} of {self.origin.num_shards} shards are finished "
                "and stay; free space or mend the folder, then run the same command again"
            )
        raise MixKDError(message) from error

    def finish(self, head: dict[str, Tensor] | None) -> None:
        """Write the teacher's head, if it belongs to the store, and the manifest. Args: head, of rank 0."""
        error: Exception | None = None
        distributed.barrier()
        if distributed.rank() == 0:
            try:
                self._finish(head)
            except (OSError, MixKDError) as caught:
                error = caught
        self.agree(error)

    def _finish(self, head: dict[str, Tensor] | None) -> None:
        shards = [read_json(self._facts(number)) for number in range(self.origin.num_shards)]
        missing = [shard_name(number) for number, facts in enumerate(shards) if facts is None]
        if missing:
            raise DataError(
                f"{self.folder}: {', '.join(missing[:8])} ({len(missing)} of {len(shards)} shards) went away while the "
                "others were made; run the same command again"
            )
        content: dict[str, Any] = {"origin": asdict(self.origin), "shards": shards}
        if head is not None:
            content["head"] = write_tensors(self.folder / HEAD, head)
        write_json(self.folder / MANIFEST, content)
        for number in range(self.origin.num_shards):
            self._facts(number).unlink()
        (self.folder / WRITING).unlink(missing_ok=True)


def _has(path: Path, facts: dict[str, Any]) -> bool:
    if not path.is_file() or path.stat().st_size != facts["bytes"]:
        return False
    return bool(file_sha256(path) == facts["sha256"])
