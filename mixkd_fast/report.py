"""report.html: what a run did, in one file that needs nothing else. Reads the run's folder alone."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixkd_fast.errors import DataError
from mixkd_fast.page import escape, facts, line_plot, number, page, table

Record = dict[str, Any]
_EXACT = {"learning_rate", "memory_mib"}
"""Columns whose curves are drawn as they are; the others are noisy and get a running mean."""
_FIELDS = {"train": {"step", "loss", "terms"}, "evaluation": {"step", "split", "metrics"}}
"""What a line of metrics.jsonl must have, by its kind."""


def write_report(run_directory: Path) -> Path:
    """Write report.html of a finished or interrupted run. Returns its path.

    Raises: DataError if the folder holds no run.
    """
    config = _read_json(run_directory / "config.json")
    if config is None:
        raise DataError(f"{run_directory} holds no run: config.json is missing")
    summary = _read_json(run_directory / "summary.json")
    records, num_broken = read_records(run_directory / "metrics.jsonl")
    task = summary["task"] if summary else config["task"]["name"]
    method = config["method"]["name"]
    section = config.get("teacher") or {}
    teacher = section.get("model") or section.get("offline")
    lead = f"{method} on {task}" + (f", teacher {teacher}" if teacher else "")
    body = []
    if summary is None:
        body.append('<p class="warn">This run has not finished: figures are those up to its last step.</p>')
    if num_broken:
        body.append(f'<p class="warn">{num_broken} unreadable line(s) of metrics.jsonl were left out.</p>')
    body += _results(summary, records)
    yardstick = (summary.get("teacher") or {}).get("metrics", {}) if summary else {}
    body += ["<h2>Course</h2>", f'<div class="plots">{"".join(_plots(records, yardstick))}</div>']
    if summary is not None:
        body += _samples(summary)
        body += _facts(summary)
    shown = escape(json.dumps(config, indent=2, ensure_ascii=False))
    body.append(f"<details><summary>Configuration</summary><pre>{shown}</pre></details>")
    path = run_directory / "report.html"
    path.write_text(page("mixkd_fast run", lead, body), encoding="utf-8")
    return path


def read_records(path: Path) -> tuple[list[Record], int]:
    """The lines of metrics.jsonl, and how many could not be read (a killed run may leave its last line cut)."""
    records, num_broken = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and _FIELDS.get(record.get("kind", ""), {""}) <= record.keys():
            records.append(record)
        else:
            num_broken += 1
    return records, num_broken


def curves_of(records: Sequence[Record], kind: str, names: Mapping[str, str]) -> dict[str, Any]:
    """Label -> (steps, values) of top-level fields of one kind of record."""
    chosen = [record for record in records if record["kind"] == kind]
    steps = [record["step"] for record in chosen]
    return {label: (steps, [record.get(field) for record in chosen]) for field, label in names.items()}


def _results(summary: Record | None, records: Sequence[Record]) -> list[str]:
    if summary is not None:
        student, teacher = summary["metrics"], (summary.get("teacher") or {}).get("metrics", {})
    else:
        student, teacher = {r["split"]: r["metrics"] for r in records if r["kind"] == "evaluation"}, {}
    if not student:
        return ["<h2>Results</h2>", "<p>No evaluation yet.</p>"]
    lines = ["<h2>Results</h2>"]
    if summary is not None and summary.get("best"):
        best = summary["best"]
        lines.append(f"<p>Best {escape(best['metric'])} {number(best['value'])} at step {number(best['step'])}.</p>")
    for split, values in student.items():
        rows = [[name.replace("_", " "), value, teacher.get(split, {}).get(name)] for name, value in values.items()]
        header = ["metric", "student", "teacher"]
        if not teacher:
            header, rows = header[:2], [row[:2] for row in rows]
        lines += [f"<h3>{escape(split)}</h3>", table(header, rows)]
    return lines


def _plots(records: Sequence[Record], teacher: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Curves over the steps; teacher (split -> metric -> value) stands as dashed lines beside the student's metrics."""
    train = [record for record in records if record["kind"] == "train"]
    steps = [record["step"] for record in train]
    names = list(dict.fromkeys(name for record in train for name in record["terms"]))
    terms = {name: (steps, [record["terms"].get(name) for record in train]) for name in names}
    total = curves_of(records, "train", {"loss": "loss"})
    plots = [line_plot("Training loss and its weighted terms", total | terms if len(terms) > 1 else total)]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    metrics = dict.fromkeys(name for record in evaluations for name in record["metrics"])
    for metric in metrics:
        curves = {}
        for split in dict.fromkeys(record["split"] for record in evaluations):
            chosen = [r for r in evaluations if r["split"] == split and metric in r["metrics"]]
            curves[split] = ([r["step"] for r in chosen], [r["metrics"][metric] for r in chosen])
        levels = {f"teacher, {split}": teacher[split][metric] for split in curves if metric in teacher.get(split, {})}
        plots.append(line_plot(f"Evaluation: {metric.replace('_', ' ')}", curves, marks=True, levels=levels))
    for field, caption in (
        ("samples_per_s", "Throughput: samples per second"),
        ("tokens_per_s", "Throughput: tokens per second"),
        ("memory_mib", "Memory of rank 0 in MiB"),
        ("learning_rate", "Learning rate"),
        ("grad_norm", "Gradient norm before clipping"),
    ):
        plots.append(
            line_plot(caption, curves_of(records, "train", {field: field}), from_zero=True, smooth=field not in _EXACT)
        )
    return [plot for plot in plots if plot]


def _samples(summary: Record) -> list[str]:
    """What student and teacher answered to the first instructions of every split."""
    lines = []
    for split, rows in summary.get("samples", {}).items():
        lines.append(f"<h2>Samples: {escape(split)}</h2>")
        for row in rows:
            texts = "".join(f"<dt>{escape(name)}</dt><dd><pre>{escape(text)}</pre></dd>" for name, text in row.items())
            lines.append(f'<dl class="sample">{texts}</dl>')
    return lines


def _facts(summary: Record) -> list[str]:
    data = dict(summary["data"])
    rows = data.pop("evaluation_rows")
    data["content_hash"] = data["content_hash"][:16]
    data |= {f"{split} rows": count for split, count in rows.items()}
    models = [["student", *_model_row(summary["student"])]]
    if summary.get("teacher"):
        models.append([f"teacher {summary['teacher']['model']}", *_model_row(summary["teacher"])])
    backends = [[op, chosen["name"], chosen["reason"]] for op, chosen in summary["backends"].items()]
    inference = {f"inference {name}": value for name, value in summary.get("inference", {}).items()}
    return [
        "<h2>Models</h2>",
        table(["model", "family", "layers", "width", "parameters"], models),
        "<h2>Data</h2>",
        facts(data),
        "<h2>Training</h2>",
        facts(summary["training"] | inference),
        "<h2>Fused operations</h2>",
        table(["operation", "backend", "why"], backends),
        "<h2>Versions</h2>",
        facts({"mixkd_fast": summary["version"]} | summary["versions"]),
    ]


def _model_row(model: Record) -> list[object]:
    return [model.get(name) for name in ("model_type", "layers", "hidden_size", "parameters")]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{path} is not readable JSON: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """`mixkd-fast report RUN`: write a run's report again, also of an interrupted one."""
    parser = argparse.ArgumentParser(prog="mixkd-fast report", description=main.__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run")
    try:
        print(write_report(parser.parse_args(argv).run))
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
