"""The points of a search: which values each trial sets."""

import itertools
import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mixkd_fast.sweep_file import Distribution, Sweep

Point = Mapping[str, Any]
"""Dotted field -> value."""


def points_of(sweep: Sweep) -> list[Point]:
    """All points in order: of a grid the last field changes fastest; those of a random search as they are drawn.

    A draw depends on (seed, its number, the field's name) alone, so neither more trials nor other fields change it.
    """
    if sweep.search == "grid":
        axes: list[list[Point]] = []
        for name, values in sweep.fields.items():
            assert isinstance(values, list)
            axes.append([{name: value} for value in values])
        axes += [list(group) for group in sweep.coupled]
        return [{name: value for part in parts for name, value in part.items()} for parts in itertools.product(*axes)]
    assert sweep.trials is not None
    return [_drawn(sweep, trial) for trial in range(sweep.trials)]


def _drawn(sweep: Sweep, trial: int) -> Point:
    point: dict[str, Any] = {}
    for name, values in sweep.fields.items():
        point[name] = _value(values, _generator(sweep.seed, trial, name))
    for group in sweep.coupled:
        point |= group[int(_generator(sweep.seed, trial, ",".join(group[0])).integers(len(group)))]
    return point


def _generator(seed: int, trial: int, name: str) -> np.random.Generator:
    key = (trial, zlib.crc32(name.encode()))
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed % 2**64, spawn_key=key)))


def _value(values: list[Any] | Distribution, rng: np.random.Generator) -> Any:
    """One draw; numbers keep six significant digits, so that they can be read and repeated."""
    if isinstance(values, list):
        return values[int(rng.integers(len(values)))]
    if values.choice is not None:
        return values.choice[int(rng.integers(len(values.choice)))]
    if values.integer is not None:
        return int(rng.integers(values.integer[0], values.integer[1] + 1))
    if values.uniform is not None:
        return float(f"{rng.uniform(values.uniform[0], values.uniform[1]):.6g}")
    assert values.log_uniform is not None
    low, high = (math.log(bound) for bound in values.log_uniform)
    return float(f"{math.exp(rng.uniform(low, high)):.6g}")
