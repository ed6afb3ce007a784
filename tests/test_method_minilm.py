"""MiniLM-v2: the relations against their equation, their identities, and runs in which they fall."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_runs import WIDER, falls, flipped, halves, layer_batch, layer_models, own_teacher, toy_run, widened
from torch import Tensor

from mixkd_fast.errors import ConfigurationError, ModelError
from mixkd_fast.methods import MiniLM, MixKD, Moment

MOMENT = Moment(0, 10, 0.0)


def _relations(method: MiniLM, student: Any, teacher: Any, batch: Any) -> Tensor:
    return method.terms(batch, student, teacher, None, MOMENT)["relations"]


def _probabilities(values: Tensor, heads: int, tokens: Tensor) -> Tensor:
    """softmax(V V^T / sqrt(d)) among one row's n tokens: [h, L, d] -> [heads, n, n]."""
    side_by_side = values[:, tokens].permute(1, 0, 2).flatten(1)
    cut = side_by_side.unflatten(1, (heads, -1)).permute(1, 0, 2)
    return (cut @ cut.transpose(1, 2) / math.sqrt(cut.shape[-1])).softmax(-1)


@pytest.mark.parametrize("change", [lambda batch: batch, flipped], ids=["padding right", "padding left"])
@pytest.mark.parametrize(
    ("options", "layer", "heads"),
    [({}, 3, 2), ({"teacher_layer": 1}, 1, 2), ({"relation_heads": 8}, 3, 8), ({"relation_heads": 1}, 3, 1)],
)
def test_relations_are_their_equation(options: dict[str, Any], layer: int, heads: int, change: Any) -> None:
    batch, (student, teacher) = change(layer_batch()), layer_models()
    own = student.read(batch, layers=[1]).projections[1]
    theirs = teacher.read(batch, layers=[layer]).projections[layer]
    expected = []
    for row in range(4):
        tokens, total = batch.attention_mask[row].nonzero()[:, 0], torch.zeros((), dtype=torch.float64)
        for name in ("query", "key", "value"):
            q = _probabilities(getattr(own, name)[row], heads, tokens)
            p = _probabilities(getattr(theirs, name)[row], heads, tokens)
            total = total + (p * (p.log() - q.log())).sum() / heads
        expected.append(3.0 * total / 6)  # 6 = the batch's mean number of tokens
    found = _relations(MiniLM(relation_weight=3.0, **options), student, teacher, batch)
    torch.testing.assert_close(found.double(), torch.stack(expected), atol=1e-9, rtol=1e-9)


def test_the_other_terms_are_mixkds() -> None:
    batch, (student, teacher) = layer_batch(), layer_models()
    options: dict[str, Any] = {"kd_weight": 0.3, "sm_weight": 0.7, "tmkd_weight": 0.9, "temperature": 3.0}
    terms = MiniLM(**options).terms(batch, student, teacher, None, MOMENT)
    expected = MixKD(**options).terms(batch, student, teacher, None, MOMENT)
    assert terms.keys() == expected.keys() | {"relations"}
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, msg=name)
    alone = MiniLM().terms(batch, student, teacher, None, MOMENT)
    assert alone.keys() == {"mle", "relations"}
    torch.testing.assert_close(alone["relations"], terms["relations"])


def test_imitating_oneself_costs_nothing_and_the_teacher_gets_no_gradient() -> None:
    batch, (student, teacher) = layer_batch(), layer_models()
    for heads in (None, 8):
        found = _relations(MiniLM(relation_heads=heads), student, own_teacher(student), batch)
        torch.testing.assert_close(found.double(), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)
    _relations(MiniLM(), student, teacher, batch).sum().backward()
    assert all(p.grad is None for p in teacher.model.parameters())
    assert any(p.grad is not None and bool(p.grad.any()) for p in student.parameters())


def test_more_padding_and_micro_batches_change_nothing() -> None:
    batch, (student, teacher) = layer_batch(), layer_models()
    method = MiniLM(relation_heads=4)
    whole = _relations(method, student, teacher, batch)
    torch.testing.assert_close(_relations(method, student, teacher, widened(batch)), whole)
    parts = [_relations(method, student, teacher, half) for half in halves(batch)]
    torch.testing.assert_close(torch.cat(parts), whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relation_heads": 5}, r"method.relation_heads = 5: must divide the student's width 24 and the teacher's 32"),
        ({"relation_heads": 3}, r"allowed: a divisor of 8"),
        ({}, r"method.relation_heads = 3: must divide"),
        ({"relation_heads": 8, "teacher_layer": 4}, r"method.teacher_layer = 4: the model has 4 layers"),
        ({"relation_heads": 8, "teacher_layer": -5}, r"method.teacher_layer = -5.*allowed: -4 to 3"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        toy_run(tmp_path, {"name": "minilm", **options}, student=WIDER)


@pytest.mark.parametrize(
    ("stage", "options"), [(0, {}), (3, {"teacher_layer": 2}), (0, {"mle_weight": 0.0, "teacher_layer": 1})]
)
def test_the_term_falls(tmp_path: Path, stage: int, options: dict[str, Any]) -> None:
    """Also with a student of another width and number of heads."""
    method = {"name": "minilm", "relation_heads": 8, **options}
    assert falls(toy_run(tmp_path, method, stage=stage, student=WIDER, learning_rate=1e-2), "relations")


def test_relations_alone_train_no_classifier(tmp_path: Path) -> None:
    """Evaluations say nothing then, and the last weights are the student."""
    method = {"name": "minilm", "relation_heads": 8, "mle_weight": 0.0}
    toy_run(tmp_path, method, student=WIDER, evaluate_every=5)
    assert not list((tmp_path / "run").glob("best/*")), "the last step's weights are kept"
    with pytest.raises(ConfigurationError, match=r'early_stopping 2 counts evaluations.*method "minilm"'):
        toy_run(tmp_path, method, "again", student=WIDER, early_stopping=2)
