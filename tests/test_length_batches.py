"""Batches of near-equal length: the compiled and the numpy planner make the same plan, and it keeps its promises."""

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mixkd_fast.data import length_batches
from mixkd_fast.data.length_batches import BatchPlan, plan_batches

ROOT = Path(__file__).parents[1]
MODULE = "mixkd_fast._host"


@pytest.fixture(scope="module", autouse=True)
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The compiled planner: the installed one, or one built here."""
    if length_batches.why_not_compiled():
        build(tmp_path_factory)
        length_batches._host.cache_clear()
    yield


def build(tmp_path_factory: pytest.TempPathFactory) -> None:
    pybind11 = pytest.importorskip("pybind11", reason="mixkd_fast._host is not built and pybind11 is not installed")
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("mixkd_fast._host is not built and there is no C++ compiler")
    library = tmp_path_factory.mktemp("host") / f"_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = ["-I", pybind11.get_include(), "-I", sysconfig.get_paths()["include"]]
    source = ROOT / "csrc" / "host" / "batching.cpp"
    flags = ["-O2", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden"]
    subprocess.run([compiler, *flags, *includes, str(source), "-o", str(library)], check=True)
    spec = importlib.util.spec_from_file_location(MODULE, library)
    assert spec is not None and spec.loader is not None
    sys.modules[MODULE] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[MODULE])


def text_lengths(num_rows: int, seed: int = 0) -> NDArray[np.int32]:
    """Like the lengths of sentences."""
    lengths = np.random.default_rng(seed).lognormal(3.3, 0.6, num_rows)
    return np.clip(lengths, 1, 512).astype(np.int32)


def widths(lengths: NDArray[np.int32], plan: BatchPlan) -> NDArray[np.int64]:
    """Longest row of each batch."""
    return np.maximum.reduceat(lengths[plan.order], plan.offsets[:-1]).astype(np.int64)


def both(lengths: Any, **options: Any) -> BatchPlan:
    """The plan, after a check that both planners agree on it."""
    plan, again = (plan_batches(lengths, planner=name, **options) for name in ("host", "numpy"))
    assert plan.order.dtype == again.order.dtype == plan.offsets.dtype == again.offsets.dtype == np.int64
    assert np.array_equal(plan.order, again.order) and np.array_equal(plan.offsets, again.offsets)
    return plan


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_promises(data: st.DataObject) -> None:
    lengths = np.array(data.draw(st.lists(st.integers(1, 60), max_size=80)), dtype=np.int64)
    limits = data.draw(st.sampled_from([(64, None), (None, 5), (96, 4), (200, None), (None, 1)]))
    group_size, drop_last = data.draw(st.integers(1, 5)), data.draw(st.booleans())
    options: dict[str, Any] = {
        "tokens_per_batch": limits[0],
        "rows_per_batch": limits[1],
        "window": data.draw(st.sampled_from([1, 7, 16, 1000])),
        "pad_multiple": data.draw(st.sampled_from([1, 8])),
        "group_size": group_size,
        "drop_last": drop_last,
        "seed": data.draw(st.integers(0, 2**64 - 1)),
        "epoch": data.draw(st.integers(0, 3)),
    }
    plan = both(lengths, **options)
    assert plan.offsets[0] == 0 and plan.offsets[-1] == len(plan.order) and (np.diff(plan.offsets) >= 1).all()
    assert len(set(plan.order.tolist())) == len(plan.order)
    if not drop_last:
        assert sorted(plan.order.tolist()) == list(range(len(lengths)))
    elif limits[0] is not None:
        assert len(lengths) - len(plan.order) < group_size and plan.num_batches % group_size == 0
    incomplete = plan.num_batches % group_size
    assert not incomplete or (
        not drop_last and all(len(plan.rows(plan.num_batches - 1 - i)) == 1 for i in range(incomplete))
    )
    for batch in range(plan.num_batches):
        rows = plan.rows(batch)
        width = -(-int(lengths[rows].max()) // options["pad_multiple"]) * options["pad_multiple"]
        assert limits[0] is None or len(rows) * width <= limits[0]
        assert limits[1] is None or len(rows) <= limits[1]
    start = data.draw(st.integers(0, plan.num_batches))
    rest = both(lengths, start_batch=start, **options)
    assert np.array_equal(rest.order, plan.order[plan.offsets[start] :])
    assert np.array_equal(rest.offsets, plan.offsets[start:] - plan.offsets[start])


def test_the_plan_is_the_same_everywhere() -> None:
    """Fixed numbers: another platform, compiler or release must find them again, or a resumed run would go astray."""
    plan = both([3, 9, 4, 1, 5, 12, 2, 6, 8, 7], rows_per_batch=3, window=5, seed=1, epoch=2)
    assert plan.order.tolist() == [7, 9, 1, 3, 6, 8, 5, 0, 2, 4]
    assert plan.offsets.tolist() == [0, 3, 6, 7, 10]
    plan = both([3, 9, 4, 1, 5, 12, 2, 6, 8, 7, 7, 11], tokens_per_batch=24, group_size=2, seed=1, epoch=2)
    assert plan.order.tolist() == [5, 9, 10, 8, 3, 6, 0, 1, 2, 4, 7, 11]
    assert plan.offsets.tolist() == [0, 1, 4, 7, 8, 11, 12]


def test_epochs_and_seeds_differ() -> None:
    lengths = text_lengths(500)
    plans = [
        plan_batches(lengths, rows_per_batch=8, seed=seed, epoch=epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0)]
    ]
    first, *others = ({frozenset(plan.rows(batch).tolist()) for batch in range(plan.num_batches)} for plan in plans)
    assert all(len(first & other) < len(first) / 4 for other in others)


def test_batches_come_in_any_order_of_length() -> None:
    lengths = text_lengths(20000)
    plan = both(lengths, rows_per_batch=32, seed=4)
    position = np.arange(plan.num_batches)
    assert abs(np.corrcoef(position, widths(lengths, plan))[0, 1]) < 0.15


def test_less_padding_than_random_batches() -> None:
    lengths = text_lengths(20000)
    plan = both(lengths, rows_per_batch=32, seed=5)
    shuffled = np.random.default_rng(0).permutation(lengths).reshape(-1, 32)
    random_tokens = int(shuffled.max(1).sum()) * 32
    planned_tokens = int((widths(lengths, plan) * np.diff(plan.offsets)).sum())
    assert planned_tokens < 1.1 * lengths.sum() < random_tokens / 2


def test_a_step_gives_every_rank_like_work() -> None:
    lengths = text_lengths(40000)
    for limits in ({"rows_per_batch": 16}, {"tokens_per_batch": 2048}):
        plan = both(lengths, group_size=8, drop_last=True, seed=6, **limits)
        tokens = (widths(lengths, plan) * np.diff(plan.offsets)).reshape(-1, 8)
        assert np.median(tokens.max(1) / tokens.mean(1)) < 1.1
        # No rank has the longest batch of every step.
        longest = tokens == tokens.max(1, keepdims=True)
        assert (longest / longest.sum(1, keepdims=True)).mean(0).max() < 0.25


def test_a_small_group_is_made_whole() -> None:
    plan = both([5] * 21, rows_per_batch=8, group_size=4, seed=0)
    assert sorted(np.diff(plan.offsets).tolist()) == [4, 4, 5, 8]
    assert both([5] * 3, rows_per_batch=8, group_size=4, seed=0).num_batches == 3
    assert both([5] * 3, rows_per_batch=8, group_size=4, seed=0, drop_last=True).num_batches == 0
    assert both([], rows_per_batch=8, seed=0).num_batches == 0


def test_a_million_rows() -> None:
    """Under a second on a quiet machine; three are allowed for a busy one."""
    lengths = text_lengths(1_000_000)
    seconds = []
    for epoch in range(2):
        start = time.perf_counter()
        plan = plan_batches(lengths, tokens_per_batch=8192, group_size=8, seed=7, epoch=epoch, planner="host")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 3.0
    assert np.array_equal(np.bincount(plan.order), np.ones(len(lengths), dtype=np.int64))


@pytest.mark.parametrize(
    "lengths, options, message",
    [
        ([1, 2], {}, "tokens_per_batch and rows_per_batch are None"),
        ([1, 0], {"rows_per_batch": 2}, r"lengths\[1\] is 0; allowed: 1 to"),
        ([1.5], {"rows_per_batch": 2}, "lengths is float64 of shape"),
        ([[1]], {"rows_per_batch": 2}, r"of shape \(1, 1\); allowed: integers"),
        ([3, 30], {"tokens_per_batch": 31}, "tokens_per_batch is 31; allowed: at least 32, the padded length of row 1"),
        ([1], {"rows_per_batch": 0}, "rows_per_batch is 0; allowed: None or 1 to"),
        ([1], {"rows_per_batch": True}, "rows_per_batch is True"),
        ([1], {"rows_per_batch": 1, "window": 0}, "window is 0; allowed: 1 to"),
        ([1], {"rows_per_batch": 1, "group_size": 0}, "group_size is 0"),
        ([1], {"rows_per_batch": 1, "pad_multiple": 0}, "pad_multiple is 0"),
        ([1], {"rows_per_batch": 1, "epoch": -1}, "epoch is -1"),
        ([1], {"rows_per_batch": 1, "start_batch": 2}, "start_batch is 2; allowed: 0 to 1"),
        ([1], {"rows_per_batch": 1, "planner": "gpu"}, "planner is 'gpu'; allowed: auto, host, numpy"),
    ],
)
def test_what_is_refused(lengths: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_batches(lengths, seed=0, **options)


def test_batch_numbers_and_a_missing_module(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_batches([4, 5], rows_per_batch=1, seed=0)
    with pytest.raises(ValueError, match="batch is 2; allowed: 0 to 1"):
        plan.rows(2)
    monkeypatch.setattr(length_batches, "_host", lambda: (None, "mixkd_fast._host cannot be loaded: no such file"))
    with pytest.raises(RuntimeError, match=r"planner 'host' is not available: .*no such file"):
        plan_batches([4], rows_per_batch=1, seed=0, planner="host")
    assert np.array_equal(plan_batches([4, 5], rows_per_batch=1, seed=0).order, plan.order)
