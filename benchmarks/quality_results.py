"""What a run of the quality benchmark is, where it is kept, and whether what is kept is what is asked for now.

A run has a folder of its own under the work folder. What it leaves there: config.json, metrics.jsonl, summary.json
and, last, result.json, with what every evaluation row came to; its weights and logits.npz too, where other runs need
them. A run whose description (task, rows, method, budget, start, teacher) is not the one asked for now counts as not
made. A result says all that the report needs, so a report's runs can be taken into another work folder (`adopt`).
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality_settings import ARMS, SETTINGS, TEACHER_BATCH_SIZE, exists, method_of
from mixkd_fast.methods import FineTune

TEACHER = "teacher"


@dataclass(frozen=True)
class Options:
    """What all runs of a work folder share."""

    data: Path
    encoder: str
    """Folder or hub name of the pretrained encoder."""
    encoder_name: str
    """What reports call it."""
    work: Path
    precision: str
    teacher_rows: Literal["all", "same"]
    threads: int | None = None


@dataclass(frozen=True)
class Run:
    """One model to train. A teacher has arm "teacher" and layers 0, which means all of them."""

    setting: str
    arm: str
    layers: int
    seed: int

    def __str__(self) -> str:
        layers = f"{self.layers} layers, " if self.layers else ""
        return f"{self.setting} {self.arm}, {layers}seed {self.seed}"


def teacher_of(run: Run, options: Options) -> Run:
    """The teacher of a student: one of all rows of the task, or one of the student's own rows.

    All rows of a task are the setting that carries the task's name.
    """
    setting = SETTINGS[run.setting]
    if options.teacher_rows == "same" and setting.fraction is not None:
        return Run(run.setting, TEACHER, 0, run.seed)
    return Run(setting.task, TEACHER, 0, 0)


def start_of(run: Run) -> Run | None:
    """The run whose model this one starts from, or None for the pretrained encoder."""
    start = SETTINGS[run.setting].start
    if start is None:
        return None
    return Run(start, TEACHER, 0, 0) if run.arm == TEACHER else Run(start, "kd", run.layers, 0)


def needed_by(run: Run, options: Options) -> list[Run]:
    """What has to be finished before a run."""
    start = start_of(run)
    found = [] if start is None else [start]
    return found if run.arm == TEACHER else [*found, teacher_of(run, options)]


def in_order(run: Run, options: Options) -> list[Run]:
    """A run after all that it needs, each once."""
    found = [other for needed in needed_by(run, options) for other in in_order(needed, options)]
    return list(dict.fromkeys([*found, run]))


def is_kept(run: Run) -> bool:
    """Whether other runs need its weights."""
    is_start = any(setting.start == run.setting for setting in SETTINGS.values())
    return run.arm == TEACHER or (is_start and run.arm == "kd" and run.seed == 0)


def folder_of(run: Run, options: Options) -> Path:
    """Where a run is kept."""
    name = f"{TEACHER}-{run.seed}" if run.arm == TEACHER else f"{run.arm}-{run.layers}layers-{run.seed}"
    return options.work / run.setting / name


def describe(run: Run, options: Options) -> dict[str, Any]:
    """All that decides a run's outcome; results of another description are never shown as this run's."""
    setting, is_teacher = SETTINGS[run.setting], run.arm == TEACHER
    method = FineTune() if is_teacher else method_of(run.arm)
    epochs = setting.epochs * (1 if is_teacher else ARMS[run.arm].passes)
    if is_teacher and setting.fraction is None:
        epochs = setting.teacher_epochs
    start = start_of(run)
    return {
        "task": setting.task,
        "fraction": setting.fraction,
        "max_length": setting.max_length,
        "splits": list(setting.splits),
        "encoder": options.encoder_name,
        "start": None if start is None else describe(start, options),
        "layers": run.layers,
        "method": method.model_dump(mode="json"),
        "training": {
            "epochs": float(epochs),
            "batch_size": TEACHER_BATCH_SIZE if is_teacher else setting.batch_size,
            "learning_rate": setting.teacher_learning_rate if is_teacher else setting.learning_rate,
            "precision": options.precision,
            "batching": "length",
            "seed": run.seed,
        },
        # Fine-tuning hears nothing of a teacher, but its agreement with one is measured.
        "teacher": None if is_teacher else describe(teacher_of(run, options), options),
    }


def finished(run: Run, options: Options) -> dict[str, Any] | None:
    """The result of a run that is made, as asked for now, or None."""
    kept = read(folder_of(run, options) / "result.json")
    return kept if kept is not None and _is_as_now(kept, run, options) else None


def _is_as_now(result: dict[str, Any], run: Run, options: Options) -> bool:
    if not is_complete(result) or (run.arm != TEACHER and not exists(run.arm)):
        return False
    return same(result["description"], describe(run, options)) and _is_of_these_files(result, options)


def _is_of_these_files(result: dict[str, Any], options: Options) -> bool:
    """Whether the data's files are those that the result was made of, as far as they are here."""
    folder = options.data / SETTINGS[result["setting"]].task
    digests = {"train": result["training_data"]} | {name: split["data"] for name, split in result["splits"].items()}
    files = {folder / f"{name}.parquet": kept for name, kept in digests.items()}
    return all(digest_of(file) == kept for file, kept in files.items() if file.is_file())


def digest_of(file: Path) -> str:
    """16 hexadecimal digits of a file's SHA-256."""
    state = file.stat()
    return _digest(file, state.st_size, state.st_mtime_ns)


@cache
def _digest(file: Path, size: int, changed_at: int) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def is_complete(result: Any) -> bool:
    """Whether a result says all that the report needs; those of earlier versions do not."""
    names = {"setting", "arm", "layers", "seed", "description", "content_hash", "models", "processor", "splits"}
    names.add("training_data")
    if not isinstance(result, dict) or not names <= result.keys():
        return False
    return all({"rows", "metrics", "correct", "nll", "data"} <= split.keys() for split in result["splits"].values())


def are_comparable(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two results are of the same rows, the same teacher and the same start."""
    splits = [{name: split["data"] for name, split in result["splits"].items()} for result in (first, second)]
    return splits[0] == splits[1] and all(first[name] == second[name] for name in ("content_hash", "models"))


def same(kept: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether two descriptions mean the same run. A method's option that came later does nothing by default."""
    if kept.keys() != now.keys():
        return False
    for name, value in kept.items():
        if name == "method":
            if any(option not in now[name] or now[name][option] != chosen for option, chosen in value.items()):
                return False
        elif isinstance(value, dict) and isinstance(now[name], dict):
            if not same(value, now[name]):
                return False
        elif value != now[name]:
            return False
    return True


def why_not(run: Run, options: Options) -> str:
    """A word on a run that is not finished."""
    if run.arm != TEACHER and not exists(run.arm):
        return f"method {ARMS[run.arm].method['name']} does not exist, or lacks an option"
    folder = folder_of(run, options)
    failure = read(folder / "failure.json")
    if failure is not None:
        return f"failed: {failure['error']}"
    return "made with other options or data" if (folder / "result.json").is_file() else "not made yet"


def adopt(results: Iterable[dict[str, Any]], options: Options) -> list[Run]:
    """Take runs that another work folder made, as its quality.json has them, unless they are finished here too.

    A run that is not as it would be made now is left out. Models do not come with results: one that a missing run needs
    is made anew.
    """
    adopted = []
    for result in results:
        if result["setting"] not in SETTINGS or result["arm"] not in (TEACHER, *ARMS):
            continue
        run = Run(result["setting"], result["arm"], result["layers"], result["seed"])
        if not _is_as_now(result, run, options):
            continue
        with locked(folder_of(run, options), wait=False) as mine:
            if mine and finished(run, options) is None:
                write(folder_of(run, options) / "result.json", result)
                adopted.append(run)
    return adopted


def whole(run: Run, options: Options) -> dict[str, Any] | None:
    """The result of a finished run, None where others need its model and that is not here as it would be made now."""
    result = finished(run, options)
    if result is None or not is_kept(run):
        return result
    folder = folder_of(run, options)
    described = read(folder / "described.json")
    has_model = (folder / "logits.npz").is_file() and weights_of(folder).is_file()
    return result if has_model and described is not None and same(described, describe(run, options)) else None


def logits_of(run: Run, options: Options) -> dict[str, NDArray[Any]]:
    """What a kept model answers: "SPLIT.logits" [N, C]."""
    with np.load(folder_of(run, options) / "logits.npz") as arrays:
        return dict(arrays)


@contextmanager
def locked(folder: Path, wait: bool) -> Iterator[bool]:
    """Whether this process alone may work in a folder; the system ends the lock with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def write(path: Path, content: dict[str, Any]) -> None:
    aside = path.with_name(f".writing-{path.name}")
    aside.write_text(json.dumps(content) + "\n")
    os.replace(aside, path)


def weights_of(folder: Path) -> Path:
    return folder / "student" / "model.safetensors"
