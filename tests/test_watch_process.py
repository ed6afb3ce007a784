"""The watching processes alone, with this test in the place of the ranks: who is told what, and when."""

import contextlib
import json
import os
import queue
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from toy import ROOT

SCRIPT = ROOT / "mixkd_fast" / "watch_process.py"
TIMEOUT_S = 3.0
TOKEN = "a secret of the run"


class Rank:
    """Starts and hears one watching process, for a sleeping process that stands for the rank."""

    def __init__(self, number: int, world: int, port: int = 0, timeout_s: float = TIMEOUT_S, token: str = TOKEN):
        self.body = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.heard: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        settings = {"rank": number, "world": world, "host": f"host{number}", "pid": self.body.pid, "token": token}
        self.say({**settings, "timeout_s": timeout_s, "address": "127.0.0.1", "port": port})
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.heard.put(json.loads(line))

    def say(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message).encode() + b"\n")
        self.process.stdin.flush()

    def hear(self, timeout: float = 20.0) -> dict[str, Any]:
        return self.heard.get(timeout=timeout)

    def leave(self) -> None:
        """What the kernel does when a rank's process is gone."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def is_silent(self, seconds: float) -> bool:
        try:
            self.heard.get(timeout=seconds)
        except queue.Empty:
            return True
        return False


class Ranks(list[Rank]):
    """Ranks that have met."""

    def meet(self, world: int, timeout_s: float = TIMEOUT_S) -> "Ranks":
        self.append(Rank(0, world, timeout_s=timeout_s))
        self.port = self[0].hear()["port"]
        self.extend(Rank(number, world, self.port, timeout_s) for number in range(1, world))
        assert [rank.hear() for rank in self] == [{"ready": True}] * world
        return self


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    started = Ranks()
    yield started
    for rank in started:
        rank.process.send_signal(signal.SIGCONT)
        for process in (rank.body, rank.process):
            process.kill()
            process.wait()


def test_others_are_told_at_once_of_a_rank_that_died(ranks: Ranks) -> None:
    ranks.meet(4)
    start = time.monotonic()
    ranks[2].leave()
    for other in (0, 1, 3):
        gone = ranks[other].hear()["gone"]
        assert gone == f"rank 2 on host2 (process {ranks[2].body.pid}) ended without a word"
    assert time.monotonic() - start < 10


def test_others_are_told_when_rank_0_died(ranks: Ranks) -> None:
    ranks.meet(3)
    ranks[0].leave()
    for other in (1, 2):
        assert ranks[other].hear()["gone"].startswith("rank 0 on host0 (process ")


def test_others_are_told_when_a_watching_process_is_killed_with_its_rank(ranks: Ranks) -> None:
    ranks.meet(3)
    for victim in (ranks[0].process, ranks[0].body):
        victim.kill()
    for other in (1, 2):
        assert "rank 0 on host0" in ranks[other].hear()["gone"]


@pytest.mark.parametrize("silent", [0, 1])
def test_a_silent_machine_is_gone_after_the_timeout(ranks: Ranks, silent: int) -> None:
    ranks.meet(3)
    start = time.monotonic()
    ranks[silent].process.send_signal(signal.SIGSTOP)  # its connections stay open, as when a cable is pulled
    for other in {0, 1, 2} - {silent}:
        assert f"rank {silent} on host{silent}" in (gone := ranks[other].hear()["gone"])
        assert "was not heard of for 3 s" in gone
    assert TIMEOUT_S - 1 < time.monotonic() - start < TIMEOUT_S + 10


def test_a_rank_that_hangs_is_killed_after_its_last_word(ranks: Ranks) -> None:
    ranks.meet(2)
    ranks[1].leave()
    assert "rank 1" in ranks[0].hear()["gone"]
    assert ranks[0].body.wait(timeout=40) == -signal.SIGKILL


def test_a_stopped_rank_is_not_gone(ranks: Ranks) -> None:
    """A debugger stops the rank, not the process beside it."""
    ranks.meet(2)
    os.kill(ranks[1].body.pid, signal.SIGSTOP)
    assert ranks[0].is_silent(2 * TIMEOUT_S)
    os.kill(ranks[1].body.pid, signal.SIGCONT)


def test_a_machine_that_slept_does_not_blame_the_others(ranks: Ranks) -> None:
    ranks.meet(2)
    for rank in ranks:
        rank.process.send_signal(signal.SIGSTOP)
    time.sleep(2 * TIMEOUT_S)
    for rank in ranks:
        rank.process.send_signal(signal.SIGCONT)
    assert ranks[0].is_silent(TIMEOUT_S) and ranks[1].is_silent(0.1)


def test_a_good_end_in_any_order_alarms_nobody(ranks: Ranks) -> None:
    ranks.meet(3)
    for number in (1, 0, 2):
        ranks[number].say({"end": None})
        ranks[number].leave()
        time.sleep(0.5)
    for rank in ranks:
        assert rank.process.wait(timeout=20) == 0
        assert rank.is_silent(0.1)


def test_an_error_of_one_rank_reaches_the_others_with_its_reason(ranks: Ranks) -> None:
    ranks.meet(3)
    ranks[1].say({"end": "failed: no such file"})
    ranks[1].leave()
    for other in (0, 2):
        gone = ranks[other].hear()["gone"]
        assert gone == f"rank 1 on host1 (process {ranks[1].body.pid}) failed: no such file"


def test_ranks_that_fail_together_are_left_to_say_so_themselves(ranks: Ranks) -> None:
    ranks.meet(3)
    for rank in ranks:
        rank.say({"end": "failed: training.batch_size"})
    for rank in ranks:
        assert rank.is_silent(3.0)


def test_an_error_that_followed_from_a_death_is_not_taken_for_its_cause(ranks: Ranks) -> None:
    """The collective of rank 0 fails because rank 1 is gone."""
    ranks.meet(3)
    ranks[1].leave()
    ranks[0].say({"end": "failed: RuntimeError: Connection closed by peer"})
    for other in (0, 2):
        assert ranks[other].hear()["gone"] == f"rank 1 on host1 (process {ranks[1].body.pid}) ended without a word"


def test_strangers_change_nothing(ranks: Ranks) -> None:
    ranks.append(Rank(0, 2))
    port = ranks[0].hear()["port"]
    for words in (b"GET / HTTP/1.0\r\n\r\n", b'{"hello": {"rank": 1}, "token": "guess"}\n', b'{"gone": "x"}\n', b"7\n"):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(words)
            while connection.recv(100):  # until it is closed at the other end
                pass
    ranks.append(Rank(1, 2, port))
    assert [rank.hear() for rank in ranks] == [{"ready": True}] * 2
    assert ranks[0].is_silent(1.0) and ranks[1].is_silent(0.1)
    with pytest.raises(OSError):  # all have met
        socket.create_connection(("127.0.0.1", port), timeout=10)


def test_more_ranks_than_a_process_may_usually_have_open_files(ranks: Ranks) -> None:
    """The limit that the rank was started with: 1024 as a rule, here fewer."""
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, usual[1]))
    try:
        ranks.append(Rank(0, 61))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, usual)
    port = ranks[0].hear()["port"]
    with contextlib.ExitStack() as stack:
        for number in range(1, 61):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            hello = {"hello": {"rank": number, "host": "far", "pid": number}, "token": TOKEN}
            connection.sendall(json.dumps(hello).encode() + b"\n")
        assert ranks[0].hear(10.0) == {"ready": True}


def test_a_rank_that_cannot_connect_says_so(ranks: Ranks) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        ranks.append(Rank(1, 2, probe.getsockname()[1]))
        assert "failed" in ranks[0].hear()


def test_watching_costs_hardly_any_time(ranks: Ranks) -> None:
    """Beats that answered each other would keep a core busy beside every rank."""
    ranks.meet(3)

    def seconds() -> float:
        return sum(sum(psutil.Process(rank.process.pid).cpu_times()[:2]) for rank in ranks)

    before = seconds()
    assert ranks[0].is_silent(3.0)
    assert seconds() - before < 0.3
