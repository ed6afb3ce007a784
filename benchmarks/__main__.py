"""Time the fused ops beside eager and compiled PyTorch and their peers, in one process.

    python -m benchmarks kd_loss|linear_kd_loss|mix_embeddings|relation_kl|all [--device cuda] [--json FILE] [--quick]
    python -m benchmarks train_step [--device cuda] [--json FILE]     # whole training steps: see train_step.py

Nothing is timed for an op whose tests fail, nor for a case that is wrong against fp64: exit status 1. --json FILE also
writes FILE.md and FILE.svg beside it; FILE and FILE.md are written after every case.
"""

import argparse
import importlib
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.bars import bars, predictions
from benchmarks.cases import kd_cases, linear_cases, mix_cases, relation_cases, short_cases
from benchmarks.machine import ROOT, facts, write_both
from benchmarks.render import markdown, plot
from benchmarks.timing import Budget, fix_what_glibc_keeps

OPS = ("kd_loss", "linear_kd_loss", "mix_embeddings", "relation_kl")
CASES: dict[str, Callable[[torch.device, bool], Sequence[Any]]] = {
    "kd_loss": kd_cases,
    "linear_kd_loss": linear_cases,
    "mix_embeddings": mix_cases,
    "relation_kl": relation_cases,
}


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["train_step"]:
        from benchmarks import train_step

        device = torch.device("cuda" if "cuda" in given and torch.cuda.is_available() else "cpu")
        return train_step.main(given[1:], {"command": command(given), **facts(device)})
    options = _options(given)
    ops = OPS if options.op == "all" else (options.op,)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: PyTorch finds no CUDA device here")
    if options.threads:
        torch.set_num_threads(options.threads)
    fix_what_glibc_keeps()
    # The profiler, which counts memory on the CPU, otherwise prints two lines per variant.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    cases = chosen_cases(ops, device, options)
    if not cases:
        sys.exit(f"no case holds {options.cases!r} in its name")
    report: dict[str, Any] = {
        "command": command(given),
        **facts(device),
        "tests": tests_before(ops, options),
        "results": [],
        "failures": [],
        "not_run": [],
    }

    def finish_case() -> None:
        report["bars"] = bars(report["results"], report["device"])
        of_gpus = "kd_loss" in ops and not options.quick
        report["predictions"] = predictions(report["device"]["name"]) if of_gpus else []
        if options.json is not None:
            write_both(report, markdown(report), options.json)

    measure_cases(cases, device, options, report, finish_case)
    if options.json is None:
        print(markdown(report))
    else:
        print(f"{options.json}\n{options.json.with_suffix('.md')}")
        if report["results"]:
            picture = options.json.with_suffix(".svg")
            plot(report, [picture])
            print(picture)
    lacking = [f"{entry['op']} {entry['case']}: {entry['why']}" for entry in report["failures"] + report["not_run"]]
    if lacking:
        sys.exit("\n".join(lacking))


def chosen_cases(ops: Sequence[str], device: torch.device, options: argparse.Namespace) -> list[tuple[str, Any]]:
    """(op, case) of everything that the options ask for, in the order of measuring."""
    found = []
    for op in ops:
        cases = CASES[op](device, options.quick)
        if options.short and not options.quick:
            cases = short_cases(cases)
        found += [(op, case) for case in cases if options.cases in case.name]
    return found


def measure_cases(
    cases: Sequence[tuple[str, Any]],
    device: torch.device,
    options: argparse.Namespace,
    report: dict[str, Any],
    finish_case: Callable[[], None],
) -> None:
    """Fill results, failures and not_run of the report; a case that fails does not stop the others."""
    budget = Budget(0.2, 2, 3) if options.quick else Budget(options.seconds, 5, 50)
    stop, compiled_ops = time.monotonic() + options.stop_after, set()
    for op, case in cases:
        entry = {"op": op, "case": case.name}
        if time.monotonic() > stop:
            report["not_run"].append({**entry, "why": f"not begun within {options.stop_after:g} s"})
            continue
        # Compiling takes longer than a short measurement: once per op shows what it brings.
        compiled = not options.quick and not (options.short and op in compiled_ops)
        compiled_ops.add(op)
        try:
            report["results"] += importlib.import_module(f"benchmarks.bench_{op}").run([case], device, budget, compiled)
        except Exception as error:
            report["failures"].append({**entry, "why": f"{type(error).__name__}: {error}"})
            print(report["failures"][-1], file=sys.stderr, flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        finish_case()
    finish_case()


def tests_before(ops: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """What the tests of the ops say, run now or, by --tested, before."""
    if options.tested:
        return {"ran": True, "summary": options.tested}
    if options.no_tests:
        return {"ran": False}
    return run_tests([name for op in ops for name in importlib.import_module(f"benchmarks.bench_{op}").TESTS])


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


def command(arguments: list[str]) -> str:
    """What to type to get the same report; of paths only the last part."""
    return "python -m benchmarks " + shlex.join(Path(word).name if os.sep in word else word for word in arguments)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("op", choices=[*OPS, "all", "train_step"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, help="file of the results; .md and .svg are written beside it")
    parser.add_argument("--cases", default="", help="only cases whose name holds this text, such as '512x32000 fp32'")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few rounds: does it run?")
    parser.add_argument("--short", action="store_true", help="few cases, those of the bars; torch.compile once per op")
    parser.add_argument("--no-tests", action="store_true", help="do not run the tests of the ops first")
    parser.add_argument("--tested", default="", help="what the tests said that ran before, for the report")
    parser.add_argument(
        "--stop-after", type=float, default=math.inf, metavar="SECONDS", help="begin no case after this time"
    )
    parser.add_argument("--seconds", type=float, default=15.0, help="time for the rounds of one case (default: 15)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
