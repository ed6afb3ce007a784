"""What a profiler saw of some training steps: milliseconds by part, and how long the GPU stood still."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

Span = tuple[float, float]
"""Start and end, in microseconds of the profiler's clock."""
PLAIN_STEP = "train_arms::step"
"""The span of a whole step in the arms that are plain PyTorch."""
_OURS = "mixkd_fast::"
_HOST, _DEVICE = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA


def profiled(run: Callable[[], object], device: str) -> list[Any]:
    """The profiler's events of a call."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as profiler:
        run()
        if device == "cuda":
            torch.cuda.synchronize()
    return list(profiler.events())


def spans(events: Iterable[Any], name: str) -> list[Span]:
    """The host's spans of a name, in order; the profiler lists most of them a second time, as the GPU saw them."""
    return sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.name == name and event.device_type == _HOST
    )


def window(starts: list[Span], steps: int) -> Span:
    """From the start of the first of the last `steps` + 1 steps to the start of the last one: so many whole steps.

    Raises: ValueError for fewer steps than that.
    """
    if len(starts) <= steps:
        raise ValueError(f"{len(starts)} steps were profiled; at least {steps + 1} are needed")
    return starts[-steps - 1][0], starts[-1][0]


def parts_of_a_step(events: list[Any], steps: int) -> dict[str, float]:
    """Median milliseconds of the parts of a step of mixkd_fast, over its last `steps` steps but one."""
    found = {name: spans(events, _OURS + name) for name in ("forward", "teacher", "backward", "optimizer")}
    first, last = window(found["forward"], steps)
    parts = {}
    for name, all_spans in found.items():
        within = [end - start for start, end in all_spans if first <= start < last]
        parts[name] = float(np.median(within)) / 1e3
    starts = [start for start, _ in found["forward"] if first <= start <= last]
    period = float(np.median(np.diff(starts))) / 1e3
    return {
        "teacher": parts["teacher"],
        "student forward and losses": parts["forward"] - parts["teacher"],
        "backward": parts["backward"],
        "clipping and AdamW": parts["optimizer"],
        "everything else": max(0.0, period - parts["forward"] - parts["backward"] - parts["optimizer"]),
    }


def idle_share(events: Iterable[Any], step: str, steps: int) -> float:
    """Share of the last `steps` steps but one in which the GPU ran no kernel and no copy.

    Args: step = name of a span of which every step has one; from its first start to its last one the time counts.
    """
    events = list(events)
    first, last = window(spans(events, step), steps)
    busy, reached = 0.0, first
    work = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        # Spans of the host's names are listed among the device's events as well, gaps and all.
        if event.device_type == _DEVICE and not event.is_user_annotation
    )
    for start, end in work:
        start, end = max(start, reached), min(end, last)
        busy += max(0.0, end - start)
        reached = max(reached, end)
    return 1 - busy / (last - first)
