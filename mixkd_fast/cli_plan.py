"""`mixkd-fast plan`: what a run will need and how fast it can be, before anything runs and without loading weights."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mixkd_fast.configuration import Config, load_config
from mixkd_fast.errors import MixKDError
from mixkd_fast.planning.assumptions import assumptions
from mixkd_fast.planning.hardware import GPUS
from mixkd_fast.planning.memory import Placement, RankMemory
from mixkd_fast.planning.plan import DEFAULT_RANKS, DevicePlan, Plan, RankPlan, make_plan

_GIB = 2**30


def main(argv: Sequence[str] | None = None) -> int:
    """Run from command-line arguments. Returns 1 for an error."""
    parser = argparse.ArgumentParser(prog="mixkd-fast plan", description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="a.b.c=VALUE")
    parser.add_argument("--gpu", choices=[*GPUS, "cpu", "all"], default="all", help="the device (all)")
    counts = ",".join(map(str, DEFAULT_RANKS))
    parser.add_argument(
        "--devices",
        type=_counts,
        default=DEFAULT_RANKS,
        metavar="N,N,...",
        help=f"numbers of GPUs, one rank each ({counts})",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure, in bytes and seconds")
    options = parser.parse_args(argv)
    names = [*GPUS, "cpu"] if options.gpu == "all" else [options.gpu]
    try:
        config = load_config(options.config, options.overrides)
        if options.gpu == "all" and config.training.precision == "fp16":
            names.remove("cpu")
        plan = make_plan(config, names, options.devices)
        print("\n".join(describe(plan, config)))
        if options.json is not None:
            options.json.write_text(json.dumps(as_json(plan, config), indent=2) + "\n", encoding="utf-8")
    except (MixKDError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def describe(plan: Plan, config: Config) -> list[str]:
    """The plan as lines of text: models and rows, memory, speed, assumptions."""
    lines = [
        f"teacher  {plan.teacher.describe() if plan.teacher else 'none'}",
        f"student  {plan.student.describe()}",
        f"rows     {plan.lengths.mean:.1f} tokens on average, {plan.lengths.longest} at most: {plan.lengths.source}",
        f"method   {config.method.name}, batch {config.training.batch_size}, {config.training.precision}; configured: "
        f"{plan.placement.describe()}",
    ]
    # A rank holds the same on every GPU.
    for is_gpu in (True, False):
        alike = [device for device in plan.devices if device.is_gpu == is_gpu]
        lines += _memory_lines(plan, alike) if alike else []
    for device in plan.devices:
        lines += _speed_lines(plan, device)
    return [*lines, "", "Assumptions", *(f"- {text}" for text in assumptions(plan, config))]


def as_json(plan: Plan, config: Config) -> dict[str, Any]:
    """Every figure, in bytes and seconds."""
    return {
        "student": asdict(plan.student),
        "teacher": asdict(plan.teacher) if plan.teacher else None,
        "rows": {"mean_tokens": plan.lengths.mean, "longest": plan.lengths.longest, "source": plan.lengths.source},
        "configured": asdict(plan.placement),
        "devices": [_device_json(device) for device in plan.devices],
        "assumptions": assumptions(plan, config),
    }


def _device_json(device: DevicePlan) -> dict[str, Any]:
    return {
        **asdict(device.device),
        "usable_bytes": device.device.usable_bytes,
        "student_rates": asdict(device.student_rates),
        "teacher_rates": asdict(device.teacher_rates) if device.teacher_rates else None,
        "counts": [
            {
                "ranks": count.ranks,
                "impossible": count.impossible,
                "memory": [
                    {**asdict(placement), **_memory_json(memory), "fits": device.fits(memory)}
                    for placement, memory in count.memory.items()
                ],
                "throughput": asdict(count.throughput) if count.throughput else None,
            }
            for count in device.counts
        ],
    }


def _memory_json(memory: RankMemory) -> dict[str, int]:
    fields: dict[str, Any] = asdict(memory)
    student = fields.pop("student")
    return {
        **fields,
        **{f"student_{name}": value for name, value in student.items()},
        "gradients_bytes": memory.gradients_bytes,
        "host_bytes": memory.host_bytes,
        "total_bytes": memory.total_bytes,
    }


def _memory_lines(plan: Plan, devices: list[DevicePlan]) -> list[str]:
    """A table of parts at the first possible number of ranks, and one of totals at all of them."""
    counts = devices[0].counts
    first = next(count for count in counts if count.work is not None)
    assert first.work is not None
    names = ", ".join(device.device.name for device in devices)
    logits = "loss" if first.memory[next(iter(first.memory))].is_language else "logits"
    header = ["", "teacher", "student", "gradients", "optimizer", "buckets", "activations", "working", logits]
    rows = [
        [_marked(placement, plan), *_parts(memory), _gib(memory.host_bytes), _fitting(devices, memory)]
        for placement, memory in first.memory.items()
    ]
    lines = [
        "",
        f"Memory per rank in GiB: {names}; {_ranks(first.ranks)}, micro-batch {first.work.micro_batch_size}, "
        f"{first.work.widest} positions; * = configured",
        *_table([[*header, "total", "on host", "fits"], *rows]),
    ]
    possible = [count for count in counts if count.work is not None]
    if len(possible) > 1:
        totals = [
            [_marked(placement, plan), *(_total(devices, count.memory[placement]) for count in possible)]
            for placement in first.memory
        ]
        lines += ["", "Total per rank in GiB (where it fits, if not everywhere)"]
        lines += _table([["", *(_ranks(count.ranks) for count in possible)], *totals])
    return lines


def _speed_lines(plan: Plan, device: DevicePlan) -> list[str]:
    header = ["ranks", "step ms", "student", "teacher", "optimizer", "exchange", "rows/s", "tokens/s", "hours", "fits"]
    rows = [_speed_row(plan, device, count) for count in device.counts if count.throughput is not None]
    impossible = [
        f"  {_ranks(count.ranks)}: cannot be used: {count.impossible}" for count in device.counts if count.impossible
    ]
    return ["", f"Speed on {device.device.name}, {plan.placement.describe()}", *_table([header, *rows]), *impossible]


def _speed_row(plan: Plan, device: DevicePlan, count: RankPlan) -> list[str]:
    speed = count.throughput
    assert speed is not None
    groups = ("student", "teacher", "optimizer", "exchange")
    parts = [1e3 * sum(part.seconds for part in speed.parts if part.name.startswith(group)) for group in groups]
    hours, fits = "?" if speed.hours is None else f"{speed.hours:.3g}", device.fits(count.memory[plan.placement])
    numbers = [f"{1e3 * speed.step_s:.3g}", *(f"{part:.3g}" for part in parts)]
    return [
        str(count.ranks),
        *numbers,
        f"{speed.rows_per_s:,.0f}",
        f"{speed.tokens_per_s:,.0f}",
        hours,
        "yes" if fits else "no",
    ]


def _parts(memory: RankMemory) -> list[str]:
    student = memory.student
    parts = (
        memory.teacher_weights_bytes,
        student.weights_bytes + student.copies_bytes,
        memory.gradients_bytes,
        student.optimizer_bytes,
        student.buckets_bytes,
        memory.activations_bytes,
        max(memory.student_working_bytes, memory.teacher_working_bytes),
        memory.logits_bytes + memory.heads_bytes,
        memory.total_bytes,
    )
    return [_gib(part) for part in parts]


def _fitting(devices: list[DevicePlan], memory: RankMemory) -> str:
    fitting = [device.device.name for device in devices if device.fits(memory)]
    return "all" if len(fitting) == len(devices) > 1 else " ".join(fitting) or "none"


def _total(devices: list[DevicePlan], memory: RankMemory) -> str:
    everywhere = all(device.fits(memory) for device in devices)
    return _gib(memory.total_bytes) + ("" if everywhere else f" ({_fitting(devices, memory)})")


def _marked(placement: Placement, plan: Plan) -> str:
    return ("* " if placement == plan.placement else "  ") + placement.describe()


def _ranks(count: int) -> str:
    return f"{count} {'rank' if count == 1 else 'ranks'}"


def _gib(count: int) -> str:
    return f"{count / _GIB:.2f}"


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def _counts(text: str) -> list[int]:
    """Numbers of ranks from "1,8,64"."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: allowed: positive whole numbers separated by commas, as 1,8,64")
    return counts
