"""Shards of the training rows: every row in exactly one, none empty, skewed as the strategy says."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loading_cases import load, refused, three, write
from toy import records, toy_config

from mixkd_fast.configuration import Config, Task, validate
from mixkd_fast.data.shards import rows_of_part, shard_of_rows
from mixkd_fast.distillation import run_config
from mixkd_fast.errors import ConfigurationError
from mixkd_fast.partition import Partition, Strategy

STRATEGIES: tuple[Strategy, ...] = ("iid", "label_skew", "quantity_skew")


@settings(deadline=None, max_examples=150)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    strategy=st.sampled_from(STRATEGIES),
    alpha=st.floats(1e-3, 1e3),
    seed=st.integers(-(2**40), 2**40),
    data=st.data(),
)
def test_shards_are_a_partition(
    labels: list[int], strategy: Strategy, alpha: float, seed: int, data: st.DataObject
) -> None:
    parts = data.draw(st.integers(1, len(labels)))
    strata = np.array(labels, dtype=np.int64)
    partition = {"strategy": strategy, "parts": parts, "alpha": alpha, "seed": seed}
    shards = [rows_of_part(strata, Partition(part=part, **partition)).tolist() for part in range(parts)]
    assert sorted(row for shard in shards for row in shard) == list(range(len(labels)))
    assert all(shard and shard == sorted(shard) for shard in shards)
    again = [rows_of_part(strata.copy(), Partition(part=part, **partition)).tolist() for part in range(parts)]
    assert again == shards
    sizes = [len(shard) for shard in shards]
    if strategy == "iid":
        assert max(sizes) - min(sizes) <= 1


def _labels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 3, 3000)


def _shares(strategy: Strategy, alpha: float) -> np.ndarray:
    """[shard, label]: rows."""
    labels = _labels()
    shards = shard_of_rows(labels, strategy, 5, alpha, seed=3)
    return np.array([np.bincount(labels[shards == shard], minlength=3) for shard in range(5)])


def test_strategies_skew_what_they_say() -> None:
    """Distance between the shards' label mixtures, and between their sizes."""

    def label_distance(counts: np.ndarray) -> float:
        mixtures = counts / counts.sum(axis=1, keepdims=True)
        whole = counts.sum(axis=0) / counts.sum()
        return float(np.abs(mixtures - whole).sum(axis=1).mean() / 2)

    def size_ratio(counts: np.ndarray) -> float:
        return float(counts.sum(axis=1).max() / counts.sum(axis=1).min())

    iid, labels, sizes = (_shares(strategy, 0.3) for strategy in STRATEGIES)
    assert label_distance(iid) < 0.06 and size_ratio(iid) == 1
    assert label_distance(labels) > 0.25
    # Small shards deviate by chance alone: those with enough rows are judged.
    assert size_ratio(sizes) > 4 and label_distance(sizes[sizes.sum(axis=1) > 300]) < 0.08
    for strategy in ("label_skew", "quantity_skew"):
        even = _shares(strategy, 1e4)
        assert size_ratio(even) < 1.2 and label_distance(even) < 0.06


def test_seeds_and_parts_give_other_divisions() -> None:
    for strategy in STRATEGIES:
        divisions = {tuple(shard_of_rows(_labels(), strategy, 4, 0.5, seed).tolist()) for seed in range(4)}
        assert len(divisions) == 4


def test_loading_divides_what_the_subset_left(tmp_path: Path) -> None:
    columns = {"text": [f"t{row}" for row in range(200)], "label": [row % 2 for row in range(200)]}
    extra = write(tmp_path / "extra.jsonl", {"text": ["e0"], "label": [1]})
    subset = load(columns, train_rows=50).train["row"][:]
    rows: Counter[int] = Counter()
    for part in range(3):
        partition = Partition(strategy="label_skew", parts=3, part=part, alpha=0.4)
        splits = load(columns, train_rows=50, partition=partition, extra_train_files=[extra])
        own = splits.train["row"][: len(splits.train) - 1]
        assert splits.train["text"][:] == [*(f"t{row}" for row in own), "e0"]
        assert splits.num_extra_rows == 1 and len(splits.evaluation["validation"]) == 200
        rows.update(own)
    assert rows == Counter(subset)


def test_regressions_are_skewed_by_bins_of_their_labels() -> None:
    columns = {"text": [str(row) for row in range(300)], "label": [row / 60 for row in range(300)]}
    means = []
    for part in range(3):
        partition = Partition(strategy="label_skew", parts=3, part=part, alpha=0.1)
        means.append(np.mean(load(columns, kind="regression", partition=partition).train["label"][:]))
    assert max(means) - min(means) > 0.8


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"strategy": "iid", "parts": 3, "part": 3}, ["partition", "part is 3", "0..2"]),
        ({"strategy": "even", "parts": 3, "part": 0}, ["task.partition.strategy = 'even'", "iid"]),
        ({"strategy": "iid", "parts": 2, "part": 0, "alpha": 0.0}, ["task.partition.alpha = 0.0"]),
        ({"strategy": "iid", "part": 0}, ["task.partition.parts: is missing"]),
    ],
)
def test_mistakes_are_named(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        validate(Task, {"name": "demo", "partition": fields}, "task")
    assert all(word in str(caught.value) for word in words), caught.value


def test_more_shards_than_rows_are_refused() -> None:
    partition = Partition(strategy="iid", parts=4, part=0)
    refused(["task.partition.parts is 4", "only 3 training rows", "1..3"], three([0, 1, 1]), partition=partition)


def test_a_run_trains_on_its_shard_and_is_scored_on_everything(tmp_path: Path) -> None:
    config = toy_config(tmp_path, training={"steps": 2, "evaluate_every": 2})
    config["task"]["partition"] = {"strategy": "quantity_skew", "parts": 3, "part": 1}
    result = run_config(validate(Config, config), progress=False)
    data = result.summary["data"]
    assert data["evaluation_rows"] == {"validation": 40} and 0 < data["train_rows"] < 95
    assert len(records(tmp_path / "run")) == 2
