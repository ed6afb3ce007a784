"""Two hosts on one machine: network namespaces with a cable between them, and the `deepspeed` command in each."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from toy import ROOT, environment, free_port

ADDRESSES = ("10.213.77.1", "10.213.77.2")


def missing() -> str:
    """Why there can be no network namespaces here, or nothing."""
    if shutil.which("ip") is None:
        return "the command ip (iproute2) is not installed"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"mixkd-probe-{os.getpid()}"
    probe = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if probe.returncode == 0:
        pair = ["ip", "-n", name, "link", "add", "probe0", "type", "veth", "peer", "name", "probe1"]
        probe = subprocess.run(pair, capture_output=True, text=True, check=False)
        subprocess.run(["ip", "netns", "delete", name], check=True)
    return f"no network namespaces or veth pairs are permitted here: {probe.stderr.strip()}" * (probe.returncode != 0)


class Hosts:
    """Two namespaces; make and remove them with `with`."""

    def __init__(self, folder: Path) -> None:
        self.names = tuple(f"mixkd-{os.getpid()}-{letter}" for letter in "ab")
        self.hostfile = folder / "hostfile"
        self.hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
        self._port = str(free_port())

    def __enter__(self) -> "Hosts":
        first, second = self.names
        for name in self.names:
            _ip("netns", "add", name)
        _ip("-n", first, "link", "add", "cable0", "type", "veth", "peer", "name", "cable1")
        _ip("-n", first, "link", "set", "cable1", "netns", second)
        for name, link, address in zip(self.names, ("cable0", "cable1"), ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", link)
            _ip("-n", name, "link", "set", link, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    def cable(self, state: str) -> None:
        """Pull the cable ("down") or put it back ("up")."""
        _ip("-n", self.names[0], "link", "set", "cable0", state)

    def start(self, host: int, *arguments: str, cwd: Path = ROOT) -> subprocess.Popen[str]:
        """`deepspeed --no_ssh --node_rank HOST ... mixkd_fast/train.py ARGUMENTS`, as docs/multi_node.md has it."""
        command = [
            *("ip", "netns", "exec", self.names[host]),
            *(os.path.join(os.path.dirname(sys.executable), "deepspeed"), "--no_ssh", "--node_rank", str(host)),
            *("--hostfile", str(self.hostfile), "--master_addr", ADDRESSES[0], "--master_port", self._port),
            *(str(ROOT / "mixkd_fast" / "train.py"), *arguments),
        ]
        return subprocess.Popen(
            command,
            cwd=cwd,
            env=environment(GLOO_SOCKET_IFNAME=f"cable{host}"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
