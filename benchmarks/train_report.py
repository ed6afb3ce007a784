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
    return [
        f"## {result['model']}, {result['teacher_layers']} -> {result['student_layers']} layers",
        "",
        _about(result, device),
        "",
        *_table(result),
        "",
        *_bars(result, device),
        *_lacking(result),
        "",
        *_agreement(result["agreement"]),
        "",
        *_parts(result),
        "",
    ]


def _about(result: dict[str, Any], device: str) -> str:
    job, ours = result["job"], result["arms"].get("mixkd_fast")
    stored = f"the {ours['store_seconds']:.1f} s" if ours else "the time"
    text = (
        f"{job['rows']:,} rows, {job['epochs']} epochs, batches of {job['batch_size']} rows with as many mixed ones. "
        f"Samples/s of mixkd_fast count {stored} in which it computed the teacher's logits; "
        f"the textbook arm is timed over {job['textbook_steps']} steps of a round, the plain ones without their first "
        f"{job['warmup_steps']} steps, and on a GPU none with those in which models are compiled. Cold: the first "
        "epoch, with the building of the teacher store where there is one; warm: those after it. mixkd_fast is: the "
        "median of the ratios of single rounds [all of them], and the ratio of the means over the same rounds. MFU: "
        f"matrix FLOPs of real tokens that the arm computes, of {result['peak_flops'] * 1e-12:.2f} TFLOP/s in bf16."
    )
    if device == "cuda":
        text += (
            f" Attention dropout is {job['attention_dropout']:g} in all arms. The tuned arms' batches come from "
            f"{job['workers']} workers of a DataLoader, pinned; mixkd_fast runs with {job['training']}. GPU idle: "
            "share of the steps, under the profiler, in which no kernel and no copy ran; no evaluation is among them."
        )
    return text


def _table(result: dict[str, Any]) -> list[str]:
    heads = ["arm", "samples/s [all rounds]", "cold", "warm", "real tokens/s", "mixkd_fast is", "of means", "MFU"]
    arms = result["arms"]
    on_gpu = any("idle_share" in arm for arm in arms.values())
    heads += ["peak MiB", *(["GPU idle"] if on_gpu else [])]
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
    for name, arm in arms.items():
        rounds = ", ".join(f"{value:.1f}" for value in arm["round_samples_per_s"].values())
        warm = "" if arm["warm_samples_per_s"] is None else f"{arm['warm_samples_per_s']:.1f}"
        cells = [
            NAMES[name],
            f"{arm['samples_per_s']:.1f} [{rounds}]",
            f"{arm['cold_samples_per_s']:.1f}",
            warm,
            f"{arm['tokens_per_s']:,.0f}",
            *_ratio(arm.get("mixkd_fast_is")),
            f"{100 * arm['mfu']:.0f} %",
            f"{arm['peak_mib']:,.0f}",
        ]
        if on_gpu:
            cells.append(f"{100 * arm['idle_share']:.0f} %" if "idle_share" in arm else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _ratio(faster: dict[str, Any] | None) -> tuple[str, str]:
    if faster is None:
        return "", ""
    rounds = ", ".join(f"{value:.2f}" for value in faster["rounds"])
    return f"{faster['median']:.2f} x [{rounds}]", f"{faster['of_means']:.2f} x"


def _lacking(result: dict[str, Any]) -> list[str]:
    lines = [f"- {what} FAILED: {why.splitlines()[-1]}" for what, why in result["failures"].items()]
    if result["not_run"]:
        lines.append(f"- not run, no time was left: {'; '.join(result['not_run'])}")
    return lines


def _agreement(agreement: dict[str, Any] | None) -> list[str]:
    if agreement is None:
        return ["Losses and gradients of the arms were not compared."]
    verdict = "all within their tolerance" if agreement["agrees"] else "NOT all within their tolerance"
    lines = [
        f"{agreement['batches']} identical batches without dropout, every arm set up as it is timed (precisions, "
        "padding, teacher store; the plain ones not compiled, mixkd_fast in fp32 neither), against the textbook arm's "
        f"arithmetic in fp32: largest relative differences, {verdict}.",
        "",
        "| arm | loss | gradient norm | tolerance |",
        "| --- | ---: | ---: | ---: |",
    ]
    for entry in agreement["compared"]:
        numbers = " | ".join(f"{entry[key]:.1e}" for key in ("loss", "gradient_norm", "tolerance"))
        lines.append(f"| {entry['arm']} | {numbers} |")
    return lines


def _parts(result: dict[str, Any]) -> list[str]:
    parts = result["parts_ms"]
    if not parts:
        return ["No step of mixkd_fast was looked at part by part."]
    whole = sum(parts.values())
    lines = ["A step of mixkd_fast by part, median (profiler on, teacher's clean logits kept):", ""]
    lines += ["| part | ms | share |", "| --- | ---: | ---: |"]
    return lines + [f"| {name} | {value:.1f} | {100 * value / whole:.0f} % |" for name, value in parts.items()]


def _bars(result: dict[str, Any], device: str) -> list[str]:
    arms = result["arms"]
    if "mixkd_fast" not in arms:
        return [f"- at least {bar:g} x {name}: not measured" for name, bar in BARS[device].items()]
    ratios = {name: arm["mixkd_fast_is"]["median"] for name, arm in arms.items() if "mixkd_fast_is" in arm}
    lines = []
    for name, bar in BARS[device].items():
        # The fastest of the tuned arms is the one to beat.
        fastest = min((arm for arm in ratios if arm.startswith(name)), key=ratios.__getitem__, default=None)
        if fastest is None:
            lines.append(f"- at least {bar:g} x {name}: not measured")
        else:
            ratio = ratios[fastest]
            lines.append(f"- at least {bar:g} x {name}: {ratio:.2f} x {fastest}, {'met' if ratio >= bar else 'MISSED'}")
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
            parts = list(result["parts_ms"].items())[::-1]
            bars = right.barh([name for name, _ in parts], [value for _, value in parts], color="#0e7490")
            right.bar_label(bars, [f" {value:.0f}" for _, value in parts])
            right.margins(x=0.15)
            right.set_title("milliseconds of a step of mixkd_fast", loc="left")
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
