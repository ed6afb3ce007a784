"""The language-model quality benchmark's result file, table and plot, from the figures of its runs alone."""

import json
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import matplotlib
import numpy as np
import torch
from scipy.stats import t as student_t

from benchmarks.statistics import mean_and_spread
from mixkd_fast.version import __version__

Runs = dict[tuple[str, str, int], dict[str, Any] | None]
"""(setting, arm, seed) -> figures, None for what is not made."""


class ArmTitle(Protocol):
    """What the report says of an arm."""

    @property
    def title(self) -> str: ...
    @property
    def control(self) -> str:
        """The arm it is compared with, by the same seeds."""


def collect(runs: Runs, settings: dict[str, str], arms: Mapping[str, ArmTitle], commit: str) -> dict[str, Any]:
    """One report: every finished run, the table of every setting, and what is missing."""
    made = {run: figures for run, figures in runs.items() if figures is not None}
    return {
        "versions": {"mixkd_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {"cores": os.cpu_count(), "system": platform.system(), "machine": platform.machine()},
        "commit": commit,
        "settings": settings,
        "arms": {name: arm.title for name, arm in arms.items()},
        "tables": {name: table(made, name, arms) for name in settings},
        "results": list(made.values()),
        "missing": [list(run) for run, figures in runs.items() if figures is None],
    }


def table(
    made: dict[tuple[str, str, int], dict[str, Any]], setting: str, arms: Mapping[str, ArmTitle]
) -> list[dict[str, Any]]:
    """A row per arm: figures over seeds, and the log-ratio of perplexity to the arm's control, paired by seed."""
    rows = []
    for name, arm in arms.items():
        values = _of_seeds(made, setting, name)
        if not values:
            continue
        perplexities = {seed: _perplexity(figures) for seed, figures in values.items()}
        base = {seed: _perplexity(figures) for seed, figures in _of_seeds(made, setting, arm.control).items()}
        own_text = [figures["own_text"]["kl"] for figures in values.values() if "own_text" in figures]
        shared = sorted(values.keys() & base.keys())
        mean, spread = mean_and_spread(list(perplexities.values()))
        rows.append(
            {
                "arm": name,
                "control": arm.control,
                "seeds": len(values),
                "perplexity": mean,
                "spread": spread,
                "own_text": mean_and_spread(own_text) if own_text else None,
                "seconds": float(np.mean([figures["seconds"] for figures in values.values()])),
                "change": None
                if name == arm.control or not shared
                else interval([math.log(perplexities[seed] / base[seed]) for seed in shared]),
            }
        )
    return rows


def _of_seeds(made: dict[tuple[str, str, int], dict[str, Any]], setting: str, arm: str) -> dict[int, dict[str, Any]]:
    return {seed: figures for (s, a, seed), figures in made.items() if (s, a) == (setting, arm)}


def interval(log_ratios: list[float]) -> dict[str, float | None]:
    """Mean change of perplexity in percent and its 95 % interval (Student's t over seeds, on the log-ratio)."""
    mean = float(np.mean(log_ratios))
    change: dict[str, float | None] = {"percent": 100 * math.expm1(mean), "lower": None, "upper": None}
    if len(log_ratios) > 1:
        half = float(student_t.ppf(0.975, len(log_ratios) - 1) * np.std(log_ratios, ddof=1) / len(log_ratios) ** 0.5)
        change |= {"lower": 100 * math.expm1(mean - half), "upper": 100 * math.expm1(mean + half)}
    return change


def _perplexity(figures: dict[str, Any]) -> float:
    return float(figures["metrics"][list(figures["evaluation"])[-1]]["perplexity"])


def _teacher(report: dict[str, Any], setting: str) -> dict[str, Any] | None:
    """Figures of the teacher, as a run that had it found them."""
    for result in report["results"]:
        if result["setting"] == setting and result["teacher_metrics"]:
            return {"perplexity": result["teacher_metrics"][list(result["evaluation"])[-1]]["perplexity"]}
    return None


def markdown(report: dict[str, Any]) -> str:
    """The report as one page."""
    commits = sorted({result["commit"] for result in report["results"] if "commit" in result})
    lines = ["# Does distillation help language models?", ""]
    lines += [
        f"`python -m benchmarks.lm_quality --data FOLDER`, made by commit {', '.join(commits) or report['commit']}, "
        f"{report['machine']['cores']} cores, torch {report['versions']['torch']}.",
        "",
        "Perplexity is that of the text of others. KL of the own text: KL(student \u2016 teacher) in nats a token, at "
        "the tokens of text that the student draws at temperature 1.",
        "",
    ]
    for setting, title in report["settings"].items():
        rows = report["tables"][setting]
        if not rows:
            continue
        example = next(r for r in report["results"] if r["setting"] == setting)
        split = list(example["evaluation"])[-1]
        lines += [f"## {title}", ""]
        lines += [
            f"Student: Llama, {example['model']['num_hidden_layers']} layers x {example['model']['hidden_size']}, "
            f"{example['parameters']:,} parameters; {example['steps']} steps of "
            f"{example['batch_size']} rows of up to {example['max_length']} tokens; best of four evaluations on "
            f"{next(iter(example['evaluation']))}, figures of {split}.",
            "",
        ]
        for control in dict.fromkeys(row["control"] for row in rows):
            group = [row for row in rows if row["control"] == control]
            lines += _rows_of(group, report, setting)
    if report["missing"]:
        names = ", ".join(f"{setting} {arm} seed {seed}" for setting, arm, seed in report["missing"])
        lines += [f"Not made: {names}.", ""]
    return "\n".join(lines)


def _rows_of(group: list[dict[str, Any]], report: dict[str, Any], setting: str) -> list[str]:
    """The arms of one control as a table."""
    start = next(r.get("start") for r in report["results"] if (r["setting"], r["arm"]) == (setting, group[0]["arm"]))
    lines = [
        "From random weights:"
        if start is None
        else f"From the student that CE made of the same seed, as many steps again, at a peak learning rate of "
        f"{start['learning_rate']:g}:",
        "",
        "| arm | seeds | perplexity | change against the labels alone (95 %) | KL of the own text | seconds a run |",
        "| --- | ---: | ---: | --- | ---: | ---: |",
    ]
    teacher = _teacher(report, setting)
    if teacher is not None:
        lines.append(f"| teacher | 1 | {teacher['perplexity']:.2f} | | | |")
    for row in group:
        perplexity = f"{row['perplexity']:.2f} \u00b1 {row['spread']:.2f}"
        own_text = "" if row["own_text"] is None else "{:.3f} \u00b1 {:.3f}".format(*row["own_text"])
        cells = (report["arms"][row["arm"]], row["seeds"], perplexity, _change(row["change"]), own_text)
        lines.append(f"| {' | '.join(map(str, cells))} | {row['seconds']:,.0f} |")
    return [*lines, ""]


def _change(change: dict[str, float | None] | None) -> str:
    if change is None:
        return ""
    if change["lower"] is None:
        return f"{change['percent']:+.1f} %"
    return f"{change['percent']:+.1f} % [{change['lower']:+.1f}, {change['upper']:+.1f}]"


def write(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write lm_quality.json, lm_quality.md and lm_quality.svg. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"lm_quality.{kind}" for kind in ("json", "md", "svg")]
    files[0].write_text(json.dumps(report, indent=1) + "\n")
    files[1].write_text(markdown(report))
    plot(report, files[2])
    return files


def plot(report: dict[str, Any], path: Path) -> None:
    """Perplexity of every arm, a point per seed, one panel per setting."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings = [name for name in report["settings"] if report["tables"][name]]
    figure, axes = plt.subplots(1, max(1, len(settings)), figsize=(5 * max(1, len(settings)), 3.2), squeeze=False)
    for axis, setting in zip(axes[0], settings, strict=False):
        names = [row["arm"] for row in report["tables"][setting]]
        for height, arm in enumerate(names):
            values = [_perplexity(r) for r in report["results"] if (r["setting"], r["arm"]) == (setting, arm)]
            axis.plot(values, [height] * len(values), "o", alpha=0.7)
        teacher = _teacher(report, setting)
        if teacher is not None:
            axis.axvline(teacher["perplexity"], color="grey", linestyle="--", label="teacher")
            axis.legend()
        axis.set_yticks(range(len(names)), [report["arms"][name] for name in names])
        axis.invert_yaxis()
        axis.set_xlabel("perplexity")
        axis.set_title(report["settings"][setting])
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
