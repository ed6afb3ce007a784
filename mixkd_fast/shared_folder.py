"""Whether all ranks see the same folder."""

import secrets
import socket
import time
from pathlib import Path

from mixkd_fast import distributed
from mixkd_fast.errors import ConfigurationError

PATIENCE_S = 20.0
"""A network file system may show a new file a little later."""
PREFIX = ".seen-by-all-"


def require_shared(folder: Path, field: str) -> None:
    """Let rank 0 write a file into a folder that is there, and every rank look for it. Collective.

    Args: field = what names the folder, for the message.
    Raises: ConfigurationError, on every rank, that names those that do not see it.
    """
    if distributed.world_size() == 1:
        return
    name = f"{PREFIX}{secrets.token_hex(8)}"
    if distributed.rank() == 0:
        (folder / name).touch()
    name = distributed.broadcast_object(name)
    deadline = time.monotonic() + PATIENCE_S
    while not (seen := (folder / name).exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    here = f"rank {distributed.rank()} on {socket.gethostname()}"
    blind = [text for text in distributed.gather_objects(None if seen else here) if text is not None]
    if distributed.rank() == 0:
        (folder / name).unlink(missing_ok=True)
    if blind:
        raise ConfigurationError(
            f"{field} = {str(folder)!r}: {', '.join(blind)} cannot see what rank 0 writes there; give a folder of a "
            "file system that all machines share, by the same path"
        )
