"""From a sweep to its trials: each with its folder and the whole, validated configuration of every run in it."""

import copy
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixkd_fast.cli_config import check_config
from mixkd_fast.configuration import Config, validate
from mixkd_fast.data.tasks import resolve
from mixkd_fast.errors import ConfigurationError
from mixkd_fast.language_task import LANGUAGE_METRICS
from mixkd_fast.partition import Strategy
from mixkd_fast.strict_json import apply_overrides, read_object
from mixkd_fast.sweep.points import Point, points_of
from mixkd_fast.sweep_file import Sweep, Transfer, as_overrides, base_content

LOWER_IS_BETTER = frozenset({"nll", "ece", "mse", "kl_to_teacher", "perplexity", "teacher_mse"})
_FURTHER_METRICS = {
    "classification": ("nll", "ece", "teacher_agreement", "kl_to_teacher"),
    "regression": ("mse", "teacher_mse"),
    "causal_lm": LANGUAGE_METRICS,
}
STRATEGY, TRANSFER = "partition.strategy", "partition.transfer"
"""Names under which a partition study's choices stand among a trial's values."""


@dataclass(frozen=True)
class RunPlan:
    """One run of a trial."""

    seed: int
    part: int | None
    """Shard of a partition study."""
    folder: Path
    config: Config


@dataclass(frozen=True)
class Trial:
    """A point of the search under one strategy and transfer: its runs, in the order in which they need each other."""

    number: int
    values: Point
    """What it sets, by name; also the strategy and the transfer of a partition study."""
    folder: Path
    runs: list[RunPlan]

    @property
    def chained(self) -> bool:
        """Whether a run needs the student of the run before it."""
        return bool(TRANSFER in self.values and self.values[TRANSFER] != "none")

    def describe(self) -> str:
        """Its values in one line."""
        return ", ".join(f"{name}={shown(value)}" for name, value in self.values.items()) or "the base configuration"


@dataclass(frozen=True)
class _Link:
    """A strategy and a transfer of a partition study."""

    strategy: Strategy
    transfer: Transfer


def shown(value: Any) -> str:
    """A value in few characters."""
    return value if isinstance(value, str) else json.dumps(value)


def plan_trials(sweep: Sweep, overrides: Sequence[str] = ()) -> list[Trial]:
    """All trials, every run's configuration validated as a run would. Equal trials are one.

    Folders are output/trials/NNN-HASH, with the hash of everything but seeds and folders. A trial whose hash is there
    keeps its folder; new ones are numbered on. So a changed sweep file runs what is new in it and finds the rest done.
    Args: overrides = "section.field=value", applied to the base configuration before the trials' values.
    Raises: ConfigurationError with all problems of all trials.
    """
    base = base_content(sweep, overrides)
    links: list[_Link | None] = [None]
    if sweep.partition is not None:
        links = [_Link(s, t) for s in sweep.partition.strategies for t in sweep.partition.transfer]
    problems: dict[str, list[str]] = {}
    firsts: dict[str, str] = {}  # the first metric of a trial's task -> the trial
    found: dict[str, tuple[Point, _Link | None, dict[str, Any]]] = {}
    for point in points_of(sweep):
        for link in links:
            label = Trial(0, _values(point, link), Path(), []).describe()
            try:
                content = apply_overrides(base, as_overrides(point))
                config = _checked(content, sweep)
                firsts.setdefault(next(iter(resolve(config.task).metrics), ""), label)
                found.setdefault(_digest(config, sweep, link), (point, link, content))
                for run in _runs(content, config, sweep, link, Path("trial"), check=True):
                    check_config(run.config, sweep.ranks or 1)
            except ConfigurationError as error:
                for line in _lines(error):
                    problems.setdefault(line, []).append(label)
    if sweep.metric is None and len(firsts) > 1:
        missing = f"metric is missing: the tasks' first ones are {', '.join(firsts)}; give one that all have"
        problems[missing] = list(firsts.values())
    if problems:
        raise ConfigurationError("\n".join(f"{line}\n  in {_some(labels)}" for line, labels in problems.items()))
    folders = _folders(Path(sweep.output) / "trials", list(found))
    return [
        Trial(
            int(folders[digest].name.partition("-")[0]),
            _values(point, link),
            folders[digest],
            _runs(content, _checked(content, sweep), sweep, link, folders[digest]),
        )
        for digest, (point, link, content) in found.items()
    ]


def _checked(content: Mapping[str, Any], sweep: Sweep) -> Config:
    config = validate(Config, content)
    check_config(config, sweep.ranks or 1)
    if sweep.metric is not None:
        spec = resolve(config.task)
        allowed = (*spec.metrics, *_FURTHER_METRICS[spec.kind])
        split, _, metric = sweep.metric.rpartition("/")
        if metric not in allowed:
            raise ConfigurationError(f'metric = "{sweep.metric}": allowed for this task: {", ".join(allowed)}')
        splits = tuple(spec.evaluation_files or spec.evaluation_splits or ())
        if split and splits and split not in splits:
            raise ConfigurationError(f'metric = "{sweep.metric}": the task has the splits {", ".join(splits)}')
    return config


def _values(point: Point, link: _Link | None) -> Point:
    return point if link is None else {**point, STRATEGY: link.strategy, TRANSFER: link.transfer}


def _runs(
    content: Mapping[str, Any], config: Config, sweep: Sweep, link: _Link | None, folder: Path, check: bool = False
) -> list[RunPlan]:
    """Args: check = the runs of one seed are enough."""
    runs = []
    for seed in (sweep.seeds or [config.training.seed])[: 1 if check else None]:
        previous: Path | None = None
        for part in range(sweep.partition.parts) if sweep.partition is not None else (None,):
            own = folder / f"seed-{seed}" if part is None else folder / f"seed-{seed}" / f"part-{part}"
            run = copy.deepcopy(dict(content))
            run["training"] = {**(run.get("training") or {}), "seed": seed}
            run["output"] = {**(run.get("output") or {}), "directory": str(own), "overwrite": False}
            if link is not None and part is not None:
                _link(run, sweep, link, part, previous)
            runs.append(RunPlan(seed, part, own, validate(Config, run)))
            previous = own
    return runs


def _link(run: dict[str, Any], sweep: Sweep, link: _Link, part: int, previous: Path | None) -> None:
    """Set the shard, and what this student takes from the one before."""
    study = sweep.partition
    assert study is not None
    run["task"]["partition"] = {
        "strategy": link.strategy,
        "parts": study.parts,
        "part": part,
        "alpha": study.alpha,
        "seed": study.seed,
    }
    if previous is None or link.transfer == "none":
        return
    student, model = dict(run.get("student") or {}), str(previous / "student")
    if link.transfer == "initial":
        # It has the chosen layers already.
        run["student"] = student | dict.fromkeys(("revision", "config", "num_layers", "layers")) | {"model": model}
        return
    teacher = dict(run.get("teacher") or {})
    if student.get("model") is None and student.get("config") is None:
        # Its layers come from the first teacher as those of every other student: only the answers are handed on.
        remote = bool(student.get("trust_remote_code") or teacher.get("trust_remote_code"))
        source = {"model": teacher["model"], "revision": teacher.get("revision"), "trust_remote_code": remote}
        run["student"] = student | source
    run["teacher"] = teacher | {"model": model, "revision": None}
    if study.method is not None:
        run["method"] = study.method.model_dump(mode="json")
    if not validate(Config, run).method.uses_teacher:
        raise ConfigurationError(
            f'partition.transfer "teacher": method "{run["method"]["name"]}" imitates no teacher; '
            'give partition.method, as {"name": "kd"}'
        )


def _digest(config: Config, sweep: Sweep, link: _Link | None) -> str:
    resolved = config.model_dump(mode="json", by_alias=True, serialize_as_any=True, exclude={"schema_", "output"})
    resolved["training"].pop("seed")
    if isinstance(config.deepspeed, str):
        resolved["deepspeed"] = read_object(config.deepspeed, "deepspeed")
    study = None
    if sweep.partition is not None and link is not None:
        study = sweep.partition.model_dump(mode="json", exclude={"strategies", "transfer"})
        study |= {"strategy": link.strategy, "transfer": link.transfer}
    return hashlib.sha256(json.dumps([resolved, study], sort_keys=True).encode()).hexdigest()[:10]


def _folders(parent: Path, digests: Sequence[str]) -> dict[str, Path]:
    """The folder of every trial: the one that is there, or a new number."""
    there = {}
    for path in parent.iterdir() if parent.is_dir() else ():
        match = re.fullmatch(r"(\d{3,})-([0-9a-f]{10})", path.name)
        if match:
            there[match[2]] = path
    number = 1 + max((int(path.name.partition("-")[0]) for path in there.values()), default=-1)
    folders = {}
    for digest in digests:
        folders[digest] = there.get(digest) or parent / f"{number:03d}-{digest}"
        number += digest not in there
    return folders


def _lines(error: ConfigurationError) -> list[str]:
    """The problems of one configuration."""
    lines = str(error).splitlines()
    return [line.strip() for line in lines[1:]] if re.fullmatch(r"\d+ problems:", lines[0]) else [str(error)]


def _some(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - 3} more trials" if len(labels) > 3 else ""
    return "; ".join(labels[:3]) + more
