"""The process beside every rank that tells when another rank is gone. Standard library only; run as a script.

A process of its own, so that nothing a rank does (a long evaluation, a collective that hangs, a debugger) delays its
beats. Rank 0's listens; the others connect to it. Lines of JSON go both ways:

from its rank (stdin)   the settings; then {"end": null} for a good end, {"end": "failed: ..."}; EOF alone is a death
to its rank (stdout)    {"port": n} of rank 0, {"ready": true}, {"gone": "who and why"}, {"failed": "..."}
between them            {"hello": {...}}, {} as a beat, {"end": ...} as above, {"gone": "who and why"} from rank 0
"""

import contextlib
import hmac
import json
import os
import resource
import selectors
import signal
import socket
import sys
import time
from typing import Any

_GRACE_S = 2.0
"""How long ranks that fail for the same reason have to say so themselves."""
_LAST_WORD_S = 20.0
"""How long a rank has to end once it knows that another is gone."""
_LINGER_S = 0.5
_WORDLESS = "ended without a word"
_ERROR = "failed: "


class Line:
    """One end of a connection, or of a pipe: whole lines in, whole lines out, never waiting."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.who: dict[str, Any] = {}
        self.last_heard = time.monotonic()
        self.over = False
        self._received = b""

    def fileno(self) -> int:
        """For selectors."""
        number: int = self.stream.fileno()
        return number

    def read(self) -> list[dict[str, Any]] | None:
        """Messages that have come since, None at the end of the stream or where it is not ours."""
        try:
            data = os.read(self.fileno(), 65536)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError:
            return None
        if not data:
            return None
        self.last_heard = time.monotonic()
        *lines, self._received = (self._received + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:  # somebody else's connection
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None

    def send(self, message: dict[str, Any]) -> None:
        """Send a line; a full or broken connection shows in what is heard, not here."""
        with contextlib.suppress(OSError):
            os.write(self.fileno(), json.dumps(message).encode() + b"\n")


def name_of(who: dict[str, Any]) -> str:
    """A rank in words."""
    return f"rank {who['rank']} on {who['host']} (process {who['pid']})"


class Watch:
    """The state of one such process."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.me = {key: settings[key] for key in ("rank", "host", "pid")}
        self.timeout_s: float = settings["timeout_s"]
        self.beat_s = min(1.0, self.timeout_s / 5)
        self.next_beat_s = 0.0
        self.token: str = settings["token"]
        self.world: int = settings["world"]
        self.is_server = settings["rank"] == 0
        self.selector = selectors.DefaultSelector()
        self.rank = Line(sys.stdin.buffer)
        self.selector.register(self.rank, selectors.EVENT_READ)
        self.out = Line(sys.stdout.buffer)
        self.peers: list[Line] = []
        self.listener: socket.socket | None = None
        # A rank that died is the cause; errors of others may be what followed.
        self.deaths: dict[int, str] = {}
        self.errors: dict[int, str] = {}
        self.first_problem_s: float | None = None
        self.told_s: float | None = None
        self.rank_is_gone = self.ending = False
        if self.is_server:
            self.listener = _listener(self.world)
            self.listener.setblocking(False)
            self.selector.register(self.listener, selectors.EVENT_READ)
            self.out.send({"port": self.listener.getsockname()[1]})
        else:
            self._connect(settings["address"], settings["port"])

    def _connect(self, address: str, port: int) -> None:
        connection = socket.create_connection((address, port), timeout=self.timeout_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(False)
        peer = self._add(connection)
        peer.who = {"rank": 0, "host": address, "pid": "?"}
        peer.send({"hello": self.me, "token": self.token})

    def _add(self, connection: socket.socket) -> Line:
        peer = Line(connection)
        self.peers.append(peer)
        self.selector.register(peer, selectors.EVENT_READ)
        return peer

    def run(self) -> None:
        """Until the rank ends, or others do."""
        before = time.monotonic()
        while not self.ending:
            for key, _ in self.selector.select(self.beat_s / 2):
                source = key.fileobj
                if source is self.listener:
                    self._accept()
                elif source is self.rank:
                    self._hear_rank()
                elif isinstance(source, Line):
                    self._hear_peer(source)
            now = time.monotonic()
            if now - before > 3 * self.beat_s:
                # This process itself was stopped (a suspended machine): nobody else is to blame for the silence.
                for peer in self.peers:
                    peer.last_heard = now
            self._beat(now)
            before = now
        for peer in self.peers:
            with contextlib.suppress(OSError):
                peer.stream.shutdown(socket.SHUT_WR)
        # A connection that is closed with something unread in it takes back what was just sent.
        time.sleep(_LINGER_S if self.peers else 0)

    def _beat(self, now: float) -> None:
        # Not after every message: a beat wakes the other side, whose answer would wake this one.
        is_due = now >= self.next_beat_s
        if is_due:
            self.next_beat_s = now + self.beat_s / 2
        for peer in self.peers:
            # A rank that has failed still waits to hear why.
            if peer.who and not peer.over and now - peer.last_heard > self.timeout_s:
                peer.over = True
                self._note(peer.who, f"was not heard of for {self.timeout_s:g} s: its machine or the network is down")
            if is_due:
                peer.send({})
        if self.first_problem_s is not None and now - self.first_problem_s > _GRACE_S:
            self._tell()
        if self.told_s is not None and now - self.told_s > _LAST_WORD_S:
            os.kill(self.me["pid"], signal.SIGKILL)  # it cannot even end itself
            self.ending = True
        if self.told_s is not None and self.rank_is_gone:
            self.ending = True

    def _accept(self) -> None:
        assert self.listener is not None
        with contextlib.suppress(OSError):
            connection, _ = self.listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setblocking(False)
            self._add(connection)

    def _stop_listening(self) -> None:
        """All have met: nobody else has anything to say here."""
        if self.listener is not None:
            self.selector.unregister(self.listener)
            self.listener.close()
            self.listener = None

    def _hear_rank(self) -> None:
        messages = self.rank.read()
        if messages is None:
            self.selector.unregister(self.rank)
            self.rank_is_gone = True
            self._end(_WORDLESS)
            self.ending = not self.is_server
            return
        for message in messages:
            if "end" in message:
                self._end(message["end"])
                self.ending = message["end"] is None

    def _end(self, reason: str | None) -> None:
        """This rank's own end, good or bad: rank 0's process tells the others, theirs tell rank 0's."""
        if self.is_server and reason is not None:
            self._note(self.me, reason)
            return
        for peer in self.peers:
            peer.send({"end": reason})

    def _hear_peer(self, peer: Line) -> None:
        messages = peer.read()
        for message in messages or []:
            if "hello" in message:
                if self.is_server:
                    if not hmac.compare_digest(str(message.get("token")).encode(), self.token.encode()):
                        self._drop(peer)
                        return
                    peer.send({"hello": self.me})
                peer.who = message["hello"]
                if not self.is_server or sum(bool(other.who) for other in self.peers) == self.world - 1:
                    self._stop_listening()
                    self.out.send({"ready": True})
            elif not peer.who:
                self._drop(peer)
                return
            elif "end" in message:
                peer.over = True
                if message["end"] is not None:
                    self._note(peer.who, message["end"])
            elif "gone" in message:
                self.deaths = {-1: message["gone"]}
                self._tell()
        if messages is None:
            if peer.who and not peer.over:
                peer.over = True
                self._note(peer.who, _WORDLESS)
            self._drop(peer)

    def _drop(self, peer: Line) -> None:
        self.selector.unregister(peer)
        peer.stream.close()
        self.peers.remove(peer)

    def _note(self, who: dict[str, Any], reason: str) -> None:
        found = self.errors if reason.startswith(_ERROR) else self.deaths
        if who["rank"] not in self.errors:
            found.setdefault(who["rank"], f"{name_of(who)} {reason}")
        if self.first_problem_s is None:
            self.first_problem_s = time.monotonic()

    def _tell(self) -> None:
        """Tell this rank, and as rank 0 the others, who is gone; those that are the reason need no telling."""
        if self.told_s is not None:
            return
        self.told_s = time.monotonic()
        causes = self.deaths or self.errors
        text = "; ".join(causes.values())
        if self.me["rank"] not in causes:
            self.out.send({"gone": text})
        for peer in self.peers if self.is_server else []:
            if peer.who and peer.who["rank"] not in causes:
                peer.send({"gone": text})


def _listener(backlog: int) -> socket.socket:
    """A listening socket on a free port of every address."""
    with contextlib.suppress(OSError, ValueError):  # a machine, or a network namespace, without IPv6
        return socket.create_server(("", 0), backlog=backlog, family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=backlog)


def _allow_connections() -> None:
    """As many open connections as the system allows: rank 0's process holds one for every other rank."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main() -> None:
    """Watch until the rank or the run ends."""
    _allow_connections()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # for the rank, which decides when this process ends
    # Unbuffered: what follows the first line is for the selector.
    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as stdin:
        settings = json.loads(stdin.readline())
    watch = None
    try:
        watch = Watch(settings)
        watch.run()
    except Exception as error:
        Line(sys.stdout.buffer).send({"failed": f"{type(error).__name__}: {error}"})
        # Nobody's run ends for this.
        for peer in watch.peers if watch is not None else []:
            peer.send({"end": None})


if __name__ == "__main__":
    main()
