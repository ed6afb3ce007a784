"""The statistics of the quality benchmark, against cases with known answers."""

import numpy as np
import pytest

from benchmarks.quality import METHODS, render
from benchmarks.statistics import mean_and_spread, pack, paired_bootstrap, unpack


def test_bootstrap_interval_has_the_width_of_theory() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.random((1, 4000)) < 0.8, rng.random((1, 4000)) < 0.7
    difference, lower, upper = paired_bootstrap(first, second)
    per_row = first.astype(float) - second.astype(float)
    assert difference == pytest.approx(per_row.mean())
    assert (upper - lower) / 2 == pytest.approx(1.96 * per_row.std() / np.sqrt(4000), rel=0.05)
    assert lower < difference < upper


def test_bootstrap_of_equal_arms_is_exactly_zero() -> None:
    arm = np.random.default_rng(1).random((3, 200)) < 0.5
    assert paired_bootstrap(arm, arm) == (0.0, 0.0, 0.0)


def test_bootstrap_uses_the_pairing() -> None:
    """Two arms that differ in one row of a thousand: the interval is narrow, though each arm alone is uncertain."""
    first = np.random.default_rng(2).random((1, 1000)) < 0.5
    second = first.copy()
    second[0, 0] = ~second[0, 0]
    _, lower, upper = paired_bootstrap(first, second)
    assert upper - lower < 0.005


def test_arms_of_other_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="the same rows"):
        paired_bootstrap(np.ones((1, 3), bool), np.ones((1, 4), bool))


def test_spread_and_packing() -> None:
    assert mean_and_spread([1.0, 3.0]) == (2.0, pytest.approx(np.sqrt(2)))
    assert mean_and_spread([5.0]) == (5.0, 0.0)
    correct = np.random.default_rng(3).random(277) < 0.6
    assert (unpack(pack(correct), 277) == correct).all()


def test_table_is_rendered_from_the_result_file() -> None:
    right, wrong = pack(np.ones(400, bool)), pack(np.zeros(400, bool))
    results = [
        {
            "task": "rte",
            "method": name,
            "seed": 0,
            "training_rows": 9,
            "splits": {"validation": {"rows": 400, "correct": wrong if name == "kd" else right}},
        }
        for name in ("teacher", *METHODS)
    ]
    report = {
        "results": results,
        "encoder": "e",
        "student_layers": 3,
        "precision": "fp32",
        "batch_size": 1,
        "learning_rate": 1,
        "training_seconds": 60,
        "machine": {"processor": "p", "cores": 2},
        "versions": {"mixkd_fast": "0", "torch": "0"},
        "commit": "c",
        "command": "run",
    }
    text = render(report)
    assert "| rte | validation | 9 | 1 | 100.0 | 100.0 | 0.0 | 100.0 |" in text
    assert "| mixkd - kd | +100.00 [+100.00, +100.00] | helps |" in text
    assert "| kd - finetune | -100.00 [-100.00, -100.00] | hurts |" in text
