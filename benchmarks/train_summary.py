"""From the runs of the arms to figures: rates, how many times faster, FLOPs."""

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig

from mixkd_fast.planning.flops import EncoderShape, forward_flops

Runs = dict[int, dict[str, Any]]
"""Round -> what `train_arms.py` wrote there."""


def rate(run: dict[str, Any], key: str = "rows") -> float:
    """Rows (or tokens) per second over all epochs, the building of the teacher store counted."""
    seconds = sum(epoch["seconds"] for epoch in run["epochs"]) + run["store_seconds"]
    return float(sum(epoch[key] for epoch in run["epochs"]) / seconds)


def cold_rate(run: dict[str, Any]) -> float:
    """Rows per second of the first epoch, the building of the teacher store counted."""
    first = run["epochs"][0]
    return float(first["rows"] / (first["seconds"] + run["store_seconds"]))


def warm_rate(run: dict[str, Any]) -> float | None:
    """Rows per second of all epochs but the first; None where there is no other."""
    later = run["epochs"][1:]
    return float(sum(e["rows"] for e in later) / sum(e["seconds"] for e in later)) if later else None


def summarise_all(runs: dict[str, Runs], job: dict[str, Any], peak: float) -> dict[str, dict[str, Any]]:
    """`summarise` of every arm; "mixkd_fast_is" for those that ran in a round in which mixkd_fast did."""
    found = {arm: summarise(arm, of_arm, job, peak) for arm, of_arm in runs.items()}
    ours = runs.get("mixkd_fast", {})
    for arm, of_arm in runs.items():
        if arm != "mixkd_fast" and ours.keys() & of_arm.keys():
            found[arm]["mixkd_fast_is"] = times_faster(ours, of_arm)
    return found


def summarise(arm: str, runs: Runs, job: dict[str, Any], peak: float) -> dict[str, Any]:
    """Medians over the rounds. Args: peak = FLOP/s, of which MFU is a share."""
    samples = {number: rate(run) for number, run in runs.items()}
    per_epoch = [[epoch["rows"] / epoch["seconds"] for epoch in run["epochs"]] for run in runs.values()]
    warm = [value for run in runs.values() if (value := warm_rate(run)) is not None]
    return {
        "samples_per_s": statistics.median(samples.values()),
        "round_samples_per_s": samples,
        "tokens_per_s": statistics.median(rate(run, "tokens") for run in runs.values()),
        "cold_samples_per_s": statistics.median(map(cold_rate, runs.values())),
        "warm_samples_per_s": statistics.median(warm) if warm else None,
        "epoch_samples_per_s": [statistics.median(values) for values in zip(*per_epoch, strict=True)],
        "store_seconds": statistics.median(run["store_seconds"] for run in runs.values()),
        "peak_mib": max(run["peak_mib"] for run in runs.values()),
        "mfu": statistics.median(samples.values()) * flops_per_row(arm, job) / peak,
    }


def times_faster(ours: Runs, other: Runs) -> dict[str, Any]:
    """How many times faster `ours` is: round by round, their median, and of the means over the same rounds.

    Rounds in which only one of both ran say nothing: the machine may have been another then. There must be another.
    """
    shared = sorted(ours.keys() & other.keys())
    rates = [(rate(ours[number]), rate(other[number])) for number in shared]
    ratios = [one / two for one, two in rates]
    return {
        "rounds": ratios,
        "median": statistics.median(ratios),
        "of_means": sum(one for one, _ in rates) / sum(two for _, two in rates),
    }


def flops_per_row(arm: str, job: dict[str, Any]) -> float:
    """Matrix FLOPs of real tokens of one row and its mixed row, mean over an epoch; only what the arm computes.

    A mixed row is as long as the longer of its pair. The backward takes twice the forward's. mixkd_fast runs the
    teacher on a clean row once in all epochs, and every last layer for the first token only.
    """
    lines = Path(job["train"]).read_text().splitlines()
    lengths = np.array([json.loads(line)["sentence"].count(" ") + 3 for line in lines])
    partners = np.random.default_rng(0).permutation(lengths)
    # With batches of like length a partner is as long as the row.
    mixed = np.maximum(lengths, partners) if arm == "textbook" else lengths
    lean = arm == "mixkd_fast"

    def flops(which: str, rows: "np.ndarray[Any, Any]") -> float:
        config = AutoConfig.from_pretrained(job[which])
        return forward_flops(EncoderShape.of(config), rows, first_token_only=lean) / len(rows)

    clean_teacher = flops("teacher", lengths) / (job["epochs"] if lean else 1)
    return clean_teacher + flops("teacher", mixed) + 3 * (flops("student", lengths) + flops("student", mixed))
