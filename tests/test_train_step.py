"""The benchmark of whole steps runs on a tiny model: arms agree on the loss, tables and plot say what was measured."""

import argparse
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from preloaded import run_script

from benchmarks import train_arms, train_report, train_step
from benchmarks.train_profile import idle_share, parts_of_a_step
from benchmarks.train_summary import cold_rate, flops_per_row, times_faster, warm_rate

TINY = (32, 2, 2, 64, 1)
OPTIONS = argparse.Namespace(
    device="cpu", rows=96, epochs=2, batch_size=16, rounds=1, compiled_rounds=0, textbook_steps=2, threads=1
)


def started(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return run_script(arguments, [environment], 300)


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train_step.SIZES, "tiny", TINY)
        patch.setattr(train_step, "ARMS", ("textbook", "tuned", "tuned_compiled", "mixkd_fast"))
        patch.setattr(train_step, "start", started)
        return train_step.measure("tiny", OPTIONS)


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train_step.SIZES, "tiny", TINY)
        return train_step.make_job("tiny", tmp_path, OPTIONS)


def test_arms_agree_and_are_timed(result: dict[str, Any]) -> None:
    agreement = result["agreement"]
    assert agreement["agrees"], agreement
    compared = {entry["arm"]: entry for entry in agreement["compared"]}
    assert {name.split(",")[0] for name in compared} == {"mixkd_fast", "tuned"}
    for name, entry in compared.items():
        assert entry["tolerance"] == (1e-5 if "fp32" in name else 2e-2)
        # Another order of the same sums: nothing equal to the last bit would mean that the arm was held against itself.
        assert 0 < entry["gradient_norm"] <= entry["tolerance"], name
    in_bf16 = [entry["gradient_norm"] for name, entry in compared.items() if "bf16" in name]
    assert len(in_bf16) == 2 and min(in_bf16) > 1e-5
    assert set(result["arms"]) == {"textbook", "tuned", "mixkd_fast"}, "no round of tuned_compiled was asked for"
    ours, textbook = result["arms"]["mixkd_fast"], result["arms"]["textbook"]
    assert len(ours["epoch_samples_per_s"]) == 2 and ours["store_seconds"] > 0
    assert ours["warm_samples_per_s"] > 0 and textbook["warm_samples_per_s"] is None
    assert 0 < ours["mfu"] < 1 and ours["peak_mib"] > 100
    assert all(value >= 0 for value in result["parts_ms"].values()) and result["parts_ms"]["backward"] > 0


def test_page_and_plot(result: dict[str, Any], tmp_path: Path) -> None:
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
    assert "| tuned, bf16 |" in text and "GPU idle" not in text
    train_report.plot(report, tmp_path / "plot.svg")
    assert "backward" in (tmp_path / "plot.svg").read_text()


def test_an_arm_beyond_its_tolerance_is_seen() -> None:
    from benchmarks.train_agreement import Found, _compare

    truth = Found("fp32", [1.0, 2.0], [3.0, 3.0])
    good = Found("bf16", [1.01, 2.0], [3.0, 3.0])
    bad = Found("fp32", [1.0, 2.0], [3.0, 3.001])
    assert _compare(truth, {"good": good})["agrees"]
    compared = _compare(truth, {"good": good, "bad": bad})
    assert not compared["agrees"] and compared["compared"][1]["loss"] == 0


def page_of(*results: dict[str, Any], device: str = "cpu", **more: Any) -> str:
    facts = {"command": "it", "commit": "abc", "versions": {"torch": "2"}}
    about = {"name": "a processor", "type": device, "threads": 1}
    return train_report.markdown({**facts, "device": about, "results": list(results), **more})


FAKE = {"epochs": [{"seconds": 1.0, "rows": 64, "tokens": 640}], "store_seconds": 0.0, "peak_mib": 1.0}


def test_an_arm_that_fails_or_no_longer_fits_leaves_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(train_step.SIZES, "tiny", TINY)
    ran: list[str] = []

    def run_arm(arm: str, job: dict[str, Any]) -> dict[str, Any]:
        ran.append(arm)
        if arm == "tuned":
            raise RuntimeError("a long story\nout of memory")
        if arm == "tuned_reusing":
            monkeypatch.setattr(train_step.time, "monotonic", lambda: 1e9)
        return FAKE

    monkeypatch.setattr(train_step, "run_arm", run_arm)
    arms: list[list[str]] = []
    options = argparse.Namespace(**{**vars(OPTIONS), "compiled_rounds": None})
    found = train_step.measure("tiny", options, 5e8, lambda result: arms.append(list(result["arms"])))
    assert ran == ["mixkd_fast", "textbook", "tuned", "tuned_reusing"]
    assert found["failures"] == {"tuned": "RuntimeError: a long story\nout of memory"}
    assert found["not_run"] == ["tuned_compiled", "agreement", "profile"]
    assert arms[0] == ["mixkd_fast"] and sorted(arms[-1]) == ["mixkd_fast", "textbook", "tuned_reusing"]
    text = page_of(found, tested="3 failed", not_run=["minilm"])
    assert "- tuned FAILED: out of memory" in text and "no time was left: tuned_compiled" in text
    assert "Tests of the ops before: 3 failed." in text and "Not begun, no time was left: minilm." in text
    assert "1.00 x tuned_reusing, MISSED" in text and "were not compared" in text
    train_report.plot({"results": [found]}, tmp_path / "plot.svg")
    assert len(train_step.lacking_parts(found)) == 4


def test_a_round_that_fails_leaves_the_other_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, where the share of the time in which it is idle is measured arm by arm."""
    monkeypatch.setitem(train_step.SIZES, "tiny", TINY)
    monkeypatch.setattr(train_step, "peak_flops", lambda device, threads: 1e12)
    ran: list[str] = []

    def run_arm(arm: str, job: dict[str, Any], more: dict[str, str] | None = None) -> dict[str, Any]:
        ran.append(arm)
        if (arm, ran.count(arm)) in {("textbook", 1), ("tuned", 3), ("agreement", 1)} or failing == arm:
            raise RuntimeError("it broke")
        if "profile" in job:
            return {"parts_ms": {"backward": 3.0}, "idle_share": 0.25}
        if arm == "agreement":
            return {"agrees": True, "batches": 1, "compared": []}
        seconds = 1.0 if arm == "mixkd_fast" else 2.0 * ran.count(arm)
        return {**FAKE, "epochs": [{"seconds": seconds, "rows": 64, "tokens": 640}]}

    monkeypatch.setattr(train_step, "run_arm", run_arm)
    options = argparse.Namespace(**{**vars(OPTIONS), "device": "cuda", "rounds": 2, "compiled_rounds": 1})
    failing = ""
    found = train_step.measure("tiny", options)
    assert ran[0] == "agreement" and ran.count("tuned_compiled") == 2 and "tuned_reusing" not in ran
    assert set(found["failures"]) == {"agreement", "textbook (round 1)", "GPU idle in tuned"}
    assert found["arms"]["textbook"]["mixkd_fast_is"]["rounds"] == [4.0]
    assert found["arms"]["tuned"]["mixkd_fast_is"]["rounds"] == [2.0, 4.0]
    assert found["arms"]["mixkd_fast"]["idle_share"] == 0.25 and "idle_share" not in found["arms"]["tuned"]
    text = page_of(json.loads(json.dumps(found)), device="cuda")
    assert "- textbook (round 1) FAILED: RuntimeError: it broke" in text and "GPU idle" in text and "| 25 % |" in text
    failing = "mixkd_fast"
    found = train_step.measure("tiny", options)
    assert "mixkd_fast" not in found["arms"] and "mixkd_fast_is" not in found["arms"]["tuned"]
    assert {"mixkd_fast (round 1)", "mixkd_fast (round 2)", "profile"} <= set(found["failures"])
    text = page_of(found, device="cuda")
    assert "- at least 1.6 x tuned: not measured" in text and "looked at part by part" in text


def run(seconds: list[float], store_seconds: float = 0.0) -> dict[str, Any]:
    return {"epochs": [{"seconds": s, "rows": 10, "tokens": 100} for s in seconds], "store_seconds": store_seconds}


def test_ratios_are_of_the_same_round() -> None:
    """The machine is twice as slow in round 1, where tuned_compiled did not run."""
    ours = {0: run([1.0, 1.0]), 1: run([2.0, 2.0]), 2: run([1.0, 1.0])}
    tuned = {0: run([2.0, 2.0]), 1: run([4.0, 4.0]), 2: run([3.0, 3.0])}
    found = times_faster(ours, tuned)
    assert found["rounds"] == [2.0, 2.0, 3.0] and found["median"] == 2.0
    assert found["of_means"] == pytest.approx((10 + 5 + 10) / (5 + 2.5 + 10 / 3))
    del tuned[1]
    assert times_faster(ours, tuned)["rounds"] == [2.0, 3.0]


def test_the_fastest_tuned_arm_is_the_one_to_beat() -> None:
    def arm(rounds: list[float]) -> dict[str, Any]:
        return {"mixkd_fast_is": {"rounds": rounds, "median": float(np.median(rounds)), "of_means": 9.0}}

    arms = {"textbook": arm([6.0]), "tuned": arm([1.3, 1.5, 1.6]), "tuned_compiled": arm([1.4, 1.3]), "mixkd_fast": {}}
    lines = train_report._bars({"arms": arms, "model": "tiny"}, "cpu")
    assert lines == [
        "- at least 5 x textbook: 6.00 x textbook, met",
        "- at least 1.4 x tuned: 1.35 x tuned_compiled, MISSED",
    ]


def test_cold_counts_the_store() -> None:
    assert cold_rate(run([2.0, 4.0, 1.0], 3.0)) == 2.0 and warm_rate(run([2.0, 4.0, 1.0], 3.0)) == 4.0
    assert warm_rate(run([2.0])) is None


def test_flops_count_only_what_an_arm_computes(job: dict[str, Any]) -> None:
    textbook, tuned, ours = (flops_per_row(arm, job) for arm in ("textbook", "tuned", "mixkd_fast"))
    # Mixed rows of random pairs are longer; ours leaves out most of the last layer and one of two teacher passes.
    assert ours < 0.8 * tuned < 0.8 * textbook


def test_batches_made_by_workers_are_those_made_in_the_step(job: dict[str, Any]) -> None:
    rows = train_arms.load_rows(job)
    plain, loaded = (train_arms.Loop(job | {"workers": workers}, "tuned") for workers in (0, 1))
    assert plain.loader is None and loaded.loader is not None
    for _ in range(2):
        pairs = list(zip(plain._batches(endless=False), loaded._batches(endless=False), strict=True))
        assert len(pairs) == 6
        for one, two in pairs:
            assert all(torch.equal(one[i], two[i]) for i in range(4))
            assert sorted(two.partner.tolist()) == list(range(16)) and two.lam.shape == (16,)
            assert two.ids.shape[1] == train_arms.own_width(rows, two.row_ids.numpy()) and two.ids.shape[1] % 8 == 0
    count, tokens = loaded._steps(8)
    assert count == 128 and 128 * rows.lengths.min() <= tokens <= 128 * rows.lengths.max()
    textbook = train_arms.Loop(job | {"workers": 1}, "textbook")
    assert textbook.loader is None and next(textbook._batches(endless=False)).ids.shape == (16, 128)


def event(name: str, start: float, end: float, gpu: bool = False, annotation: bool = False) -> SimpleNamespace:
    kind = torch.autograd.DeviceType.CUDA if gpu else torch.autograd.DeviceType.CPU
    span = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, time_range=span, device_type=kind, is_user_annotation=annotation)


def steps(count: int) -> list[SimpleNamespace]:
    """A step every 100 microseconds: 50 forward (20 of the teacher), 30 backward, 10 optimizer."""
    found = []
    for number in range(count):
        for name, start, end in [("forward", 0, 50), ("teacher", 5, 25), ("backward", 50, 80), ("optimizer", 80, 90)]:
            span = (100.0 * number + start, 100.0 * number + end)
            found.append(event(f"mixkd_fast::{name}", *span, annotation=True))
            # The same span as the GPU saw it: longer, and no work.
            found.append(event(f"mixkd_fast::{name}", span[0], span[1] + 45, gpu=True, annotation=True))
    return found


def test_parts_are_the_hosts_spans() -> None:
    parts = parts_of_a_step(steps(6), 4)
    assert parts == pytest.approx(
        {"teacher": 0.02, "student forward and losses": 0.03, "backward": 0.03, "clipping and AdamW": 0.01,
         "everything else": 0.01}
    )  # fmt: skip


def test_the_gpu_is_idle_only_within_the_steps_that_are_looked_at() -> None:
    """Two whole steps, from 100 to 300; before them a warm-up, after them an evaluation and a long pause."""
    kernels = [(0, 90), (90, 120), (110, 115), (130, 170), (160, 200), (250, 260), (290, 320), (330, 380), (900, 950)]
    events = steps(4) + [event("kernel", *span, gpu=True) for span in kernels]
    busy = (120 - 100) + (200 - 130) + (260 - 250) + (300 - 290)
    assert idle_share(events, "mixkd_fast::forward", 2) == pytest.approx(1 - busy / 200)
    assert idle_share(steps(4), "mixkd_fast::forward", 2) == 1.0, "spans are no work"
    with pytest.raises(ValueError, match="4 steps were profiled; at least 5 are needed"):
        idle_share(events, "mixkd_fast::forward", 4)


def test_the_profile_has_no_evaluation_among_its_steps(job: dict[str, Any], tmp_path: Path) -> None:
    from mixkd_fast.configuration import Config, batch_arithmetic, validate
    from mixkd_fast.schedule import is_checkpoint_step, is_evaluation_step, stream_of, total_steps

    training = validate(Config, train_arms.fields(job | {"profile": 12}, tmp_path)).training
    lengths = train_arms.load_rows(job).lengths
    stream = stream_of(training, lengths, batch_arithmetic(training, 1), None, 8)
    total = total_steps(training, stream)
    evaluated = [done for done in range(1, total + 1) if is_evaluation_step(training, done, total, stream)]
    saved = [done for done in range(1, total + 1) if is_checkpoint_step(training, done, total, done in evaluated)]
    assert evaluated == saved == [12]
    assert stream.epoch(12) > 1.05, "a second epoch, or no logits would be kept"
