"""Several ranks: when one is gone, the others stop soon and say so, though they hang in a collective.

The watching itself is done by a small process beside every rank (`watch_process.py`).
"""

import contextlib
import json
import os
import queue
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mixkd_fast import distributed
from mixkd_fast.errors import Interrupted, MixKDError

EXIT_CODE = 75
"""Exit status of a rank that stops because another is gone: EX_TEMPFAIL of sysexits.h, worth another try."""
_VERDICT_S = 5.0
"""How long a rank whose collective failed waits for the word that another rank is gone."""


@contextlib.contextmanager
def watched_ranks(timeout_s: float | None, what_next: str) -> Iterator[None]:
    """While this block runs, end this process soon after another rank's process or machine is gone. Collective.

    A rank is gone when its process has ended (by a signal, or an error that is its own), which is known at once, or
    when its machine has been silent for `timeout_s`. This rank then prints who is gone, and ends with `EXIT_CODE`.
    A rank that is only slow, or stopped by a debugger, is not gone. With one rank, or timeout_s None, nothing is
    watched; nor, after a warning, where the watching processes cannot reach each other.
    Args: what_next = what the user does then, for the message.
    """
    if distributed.world_size() == 1 or timeout_s is None or "MASTER_ADDR" not in os.environ:
        yield
        return
    watch = _Watch(timeout_s, what_next)
    try:
        watch.start()
        yield
    except Interrupted:
        watch.end(None)
        raise
    except MixKDError as error:
        watch.end(f"failed: {error}")
        raise
    except BaseException as error:
        watch.end(f"failed: {type(error).__name__}: {error}")
        # A collective fails when the rank at its other end is gone: that is the better message.
        watch.wait_for_verdict()
        raise
    else:
        watch.end(None)
    finally:
        watch.close()


class _Watch:
    """The watching process of this rank, and a thread that listens to it."""

    def __init__(self, timeout_s: float, what_next: str) -> None:
        self._timeout_s, self._what_next = timeout_s, what_next
        self._facts: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._process: subprocess.Popen[bytes] | None = None
        self._is_on = False

    def start(self) -> None:
        """Start the processes of all ranks and have them meet; say so if they do not. Collective."""
        meeting: dict[str, Any] = {"token": secrets.token_hex(16), "address": os.environ["MASTER_ADDR"]}
        if distributed.rank() == 0:
            meeting |= self._launch(meeting)
        meeting = distributed.broadcast_object(meeting)
        if distributed.rank() != 0 and "failed" not in meeting:
            self._launch(meeting, wait=False)
        answer = meeting if "failed" in meeting else self._next_fact()
        problems = [answer["failed"] for answer in distributed.gather_objects(answer) if "failed" in answer]
        self._is_on = not problems
        if problems:
            self.close()
            distributed.say(
                f"Warning: the ranks do not watch each other ({problems[0]}): if a machine is lost, the others wait "
                "for it until their collectives time out"
            )

    def _launch(self, meeting: dict[str, Any], wait: bool = True) -> dict[str, Any]:
        settings = meeting | {
            "rank": distributed.rank(),
            "world": distributed.world_size(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "timeout_s": self._timeout_s,
        }
        script = Path(__file__).with_name("watch_process.py")
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            return {"failed": str(error)}
        self._say(settings)
        threading.Thread(target=self._listen, name="watch", daemon=True).start()
        return self._next_fact() if wait else {}

    def _next_fact(self) -> dict[str, Any]:
        try:
            return self._facts.get(timeout=self._timeout_s + _VERDICT_S)
        except queue.Empty:
            host = socket.gethostname()
            return {"failed": f"rank {distributed.rank()} on {host} heard nothing for {self._timeout_s:g} s"}

    def _listen(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            if "gone" not in message:
                self._facts.put(message)
                continue
            text = (
                f"\nerror: {message['gone']}. Rank {distributed.rank()} on {socket.gethostname()} stops too; "
                f"{self._what_next}\n"
            )
            # Not through Python's streams: the main thread may hold their locks.
            os.write(2, text.encode())
            os._exit(EXIT_CODE)
        self._facts.put({"failed": "a watching process ended"})

    def _say(self, message: dict[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def end(self, reason: str | None) -> None:
        """Tell the other ranks that this one ends, well (None) or not."""
        if self._is_on:
            self._say({"end": reason})

    def wait_for_verdict(self) -> None:
        """Give word of another rank's end a little time; it ends this process."""
        if self._is_on:
            threading.Event().wait(_VERDICT_S)

    def close(self) -> None:
        """Let the process go, which ends when its rank says nothing more."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
