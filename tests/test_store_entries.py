"""The folder of teacher stores: bounded, entries made anew where damaged, a disk that refuses costs one warning."""

import json
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_teacher_store import BIG, expected, ids, opened

from mixkd_fast.teacher_store import TeacherStore


def test_least_recently_used_entries_make_room(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("not ours")
    stores = {}
    for age, key in ((50, "a"), (40, "b"), (30, "c")):
        stores[key] = opened(tmp_path, 100, 3, key)
        stores[key].write(ids(1), expected(ids(1)))
        os.utime(tmp_path / key, (time.time() - age,) * 2)
    opened(tmp_path, 100, 3, "a").close()  # used again, so that b is now the oldest
    assert TeacherStore.open(tmp_path, "d", 100, 3, 3 * 1600) is not None
    assert {path.name for path in tmp_path.iterdir()} == {"a", "c", "d", "other"}
    stores["b"].write(ids(2), expected(ids(2)))
    stores["b"].share()
    assert stores["b"].read(ids(1, 2)) is not None, "whoever has it open uses it on"
    for key in ("c", "d"):
        os.utime(tmp_path / key, (0, 0))
    stores["c"].share()  # counts as use
    assert TeacherStore.open(tmp_path, "e", 100, 3, 2 * 1600) is not None
    assert {path.name for path in tmp_path.iterdir()} == {"c", "e", "other"}
    again = TeacherStore.open(tmp_path, "c", 100, 3, 1600)
    assert again is not None and again.read(ids(1)) is not None, "the one that is opened stays"
    assert {path.name for path in tmp_path.iterdir()} == {"c", "other"}


def _another_shape(entry: Path) -> None:
    shutil.rmtree(entry)
    opened(entry.parent, 100, 2).write(ids(5), np.ones((1, 2), np.float32))


def _a_file(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.write_text("?")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "garbage": lambda entry: (entry / "manifest.json").write_bytes(b"\xff{"),
    "another format": lambda entry: (entry / "manifest.json").write_text(
        json.dumps({**json.loads((entry / "manifest.json").read_text()), "format": -1})
    ),
    "no manifest": lambda entry: (entry / "manifest.json").unlink(),
    "no rows": lambda entry: (entry / "logits.rows").unlink(),
    "cut": lambda entry: os.truncate(entry / "logits.rows", 16 * 50),
    "another shape": _another_shape,
    "a file": _a_file,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_entry_that_is_not_whole_is_made_anew(tmp_path: Path, damage: str) -> None:
    store = opened(tmp_path)
    store.write(ids(5), expected(ids(5)))
    store.close()
    DAMAGES[damage](tmp_path / "key")
    again = opened(tmp_path)
    assert again.num_filled == 0
    again.write(ids(5), expected(ids(5)))
    assert opened(tmp_path).read(ids(5)) is not None
    assert [path.name for path in tmp_path.iterdir()] == ["key"], "nothing is left behind"


def test_what_killed_processes_left_is_removed_later(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / f".teacher-store-{name}").mkdir()
        (tmp_path / f".teacher-store-{name}" / "logits.rows").write_bytes(bytes(100))
    os.utime(tmp_path / ".teacher-store-old", (0, 0))
    opened(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"key", ".teacher-store-new"}


def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No store, one line of warning, nothing left in the folder."""
    assert TeacherStore.open(folder, "key", 10_000, 3, BIG) is None
    error = capsys.readouterr().err
    assert str(folder) in error and "cannot be written" in error and error.count("\n") == 1
    assert not folder.is_dir() or not list(folder.iterdir())


def test_a_folder_below_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file" / "folder", capsys)


def test_blocks_are_reserved_when_opening(tmp_path: Path) -> None:
    opened(tmp_path, 100_000)
    status = (tmp_path / "key" / "logits.rows").stat()
    assert status.st_blocks * 512 >= status.st_size == 1_600_000, "a full disk would be a SIGBUS later"


def test_a_full_disk_shows_when_opening(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # the system refuses what a full disk would
    try:
        refused(tmp_path, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_read_only_folder_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(tempfile.mkdtemp())  # below nothing that belongs to this user alone
    folder.chmod(0o555)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # root may write anywhere
        refused(folder, capsys)
    finally:
        os.seteuid(user)
        folder.rmdir()
