"""Time the fused ops beside eager and compiled PyTorch and their peers, in one process.

    python -m benchmarks kd_loss|linear_kd_loss|mix_embeddings|relation_kl|all [--device cuda] [--json FILE] [--quick]
    python -m benchmarks train_step [--device cuda] [--json FILE]     # whole training steps: see train_step.py

Nothing is timed for an op whose tests fail, nor for an implementation that is wrong against fp64: exit status 1.
--json FILE also writes FILE.md and FILE.svg beside it.
"""

import argparse
import importlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.bars import bars, predictions
from benchmarks.cases import kd_cases, linear_cases, mix_cases, relation_cases
from benchmarks.render import markdown, write
from benchmarks.timing import Budget, WrongResult, fix_what_glibc_keeps
from mixkd_fast.version import __version__

ROOT = Path(__file__).resolve().parent.parent
OPS = ("kd_loss", "linear_kd_loss", "mix_embeddings", "relation_kl")
CASES: dict[str, Callable[[torch.device, bool], Sequence[Any]]] = {
    "kd_loss": kd_cases,
    "linear_kd_loss": linear_cases,
    "mix_embeddings": mix_cases,
    "relation_kl": relation_cases,
}
PEERS = ("triton", "trl", "liger-kernel")


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["train_step"]:
        from benchmarks import train_step

        device = torch.device("cuda" if "cuda" in given else "cpu")
        facts = {
            "command": command(given),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": commit(),
            "versions": versions(device),
            "device": device_facts(device),
        }
        return train_step.main(given[1:], facts)
    options = _options(arguments)
    ops = OPS if options.op == "all" else (options.op,)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: PyTorch finds no CUDA device here")
    if options.threads:
        torch.set_num_threads(options.threads)
    fix_what_glibc_keeps()
    # The profiler, which counts memory on the CPU, otherwise prints two lines per variant.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    budget = Budget(0.2, 2, 3) if options.quick else Budget(options.seconds, 5, 50)
    modules = [importlib.import_module(f"benchmarks.bench_{op}") for op in ops]
    tests = {"ran": False} if options.no_tests else run_tests([name for module in modules for name in module.TESTS])
    results: list[dict[str, Any]] = []
    for op, module in zip(ops, modules, strict=True):
        cases = [case for case in CASES[op](device, options.quick) if options.cases in case.name]
        try:
            results += module.run(cases, device, budget, compiled=not options.quick)
        except WrongResult as error:
            sys.exit(f"{op}: {error}. Nothing is reported.")
    if not results:
        sys.exit(f"no case holds {options.cases!r} in its name")
    facts = device_facts(device)
    report = {
        "command": command(arguments if arguments is not None else sys.argv[1:]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(device),
        "device": facts,
        "tests": tests,
        "bars": bars(results, facts),
        "predictions": predictions(facts["name"]) if "kd_loss" in ops and not options.quick else [],
        "results": results,
    }
    if options.json is None:
        print(markdown(report))
        return
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print("\n".join(str(path) for path in (options.json, *write(report, options.json))))


def run_tests(patterns: list[str]) -> dict[str, Any]:
    """Run the tests of the ops; exit with status 1 if one fails or if there is none."""
    files = sorted({str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "tests").glob(pattern)})
    empty = [pattern for pattern in patterns if not list((ROOT / "tests").glob(pattern))]
    if empty:
        sys.exit(f"no tests named {', '.join(empty)}: nothing is timed untested (--no-tests to do so anyway)")
    print(f"testing {' '.join(files)}", file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *files], cwd=ROOT, capture_output=True, text=True, check=False
    )
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()]
    if done.returncode != 0:
        sys.exit("\n".join([*lines[-15:], "Tests fail: nothing is timed."]))
    return {"ran": True, "command": "python -m pytest -q " + " ".join(files), "summary": lines[-1].strip("= ")}


def device_facts(device: torch.device) -> dict[str, Any]:
    """Name, type, CPU threads and cores; for a GPU also its compute capability, memory and L2 cache."""
    facts: dict[str, Any] = {
        "type": device.type,
        "name": _processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "capability": None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "name": properties.name,
            "capability": [properties.major, properties.minor],
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
        }
    else:
        facts["instructions"] = torch.backends.cpu.get_cpu_capability()
    return facts


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


def command(arguments: list[str]) -> str:
    """What to type to get the same report; of paths only the last part."""
    return "python -m benchmarks " + shlex.join(Path(word).name if os.sep in word else word for word in arguments)


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


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("op", choices=[*OPS, "all", "train_step"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, help="file of the results; .md and .svg are written beside it")
    parser.add_argument("--cases", default="", help="only cases whose name holds this text, such as '512x32000 fp32'")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few rounds: does it run?")
    parser.add_argument("--no-tests", action="store_true", help="do not run the tests of the ops first")
    parser.add_argument("--seconds", type=float, default=15.0, help="time for the rounds of one case (default: 15)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
