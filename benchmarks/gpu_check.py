"""Everything that needs an NVIDIA GPU, in one go: python -m benchmarks.gpu_check [--only PART,PART] [--out FOLDER]

Parts run one after the other in processes of their own; one that fails does not stop the others. FOLDER gets the output
of each part, gpu_check.json with what passed, and the benchmarks' JSON, tables and plots. Status 1 after a failure.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
OP_TESTS = "tests/test_losses*.py tests/test_reference_divergences.py tests/test_kd_loss_*.py tests/test_mix_*.py"
SANITIZED = 'tests/test_cuda_*.py -k "not capture and not 2_to_the_31 and not compiled"'


class Part(NamedTuple):
    """A shell command, the seconds it may take, and a program it cannot do without."""

    command: str
    limit_s: int
    needs: str = ""


def parts(python: str, out: Path) -> dict[str, Part]:
    """Every part in order; `python` and `out` as they stand in a shell command."""
    sanitizer = f"compute-sanitizer --error-exitcode 1 --tool {{}} {python} -m pytest -q -x {SANITIZED}"
    return {
        "build": Part(f"MIXKD_BUILD=cuda {python} setup.py build_ext --inplace", 300, "nvcc"),
        "backends": Part(f"{python} -m mixkd_fast.ops.backends", 60),
        "ops": Part(f"MIXKD_REQUIRE=cpu,cuda {python} -m pytest -q {OP_TESTS} tests/test_triton_*.py", 600),
        "graphs": Part(f"{python} -m pytest -q tests/test_cuda_*.py tests/test_fused_encoder.py", 300),
        "memcheck": Part(sanitizer.format("memcheck"), 300, "compute-sanitizer"),
        "racecheck": Part(sanitizer.format("racecheck"), 300, "compute-sanitizer"),
        "initcheck": Part(sanitizer.format("initcheck"), 300, "compute-sanitizer"),
        "training": Part(f"{python} -m benchmarks.gpu_training --out {out}", 300),
        "bench_ops": Part(f"{python} -m benchmarks all --device cuda --no-tests --json {out}/ops.json", 600),
        "bench_step": Part(f"{python} -m benchmarks train_step --device cuda --json {out}/train_step.json", 600),
        "overhead": Part(f"{python} -m benchmarks.deepspeed_overhead --device cuda", 120),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="comma separated parts (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    known = parts(shlex.quote(sys.executable), Path(shlex.quote(str(options.out.resolve()))))
    chosen = options.only.split(",") if options.only else list(known)
    unknown = [name for name in chosen if name not in known]
    if unknown:
        parser.error(f"--only {','.join(unknown)}: allowed: {', '.join(known)}")
    results = run({name: known[name] for name in chosen}, options.out)
    (options.out / "gpu_check.json").write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    sys.exit(any(result["outcome"] == "failed" for result in results.values()))


def run(chosen: Mapping[str, Part], out: Path) -> dict[str, dict[str, Any]]:
    """Run parts; each one's output goes to `out`/PART.log."""
    results = {}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    for name, part in chosen.items():
        print(f"== {name}: {part.command}", file=sys.stderr, flush=True)
        started = time.monotonic()
        if part.needs and shutil.which(part.needs) is None:
            results[name] = {"outcome": "left out", "why": f"{part.needs} is not installed", "seconds": 0.0}
            continue
        log = out / f"{name}.log"
        with log.open("w") as file:
            child = subprocess.Popen(
                ["bash", "-c", part.command],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status: int | str = child.wait(part.limit_s)
            except subprocess.TimeoutExpired:
                # With everything that it has started, or the next part would share the GPU.
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
                status = f"still running after {part.limit_s} s"
        lines = log.read_text(errors="replace").strip().splitlines() or [""]
        outcome = {"outcome": "passed"} if status == 0 else {"outcome": "failed", "why": f"status {status}"}
        results[name] = {**outcome, "seconds": time.monotonic() - started, "last_line": lines[-1][:200]}
    return results


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """What passed, as Markdown."""
    lines = ["| part | outcome | seconds | last line |", "| --- | --- | ---: | --- |"]
    for name, result in results.items():
        outcome = " ".join(str(result[key]) for key in ("outcome", "why") if key in result)
        lines.append(f"| {name} | {outcome} | {result['seconds']:.0f} | {result.get('last_line', '')} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
