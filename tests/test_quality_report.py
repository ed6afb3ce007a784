"""What the quality benchmark makes of its runs: comparisons, the page and the plot, from results by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks import quality_report
from benchmarks.quality_comparisons import comparisons, trends, unpaired
from benchmarks.quality_results import TEACHER, Run
from benchmarks.quality_settings import CLAIM, SETTINGS
from benchmarks.statistics import holm, pack, pack_losses

_Results = dict[Run, dict[str, Any]]


def _result(right: NDArray[Any]) -> dict[str, Any]:
    """What a comparison reads of a run: rows that are right, each with a loss of 0 or 1."""
    right = right.astype(bool)
    split = {"rows": len(right), "correct": pack(right), "nll": pack_losses(1.0 - right), "data": "x"}
    return {"content_hash": "c", "models": {"teacher": "t", "start": None}, "splits": {"validation": split}}


def _runs(gains: dict[str, float], arms: tuple[str, ...] = CLAIM, seeds: int = 5, exact: bool = True) -> _Results:
    """Students of 3 layers: the second arm is right on half of 400 rows, the first on a setting's gain more, or both
    are as often as chance has it."""
    rng, runs = np.random.default_rng(0), {}
    for setting, gain in gains.items():
        for seed in range(seeds):
            places = rng.permutation(400)
            for arm, share in zip(arms, (0.5 + gain, 0.5), strict=True):
                runs[Run(setting, arm, 3, seed)] = _result((places if exact else 400 * rng.random(400)) < 400 * share)
    return runs


def test_the_claim_is_a_family_of_its_own_and_one_seed_is_no_test() -> None:
    runs = _runs({"sst2_1pct": 0.02, "sst2_10pct": 0.01}) | _runs({"sst2": 0.1}, seeds=1)
    runs |= _runs({"sst2_1pct": 0.02, "sst2_10pct": 0.01}, arms=("pkd", "kd"))
    found = {(c["setting"], c["first"], c["second"]): c["accuracy"] for c in comparisons(runs)}
    assert found[("sst2", *CLAIM)]["adjusted_p_value"] is None
    for first in ("sm_tmkd", "pkd"):
        both = [found[setting, first, "kd"] for setting in ("sst2_1pct", "sst2_10pct")]
        assert [one["adjusted_p_value"] for one in both] == holm([one["p_value"] for one in both])
    assert [round(found[(name, *CLAIM)]["difference"], 9) for name in ("sst2_1pct", "sst2_10pct", "sst2")] == [
        0.02,
        0.01,
        0.1,
    ]


def test_many_strong_differences_survive_their_number() -> None:
    """A full matrix has hundreds of differences; strong ones must not be lost to a floor of the p values."""
    runs: _Results = {}
    for name in ("kd_2x", "kd_sm", "tmkd", "pkd", "cr_ild", "cckd"):
        runs |= _runs(dict.fromkeys(("sst2_1pct", "rte", "mrpc", "sst2_10pct"), 0.3), arms=(name, "kd"), exact=False)
    differences = [c["accuracy"] for c in comparisons(runs) if c["second"] == "kd"]
    assert len(differences) == 24 and all(one["adjusted_p_value"] < 0.05 for one in differences)


def test_trends_are_differences_of_gains_on_the_same_rows() -> None:
    runs = _runs({"sst2_1pct": 0.1, "sst2_10pct": 0.02, "rte": 0.5}) | _runs({"sst2": 0.01}, seeds=1)
    found = {(entry["setting"], entry["more"]): entry for entry in trends(runs)}
    assert set(found) == {("sst2_1pct", "sst2_10pct"), ("sst2_1pct", "sst2"), ("sst2_10pct", "sst2")}
    few = found["sst2_1pct", "sst2_10pct"]
    assert few["seeds"] == [0, 1, 2, 3, 4] and few["accuracy"]["difference"] == pytest.approx(0.08)
    assert few["accuracy"]["lower"] > 0 and few["nll"]["upper"] < 0
    assert found["sst2_1pct", "sst2"]["seeds"] == [0]
    for arm in CLAIM:
        runs[Run("sst2", arm, 3, 0)]["splits"]["validation"]["data"] = "other rows"
    assert [(entry["setting"], entry["more"]) for entry in trends(runs)] == [("sst2_1pct", "sst2_10pct")]


def test_the_page_begins_with_the_claim() -> None:
    report = _report()
    runs = _runs({"sst2_1pct": 0.1, "sst2_10pct": 0.02})
    report |= {"comparisons": comparisons(runs), "trends": trends(runs)}
    text = quality_report.markdown(report)
    assert "## The published claim: SM+TMKD over KD, most where rows are few" in text
    assert "| SST-2, 1 % | 3 | 5 | +10.0 [" in text and "| SST-2, 1 % | SST-2, 10 % | 3 | 5 | +8.0 [" in text
    assert json.loads(json.dumps(report["comparisons"])) == report["comparisons"]


def test_report_of_a_result_file_by_hand() -> None:
    text = quality_report.markdown(_report())
    assert "| RTE | 2 | 100.0 | 0.0 ± 0.0 | 50.0 ± 70.7 | 100.0 (1) |" in text
    assert "| RTE | TMKD | 2 | +50.0 [+40.0, +60.0] | helps | -0.100 [-0.200, -0.050] | (helps) |" in text
    report = _report()
    report["comparisons"][0]["accuracy"]["adjusted_p_value"] = None
    assert "| RTE | TMKD | 2 | +50.0 [+40.0, +60.0] | (helps) |" in quality_report.markdown(report)
    assert "- rte, 3 layers, not made yet: tmkd 1" in text
    assert "| RTE | 7 | 2 | 32 | 9 | 0.0001 | 128 | 5, 32, 0.0001 | MNLI, 26,413 rows |" in text


@pytest.mark.parametrize("part", ["content_hash", "models", "data"])
def test_runs_of_other_rows_or_another_teacher_are_not_paired(part: str) -> None:
    runs = {Run("sst2", arm, 3, seed): _result(np.ones(8)) for arm in ("ft", "kd") for seed in (0, 1)}
    other = runs[Run("sst2", "kd", 3, 1)]
    assert [entry["seeds"] for entry in comparisons(runs)] == [[0, 1]] and not unpaired(runs)
    (other["splits"]["validation"] if part == "data" else other)[part] = "another"
    assert [entry["seeds"] for entry in comparisons(runs)] == [[0]]
    left = {"setting": "sst2", "layers": 3, "first": "kd", "second": "ft", "seeds": [1]}
    assert unpaired(runs) == [left]
    text = quality_report.markdown({**_report(), "unpaired": [left]})
    assert "- sst2, 3 layers: KD and FT, seeds 1" in text


def test_plot_of_a_result_file_by_hand(tmp_path: Path) -> None:
    quality_report.plot(_report(), tmp_path / "plot.svg")
    svg = (tmp_path / "plot.svg").read_text()
    assert svg.startswith("<?xml") and "RTE" in svg and "TMKD" in svg
    quality_report.plot({**_report(), "results": []}, tmp_path / "empty.svg")


def _report() -> dict[str, Any]:
    """FT is wrong everywhere, KD with one seed of two, TMKD nowhere and has one seed."""
    teacher = {"task": "rte", "method": {}, "training": {"epochs": 5, "batch_size": 32, "learning_rate": 1e-4}}
    common = {"training_rows": 7, "steps": 9, "seconds": 60.0, "device": "cpu (1 threads)", "processor": "p"}
    results = [{**common, "setting": "rte", "arm": TEACHER, "layers": 0, "seed": 0, "description": teacher}]
    for arm, seed in (("ft", 0), ("ft", 1), ("kd", 0), ("kd", 1), ("tmkd", 0)):
        described = {"task": "rte", "teacher": teacher}
        results.append({**common, "setting": "rte", "arm": arm, "layers": 3, "seed": seed, "description": described})
    right = [1, 0, 0, 0, 1, 1]
    for result, share in zip(results, right, strict=True):
        metrics = dict.fromkeys(quality_report.METRICS, float(share))
        result["splits"] = {
            "validation": {"rows": 8, "metrics": metrics, "correct": pack(np.full(8, bool(share)))},
        }
    figures = {"difference": 0.5, "lower": 0.4, "upper": 0.6, "p_value": 0.0002, "adjusted_p_value": 0.001}
    nll = {"difference": -0.1, "lower": -0.2, "upper": -0.05, "p_value": 0.02, "adjusted_p_value": 0.2}
    pair = {"setting": "rte", "split": "validation", "layers": 3, "first": "tmkd", "second": "kd", "seeds": [0, 1]}
    return {
        "command": "quality",
        "encoder": "e",
        "teacher_rows": "all",
        "precision": "bf16",
        "settings": {name: quality_report.asdict(setting) for name, setting in SETTINGS.items()},
        "results": results,
        "comparisons": [{**pair, "accuracy": dict(figures), "nll": dict(nll)}],
        "trends": [],
        "unpaired": [],
        "missing": [{"setting": "rte", "arm": "tmkd", "layers": 3, "seed": 1, "why": "not made yet"}],
        "versions": {"mixkd_fast": "0", "torch": "0"},
        "commit": "c",
    }
