"""SIGTERM and SIGINT become a request to stop at the next step boundary, where the run is saved."""

import os
import signal
from types import FrameType
from typing import Any, ClassVar

import psutil


class StopRequest:
    """Collects stop signals while the `with` block runs; a second Ctrl-C acts at once, as usual."""

    last_received: ClassVar[int | None] = None
    """The last stop signal in this process: a run that was at its last step anyway ends as if there had been none."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, Any] = {}
        self._launcher = self._launcher_process()
        self._command_pid = self._launcher.ppid() if self._launcher else None

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._previous[number] = signal.signal(number, self._receive)
            except ValueError:  # not the main thread (a notebook's worker): signals stay with their owner
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = StopRequest.last_received = number

    @staticmethod
    def _launcher_process() -> psutil.Process | None:
        """DeepSpeed's per-machine launcher, the parent of this process, if it has one."""
        return psutil.Process().parent() if "CROSS_RANK" in os.environ else None  # only that launcher sets it

    def requested(self) -> int | None:
        """The signal that asks this process to stop, or None.

        SIGTERM to the `deepspeed` command ends it without a word to the launcher it started, which then has another
        parent: that counts as SIGTERM here.
        """
        if self.signal_number is None and self._launcher is not None and self._launcher.ppid() != self._command_pid:
            self.signal_number = signal.SIGTERM
        return self.signal_number
