"""Timing the variants of one case against each other and against a copy, in one process.

Variants take turns: every round runs each of them once, in a new random order, so that a change of clock or of load
meets all of them alike. CPU: wall-clock time, short calls repeated inside one sample. CUDA: events, with the L2 cache
overwritten before every sample. What a call allocates and frees is part of its time, also for the copy.
"""

import ctypes
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Kind = Literal["project", "eager", "compile", "peer"]
Tolerances = dict[torch.dtype, float]

SAMPLE_SECONDS = 2e-3
"""A CPU sample repeats its call until it lasts this long: a timer tick and a loop turn no longer count."""

SAME_FUNCTION = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
"""Relative L2 error up to which a peer still counts as computing the same function; its error is reported anyway."""


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
LARGEST_KEPT_BYTES = 4 * 2**20


class WrongResult(RuntimeError):
    """An implementation of this project is further from the fp64 truth than allowed: its time means nothing."""


@dataclass(frozen=True)
class Arm:
    """A variant: `call` computes everything that is timed and returns tensors named as in the truth.

    `missing` says why the variant cannot run here; then `call` is None.
    """

    name: str
    kind: Kind
    call: Callable[[], tuple[Tensor, ...]] | None
    missing: str = ""
    compared: bool = True
    """False: a companion timed in the same rounds whose result is another one than the truth of this case."""
    forward: Callable[[], object] | None = None
    """The forward of `call` alone, whose peak of memory is measured as well."""


@dataclass(frozen=True)
class Budget:
    """How long a case is timed: until `seconds` have passed, but `least` to `most` rounds."""

    seconds: float
    least: int
    most: int


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call over the rounds: median, lower and upper quartile."""

    median_ms: float
    lower_ms: float
    upper_ms: float
    rounds: int
    calls_per_sample: int


def fix_what_glibc_keeps() -> None:
    """CPU memory behaves alike in every case: a tensor above 4 MiB is new to the process in every call.

    By itself glibc does so above 32 MiB, unless the tensors of earlier cases left a hole: then a `clone()` of 64 MB
    takes a sixth of the time. Variables of glibc that the user set are left alone: MALLOC_MMAP_MAX_=0 together with
    MALLOC_TRIM_THRESHOLD_=17179869184 measures with memory that is reused.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, LARGEST_KEPT_BYTES)


def interleave(calls: Mapping[str, Callable[[], object]], device: torch.device, budget: Budget) -> dict[str, Timing]:
    """Time every call in shuffled rounds, after three calls each that are not counted."""
    on_cuda = device.type == "cuda"
    warm_ms = {name: min(_wall_ms(call, 1) for _ in range(3)) for name, call in calls.items()}
    repeats = {name: 1 if on_cuda else max(1, round(SAMPLE_SECONDS * 1e3 / ms)) for name, ms in warm_ms.items()}
    flush = _l2_flush(device) if on_cuda else None
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0)
    started, done = time.perf_counter(), 0
    while done < budget.least or (done < budget.most and time.perf_counter() - started < budget.seconds):
        shuffle.shuffle(order)
        if flush is not None:
            events = {name: _between_events(calls[name], flush) for name in order}
            torch.cuda.synchronize(device)
            for name, (start, end) in events.items():
                samples[name].append(start.elapsed_time(end))
        else:
            for name in order:
                if repeats[name] == 1:
                    # Once unseen, as in a loop of steps: memory that a virtual machine has not used for two seconds may
                    # have gone back to its host, at ten times the price.
                    calls[name]()
                samples[name].append(_wall_ms(calls[name], repeats[name]))
        done += 1
    return {name: _summary(values, repeats[name]) for name, values in samples.items()}


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most that tensors made during one call occupied at once. On the CPU: memory of PyTorch's allocator."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in trace if event["name"] == "[memory]")
    occupied = peak = 0
    for _, change in changes:
        occupied += change
        peak = max(peak, occupied)
    return peak


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """L2 norm of the difference over the norm of the truth (1 where that is 0), in fp64, piece by piece."""
    if actual.shape != truth.shape:
        raise WrongResult(f"shape {tuple(actual.shape)} instead of {tuple(truth.shape)}")
    squared = norm = torch.zeros((), dtype=torch.float64, device=truth.device)
    pairs = zip(actual.detach().reshape(-1).split(1 << 24), truth.reshape(-1).split(1 << 24), strict=True)
    for piece, exact in pairs:
        squared = squared + (piece.double() - exact.double()).square().sum()
        norm = norm + exact.double().square().sum()
    return float(squared.sqrt() / torch.where(norm == 0, 1.0, norm.sqrt()))


def measure(
    arms: Sequence[Arm],
    copy: Callable[[], object],
    copy_bytes: int,
    floor_bytes: int,
    truth: Mapping[str, Tensor],
    dtype: torch.dtype,
    tolerances: Tolerances,
    device: torch.device,
    budget: Budget,
) -> list[dict[str, Any]]:
    """One entry per arm, and one named "copy": check each against the truth, then time all of them together.

    Args: copy_bytes and floor_bytes are read + written; truth by name in the order of what the arms return; dtype is
    that of the inputs; tolerances bound the relative L2 error of the project's arms.
    Raises: WrongResult, naming the arm, if one of the project is wrong. A peer that is wrong has no time.
    """
    entries = [_check(arm, truth, dtype, tolerances) for arm in arms]
    timed = {arm.name: arm.call for arm, entry in zip(arms, entries, strict=True) if arm.call and "why" not in entry}
    timings = interleave({"copy": copy, **timed}, device, budget)
    copied_ms = timings["copy"].median_ms
    copy_rate = copy_bytes / copied_ms
    entries.insert(0, {"name": "copy", "kind": "copy", **_figures(timings["copy"], copy_bytes, copy_rate)})
    for arm, entry in zip(arms, entries[1:], strict=True):
        if arm.name in timed:
            entry |= _figures(timings[arm.name], floor_bytes, copy_rate)
            entry["peak_bytes"] = peak_bytes(timed[arm.name], device)
            if arm.forward is not None:
                entry["forward_peak_bytes"] = peak_bytes(arm.forward, device)
    return entries


def _check(arm: Arm, truth: Mapping[str, Tensor], dtype: torch.dtype, tolerances: Tolerances) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": arm.name, "kind": arm.kind}
    if arm.call is None:
        return entry | {"why": arm.missing}
    try:
        outputs = arm.call()
    except torch.OutOfMemoryError:
        return entry | {"why": "out of memory"}
    except Exception as error:
        # What others wrote may not run here, for want of a compiler for example; the table then says so.
        if arm.kind == "project":
            raise
        return entry | {"why": f"failed with {type(error).__name__}"}
    if not arm.compared:
        return entry
    try:
        errors = {name: relative_error(output, truth[name]) for name, output in zip(truth, outputs, strict=True)}
    except WrongResult:
        if arm.kind == "project":
            raise
        return entry | {"why": "result of another shape"}
    limit = (tolerances if arm.kind == "project" else SAME_FUNCTION)[dtype]
    # Written so that NaN is wrong.
    wrong = {name: error for name, error in errors.items() if not error <= limit}
    if wrong and arm.kind == "project":
        text = ", ".join(f"{name} {error:.1e}" for name, error in wrong.items())
        raise WrongResult(f"{arm.name}: relative L2 error against fp64 of {text}; at most {limit:.0e} is allowed")
    return entry | {"errors": errors} | ({"why": "another function: error too large"} if wrong else {})


def _figures(timing: Timing, num_bytes: int, copy_bytes_per_ms: float) -> dict[str, Any]:
    rate = num_bytes / timing.median_ms
    return {
        "time": asdict(timing),
        "floor_bytes": num_bytes,
        "gb_per_s": rate * 1e-6,
        "fraction_of_copy": rate / copy_bytes_per_ms,
    }


def _wall_ms(call: Callable[[], object], repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) * 1e3 / repeats


def _l2_flush(device: torch.device) -> Callable[[], object]:
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(max(size, 1 << 28), dtype=torch.int8, device=device).zero_


def _between_events(
    call: Callable[[], object], flush: Callable[[], object]
) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush()
    start.record()
    call()
    end.record()
    return start, end


def _summary(samples: list[float], repeats: int) -> Timing:
    lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, lower, upper, len(samples), repeats)
