"""What a measurement was made on and with, and its two files: JSON and Markdown."""

import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mixkd_fast.planning.hardware import GPUS
from mixkd_fast.version import __version__

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("triton", "trl", "liger-kernel")


def facts(device: torch.device) -> dict[str, Any]:
    """Date, commit, versions and device, as every report begins."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(device),
        "device": device_facts(device),
    }


def device_facts(device: torch.device) -> dict[str, Any]:
    """Name, type, CPU threads and cores; for a GPU also its compute capability, memory and L2 cache."""
    found: dict[str, Any] = {
        "type": device.type,
        "name": _processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "capability": None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "name": properties.name,
            "capability": [properties.major, properties.minor],
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
        }
    else:
        found["instructions"] = torch.backends.cpu.get_cpu_capability()
    return found


def versions(device: torch.device) -> dict[str, str]:
    """Of everything that was timed or did the timing."""
    found = {"mixkd_fast": __version__, "torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cuda":
        found["cuda"] = str(torch.version.cuda)
    for name in PEERS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str:
    """Short hash, "-dirty" with uncommitted changes to tracked files."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude", "*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def planned_gpu(name: str) -> str:
    """The entry of `mixkd-fast plan`'s table of GPUs for a device called `name`. Raises: LookupError."""
    found = next((key for key in GPUS if key in name), None)
    if found is None:
        raise LookupError(f"no published figures for {name}; there are some for {', '.join(GPUS)}")
    return found


def headline(report: dict[str, Any]) -> str:
    """The facts as a line of a page."""
    listed = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"{report['device']['name']}; {listed}; commit {report['commit']}, {report['date']}."


def write_both(report: dict[str, Any], page: str, json_file: Path) -> None:
    """The report as `json_file`, the page beside it as .md."""
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    json_file.with_suffix(".md").write_text(page.rstrip("\n") + "\n", encoding="utf-8")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())
