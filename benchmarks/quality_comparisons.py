"""Which arms of the quality benchmark differ, by their runs' figures of single evaluation rows."""

from collections import defaultdict
from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np

from benchmarks.quality_results import Run, are_comparable
from benchmarks.quality_settings import CLAIM, SETTINGS, pairs
from benchmarks.statistics import Values, holm, paired_bootstrap, unpack, unpack_losses

FIGURES = ("accuracy", "nll")
Results = dict[Run, dict[str, Any]]


def comparisons(runs: Results) -> list[dict[str, Any]]:
    """Paired differences of the students' figures over the seeds that both arms have.

    p values are adjusted by Holm's method within a figure's family: the published claim in all its settings and depths,
    and of the other differences those from one control at one depth. One seed is no test and has no adjusted p value.
    """
    found = []
    for setting in SETTINGS:
        for layers in _depths(runs, setting):
            here = {run.arm for run in runs if (run.setting, run.layers) == (setting, layers)}
            for first, second in pairs(here):
                common = _common_seeds(runs, setting, layers, first, second)
                for split in SETTINGS[setting].splits if common else ():
                    entry: dict[str, Any] = {"setting": setting, "split": split, "layers": layers}
                    entry |= {"first": first, "second": second, "seeds": common}
                    for figure in FIGURES:
                        arms = [_figures(runs, setting, split, layers, arm, common, figure) for arm in (first, second)]
                        entry[figure] = asdict(paired_bootstrap(*arms))
                    found.append(entry)
    _adjust(found)
    return found


def trends(runs: Results) -> list[dict[str, Any]]:
    """The claim's gain where rows are few, less its gain where there are more of the same task's.

    Both gains are measured on the same evaluation rows; seeds are paired by their number.
    """
    found = []
    fewer_and_more = [
        (few, more)
        for few, more in combinations(sorted(SETTINGS, key=lambda name: SETTINGS[name].rows), 2)
        if SETTINGS[few].task == SETTINGS[more].task
    ]
    for few, more in fewer_and_more:
        for layers in _depths(runs, few):
            seeds = [set(_common_seeds(runs, setting, layers, *CLAIM)) for setting in (few, more)]
            common = sorted(seed for seed in seeds[0] & seeds[1] if _same_rows(runs, few, more, layers, seed))
            for split in SETTINGS[few].splits if common else ():
                entry: dict[str, Any] = {"setting": few, "more": more, "split": split, "layers": layers}
                entry |= {"first": CLAIM[0], "second": CLAIM[1], "seeds": common}
                for figure in FIGURES:
                    gains = []
                    for setting in (few, more):
                        arms = [_figures(runs, setting, split, layers, arm, common, figure) for arm in CLAIM]
                        gains.append(arms[0].astype(np.float64) - arms[1].astype(np.float64))
                    entry[figure] = asdict(paired_bootstrap(*gains))
                found.append(entry)
    return found


def unpaired(runs: Results) -> list[dict[str, Any]]:
    """Seeds that two arms have and that are not compared: their rows, teachers or starts are not the same."""
    found = []
    for setting in SETTINGS:
        for layers in _depths(runs, setting):
            seeds: dict[str, set[int]] = defaultdict(set)
            for run in runs:
                if (run.setting, run.layers) == (setting, layers):
                    seeds[run.arm].add(run.seed)
            for first, second in pairs(seeds):
                left = seeds[first] & seeds[second] - {*_common_seeds(runs, setting, layers, first, second)}
                if left:
                    entry = {"setting": setting, "layers": layers, "first": first, "second": second}
                    found.append(entry | {"seeds": sorted(left)})
    return found


def _same_rows(runs: Results, few: str, more: str, layers: int, seed: int) -> bool:
    """Whether two settings' students were evaluated on the same rows."""
    splits = [runs[Run(setting, CLAIM[0], layers, seed)]["splits"] for setting in (few, more)]
    first, second = ({name: split["data"] for name, split in some.items()} for some in splits)
    return first == second


def _adjust(found: list[dict[str, Any]]) -> None:
    for figure in FIGURES:
        families: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        for entry in found:
            entry[figure]["adjusted_p_value"] = None
            if len(entry["seeds"]) > 1:
                is_claim = (entry["first"], entry["second"]) == CLAIM
                families["claim" if is_claim else (entry["second"], entry["layers"])].append(entry[figure])
        for family in families.values():
            for difference, p_value in zip(family, holm([one["p_value"] for one in family]), strict=True):
                difference["adjusted_p_value"] = p_value


def _depths(runs: Results, setting: str) -> list[int]:
    return sorted({run.layers for run in runs if run.setting == setting}, reverse=True)


def _common_seeds(runs: Results, setting: str, layers: int, first: str, second: str) -> list[int]:
    """Those that both arms have, on the same rows, with the same teacher and from the same start."""
    seeds = (run.seed for run in runs if (run.setting, run.layers, run.arm) == (setting, layers, first))
    pairs_of = {seed: [runs.get(Run(setting, arm, layers, seed)) for arm in (first, second)] for seed in seeds}
    return sorted(seed for seed, (one, other) in pairs_of.items() if one and other and are_comparable(one, other))


def _figures(runs: Results, setting: str, split: str, layers: int, arm: str, seeds: list[int], figure: str) -> Values:
    """Figures [S, N] of one arm."""
    splits = [runs[Run(setting, arm, layers, seed)]["splits"][split] for seed in seeds]
    if figure == "accuracy":
        return np.stack([unpack(s["correct"], s["rows"]) for s in splits])
    return np.stack([unpack_losses(s["nll"]) for s in splits])
