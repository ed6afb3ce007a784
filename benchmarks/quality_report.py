"""The quality benchmark's result file, and the tables and the plot made from it alone."""

import json
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality_comparisons import comparisons, trends, unpaired
from benchmarks.quality_results import TEACHER, Options, Run, finished, same, teacher_of, why_not
from benchmarks.quality_runs import commit
from benchmarks.quality_settings import ARMS, CLAIM, SETTINGS
from benchmarks.statistics import mean_and_spread
from mixkd_fast.version import __version__

METRICS = ("accuracy", "f1", "nll", "ece", "teacher_agreement", "kl_to_teacher")
_TITLES = ("accuracy, %", "F1, %", "NLL", "ECE", "as the teacher, %", "KL to teacher")
_PERCENT = ("accuracy", "f1", "teacher_agreement")
_CONTROLS = {"kd": "KD", "ft": "FT", "kd_2x": "KD with twice the steps (mixed rows double the forwards of a step)"}


def collect(options: Options, planned: list[Run], command: str) -> dict[str, Any]:
    """Everything that is finished in the work folder, the comparisons, and what is missing of the planned runs."""
    runs = _finished_runs(options)
    students = {run: result for run, result in runs.items() if run.arm != TEACHER}
    return {
        "command": command,
        "encoder": options.encoder_name,
        "teacher_rows": options.teacher_rows,
        "precision": options.precision,
        "settings": {name: asdict(setting) for name, setting in SETTINGS.items()},
        "arms": {name: asdict(arm) for name, arm in ARMS.items()},
        "versions": {"mixkd_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "commit": commit(),
        "results": [result for _, result in sorted(runs.items(), key=lambda item: _order(item[0]))],
        "comparisons": comparisons(students),
        "trends": trends(students),
        "unpaired": unpaired(students),
        "missing": [
            {
                "setting": run.setting,
                "arm": run.arm,
                "layers": run.layers,
                "seed": run.seed,
                "why": why_not(run, options),
            }
            for run in planned
            if run not in runs
        ],
    }


def write(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write quality.json, quality.md and quality.svg. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"quality.{kind}" for kind in ("json", "md", "svg")]
    files[0].write_text(json.dumps(report, indent=1) + "\n")
    files[1].write_text(markdown(report))
    plot(report, files[2])
    return files


def markdown(report: dict[str, Any]) -> str:
    """The result file as one page."""
    results = report["results"]
    layers = sorted({r["layers"] for r in results if r["layers"]}, reverse=True)
    lines = ["# Does distillation help?", "", *_introduction(report), "", *_budgets(report), *_claim(report)]
    for number in layers:
        lines += ["", f"## Students of {number} layers", "", *_accuracies(report, number)]
        for control, title in _CONTROLS.items():
            rows = [c for c in report["comparisons"] if c["layers"] == number and c["second"] == control]
            if rows:
                lines += ["", f"### Against {title}", "", *_differences(report, rows)]
        lines += ["", "### All figures", "", *_figures(report, number)]
    return "\n".join([*lines, "", *_ending(report), ""])


def plot(report: dict[str, Any], path: Path) -> None:
    """A panel per evaluation split: accuracy of every arm (mean and spread over seeds), the teacher's as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = _groups(report["results"])
    names = [name for name in ARMS if any(r["arm"] == name for r in report["results"])]
    layers = sorted({r["layers"] for r in report["results"] if r["layers"]}, reverse=True)
    columns = min(4, max(1, len(groups)))
    rows = max(1, -(-len(groups) // columns))
    with pyplot.rc_context({"svg.hashsalt": "mixkd-fast", "font.size": 9}):
        size = (3.1 * columns + 1.2, 0.28 * rows * max(4, len(names)) + 0.8)
        figure, grid = pyplot.subplots(rows, columns, figsize=size, squeeze=False, sharey=True, layout="constrained")
        for panel in grid.flat[len(groups) :]:
            panel.axis("off")
        for panel, (setting, split) in zip(grid.flat, groups, strict=False):
            for shift, number in enumerate(layers):
                for place, name in enumerate(names):
                    values = _values(report["results"], setting, split, name, number, "accuracy")
                    if values:
                        mean, spread = mean_and_spread(values)
                        color = ("#c2410c", "#0e7490", "#7c3aed")[shift % 3]
                        height = place + 0.25 * (shift - (len(layers) - 1) / 2)
                        label = f"student of {number} layers"
                        panel.errorbar(100 * mean, height, xerr=100 * spread, fmt="o", ms=4, color=color, label=label)
            teacher = _teacher_values(report, setting, split, "accuracy")
            if teacher:
                panel.axvline(100 * mean_and_spread(teacher)[0], color="#64748b", linestyle="--", label="teacher")
            panel.set_title(_label(report, setting, split), loc="left")
            panel.grid(axis="x", alpha=0.3)
        if groups:
            grid[0][0].set_yticks(range(len(names)), [ARMS[name].title for name in names])
            grid[0][0].invert_yaxis()
            keys: dict[str, Any] = {}
            for panel in grid.flat[: len(groups)]:
                keys |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
            figure.legend(list(keys.values()), list(keys), loc="outside upper right", ncols=len(keys))
            figure.supxlabel("accuracy, % (mean and standard deviation over seeds)")
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def _finished_runs(options: Options) -> dict[Run, dict[str, Any]]:
    runs = {}
    for file in sorted(options.work.glob("*/*/result.json")):
        kept = json.loads(file.read_text())
        run = Run(kept["setting"], kept["arm"], kept["layers"], kept["seed"])
        result = finished(run, options) if run.setting in SETTINGS and run.arm in (TEACHER, *ARMS) else None
        if result is not None:
            runs[run] = result
    # Of the teachers, those that a student here has.
    used = {teacher_of(run, options) for run in runs if run.arm != TEACHER}
    return {run: result for run, result in runs.items() if run.arm != TEACHER or run in used}


def _order(run: Run) -> tuple[int, int, int, int]:
    return list(SETTINGS).index(run.setting), -run.layers, [TEACHER, *ARMS].index(run.arm), run.seed


def _introduction(report: dict[str, Any]) -> list[str]:
    which = "all rows of the task" if report["teacher_rows"] == "all" else "the same rows as its student"
    return [
        f"Teacher: {report['encoder']}, fine-tuned on {which}. Students: the first layers of "
        "that encoder. Where the table names another start, the teacher starts from that task's teacher, and students "
        "from the student that KD trained there. Every arm sees the same rows in the same number of steps, but for KD "
        "with twice the steps; "
        f"{report['precision']}, batches of rows of like length, linear decay after 10 % "
        "warm-up, the last step's weights. Nothing was chosen on the evaluation rows but the budgets below, which are "
        "the same for all arms. ± is the standard deviation over seeds; where a setting is a share of the rows, each "
        "seed draws its own.",
        "",
        "Differences: 95 % intervals of a paired bootstrap over seeds and evaluation rows (10,000 resamples), widened "
        "for the few seeds; with one seed they speak of rows alone. The seeds both arms have are used. The intervals "
        "are not corrected for how many there are. The verdicts are: helps or hurts where the interval excludes 0 and "
        "Holm's adjusted p is below 0.05, in brackets where only the interval does, and where one seed speaks for the "
        "arm. It is adjusted over all settings and depths for the published claim, and for the others over their "
        "table. Runs are paired if they had the same rows, the same teacher and the same start, weight for weight.",
    ]


def _budgets(report: dict[str, Any]) -> list[str]:
    lines = [
        "| setting | training rows | epochs | batch | steps | learning rate | longest row "
        "| teacher's epochs, batch, rate | start |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for name in dict.fromkeys(r["setting"] for r in report["results"] if r["arm"] != TEACHER):
        setting = report["settings"][name]
        students = [r for r in report["results"] if r["setting"] == name and r["arm"] not in (TEACHER, "kd_2x")]
        start = "the pretrained encoder"
        if setting["start"] is not None:
            start = str(report["settings"][setting["start"]]["title"])
        steps = f"{students[0]['steps']:,}" if students else ""
        rows = f"{students[0]['training_rows']:,}" if students else f"{setting['rows']:,}"
        teachers = [r for r in report["results"] if r["arm"] == TEACHER and r["description"]["task"] == setting["task"]]
        section = teachers[0]["description"]["training"] if teachers else {}
        teacher = "{epochs:g}, {batch_size}, {learning_rate:g}".format(**section) if section else ""
        lines.append(
            f"| {setting['title']} | {rows} | {setting['epochs']:g} | {setting['batch_size']} | {steps} | "
            f"{setting['learning_rate']:g} | {setting['max_length']} | {teacher} | {start} |"
        )
    return lines


def _claim(report: dict[str, Any]) -> list[str]:
    """The published claim in all settings and depths, and how its gain changes with the rows of a task."""
    first, second = (ARMS[name].title for name in CLAIM)
    rows = [c for c in report["comparisons"] if (c["first"], c["second"]) == CLAIM]
    lines = ["", f"## The published claim: {first} over {second}, most where rows are few", ""] if rows else []
    if rows:
        lines += _table(rows, ["setting", "layers"], lambda c: [_label(report, c["setting"], c["split"]), c["layers"]])
    if report["trends"]:
        lines += ["", f"The gain of {first} over {second} with few rows, less its gain with more rows of the task:", ""]
        lines += _table(
            report["trends"],
            ["few", "more", "layers"],
            lambda c: [_label(report, c["setting"], c["split"]), _label(report, c["more"], c["split"]), c["layers"]],
            verdicts=False,
        )
    return lines


def _accuracies(report: dict[str, Any], layers: int) -> list[str]:
    results = report["results"]
    names = [name for name in ARMS if any(r["arm"] == name and r["layers"] == layers for r in results)]
    lines = [
        "Accuracy in percent (number of seeds where it is not the most of the row).",
        "",
        f"| setting | seeds | teacher | {' | '.join(ARMS[name].title for name in names)} |",
        "| --- | ---: | ---: |" + " ---: |" * len(names),
    ]
    for setting, split in _groups([r for r in results if r["layers"] == layers]):
        values = [_values(results, setting, split, name, layers, "accuracy") for name in names]
        most = max(len(some) for some in values)
        cells = [_cell(some, True) + (f" ({len(some)})" if 0 < len(some) < most else "") for some in values]
        teacher = _cell(_teacher_values(report, setting, split, "accuracy"), True)
        lines.append(f"| {_label(report, setting, split)} | {most} | {teacher} | {' | '.join(cells)} |")
    return lines


def _differences(report: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    def first_cells(entry: dict[str, Any]) -> list[str]:
        return [_label(report, entry["setting"], entry["split"]), ARMS[entry["first"]].title]

    return _table(rows, ["setting", "arm"], first_cells)


def _table(
    rows: list[dict[str, Any]],
    titles: list[str],
    first_cells: Callable[[dict[str, Any]], list[Any]],
    verdicts: bool = True,
) -> list[str]:
    """Differences of accuracy and NLL, after a row's first cells."""
    figures = ["accuracy, points", "", "NLL", ""] if verdicts else ["accuracy, points", "NLL"]
    lines = [
        f"| {' | '.join([*titles, 'seeds', *figures])} |",
        "| --- |" + " --- |" * (len(titles) - 1) + " ---: |" + " --- |" * len(figures),
    ]
    for entry in rows:
        accuracy, nll = entry["accuracy"], entry["nll"]
        points = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * accuracy[k] for k in ("difference", "lower", "upper")))
        nats = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*(nll[k] for k in ("difference", "lower", "upper")))
        found = [points, _verdict(accuracy, 1), nats, _verdict(nll, -1)] if verdicts else [points, nats]
        lines.append(f"| {' | '.join(map(str, [*first_cells(entry), len(entry['seeds']), *found]))} |")
    return lines


def _verdict(found: dict[str, Any], better: int) -> str:
    low, high = sorted((better * found["lower"], better * found["upper"]))
    word = "helps" if low > 0 else "hurts" if high < 0 else ""
    if not word:
        return "no evidence"
    p_value = found["adjusted_p_value"]
    return word if p_value is not None and p_value < 0.05 else f"({word})"


def _figures(report: dict[str, Any], layers: int) -> list[str]:
    results = report["results"]
    lines = [f"| setting | arm | seeds | {' | '.join(_TITLES)} |", "| --- | --- | ---: |" + " ---: |" * len(METRICS)]
    for setting, split in _groups([r for r in results if r["layers"] == layers]):
        label = _label(report, setting, split)
        for name in ARMS:
            columns = [_values(results, setting, split, name, layers, metric) for metric in METRICS]
            if columns[0]:
                cells = [_cell(column, metric in _PERCENT) for column, metric in zip(columns, METRICS, strict=True)]
                lines.append(f"| {label} | {ARMS[name].title} | {len(columns[0])} | {' | '.join(cells)} |")
    return lines


def _ending(report: dict[str, Any]) -> list[str]:
    results = report["results"]
    hours = sum(r["seconds"] for r in results) / 3600
    devices = ", ".join(sorted({f"{r['processor']} ({r['device']})" for r in results}))
    lines = []
    missing: dict[str, list[str]] = {}
    for entry in report["missing"]:
        where = f"{entry['setting']}, {entry['layers']} layers, {entry['why']}"
        missing.setdefault(where, []).append(f"{entry['arm']} {entry['seed']}")
    if missing:
        lines += ["## Missing", "", "Runs (arm and seed) that were asked for and are not in the tables:", ""]
        lines += [f"- {where}: {', '.join(names)}" for where, names in missing.items()] + [""]
    if report["unpaired"]:
        lines += ["## Not compared", "", "Runs of a seed that had other rows, another teacher or another start:", ""]
        for entry in report["unpaired"]:
            names = f"{ARMS[entry['first']].title} and {ARMS[entry['second']].title}"
            seeds = ", ".join(map(str, entry["seeds"]))
            lines.append(f"- {entry['setting']}, {entry['layers']} layers: {names}, seeds {seeds}")
        lines.append("")
    return [
        *lines,
        f"{len(results)} runs took {hours:.1f} hours in all on {devices}; mixkd_fast "
        f"{report['versions']['mixkd_fast']} at {report['commit']}, torch {report['versions']['torch']}. "
        "quality.json says of every run where and at which commit it was made, and what every evaluation row came to.",
        "",
        f"Command: `{report['command']}`",
    ]


def _groups(results: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(setting, split) with a student."""
    return list(dict.fromkeys((r["setting"], split) for r in results if r["arm"] != TEACHER for split in r["splits"]))


def _label(report: dict[str, Any], setting: str, split: str) -> str:
    section = report["settings"][setting]
    return str(section["title"]) + (f", {split.removeprefix('validation_')}" if len(section["splits"]) > 1 else "")


def _values(results: list[dict[str, Any]], setting: str, split: str, arm: str, layers: int, metric: str) -> list[float]:
    key = (setting, arm, layers)
    return [r["splits"][split]["metrics"][metric] for r in results if (r["setting"], r["arm"], r["layers"]) == key]


def _teacher_values(report: dict[str, Any], setting: str, split: str, metric: str) -> list[float]:
    """Figures of the teachers that the setting's students had."""
    wanted = [r["description"]["teacher"] for r in report["results"] if r["setting"] == setting and r["layers"]]
    return [
        r["splits"][split]["metrics"][metric]
        for r in report["results"]
        if r["arm"] == TEACHER and any(same(r["description"], other) for other in wanted)
    ]


def _cell(values: list[float], percent: bool) -> str:
    if not values:
        return ""
    mean, spread = mean_and_spread(values)
    shown = f"{100 * mean:.1f}" if percent else f"{mean:.3f}"
    return shown + ((f" ± {100 * spread:.1f}" if percent else f" ± {spread:.3f}") if len(values) > 1 else "")
