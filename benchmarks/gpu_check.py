"""Everything that needs an NVIDIA GPU, in under ten minutes: python -m benchmarks.gpu_check [--only PART,PART]

Parts run one after the other in processes of their own, the most important first; one that fails does not stop the
others. The folder (--out) gets each part's output, gpu_check.json and gpu_check.md with what passed, and JSON and
Markdown of every benchmark, each written as soon as something is known. Exit status 1 if a part failed, was left out
because a program is missing, or did not fit into the time; a part alone (--only) has all of the time.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import xml.etree.ElementTree
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_parts import Part, parts
from benchmarks.machine import PEERS, ROOT, facts, headline, write_both

BUDGET_S = 570.0
LEAST_S = 5.0
"""With less time than this left a part is not begun."""
NEW_WORK_SHARE = 0.75
"""Of a part's time: after it a benchmark starts no further case, so that it ends by itself."""
Results = dict[str, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="comma separated parts (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for everything (default: %(default)g)")
    options = parser.parse_args()
    known = parts(shlex.quote(sys.executable), shlex.quote(str(options.out.resolve())))
    chosen = options.only.split(",") if options.only else list(known)
    unknown = [name for name in chosen if name not in known]
    if unknown:
        parser.error(f"--only {','.join(unknown)}: allowed: {', '.join(known)}")
    started = time.monotonic()
    report = facts(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    report["missing_peers"] = [name for name in PEERS if report["versions"][name] == "not installed"]

    def save(results: Results) -> None:
        report.update(parts=results, seconds=time.monotonic() - started)
        write_both(report, page(report), options.out / "gpu_check.json")

    results = run({name: known[name] for name in chosen}, options.out, options.budget, save)
    print(page(report))
    sys.exit(any(result["outcome"] != "passed" for result in results.values()))


def run(
    chosen: Mapping[str, Part],
    out: Path,
    budget_s: float = BUDGET_S,
    save: Callable[[Results], None] = lambda results: None,
) -> Results:
    """Run parts within `budget_s` seconds, each one's output in `out`/PART.log; `save` gets what is known so far."""
    out.mkdir(parents=True, exist_ok=True)
    deadline, results = time.monotonic() + budget_s, Results()
    for _, neighbours in groupby(chosen.items(), key=lambda item: item[1].beside or item[0]):
        group, tested = list(neighbours), what_tests_said(results)
        with ThreadPoolExecutor(len(group)) as pool:
            jobs = {}
            for name, part in group:
                left = deadline - time.monotonic()
                limit_s = left if len(chosen) == 1 else min(part.limit_s, left)
                jobs[name] = pool.submit(run_part, name, part, out, limit_s, tested)
            for name, job in jobs.items():
                results[name] = job.result()
                save(results)
    return results


def run_part(name: str, part: Part, out: Path, limit_s: float, tested: str) -> dict[str, Any]:
    """One part. Returns outcome ("passed", "failed", "left out" or "not run"), why, seconds and last_line."""
    environment = environment_of_parts()
    if part.needs and shutil.which(part.needs, path=environment["PATH"]) is None:
        return {"outcome": "left out", "why": f"{part.needs} is not installed", "seconds": 0.0}
    if limit_s < min(LEAST_S, part.limit_s):
        return {"outcome": "not run", "why": "no time was left", "seconds": 0.0}
    junit = out / f"{name}.xml"
    junit.unlink(missing_ok=True)
    values = {"seconds": str(int(NEW_WORK_SHARE * limit_s)), "tested": tested, "junit": str(junit.resolve())}
    command = part.command
    for key, value in values.items():
        command = command.replace(f"{{{key}}}", shlex.quote(value))
    print(f"== {name}: {command}", file=sys.stderr, flush=True)
    started, log = time.monotonic(), out / f"{name}.log"
    why = run_command(command, environment, log, limit_s)
    if not why and "{junit}" in part.command:
        why = skipped_altogether(junit)
    lines = log.read_text(errors="replace").strip().splitlines() or [""]
    outcome = {"outcome": "failed", "why": why} if why else {"outcome": "passed"}
    return {**outcome, "seconds": time.monotonic() - started, "last_line": lines[-1][:200]}


def run_command(command: str, environment: dict[str, str], log: Path, limit_s: float) -> str:
    """Run it with its output in `log`. Returns what went wrong, or ""."""
    with log.open("w") as file:
        child = subprocess.Popen(
            ["bash", "-c", command],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"still running after {limit_s:.0f} s"
        finally:
            if child.poll() is None:
                # With everything that it has started, or the next part would share the GPU.
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    return f"status {status}" if status else ""


def environment_of_parts() -> dict[str, str]:
    """This process's, with the programs of this Python and of the CUDA toolkit on the path."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    path = [sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath), f"{home}/bin"]
    return {**os.environ, "PATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def skipped_altogether(junit: Path) -> str:
    """Which files of tests had none that ran, and why; "" if there is no such file."""
    if not junit.is_file():
        return "no test was reported"
    skipped: dict[str, list[str]] = {}
    ran = set()
    for case in xml.etree.ElementTree.parse(junit).iter("testcase"):
        # A file that is skipped while it is collected has an empty class name.
        name, found = case.get("classname") or case.get("name") or "", case.find("skipped")
        if found is None:
            ran.add(name)
        else:
            skipped.setdefault(name, []).append(found.get("message") or "")
    if not ran and not skipped:
        return "there was no test"
    return "; ".join(f"all of {name} skipped: {whys[0]}" for name, whys in skipped.items() if name not in ran)


def what_tests_said(results: Results) -> str:
    """For the benchmarks' reports: were the ops tested before, and did they pass?"""
    found = results.get("op_tests")
    if found is None:
        return "not run before these measurements"
    said = f"{found['outcome']}: {found.get('last_line', '').strip('= ')}"
    return (
        said
        if found["outcome"] == "passed"
        else f"NOT PASSED ({said}; {found['why']}), so figures may be of wrong code"
    )


def page(report: Mapping[str, Any]) -> str:
    """gpu_check.md."""
    lines = ["# GPU check", "", headline(dict(report)), ""]
    if report["missing_peers"]:
        lines += [f"Peers that are not installed and were not timed: {', '.join(report['missing_peers'])}.", ""]
    lines += [f'{report["seconds"]:.0f} s in all. Parts that do not say "passed" are not checked.', ""]
    return "\n".join([*lines, table(report["parts"])])


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """What passed, as Markdown."""
    lines = ["| part | outcome | seconds | last line |", "| --- | --- | ---: | --- |"]
    for name, result in results.items():
        outcome = ": ".join(str(result[key]) for key in ("outcome", "why") if key in result)
        cells = (name, outcome, f"{result['seconds']:.0f}", result.get("last_line", ""))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
