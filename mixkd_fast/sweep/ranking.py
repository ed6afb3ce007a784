"""What the trials came to: means over seeds, their order, sweep.json and sweep.md."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixkd_fast.errors import DataError
from mixkd_fast.page import number
from mixkd_fast.run_folder import write_json
from mixkd_fast.sweep.execution import is_finished, recorded_error
from mixkd_fast.sweep.trials import LOWER_IS_BETTER, RunPlan, Trial, shown
from mixkd_fast.sweep_file import Sweep

Cells = list[list[object]]


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    plan: RunPlan
    metrics: dict[str, dict[str, float]]
    teacher: dict[str, dict[str, float]]
    seconds: float


@dataclass(frozen=True)
class TrialResult:
    """What is known of a trial."""

    trial: Trial
    metric: str
    """split/metric by which it is ranked"""
    runs: list[RunResult]
    errors: list[str]

    @property
    def status(self) -> str:
        """finished, failed, or unfinished."""
        if len(self.runs) == len(self.trial.runs):
            return "finished"
        return "failed" if self.errors else "unfinished"

    @property
    def values(self) -> dict[int, float]:
        """Seed -> the metric of its student; in a partition study that of the last shard's student."""
        last = {plan.seed: plan for plan in self.trial.runs}
        return {
            run.plan.seed: value_of(run.metrics, self.metric) for run in self.runs if last[run.plan.seed] is run.plan
        }

    @property
    def mean(self) -> float | None:
        """Over the seeds; None before all are there."""
        return statistics.fmean(self.values.values()) if self.status == "finished" else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds (n - 1); None for a single one."""
        values = self.values
        return statistics.stdev(values.values()) if self.status == "finished" and len(values) > 1 else None

    @property
    def parts(self) -> dict[int, float] | None:
        """Shard -> the metric of its student, mean over the seeds; None without a partition study."""
        numbers = sorted({run.plan.part for run in self.runs if run.plan.part is not None})
        if not numbers:
            return None
        return {
            part: statistics.fmean(value_of(run.metrics, self.metric) for run in self.runs if run.plan.part == part)
            for part in numbers
        }

    @property
    def seconds(self) -> float:
        """Of the training steps of all its runs, also of those before an interruption."""
        return sum(run.seconds for run in self.runs)


@dataclass(frozen=True)
class Ranking:
    """All trials, the best first; trials that are not finished last."""

    metric: str
    """split/metric; without the split where the trials' tasks have different ones"""
    higher_is_better: bool
    results: list[TrialResult]

    @property
    def fields(self) -> list[str]:
        """Names of what the trials set."""
        return list(dict.fromkeys(name for result in self.results for name in result.trial.values))

    @property
    def num_failed(self) -> int:
        """Trials with a run that failed."""
        return sum(result.status == "failed" for result in self.results)

    def table(self) -> tuple[list[str], Cells]:
        """Header and rows: rank, what the trial sets, mean and standard deviation, seconds."""
        partitioned = any(result.parts for result in self.results)
        header = ["rank", "trial", *self.fields, self.metric, "std", *(["mean of shards"] if partitioned else [])]
        rows: Cells = []
        for place, result in enumerate(self.results, start=1):
            values = [_cell(result.trial.values.get(name)) for name in self.fields]
            done = result.status == "finished"
            parts = [statistics.fmean(result.parts.values()) if done and result.parts else None] if partitioned else []
            rows.append(
                [
                    str(place) if done else result.status,
                    f"{result.trial.number:03d}",
                    *values,
                    result.mean,
                    result.deviation,
                    *parts,
                    round(result.seconds, 1),
                ]
            )
        return [*header, "seconds"], rows


def rank(sweep: Sweep, trials: Sequence[Trial]) -> Ranking:
    """Read what the runs have left and put the trials in order; equal ones keep the order of the search.

    Without a split in the sweep's metric each trial goes by its own task's first one.
    Raises: DataError if a summary cannot be read, or lacks the metric.
    """
    results = []
    for trial in trials:
        runs = [_read(plan) for plan in trial.runs if is_finished(plan)]
        errors = [error for plan in trial.runs if (error := recorded_error(plan))]
        results.append(TrialResult(trial, _metric(sweep, runs), runs, errors))
    metrics = list(dict.fromkeys(result.metric for result in results if result.runs)) or [sweep.metric or "metric"]
    metric = metrics[0] if len(metrics) == 1 else metrics[0].rpartition("/")[2]
    higher = metric.rpartition("/")[2] not in LOWER_IS_BETTER
    sign = -1 if higher else 1

    def order(result: TrialResult) -> tuple[bool, float]:
        mean = result.mean
        return mean is None, math.inf if mean is None or math.isnan(mean) else sign * mean

    results.sort(key=order)
    return Ranking(metric, higher, results)


def _metric(sweep: Sweep, runs: Sequence[RunResult]) -> str:
    """split/metric by which a trial's runs are ranked."""
    figures = runs[0].metrics if runs else {}
    split, _, name = (sweep.metric or "").rpartition("/")
    split = split or next(iter(figures), "")
    return f"{split}/{name or next(iter(figures.get(split, {})), 'metric')}"


def value_of(metrics: Mapping[str, Mapping[str, float]], metric: str) -> float:
    """A figure by "split/metric". Raises: DataError naming those that are there."""
    split, _, name = metric.rpartition("/")
    if split not in metrics or name not in metrics[split]:
        there = ", ".join(f"{s}/{m}" for s, values in metrics.items() for m in values)
        raise DataError(f'metric = "{metric}" is not among the figures of a finished run: {there}')
    value = metrics[split][name]
    # JSON has no NaN: a figure that was not finite is null there.
    return float("nan") if value is None else float(value)


def write_ranking(ranking: Ranking, folder: Path) -> None:
    """sweep.json and sweep.md."""
    write_json(folder / "sweep.json", as_json(ranking))
    (folder / "sweep.md").write_text(as_markdown(ranking), encoding="utf-8")


def as_json(ranking: Ranking) -> dict[str, Any]:
    """Everything that is known."""
    trials = []
    for place, result in enumerate(ranking.results, start=1):
        values = result.values
        trials.append(
            {
                "rank": place if result.status == "finished" else None,
                "trial": result.trial.number,
                "folder": str(result.trial.folder),
                "status": result.status,
                "values": dict(result.trial.values),
                "metric": result.metric if result.runs else None,
                "mean": result.mean,
                "std": result.deviation,
                "by_seed": {str(seed): value for seed, value in values.items()},
                "by_part": {str(k): v for k, v in result.parts.items()} if result.parts else None,
                "seconds": result.seconds,
                "students": [str(run.plan.folder / "student") for run in result.runs if run.plan.seed in values],
                "errors": result.errors,
            }
        )
    return {"metric": ranking.metric, "higher_is_better": ranking.higher_is_better, "trials": trials}


def as_markdown(ranking: Ranking) -> str:
    """The ranking as a table, then the errors."""
    header, rows = ranking.table()
    lines = [f"# Sweep: {len(rows)} trials by {ranking.metric}", ""]
    lines.append(f"{'Higher' if ranking.higher_is_better else 'Lower'} is better; std is over seeds.")
    lines += ["", _row(header), _row(["---"] * len(header)), *(_row([number(cell) for cell in row]) for row in rows)]
    failed = [result for result in ranking.results if result.errors]
    if failed:
        lines += ["", "## Failed", ""]
        lines += [f"- {r.trial.number:03d}: {_one_line(error)}" for r in failed for error in r.errors]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_one_line(cell) for cell in cells) + " |"


def _one_line(text: str) -> str:
    return text.partition("\n")[0].replace("|", "\\|")


def _cell(value: Any) -> object:
    """Numbers as they were written: rounding would hide what was tried."""
    return "" if value is None else shown(value)


def _read(plan: RunPlan) -> RunResult:
    path = plan.folder / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not readable JSON: {error}") from error
    teacher = (summary.get("teacher") or {}).get("metrics", {})
    return RunResult(plan, summary["metrics"], teacher, float(summary["training"]["seconds"]))
