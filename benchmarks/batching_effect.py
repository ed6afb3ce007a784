"""What batches of rows of like length do to the student: python -m benchmarks.batching_effect [--seeds N] [--steps N]

The demo's student by MixKD, with rows drawn at random, with planned batches of several windows, and with a token budget
for four micro-batches per step; the same rows, steps and seeds. Prints a table of validation loss and accuracy, mean
and standard deviation over seeds.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.statistics import mean_and_spread
from mixkd_fast import MixKD, distill

SETTINGS: dict[str, dict[str, Any]] = {
    "random": {"batching": "random"},
    "length, window 8192": {"batching": "length", "window": 8192},
    "length, window 512": {"batching": "length", "window": 512},
    "length, window 128": {"batching": "length", "window": 128},
    "4 x 192 tokens": {
        "batching": "length",
        "batch_size": 64,
        "micro_batch_size": 16,
        "tokens_per_micro_batch": 192,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rows", type=int, default=6000, help="training rows of the demo task")
    options = parser.parse_args()
    print("| batches | validation NLL | accuracy, % |")
    print("| --- | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        for name, training in SETTINGS.items():
            runs = [run(Path(folder), training, seed, options) for seed in range(options.seeds)]
            loss, loss_spread = mean_and_spread([nll for nll, _ in runs])
            accuracy, accuracy_spread = mean_and_spread([100 * share for _, share in runs])
            cells = (name, f"{loss:.3f} ± {loss_spread:.3f}", f"{accuracy:.1f} ± {accuracy_spread:.1f}")
            print(f"| {' | '.join(cells)} |", flush=True)


def run(folder: Path, training: dict[str, Any], seed: int, options: argparse.Namespace) -> tuple[float, float]:
    """Validation NLL and accuracy of the last student."""
    result = distill(
        task={"name": "demo", "train_rows": options.rows, "max_length": 64},
        teacher="mixkd_fast/data/demo/teacher",
        student={"num_layers": 2, "dropout": 0.0},
        method=MixKD(kd_weight=1.0),
        training={
            "steps": options.steps,
            "batch_size": 32,
            "evaluation_batch_size": 256,
            "learning_rate": 1e-3,
            "weight_decay": 0.1,
            "evaluate_every": options.steps,
            "keep_best": False,
            "log_every": 100,
            "seed": seed,
            **training,
        },
        output={"directory": str(folder / "run"), "overwrite": True, "report": False},
        progress=False,
    )
    metrics = result.metrics["validation"]
    return metrics["nll"], metrics["accuracy"]


if __name__ == "__main__":
    main()
