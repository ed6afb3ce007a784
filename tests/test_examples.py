"""The examples run, and what they train learns."""

import importlib.util
import sys
from copy import deepcopy
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from mixkd_fast.losses import KDLoss, LinearKDLoss

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
    example = load("hf_trainer")
    for options in ({}, example.MIXKD):
        losses = example.main(steps=30, **options)
        assert len(losses) == 30
        assert mean(losses[-5:]) < 0.85 * mean(losses[:5])


def test_trainer_subclass_takes_the_mean_over_the_accumulated_batch() -> None:
    """2 micro-batches of 8 rows train as one batch of 16 does."""
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    example = load("hf_trainer")
    accumulated = example.main(steps=8, micro_batch_size=8, accumulation_steps=2)
    at_once = example.main(steps=8, micro_batch_size=16, accumulation_steps=1)
    assert accumulated == pytest.approx(at_once, rel=1e-4)


def test_lightning_module_learns() -> None:
    pytest.importorskip("lightning", reason="examples/lightning_module.py needs lightning")
    losses = load("lightning_module").main(epochs=8)
    assert len(losses) == 64
    assert mean(losses[-8:]) < 0.9 * mean(losses[:8])


def test_lightning_module_trains_the_student_alone() -> None:
    """A teacher with dropout gives the same logits in every step, and none of its weights moves."""
    lightning = pytest.importorskip("lightning", reason="examples/lightning_module.py needs lightning")
    example = load("lightning_module")
    student, teacher = example.classifier(8), nn.Sequential(nn.Dropout(0.5), example.classifier(8))
    student_before, teacher_before = deepcopy(student.state_dict()), deepcopy(teacher.state_dict())
    module = example.MixKD(student, teacher.train())
    rows = torch.utils.data.TensorDataset(torch.randn(16, 16), torch.randint(4, (16,)))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=8))
    assert not teacher.training
    assert all(torch.equal(teacher_before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert any(not torch.equal(student_before[name], tensor) for name, tensor in student.state_dict().items())


def load_trl_example() -> ModuleType:
    pytest.importorskip("trl", reason="examples/trl_trainer.py needs trl")
    pytest.importorskip("trl.experimental.gkd", reason="this version of trl has no trl.experimental.gkd")
    return load("trl_trainer")


def test_trl_trainer_learns_with_temperature_and_hard_labels() -> None:
    losses = load_trl_example().main(steps=30, loss=LinearKDLoss(divergence="jsd", temperature=2.0, ce_weight=0.1))
    assert len(losses) == 30
    assert mean(losses[-5:]) < 0.75 * mean(losses[:5])


def test_trl_trainer_has_the_losses_of_trl_at_temperature_1() -> None:
    """Same divergence, masks, shift and mean as GKDTrainer's own loss: the two runs cannot be told apart."""
    example = load_trl_example()
    ours = example.main(steps=5)
    theirs = example.main(steps=5, trainer_class=sys.modules["trl.experimental.gkd"].GKDTrainer)
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_trl_trainer_takes_the_mean_over_the_accumulated_batch() -> None:
    """Answers differ in length, so the mean of micro-batch means would be another number."""
    example = load_trl_example()
    loss = KDLoss(divergence="reverse_kl")
    accumulated = example.main(steps=5, micro_batch_size=4, accumulation_steps=4, loss=loss)
    at_once = example.main(steps=5, micro_batch_size=16, accumulation_steps=1, loss=loss)
    assert accumulated == pytest.approx(at_once, rel=1e-4)
