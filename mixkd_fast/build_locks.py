"""The places where DeepSpeed builds and loads its extensions, guarded by `guarded_builds`.

Against locks of dead builds: a process killed while torch compiles or loads an extension leaves one behind, and every
later start would wait on it for ever. And against a second ninja: one version does not read the log of another, so that
runs which find different ones by PATH would each compile everything anew.
"""

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

EXTENSIONS = ("deepspeed_shm_comm", "cpu_adam", "fused_adam", "pin_memory", "async_io")
"""What this program lets DeepSpeed build, by folder."""
UNHELD_S = 120.0
"""Age from which a lock that no process of this machine holds open is dead. Not 0: another machine may share the
folder, and a build takes about half a minute."""
OLD_S = 900.0
"""Age from which any lock is dead."""


@contextlib.contextmanager
def guarded_builds(unheld_s: float = UNHELD_S, old_s: float = OLD_S, poll_s: float = 1.0) -> Iterator[None]:
    """Waits on entry until no lock is left that may be dead; removes those that turn dead while the block runs.

    In the block the programs of this Python environment, ninja among them, come before others of the same name.
    Waiting here, not in torch: who waits there takes the end of a lock for the end of a build, and finds no library.
    """
    told = False
    while locks := [lock for lock in _locks() if not _remove_if_dead(lock, unheld_s, old_s) and not _is_held(lock)]:
        if not told:
            text = "waiting up to %.0f s: %s was left by a process that died, or another machine builds there"
            logging.getLogger(__name__).warning(text, unheld_s, locks[0])
            told = True
        time.sleep(poll_s)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(poll_s):
            for lock in _locks():
                _remove_if_dead(lock, unheld_s, old_s)

    thread = threading.Thread(target=watch, name="build locks", daemon=True)
    thread.start()
    path = os.environ.get("PATH")
    if sys.executable:
        os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + (path or os.defpath)
    try:
        yield
    finally:
        if path is None:
            os.environ.pop("PATH", None)
        else:
            os.environ["PATH"] = path
        done.set()
        thread.join()


def _locks() -> list[Path]:
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    return [lock for lock in [*root.glob("*/lock"), *root.glob("*/*/lock")] if lock.parent.name in EXTENSIONS]


def _remove_if_dead(lock: Path, unheld_s: float, old_s: float) -> bool:
    """Whether the lock is gone."""
    try:
        age = time.time() - lock.stat().st_mtime
        if age > old_s or (age > unheld_s and not _is_held(lock)):
            lock.unlink()
            return True
    except FileNotFoundError:  # its owner is done
        return True
    return False


def _is_held(lock: Path) -> bool:
    """Whether a process holds the file open, as the builder does; True where the system does not tell."""
    if not Path("/proc/self/fd").is_dir():
        return lock.exists()
    with contextlib.suppress(FileNotFoundError):
        wanted = lock.stat()
        for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
            with contextlib.suppress(OSError):  # the process ended, or belongs to another user
                if os.path.samestat(descriptor.stat(), wanted):
                    return True
    return False
