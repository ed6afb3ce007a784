"""A build lock left by a killed process does not hang the next start; a fresh one is respected."""

import os
import time
from pathlib import Path

import pytest

from mixkd_fast.engine import remove_stale_build_locks


def test_only_old_locks_of_the_cpu_communication_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    old, fresh, other = (
        tmp_path / name / "lock" for name in ("deepspeed_shm_comm", "x/deepspeed_shm_comm_op", "cpu_adam")
    )
    for lock in (old, fresh, other):
        lock.parent.mkdir(parents=True)
        lock.touch()
    hour_ago = time.time() - 3600
    os.utime(old, (hour_ago, hour_ago))
    os.utime(other, (hour_ago, hour_ago))
    remove_stale_build_locks()
    assert not old.exists() and fresh.exists() and other.exists()
