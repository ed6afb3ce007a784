"""Which rows learn from the teacher: scores are autograd's own gradients, and several ranks choose as one does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from numpy.typing import NDArray
from tiny_models import FAMILIES, tiny_encoder
from torch import Tensor
from toy import losses, must_run_ranks, toy_config, toy_rows, toy_tokenizer

from mixkd_fast import distill
from mixkd_fast.data.batching import Batch, EvaluationBatches, Padding
from mixkd_fast.data.tokenization import TokenRows, tokenize_rows
from mixkd_fast.encoder import Encoder
from mixkd_fast.errors import ModelError
from mixkd_fast.frozen_teacher import FrozenTeacher
from mixkd_fast.methods import Setting
from mixkd_fast.methods.row_selection import best_rows, classifier_inputs, gradient_dots


def _rows() -> TokenRows:
    texts = toy_rows(20)["sentence"]
    table = Dataset.from_dict({"text": texts, "label": [n % 3 for n in range(20)], "row": list(range(20))})
    return tokenize_rows(table, toy_tokenizer(), 32, None)


def _collect(rows: TokenRows, ranks: int) -> Callable[[Callable[[Batch], Tensor]], NDArray[np.float32]]:
    """A pass over all rows as so many ranks share it, one after the other, idle batches included."""

    def collect(forward: Callable[[Batch], Tensor]) -> NDArray[np.float32]:
        found: dict[int, list[float]] = {}
        for rank in range(ranks):
            for batch in EvaluationBatches(rows, 7, rank, ranks, Padding(0)):
                found.update(zip(batch.row_ids.tolist(), forward(batch).tolist(), strict=True))
        found.pop(-1, None)
        return np.array([found[row] for row in range(len(rows))], dtype=np.float32)

    return collect


def _setting(student: Encoder, teacher: Encoder, ranks: int = 1) -> Setting:
    def unused(*_: Any) -> Any:
        raise AssertionError("the scores need no further model")

    rows = _rows()
    return Setting(
        student=student,
        teacher=FrozenTeacher(teacher, lambda: ""),
        rows=rows,
        num_labels=3,
        kind="classification",
        tokenizer=toy_tokenizer(),
        seed=0,
        device=torch.device("cpu"),
        collect=_collect(rows, ranks),
        load_teacher=unused,
        load_masked_lm=unused,
        load_texts=unused,
        new_student=unused,
        share=unused,
    )


def _target(batch: Batch, logits: Tensor) -> Tensor:
    return (logits / 2).softmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_dot_products_of_autograds_own_gradients(family: str) -> None:
    student, teacher = (tiny_encoder(family, seed=seed, pad_token_id=0) for seed in (1, 2))
    student.train()

    scores = gradient_dots(_setting(student, teacher), 2.0, _target)
    assert student.training
    student.eval()
    with classifier_inputs(student.model, 3) as inputs:
        layer = inputs.layer
    assert not layer._forward_hooks, "nothing stays behind"
    parameters = [layer.weight, layer.bias]
    labels, distilled = torch.zeros(0), {}
    for batch in EvaluationBatches(_rows(), 1, 0, 1, Padding(0)):
        logits = student.clean(batch).logits
        ce = torch.autograd.grad(F.cross_entropy(logits, batch.labels), parameters, retain_graph=True)
        kl = 4 * F.kl_div(F.log_softmax(logits / 2, -1), _target(batch, teacher.clean(batch).logits), reduction="sum")
        own = torch.autograd.grad(kl, parameters)
        distilled[int(batch.row_ids[0])] = torch.cat([gradient.flatten() for gradient in own])
        gradient = torch.cat([part.flatten() for part in ce])
        labels = gradient if labels.numel() == 0 else labels + gradient
    expected = [float(distilled[row] @ labels) / 20 for row in range(20)]
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-4)
    assert np.ptp(scores) > 0.1


def test_idle_ranks_add_nothing() -> None:
    """Three batches over two ranks: one of them fills up with a row that counts nowhere."""
    student, teacher = (tiny_encoder("bert", seed=seed, pad_token_id=0) for seed in (1, 2))
    alone, shared = (gradient_dots(_setting(student, teacher, ranks), 2.0, _target) for ranks in (1, 2))
    np.testing.assert_allclose(shared, alone, rtol=1e-5, atol=1e-6)


def test_best_rows_are_the_highest_and_the_earliest() -> None:
    scores = np.array([0.5, 2.0, -1.0, 2.0, 0.5, 0.5], dtype=np.float32)
    assert best_rows(scores, 0.5)[:, 0].tolist() == [1, 1, 0, 1, 0, 0]
    assert best_rows(scores, 0.01).sum() == 1 and best_rows(scores, 1.0).sum() == 6


def test_models_without_a_last_linear_layer_are_named() -> None:
    none = pytest.raises(ModelError, match=r"method.select_share: Linear has no linear layer with 3 outputs")
    with none, classifier_inputs(torch.nn.Linear(4, 2), 3):
        pass
    model = torch.nn.Linear(4, 3)
    with classifier_inputs(model, 3) as inputs, pytest.raises(ModelError, match="not what its last linear layer gives"):
        inputs.of(2 * model(torch.randn(2, 4)))


def test_two_ranks_choose_and_train_as_one(tmp_path: Path) -> None:
    method = {"name": "label_revision", "select_share": 0.4}
    config = toy_config(tmp_path, method=method, training={"steps": 4, "evaluate_every": 4})
    distill(**config, progress=False)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    must_run_ranks(2, "--config", str(path), "--set", f"output.directory={tmp_path / 'two'}")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "run"), rel=1e-4)
