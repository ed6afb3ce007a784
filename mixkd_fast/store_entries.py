"""The folder of teacher stores: entries that are whole or not there, the least recently used ones removed.

folder/<key>/manifest.json   what the rows are; an entry that does not say what is expected is made anew
folder/<key>/logits.rows     its rows
"""

import contextlib
import errno
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mixkd_fast.checkpoint import sync

FORMAT_VERSION = 1
ROWS = "logits.rows"
_MANIFEST = "manifest.json"
_ASIDE = ".teacher-store-"
_ABANDONED_AFTER_S = 3600.0
_BLOCK_BYTES = 1 << 24
_TRIES = 5


def make_room(folder: Path, key: str, room: int) -> None:
    """Remove what killed processes left, and least recently used entries but `key` until they take `room` bytes."""
    for path in folder.glob(f"{_ASIDE}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED_AFTER_S:
                shutil.rmtree(path)
    entries = []
    for rows in folder.glob(f"*/{ROWS}"):
        if rows.parent.name != key and not rows.parent.name.startswith(_ASIDE):
            with contextlib.suppress(FileNotFoundError):
                entries.append((rows.parent.stat().st_mtime_ns, rows.stat().st_size, rows.parent))
    total = sum(size for _, size, _ in entries)
    for _, size, entry in sorted(entries):
        if total <= room:
            break
        with contextlib.suppress(OSError):  # another user's
            _remove(entry)
            total -= size


def make_entry(entry: Path, num_rows: int, num_classes: int) -> None:
    """See to it that the entry is there and whole, and mark it as just used. Raises: OSError if the disk refuses."""
    manifest = {"format": FORMAT_VERSION, "byteorder": sys.byteorder, "num_rows": num_rows, "num_classes": num_classes}
    num_bytes = num_rows * (num_classes + 1) * 4
    for _ in range(_TRIES):
        # Asked first: what appears later is another process's, and whole.
        if os.path.lexists(entry):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError):
                same = json.loads((entry / _MANIFEST).read_text()) == manifest
                if same and (entry / ROWS).stat().st_size == num_bytes:
                    os.utime(entry)
                    return
            _remove(entry)
        with _aside(entry.parent) as aside:
            with (aside / ROWS).open("wb") as file:
                _allocate(file.fileno(), num_bytes)
            (aside / _MANIFEST).write_text(json.dumps(manifest))
            sync(aside / ROWS)
            sync(aside / _MANIFEST)
            try:
                aside.rename(entry)
                sync(entry.parent)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another process was faster
                    raise
    raise OSError(f"{entry} is removed or replaced again and again")


def _allocate(descriptor: int, num_bytes: int) -> None:
    """Make a file of zeros whose blocks are reserved: a full disk must show here and not as SIGBUS later."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, num_bytes)
        return
    for start in range(0, num_bytes, _BLOCK_BYTES):
        os.write(descriptor, bytes(min(_BLOCK_BYTES, num_bytes - start)))


def _remove(entry: Path) -> None:
    """Take an entry out of the folder in one step, then delete it. Who has mapped it can use it on."""
    with _aside(entry.parent) as aside, contextlib.suppress(FileNotFoundError):
        entry.rename(aside / "removed")


@contextlib.contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix=_ASIDE, dir=folder))
    try:
        # mkdtemp makes private folders; a shared cache has the usual rights.
        path.chmod(folder.stat().st_mode & 0o777)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
