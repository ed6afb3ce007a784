"""sweep.html: the ranking and a plot of the metric against each field, in one file that needs nothing else."""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixkd_fast.page import bar_plot, escape, page, scatter_plot, table
from mixkd_fast.sweep.ranking import Ranking, TrialResult, value_of
from mixkd_fast.sweep.trials import STRATEGY, TRANSFER, shown
from mixkd_fast.sweep_file import Sweep

_LARGEST_SPAN = 20.0
"""Ratio of the largest to the smallest positive value from which an axis is logarithmic."""


def write_page(ranking: Ranking, sweep: Sweep, folder: Path) -> Path:
    """Write sweep.html. Returns its path."""
    done = [result for result in ranking.results if result.mean is not None]
    body = []
    waiting = len(ranking.results) - len(done) - ranking.num_failed
    if waiting:
        body.append(f'<p class="warn">{waiting} of {len(ranking.results)} trials have not finished.</p>')
    header, rows = ranking.table()
    order = "higher" if ranking.higher_is_better else "lower"
    body += ["<h2>Ranking</h2>", f"<p>By {escape(ranking.metric)}; {order} is better; std is over seeds.</p>"]
    body.append(table(header, rows))
    plots = [plot for plot in _plots(ranking, done) if plot]
    if plots:
        body += ["<h2>Fields</h2>", f'<div class="plots">{"".join(plots)}</div>']
    failed = [result for result in ranking.results if result.errors]
    if failed:
        body.append("<h2>Failed</h2>")
        for result in failed:
            text = "\n\n".join(result.errors)
            body.append(f"<h3>{result.trial.number:03d}: {escape(result.trial.describe())}</h3>")
            body.append(f"<pre>{escape(text)}</pre>")
    content = json.dumps(sweep.model_dump(mode="json", by_alias=True, exclude_defaults=True), indent=2)
    body.append(f"<details><summary>Sweep file</summary><pre>{escape(content)}</pre></details>")
    path = folder / "sweep.html"
    lead = f"{len(ranking.results)} trials, {sweep.search} search; {sweep.output}"
    path.write_text(page("mixkd_fast sweep", lead, body), encoding="utf-8")
    return path


def _plots(ranking: Ranking, done: list[TrialResult]) -> list[str]:
    """Points over numeric fields, bars for the others."""
    plots = []
    for name in ranking.fields:
        having = [result for result in done if name in result.trial.values]
        values = [result.trial.values[name] for result in having]
        if len({shown(value) for value in values}) < 2:
            continue
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            plots.append(_points(ranking, name, having))
        else:
            plots.append(_bars(f"{ranking.metric} by {name}", ranking, having, [name]))
    if all(len({r.trial.values.get(name) for r in done}) > 1 for name in (STRATEGY, TRANSFER)):
        plots.append(_bars(f"{ranking.metric} by strategy and transfer", ranking, done, [STRATEGY, TRANSFER]))
    return plots


def _points(ranking: Ranking, name: str, results: list[TrialResult]) -> str:
    x = [float(result.trial.values[name]) for result in results]
    return scatter_plot(
        f"{ranking.metric} over {name}",
        x,
        [result.mean for result in results],
        [result.deviation for result in results],
        label=name,
        logarithmic=min(x) > 0 and max(x) / min(x) >= _LARGEST_SPAN,
        level=_teacher(results),
    )


def _teacher(results: list[TrialResult]) -> tuple[str, float] | None:
    """The teacher's own figure, where all trials have the same one."""
    figures = {_figure(run.teacher, result.metric) for result in results for run in result.runs}
    only = figures.pop() if len(figures) == 1 else None
    return None if only is None else ("teacher", only)


def _figure(metrics: Mapping[str, Mapping[str, float]], metric: str) -> float | None:
    split, _, name = metric.rpartition("/")
    return value_of(metrics, metric) if name in metrics.get(split, {}) else None


def _bars(caption: str, ranking: Ranking, results: list[TrialResult], names: list[str]) -> str:
    """A bar per value: the mean over its trials."""
    groups: dict[str, list[float]] = {}
    for result in results:
        if result.mean is not None and abs(result.mean) < float("inf"):
            label = ", ".join(_short(result.trial.values[name]) for name in names)
            groups.setdefault(label, []).append(result.mean)
    means = {label: statistics.fmean(values) for label, values in groups.items()}
    counts = {len(values) for values in groups.values()}
    note = f" (means of {counts.pop()} trials)" if len(counts) == 1 and counts != {1} else ""
    return bar_plot(caption + note, dict(sorted(means.items(), key=lambda item: item[1]))) if means else ""


def _short(value: Any) -> str:
    text = shown(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
