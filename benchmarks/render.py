"""Tables and plots of a benchmark's JSON.

python -m benchmarks.render FILE.json [--png]    writes FILE.md and FILE.svg (and FILE.png) beside it
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.bars import speedup

COLORS = {"project": "#c0392b", "reference": "#34495e", "eager": "#7f8c8d", "compile": "#2980b9", "peer": "#27ae60"}


def write(report: dict[str, Any], json_file: Path, png: bool = False) -> list[Path]:
    """Write the table and the plot of a report beside its JSON file. Returns what was written."""
    table = json_file.with_suffix(".md")
    table.write_text(markdown(report), encoding="utf-8")
    pictures = [json_file.with_suffix(suffix) for suffix in ([".svg", ".png"] if png else [".svg"])]
    plot(report, pictures)
    return [table, *pictures]


def markdown(report: dict[str, Any]) -> str:
    """The whole report as text: what was measured on, bars, every figure, what did not run."""
    device, tests = report["device"], report["tests"]
    lines = ["# Fused ops: time, traffic, memory, error", "", f"Command: `{report['command']}`", ""]
    on_cpu = device["type"] == "cpu"
    caches = (
        "A call shorter than 2 ms is repeated within a sample and finds its tensors in the cache. A longer one is "
        "made twice, and the second time counts. Tensors above 4 MiB are new to the process in every call."
        if on_cpu
        else "The L2 cache is overwritten before every call."
    )
    counted = ", as the allocator of PyTorch counts them" if on_cpu else ""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines += [
        f"{device['name']}, {device['threads']} CPU threads; {versions}; commit {report['commit']}, {report['date']}. "
        + _tests_text(tests),
        "",
    ]
    lines += [
        "Time is the median over rounds in which all variants of a case take turns, with the quartiles in brackets; "
        f"it holds what a call allocates. {caches} `times eager` is against `eager`, plain PyTorch as users write it, "
        "or against this project's `reference` where there is none. GB/s counts the fewest bytes that the op must "
        "move (kd_loss: two tensors read, one written; mix_embeddings: two rows read, one written; its backward: a row "
        "read, the gradient of the whole word table written; relation_kl: four tensors read, two gradients written; "
        "linear_kd_loss, which products bound: hidden states and weights read, two gradients written). TFLOP/s counts "
        "the products alone. "
        "`of copy` compares that rate with a `clone()` timed in the same rounds: of the student's logits, or of as "
        "many bytes for the other ops. Peak is the most that "
        f"tensors made by one call occupied at once{counted}. Errors are relative L2 norms against fp64 from the same "
        "inputs.",
        "",
    ]
    lines += _lacking_lines("Failed", report.get("failures", []))
    lines += _lacking_lines("Not run", report.get("not_run", []))
    lines += _bars_lines(report["bars"])
    for op in dict.fromkeys(result["op"] for result in report["results"]):
        lines += _op_lines(op, [result for result in report["results"] if result["op"] == op])
    if report["predictions"]:
        lines += ["## Predictions, not measurements", ""]
        lines += [
            "kd_loss with its gradient: the fewest bytes over the published memory bandwidth; the least time.",
            "",
        ]
        lines += ["| GPU | case | GB | prediction, ms |", "| --- | --- | ---: | ---: |"]
        for entry in report["predictions"]:
            size, time = entry["floor_bytes"] * 1e-9, entry["predicted_ms"]
            lines.append(f"| {entry['device']} | {entry['case']} | {size:.2f} | {time:.2f} |")
        lines.append("")
    return "\n".join(lines)


def plot(report: dict[str, Any], files: list[Path]) -> None:
    """One panel per case: a bar per variant, its quartiles, and a line where a copy of the fewest bytes would be."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results, columns = report["results"], 3
    rows = -(-len(results) // columns)
    longest = max(len(_timed(result)) for result in results)
    size = (5.2 * columns, (0.8 + 0.22 * longest) * rows + 0.6)
    with pyplot.rc_context({"svg.hashsalt": "mixkd-fast", "font.size": 8}):
        figure, grid = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
        for axes, result in zip(grid.flat, results, strict=False):
            arms = _timed(result)[::-1]
            times = [arm["time"] for arm in arms]
            medians = [time["median_ms"] for time in times]
            spread = [
                [time["median_ms"] - time["lower_ms"] for time in times],
                [time["upper_ms"] - time["median_ms"] for time in times],
            ]
            colors = [COLORS["reference" if arm["name"] == "reference" else arm["kind"]] for arm in arms]
            axes.barh([arm["name"] for arm in arms], medians, xerr=spread, color=colors, height=0.7)
            copied = result["arms"][0]
            bound = arms[0]["floor_bytes"] / copied["floor_bytes"] * copied["time"]["median_ms"]
            axes.axvline(bound, color="black", linestyle="--", linewidth=0.8)
            axes.set_title(f"{result['op']}\n{result['case']['name']}", fontsize=8, loc="left")
            for place, time in enumerate(times):
                axes.annotate(f" {_ms(time['median_ms'])}", (time["upper_ms"], place), va="center", fontsize=7)
            axes.margins(x=0.15)
        for axes in list(grid.flat)[len(results) :]:
            axes.set_visible(False)
        figure.suptitle(f"ms per call on {report['device']['name']}; dashed: a copy of the fewest bytes", fontsize=10)
        for file in files:
            figure.savefig(file, dpi=110, metadata={"Date": None} if file.suffix == ".svg" else None)
        pyplot.close(figure)


def _lacking_lines(title: str, entries: list[dict[str, Any]]) -> list[str]:
    if not entries:
        return []
    return [f"## {title}", "", *(f"- {entry['op']}, {entry['case']}: {entry['why']}" for entry in entries), ""]


def _bars_lines(bars: list[dict[str, Any]]) -> list[str]:
    if not bars:
        return []
    lines = ["## Bars", "", "| op | case | backend | measured | bar | |", "| --- | --- | --- | ---: | --- | --- |"]
    for bar in bars:
        measured = "not measured" if bar["measured"] is None else f"{bar['measured']:.2f}"
        verdict = {True: "pass", False: "**FAIL**", None: "-"}[bar["passed"]]
        limit = f"{'at most' if bar['at_most'] else 'at least'} {bar['limit']:g} {bar['bar']}"
        lines.append(f"| {bar['op']} | {bar['case']} | {bar['backend']} | {measured} | {limit} | {verdict} |")
    return [*lines, ""]


def _op_lines(op: str, results: list[dict[str, Any]]) -> list[str]:
    errors = list(dict.fromkeys(name for result in results for arm in result["arms"] for name in arm.get("errors", ())))
    shown = errors if len(errors) <= 2 else ["output", "gradients, largest"]
    lines = [f"## {op}", ""]
    counted = any("tflop_per_s" in arm for result in results for arm in result["arms"])
    columns = ["GB/s", "of copy", *(["TFLOP/s"] if counted else []), "peak MiB", *(f"{name} error" for name in shown)]
    lines.append(f"| case | variant | ms [quartiles] | times eager | {' | '.join(columns)} |")
    lines.append("| --- | --- | ---: | ---: |" + " ---: |" * len(columns))
    absent: dict[str, list[str]] = {}
    for result in results:
        arms = {arm["name"]: arm for arm in result["arms"]}
        for number, arm in enumerate(result["arms"]):
            if "time" not in arm:
                absent.setdefault(f"{arm['name']}: {arm['why']}", []).append(result["case"]["name"])
                continue
            time, ratio = arm["time"], speedup(arms, arm["name"])
            cells = [
                result["case"]["name"] if number == 0 else "",
                arm["name"],
                f"{_ms(time['median_ms'])} [{_ms(time['lower_ms'])}, {_ms(time['upper_ms'])}]",
                "" if ratio is None or arm["kind"] == "copy" else f"{ratio:.2f}",
                f"{arm['gb_per_s']:.1f}",
                f"{100 * arm['fraction_of_copy']:.0f} %",
                *([f"{arm['tflop_per_s']:.2f}" if "tflop_per_s" in arm else ""] if counted else []),
                f"{arm['peak_bytes'] / 2**20:.1f}" if "peak_bytes" in arm else "",
                *_error_cells(arm.get("errors"), shown),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    if absent:
        lines += ["Not run:", ""]
        lines += [f"- {text} ({len(cases)} of {len(results)} cases)" for text, cases in absent.items()]
        lines.append("")
    return lines


def _error_cells(errors: dict[str, float] | None, shown: list[str]) -> list[str]:
    if errors is None:
        return [""] * len(shown)
    gradients = [error for name, error in errors.items() if name.startswith("gradient of")]
    named = errors | ({"gradients, largest": max(gradients)} if gradients else {})
    return [f"{named[name]:.1e}" if name in named else "" for name in shown]


def _tests_text(tests: dict[str, Any]) -> str:
    if not tests["ran"]:
        return "The tests were left out (`--no-tests`); every timed result was compared with fp64."
    return f"Tests before timing: {tests['summary']}."


def _timed(result: dict[str, Any]) -> list[dict[str, Any]]:
    # Without errors: the copy, and another divergence timed for comparison.
    return [arm for arm in result["arms"] if "time" in arm and "errors" in arm]


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.3g}" if milliseconds < 100 else f"{milliseconds:.0f}"


def main() -> None:
    """Render one file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.render", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="JSON written by python -m benchmarks --json")
    parser.add_argument("--png", action="store_true", help="also as PNG")
    options = parser.parse_args()
    for written in write(json.loads(options.file.read_text(encoding="utf-8")), options.file, options.png):
        print(written)


if __name__ == "__main__":
    main()
