"""Does training on the GPU follow the CPU's? python -m benchmarks.gpu_training [--steps N] [--out FOLDER]

The demo's student by MixKD without dropout: fp32 on the CPU, then bf16 on the GPU at ZeRO 0, 2 and 3, padded, unpadded
and compiled. Losses of the same steps must stay near each other; exit status 1 if they do not.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

TOLERANCE = 0.05
"""Largest mean relative difference of the losses over all steps: bf16 against fp32."""
VARIANTS: dict[str, dict[str, Any]] = {
    "ZeRO 0": {},
    "ZeRO 0, unpadded": {"training.unpadded": True},
    "ZeRO 0, compiled": {"training.compile": "dynamic"},
    "ZeRO 0, CUDA graphs": {"training.compile": "shapes"},
    "ZeRO 0, teacher on its own stream": {"teacher.stream": True},
    "ZeRO 0, fp8 teacher": {"teacher.quantization": "fp8"},
    "ZeRO 0, accumulated": {"training.micro_batch_size": 8},
    "ZeRO 2": {"deepspeed.zero_optimization.stage": 2},
    "ZeRO 3": {"deepspeed.zero_optimization.stage": 3},
    "ZeRO 3 teacher": {"teacher.zero_stage": 3},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("PyTorch finds no CUDA device here")
    with tempfile.TemporaryDirectory() as folder:
        truth = losses(Path(folder), options.steps, {"training.precision": "fp32"}, gpu=False)
        report = {}
        for name, changes in VARIANTS.items():
            found = losses(Path(folder), options.steps, {"training.precision": "bf16", **changes}, gpu=True)
            pairs = zip(found, truth, strict=True)
            report[name] = sum(abs(ours - exact) / abs(exact) for ours, exact in pairs) / len(truth)
            print(f"{name}: mean relative difference of {len(truth)} losses {report[name]:.4f}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "training.json").write_text(json.dumps({"tolerance": TOLERANCE, "difference": report}, indent=1))
    if max(report.values()) > TOLERANCE:
        sys.exit(f"a difference is above {TOLERANCE}")


def losses(folder: Path, steps: int, changes: dict[str, Any], gpu: bool) -> list[float]:
    """The losses of a run of the real program, in a process of its own."""
    fields = {
        "output.directory": str(folder / "run"),
        "output.report": False,
        "training.steps": steps,
        "training.log_every": 1,
        "training.evaluate_every": steps,
        "training.checkpoint_every": steps,
        "training.batching": "length",
        **changes,
    }
    command = [sys.executable, "-m", "mixkd_fast.train", "--config", "configs/demo_mixkd.json"]
    for name, value in fields.items():
        command += ["--set", f"{name}={json.dumps(value)}"]
    environment = {**os.environ, **({} if gpu else {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"})}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if record["kind"] == "train"]


if __name__ == "__main__":
    main()
