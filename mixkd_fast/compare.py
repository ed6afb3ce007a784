"""`mixkd-fast compare RUN ...`: finished runs and their teacher in one table, and as a page with plots."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixkd_fast.errors import DataError
from mixkd_fast.page import bar_plot, line_plot, number, page, table
from mixkd_fast.report import curves_of, read_records

Cells = list[list[object]]
_EXPLAINING = {"nll", "ece", "mse", "teacher_agreement", "kl_to_teacher", "teacher_mse"}
_COMMON = {"teacher_agreement": "agreement", "kl_to_teacher": "KL to teacher"}


def compare(directories: Sequence[Path]) -> tuple[list[str], Cells]:
    """Header and rows: the teacher first (once, if all runs had the same), then a row per run.

    Raises: DataError for a folder without summary.json.
    """
    summaries = [_summary(path) for path in directories]
    names = list(
        dict.fromkeys(
            (split, metric)
            for summary in summaries
            for split, values in summary["metrics"].items()
            for metric in values
        )
    )
    # What explains a figure is given for the first split alone; the task's own metrics for each.
    names = [(split, metric) for split, metric in names if split == names[0][0] or metric not in _EXPLAINING]
    one_split = len({split for split, _ in names}) == 1
    start = names[0][0].partition("_")[0] + "_" if names else ""
    shared = start if all(split.startswith(start) for split, _ in names) else ""
    labels = [_COMMON.get(m, m) if one_split else f"{s.removeprefix(shared)}: {_COMMON.get(m, m)}" for s, m in names]
    header = ["model", *labels, "parameters", "train samples/s", "train seconds", "inference samples/s"]
    label_of = _labels(directories)
    rows: Cells = []
    seen: set[str] = set()
    for summary in summaries:
        teacher = summary.get("teacher")
        if teacher and teacher["model"] not in seen:
            seen.add(teacher["model"])
            figures = [teacher["metrics"].get(split, {}).get(metric) for split, metric in names]
            rate = summary.get("inference", {}).get("teacher_samples_per_s")
            rows.append([f"teacher {teacher['model']}", *figures, teacher.get("parameters"), None, None, rate])
    for path, summary in zip(directories, summaries, strict=True):
        figures = [summary["metrics"].get(split, {}).get(metric) for split, metric in names]
        training, rate = summary["training"], summary.get("inference", {}).get("samples_per_s")
        label = f"{summary['method']} ({label_of[path]})"
        rows.append(
            [label, *figures, summary["student"]["parameters"], training["samples_per_s"], training["seconds"], rate]
        )
    return header, rows


def format_table(header: Sequence[str], rows: Cells) -> str:
    """The table as aligned text; numbers right."""
    lines = [list(header), *[[number(cell) for cell in row] for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    shown = []
    for line in lines:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        shown.append("  ".join(cells).rstrip())
    shown.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(shown)


def write_comparison(directories: Sequence[Path], path: Path) -> Path:
    """The table and its plots as one self-contained page. Returns its path."""
    header, rows = compare(directories)
    plots = []
    scores = {str(row[0]): float(row[1]) for row in rows if isinstance(row[1], int | float)}
    if scores:
        plots.append(bar_plot(f"{header[1]}, best evaluation", scores))
    losses: dict[str, Any] = {}
    metric: dict[str, Any] = {}
    for directory, label in _labels(directories).items():
        records, _ = read_records(directory / "metrics.jsonl")
        losses |= curves_of(records, "train", {"loss": label})
        evaluations = [r for r in records if r["kind"] == "evaluation"]
        if evaluations:
            split, name = evaluations[0]["split"], next(iter(evaluations[0]["metrics"]))
            chosen = [r for r in evaluations if r["split"] == split]
            metric[label] = ([r["step"] for r in chosen], [r["metrics"].get(name) for r in chosen])
    plots += [
        line_plot(f"{header[1]} over steps", metric, marks=True),
        line_plot("Training loss (sums of each method's own terms)", losses),
    ]
    body = [table(header, rows), "<h2>Course</h2>", f'<div class="plots">{"".join(plots)}</div>']
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page("mixkd_fast comparison", ", ".join(str(d) for d in directories), body), encoding="utf-8")
    return path


def _labels(directories: Sequence[Path]) -> dict[Path, str]:
    """The folders' names, or whole paths where two have the same name."""
    names = {path: path.resolve().name for path in directories}
    return {path: name if list(names.values()).count(name) == 1 else str(path) for path, name in names.items()}


def _summary(directory: Path) -> dict[str, Any]:
    path = directory / "summary.json"
    if not path.is_file():
        raise DataError(f"{directory} holds no finished run: summary.json is missing")
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not readable JSON: {error}") from error
    return content


def main(argv: Sequence[str] | None = None) -> int:
    """Put finished runs beside each other."""
    parser = argparse.ArgumentParser(prog="mixkd-fast compare", description=main.__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="folders of finished runs")
    parser.add_argument("--html", metavar="FILE", type=Path, help="also write a page with plots")
    options = parser.parse_args(argv)
    try:
        print(format_table(*compare(options.runs)))
        reports = [run / "report.html" for run in options.runs if (run / "report.html").is_file()]
        if options.html:
            reports.insert(0, write_comparison(options.runs, options.html))
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for report in reports:
        print(f"report: {report.resolve()}")
    return 0
