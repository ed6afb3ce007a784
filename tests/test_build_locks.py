"""A build lock left by a killed process does not hang the next start; a build that runs is waited for."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.utils.cpp_extension import get_default_build_root
from torch.utils.file_baton import FileBaton
from toy import must_run

from mixkd_fast.build_locks import guarded_builds

# Where this machine's builds are, before the tests look elsewhere.
BUILDS = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path


def _lock(folder: Path, age_s: float = 0.0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / "lock"
    lock.touch()
    then = time.time() - age_s
    os.utime(lock, (then, then))
    return lock


def test_dead_locks_of_deepspeeds_extensions_are_removed_and_no_others(root: Path) -> None:
    dead = [_lock(root / "deepspeed_shm_comm", 300), _lock(root / "py311_cpu" / "cpu_adam", 300)]
    foreign = _lock(root / "somebody_elses", 300)
    with guarded_builds():
        assert not any(lock.exists() for lock in dead)
    assert foreign.exists()


def test_a_young_lock_nobody_holds_is_waited_for_until_it_counts_as_dead(root: Path) -> None:
    lock = _lock(root / "deepspeed_shm_comm")
    start = time.monotonic()
    with guarded_builds(unheld_s=1.0, poll_s=0.05):
        assert 0.5 < time.monotonic() - start < 30
        assert not lock.exists()


def test_the_lock_of_a_running_build_is_kept(root: Path) -> None:
    (root / "cpu_adam").mkdir()
    baton = FileBaton(str(root / "cpu_adam" / "lock"))
    assert baton.try_acquire()
    os.utime(root / "cpu_adam" / "lock", (0, time.time() - 300))
    start = time.monotonic()
    with guarded_builds(poll_s=0.05):  # not waited for either: torch does that
        time.sleep(0.3)
        assert (root / "cpu_adam" / "lock").exists() and time.monotonic() - start < 30
    baton.release()


def test_a_wait_in_torch_ends_when_the_builder_is_killed(root: Path) -> None:
    (root / "cpu_adam").mkdir()
    lock = root / "cpu_adam" / "lock"
    code = f"from torch.utils.file_baton import FileBaton; FileBaton({str(lock)!r}).try_acquire(); print(flush=True); "
    builder = subprocess.Popen([sys.executable, "-c", code + "input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert builder.stdout is not None
    builder.stdout.readline()
    with guarded_builds(unheld_s=0.5, poll_s=0.05):
        assert lock.exists()
        builder.kill()
        builder.wait()
        FileBaton(str(lock)).wait()
    assert not lock.exists()


def test_deepspeed_builds_behind_a_dead_lock(root: Path) -> None:
    """The library is not there yet: a start that only waited for the lock to go would find none."""
    for built in BUILDS.glob("**/deepspeed_shm_comm/deepspeed_shm_comm.so"):  # its object files save minutes
        shutil.copytree(built.parent, root / "deepspeed_shm_comm", ignore=shutil.ignore_patterns("*.so", "lock"))
        break
    lock = _lock(root / "deepspeed_shm_comm", 300)
    code = "import torch; from mixkd_fast.engine import start_distributed; start_distributed(torch.device('cpu'))"
    must_run([sys.executable, "-c", code], TORCH_EXTENSIONS_DIR=str(root))
    assert not lock.exists() and list(root.rglob("deepspeed_shm_comm.so"))


def test_builds_take_the_ninja_of_this_environment(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version would not read the log of the build that is there, and compile everything again."""
    own = Path(sys.executable).parent / "ninja"
    if not own.exists():
        pytest.skip("this environment has no ninja of its own")
    other = root / "bin" / "ninja"
    other.parent.mkdir()
    other.write_text("#!/bin/sh\nexit 1\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(other.parent), prepend=os.pathsep)
    assert shutil.which("ninja") == str(other)
    with guarded_builds():
        assert shutil.which("ninja") == str(own)
    assert shutil.which("ninja") == str(other)
