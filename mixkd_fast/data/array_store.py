"""Named arrays in a folder that is whole or not there: written aside, checked, renamed; opened as memory maps."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MANIFEST = "manifest.json"
_ABANDONED_AFTER_S = 3600.0


def save(folder: Path, arrays: Mapping[str, NDArray[Any]], meta: Mapping[str, int | str]) -> None:
    """Write arrays and a few facts; a kill at any moment leaves `folder` absent, as it was, or whole.

    If another process has put a whole entry there meanwhile, that one stays.
    Raises: OSError if the disk refuses.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder)
    aside = Path(tempfile.mkdtemp(prefix=_aside_prefix(folder), dir=folder.parent))
    try:
        files = {}
        for name, array in arrays.items():
            path = aside / f"{name}.npy"
            with path.open("wb") as file:
                np.save(file, array, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
            files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        with (aside / _MANIFEST).open("w") as file:
            json.dump({"meta": dict(meta), "files": files}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        # mkdtemp makes private folders; a shared cache has the usual rights.
        aside.chmod(folder.parent.stat().st_mode & 0o777)
        _put_in_place(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def load(folder: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]] | None:
    """The arrays, as read-only memory maps, and the facts; None if the folder is absent, incomplete or altered."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        arrays = {}
        for name, expected in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != expected["bytes"] or _sha256(path) != expected["sha256"]:
                return None
            # A plain view of the map: np.memmap itself makes every slice slow.
            arrays[path.stem] = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
        return arrays, manifest["meta"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _put_in_place(aside: Path, folder: Path) -> None:
    for _ in range(3):
        try:
            aside.rename(folder)
            return
        except OSError:
            # Something is there already: keep it if it is whole, else move it out of the way and try again.
            if not folder.exists():
                raise
            if load(folder) is not None:
                return
            damaged = Path(tempfile.mkdtemp(prefix=_aside_prefix(folder), dir=folder.parent))
            with contextlib.suppress(FileNotFoundError):
                # Another process may be doing the same.
                folder.rename(damaged / "damaged")
            shutil.rmtree(damaged, ignore_errors=True)
    raise OSError(f"{folder} cannot be replaced")


def _aside_prefix(folder: Path) -> str:
    return f".{folder.name[:16]}."


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed processes have left of this entry."""
    for path in folder.parent.glob(f"{_aside_prefix(folder)}*"):
        try:
            age_s = time.time() - path.stat().st_mtime
        except FileNotFoundError:
            continue
        if age_s > _ABANDONED_AFTER_S:
            shutil.rmtree(path, ignore_errors=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
