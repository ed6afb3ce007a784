"""Checkpoints that are whole or not there: written aside, hashed, renamed; verified before use.

checkpoints/step-00000120/manifest.json   size and sha256 of every file below, and the run's state
checkpoints/step-00000120/state/...       what the engine wrote (one file per rank and kind)
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixkd_fast import distributed
from mixkd_fast.errors import CheckpointError

MANIFEST = "manifest.json"
_ASIDE = ".writing-"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int
    state: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run. All methods are collective: every rank calls them."""

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory = directory
        self.keep = keep

    def write(self, step: int, state: dict[str, Any], save: Callable[[Path], None]) -> Path:
        """Write a checkpoint: `save(folder)` runs on every rank; then rank 0 hashes, renames and prunes.

        Raises: CheckpointError when any rank could not write; earlier checkpoints stay as they were.
        """
        aside, final = self.directory / f"{_ASIDE}{step:08d}", self.directory / f"step-{step:08d}"
        error: OSError | RuntimeError | None = None
        try:
            if distributed.rank() == 0:
                remove_tree(aside)
                aside.mkdir(parents=True)
        except OSError as caught:
            error = caught
        self._agree(error, aside)
        try:
            save(aside / "state")
        except (OSError, RuntimeError) as caught:  # torch.save reports a full disk as RuntimeError
            error = caught
        self._agree(error, aside)
        if distributed.rank() == 0:
            try:
                write_manifest(aside, {"step": step, "state": state})
                remove_tree(final)
                os.replace(aside, final)
                sync(self.directory)
                self._prune()
            except OSError as caught:
                error = caught
        self._agree(error, aside)
        return final

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is complete and unaltered; others are skipped with a message."""
        found: Checkpoint | None = None
        if distributed.rank() == 0 and self.directory.is_dir():
            for path in sorted(self.directory.glob("step-*"), reverse=True):
                try:
                    content = verify_manifest(path)
                except CheckpointError as error:
                    distributed.say(f"Skipping {path.name}: {error}")
                    continue
                found = Checkpoint(path, content["step"], content["state"])
                break
        result: Checkpoint | None = distributed.broadcast_object(found)
        return result

    def _agree(self, error: BaseException | None, aside: Path) -> None:
        message = distributed.first_error(error)
        if message is not None:
            if distributed.rank() == 0:
                shutil.rmtree(aside, ignore_errors=True)
            raise CheckpointError(
                f"output.directory: cannot write a checkpoint to {self.directory} ({message}). "
                "Earlier checkpoints are intact; free space or mend the folder, then run again with --resume."
            ) from error

    def _prune(self) -> None:
        for old in sorted(self.directory.glob("step-*"))[: -self.keep]:
            remove_tree(old)


def write_on_rank_zero(folder: Path, write: Callable[[], None]) -> None:
    """Let rank 0 write something under `folder`; a failure is everybody's error. Collective.

    Raises: CheckpointError that says what could not be written.
    """
    error: OSError | RuntimeError | None = None
    if distributed.rank() == 0:
        try:
            write()
        except (OSError, RuntimeError) as caught:
            error = caught
    message = distributed.first_error(error)
    if message is not None:
        raise CheckpointError(
            f"output.directory: cannot write to {folder} ({message}). "
            "Checkpoints are intact; free space or mend the folder, then run again with --resume."
        ) from error


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Flush every file of `folder` to disk and write its manifest last."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            sync(path)
    (folder / MANIFEST).write_text(json.dumps(content | {"files": files}, indent=1))
    sync(folder / MANIFEST)
    sync(folder)


def verify_manifest(folder: Path) -> dict[str, Any]:
    """Read a folder's manifest and check every file against it.

    Raises: CheckpointError that says what is missing or altered.
    """
    try:
        content: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        files = content["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"incomplete: no readable {MANIFEST} ({error})") from error
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"incomplete: {name} is missing")
        if path.stat().st_size != expected["bytes"] or file_sha256(path) != expected["sha256"]:
            raise CheckpointError(f"altered: {name} does not have the sha256 of the manifest")
    return content


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make `folder` anew with `fill(path)`, written aside and renamed, so that a kill leaves the old or the new one."""
    aside = folder.with_name(f"{_ASIDE}{folder.name}")
    remove_tree(aside)
    aside.mkdir(parents=True)
    fill(aside)
    for path in aside.rglob("*"):
        sync(path)
    remove_tree(folder)
    os.replace(aside, folder)
    sync(folder.parent)


def remove_tree(path: Path) -> None:
    """Delete a folder if it is there."""
    if path.exists():
        shutil.rmtree(path)


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
