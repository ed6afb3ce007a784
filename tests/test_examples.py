"""The examples run, and what they train learns."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_plain_pytorch_loop_learns() -> None:
    losses = load("plain_pytorch").main(steps=60)
    assert len(losses) == 60
    assert mean(losses[-10:]) < 0.85 * mean(losses[:10])


def test_trainer_subclass_learns() -> None:
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    losses = load("hf_trainer").main(steps=30)
    assert len(losses) == 30
    assert mean(losses[-5:]) < 0.85 * mean(losses[:5])


def test_trainer_subclass_takes_the_mean_over_the_accumulated_batch() -> None:
    """2 micro-batches of 8 rows train as one batch of 16 does."""
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    example = load("hf_trainer")
    accumulated = example.main(steps=8, micro_batch_size=8, accumulation_steps=2)
    at_once = example.main(steps=8, micro_batch_size=16, accumulation_steps=1)
    assert accumulated == pytest.approx(at_once, rel=1e-4)
