"""The benchmark of whole steps runs on a tiny model: arms agree on the loss, tables and plot say what was measured."""

import argparse
import json
from pathlib import Path

import pytest

from benchmarks import train_report, train_step

TINY = (32, 2, 2, 64, 1)


@pytest.fixture(scope="module")
def result() -> dict:  # type: ignore[type-arg]
    options = argparse.Namespace(
        device="cpu", rows=128, epochs=2, batch_size=16, rounds=1, textbook_steps=2, threads=1, models="tiny"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train_step.SIZES, "tiny", TINY)
        patch.setattr(train_step, "ARMS", ("textbook", "tuned", "mixkd_fast"))
        return train_step.measure("tiny", options)


def test_arms_agree_and_are_timed(result: dict) -> None:  # type: ignore[type-arg]
    assert result["agreement"]["agrees"], result["agreement"]
    assert 0 < result["agreement"]["largest_relative_difference"]["fp32"] < 1e-5
    assert set(result["arms"]) == {"textbook", "tuned", "mixkd_fast"}
    ours, textbook = result["arms"]["mixkd_fast"], result["arms"]["textbook"]
    assert len(ours["epoch_samples_per_s"]) == 2 and ours["store_seconds"] > 0
    assert ours["samples_per_s"] > textbook["samples_per_s"] > 0
    assert 0 < ours["mfu"] < 1 and ours["peak_mib"] > 100
    assert all(value >= 0 for value in result["parts_ms"].values()) and result["parts_ms"]["backward"] > 0


def test_page_and_plot(result: dict, tmp_path: Path) -> None:  # type: ignore[type-arg]
    report = {
        "command": "python -m benchmarks train_step",
        "commit": "abc",
        "versions": {"torch": "2"},
        "device": {"name": "a processor", "type": "cpu", "threads": 1},
        "results": [result],
    }
    text = train_report.markdown(json.loads(json.dumps(report)))
    rate = result["arms"]["mixkd_fast"]["samples_per_s"]
    assert f"| mixkd_fast | {rate:.1f} [" in text and "at least 5 x textbook" in text
    train_report.plot(report, tmp_path / "plot.svg")
    assert "backward" in (tmp_path / "plot.svg").read_text()


def test_an_arm_that_fails_or_no_longer_fits_leaves_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = argparse.Namespace(
        device="cpu", rows=64, epochs=1, batch_size=16, rounds=1, textbook_steps=2, threads=1, models="tiny"
    )
    monkeypatch.setitem(train_step.SIZES, "tiny", TINY)
    ran: list[str] = []

    def run_arm(arm: str, job: dict) -> dict:  # type: ignore[type-arg]
        ran.append(arm)
        if arm == "tuned":
            raise RuntimeError("a long story\nout of memory")
        if arm == "tuned_reusing":
            monkeypatch.setattr(train_step.time, "monotonic", lambda: 1e9)
        return {"epochs": [{"seconds": 1.0, "rows": 64, "tokens": 640}], "store_seconds": 0.0, "peak_mib": 1.0}

    monkeypatch.setattr(train_step, "run_arm", run_arm)
    arms: list[list[str]] = []
    found = train_step.measure("tiny", options, 5e8, lambda result: arms.append(list(result["arms"])))
    assert ran == ["mixkd_fast", "textbook", "tuned", "tuned_reusing"]
    assert found["failures"] == {"tuned": "RuntimeError: a long story\nout of memory"}
    assert found["not_run"] == ["tuned_compiled", "agreement", "profile"]
    assert arms[0] == ["mixkd_fast"] and sorted(arms[-1]) == ["mixkd_fast", "textbook", "tuned_reusing"]
    device = {"name": "a processor", "type": "cpu", "threads": 1}
    report = {"command": "it", "commit": "abc", "versions": {"torch": "2"}, "device": device, "results": [found]}
    text = train_report.markdown({**report, "tested": "3 failed", "not_run": ["minilm"]})
    assert "- tuned FAILED: out of memory" in text and "no time was left: tuned_compiled" in text
    assert "Tests of the ops before: 3 failed." in text and "Not begun, no time was left: minilm." in text
    train_report.plot(report, tmp_path / "plot.svg")
    assert len(train_step.lacking_parts(found)) == 4


def test_flops_count_only_what_an_arm_computes(tmp_path: Path) -> None:
    options = argparse.Namespace(device="cpu", rows=64, epochs=3, batch_size=16, textbook_steps=2, threads=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train_step.SIZES, "tiny", TINY)
        job = train_step.make_job("tiny", tmp_path, options)
    textbook, tuned, ours = (train_step.flops_per_row(arm, job) for arm in ("textbook", "tuned", "mixkd_fast"))
    # Mixed rows of random pairs are longer; ours leaves out most of the last layer and two of three teacher passes.
    assert ours < 0.7 * tuned < 0.7 * textbook


def test_idle_share_counts_overlaps_once() -> None:
    from benchmarks.train_arms import _idle_share

    assert _idle_share([(0, 4), (1, 2), (3, 5), (8, 10)]) == pytest.approx(0.3)
