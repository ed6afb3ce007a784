"""One process at a time in a folder of results."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mixkd_fast.errors import ConfigurationError

_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
"""What file systems without locks answer; there nobody is kept out."""


@contextmanager
def alone_in(folder: Path, field: str, what: str) -> Iterator[None]:
    """Keep a second `what` (a run, a sweep) out of the folder; the lock goes with the process, however that ends.

    Raises: ConfigurationError that names the field if one is at work there; OSError if the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / f".{what}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigurationError(f"{field} = {str(folder)!r}: another {what} is at work there") from error
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        yield
    finally:
        os.close(descriptor)
