"""Tables and plots of `python -m benchmarks train_step`, from its JSON."""

from pathlib import Path
from typing import Any

BARS = {
    "cpu": {"textbook": 5.0, "tuned": 1.4},
    "cuda": {"textbook": 4.0, "tuned": 1.6},
}
"""How many times faster than an arm mixkd_fast has to be."""
MFU_BAR = {"bert-large": 0.35}
NAMES = {
    "textbook": "textbook: padded to the longest allowed, four forwards",
    "tuned": "tuned: like lengths, bf16 autocast and teacher, fused AdamW, SDPA",
    "tuned_reusing": "the same, freed memory kept by glibc's variables",
    "tuned_compiled": "tuned with torch.compile",
    "mixkd_fast": "mixkd_fast",
}


def markdown(report: dict[str, Any]) -> str:
    """Everything as one page."""
    device = report["device"]
    lines = [
        "# Training steps",
        "",
        f"`{report['command']}`, commit {report['commit']}, {device['name']}, {device['threads']} CPU threads, "
        f"torch {report['versions']['torch']}. MixKD with KD, SM and TMKD weighted 1; rows of MNLI's lengths; every "
        "arm in a process of its own, in turn.",
        "",
    ]
    if report.get("tested"):
        lines += [f"Tests of the ops before: {report['tested']}.", ""]
    for result in report["results"]:
        lines += _section(result, device["type"])
    if report.get("not_run"):
        lines += [f"Not begun, no time was left: {', '.join(report['not_run'])}.", ""]
    return "\n".join(lines)


def _section(result: dict[str, Any], device: str) -> list[str]:
    job, arms = result["job"], result["arms"]
    ours = arms.get("mixkd_fast")
    stored = f"the {ours['store_seconds']:.1f} s" if ours else "the time"
    lines = [
        f"## {result['model']}, {result['teacher_layers']} -> {result['student_layers']} layers",
        "",
        f"{job['rows']:,} rows, {job['epochs']} epochs, batches of {job['batch_size']} rows with as many mixed ones. "
        f"Samples/s of mixkd_fast count {stored} in which it computed the teacher's logits; "
        f"the textbook arm is timed over {job['textbook_steps']} steps of a round, the plain ones without their first "
        f"{job['warmup_steps']} steps, and on a GPU none with those in which models are compiled. MFU: matrix FLOPs of "
        f"real tokens that the arm computes, of {result['peak_flops'] * 1e-12:.2f} TFLOP/s in bf16.",
        "",
        "| arm | samples/s [all rounds] | real tokens/s | mixkd_fast is | MFU | peak MiB | samples/s by epoch |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, arm in arms.items():
        rounds = ", ".join(f"{value:.1f}" for value in arm["all_samples_per_s"])
        epochs = ", ".join(f"{value:.1f}" for value in arm["epoch_samples_per_s"])
        ratio = f"{ours['samples_per_s'] / arm['samples_per_s']:.2f} x" if ours and name != "mixkd_fast" else ""
        lines.append(
            f"| {NAMES[name]} | {arm['samples_per_s']:.1f} [{rounds}] | {arm['tokens_per_s']:,.0f} | {ratio} | "
            f"{100 * arm['mfu']:.0f} % | {arm['peak_mib']:,.0f} | {epochs} |"
        )
    lines += ["", *_bars(result, device), ""]
    lines += [f"- {what} FAILED: {why.splitlines()[-1]}" for what, why in result.get("failures", {}).items()]
    if result.get("not_run"):
        lines += [f"- not run, no time was left: {', '.join(result['not_run'])}"]
    lines += ["", *_agreement(result["agreement"])]
    parts = {name: value for name, value in result["parts_ms"].items() if name != "device idle share"}
    if parts:
        whole = sum(parts.values())
        lines += ["A step of mixkd_fast by part, median (profiler on, teacher's clean logits kept):", ""]
        lines += ["| part | ms | share |", "| --- | ---: | ---: |"]
        lines += [f"| {name} | {value:.1f} | {100 * value / whole:.0f} % |" for name, value in parts.items()]
    if "device idle share" in result["parts_ms"]:
        lines += ["", f"The GPU is idle {100 * result['parts_ms']['device idle share']:.0f} % of the time."]
    return [*lines, ""]


def _agreement(agreement: dict[str, Any] | None) -> list[str]:
    if agreement is None:
        return ["The losses of the arms were not compared.", ""]
    differences = ", ".join(
        f"{precision} {value:.1e}" for precision, value in agreement["largest_relative_difference"].items()
    )
    verdict = "within" if agreement["agrees"] else "NOT within"
    return [
        "Loss on identical batches against the textbook's in fp32, largest relative difference (fp32, bf16: of "
        f"mixkd_fast; tuned: of that arm): {differences}, {verdict} the tolerance.",
        "",
    ]


def _bars(result: dict[str, Any], device: str) -> list[str]:
    arms = result["arms"]
    if "mixkd_fast" not in arms:
        return []
    ours = arms["mixkd_fast"]["samples_per_s"]
    lines = []
    for name, bar in BARS[device].items():
        # The fastest of the tuned arms is the one to beat.
        rates = [arm["samples_per_s"] for other, arm in arms.items() if other.startswith(name)]
        if rates:
            verdict = "met" if ours >= bar * max(rates) else "MISSED"
            lines.append(f"- at least {bar:g} x {name}: {ours / max(rates):.2f} x, {verdict}")
        else:
            lines.append(f"- at least {bar:g} x {name}: not measured")
    if device == "cuda" and result["model"] in MFU_BAR:
        bar, mfu = MFU_BAR[result["model"]], arms["mixkd_fast"]["mfu"]
        lines.append(f"- MFU at least {100 * bar:.0f} %: {100 * mfu:.0f} %, {'met' if mfu >= bar else 'MISSED'}")
    return lines


def plot(report: dict[str, Any], path: Path) -> None:
    """Left: samples/s of the arms. Right: where a step of mixkd_fast goes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = report["results"]
    with pyplot.rc_context({"svg.hashsalt": "mixkd-fast", "font.size": 9}):
        figure, grid = pyplot.subplots(
            len(results), 2, figsize=(11, 2.6 * len(results) + 0.4), squeeze=False, layout="constrained"
        )
        for (left, right), result in zip(grid, results, strict=True):
            arms = list(result["arms"].items())[::-1]
            rates = [arm["samples_per_s"] for _, arm in arms]
            colors = ["#c2410c" if name == "mixkd_fast" else "#94a3b8" for name, _ in arms]
            bars = left.barh([name for name, _ in arms], rates, color=colors)
            left.bar_label(bars, [f" {rate:.0f}" for rate in rates])
            left.margins(x=0.15)
            left.set_title(f"{result['model']}: samples/s", loc="left")
            parts = [(name, value) for name, value in result["parts_ms"].items() if name != "device idle share"][::-1]
            bars = right.barh([name for name, _ in parts], [value for _, value in parts], color="#0e7490")
            right.bar_label(bars, [f" {value:.0f}" for _, value in parts])
            right.margins(x=0.15)
            right.set_title("milliseconds of a step of mixkd_fast", loc="left")
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
