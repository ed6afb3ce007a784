"""PKT: kernels and their divergence against the equations, the schedule of the layers, and a run in which it falls."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layer_runs import WIDER, falls, layer_batch, layer_models, own_teacher, toy_run, widened
from torch import Tensor

from mixkd_fast.methods import PKT, Moment
from mixkd_fast.methods.pkt import kernel_divergence

MOMENT = Moment(0, 10, 0.0)


def _transfer(method: PKT, student: Any, teacher: Any, batch: Any, epoch: float = 0.0) -> Tensor:
    return method.terms(batch, student, teacher, None, Moment(0, 10, epoch))["pkt"]


def _written_out(student: Any, teacher: Any, kernel: str) -> list[float]:
    """Row by row and pair by pair."""

    def similarity(a: Any, b: Any) -> float:
        if kernel == "cosine":
            return float((a @ b / np.linalg.norm(a) / np.linalg.norm(b) + 1) / 2)
        return float(1 / (1 + np.sqrt(((a - b) ** 2).sum())))

    result = []
    for i in range(len(student)):
        p = [similarity(teacher[i], other) for other in teacher]
        q = [similarity(student[i], other) for other in student]
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        kl = sum(x * np.log(x / y) for x, y in zip(p, q, strict=True))
        result.append(kl + sum(y * np.log(y / x) for x, y in zip(p, q, strict=True)))
    return result


@pytest.mark.parametrize("kernel", ["cosine", "student_t"])
def test_divergence_is_the_sum_of_both_kullback_leiblers(kernel: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, width, generator=generator, dtype=torch.float64) for width in (3, 5))
    expected = torch.tensor(_written_out(student.numpy(), teacher.numpy(), kernel), dtype=torch.float64)
    torch.testing.assert_close(kernel_divergence(student, teacher, [kernel]), expected)
    assert expected.min() > 1e-3


def test_both_kernels_are_added_and_gradients_are_right() -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(5, width, generator=generator, dtype=torch.float64) for width in (4, 3))
    both = kernel_divergence(student, teacher, ["cosine", "student_t"])
    apart = [kernel_divergence(student, teacher, [kernel]) for kernel in ("cosine", "student_t")]
    torch.testing.assert_close(both, apart[0] + apart[1])
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda rows: kernel_divergence(rows, teacher, ["cosine", "student_t"]), student)


def test_equal_and_opposite_rows_stay_finite() -> None:
    student = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]], requires_grad=True)
    value = kernel_divergence(student, torch.randn(4, 3), ["cosine", "student_t"])
    (grad,) = torch.autograd.grad(value.sum(), student)
    assert value.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("features", ["mean", "first"])
def test_layers_are_weighted_by_the_epoch(features: Any) -> None:
    batch, (student, teacher) = layer_batch(), layer_models()
    own = student.clean(batch, output_hidden_states=True).hidden_states
    theirs = teacher.clean(batch, output_hidden_states=True).hidden_states

    def pooled(hidden: Tensor) -> Any:
        if features == "first":
            return hidden[:, 0].detach().numpy()
        rows = [row[:length].mean(0) for row, length in zip(hidden, (9, 5, 7, 3), strict=True)]
        return torch.stack(rows).detach().numpy()

    parts = [
        torch.tensor(_written_out(pooled(own[a + 1]), pooled(theirs[b + 1]), kernel), dtype=torch.float64)
        for a, b in ((0, 1), (1, 3))
        for kernel in ("cosine", "student_t")
    ]
    for epoch, weight in ((0.9, 100.0), (2.5, 100 * 0.7**2)):
        expected = 3.0 * (weight * (parts[0] + parts[1]) + parts[2] + parts[3])
        value = _transfer(PKT(pkt_weight=3.0, features=features), student, teacher, batch, epoch)
        torch.testing.assert_close(value, expected)


def test_identities() -> None:
    batch, (student, teacher) = layer_batch(), layer_models(hidden_size=24, num_attention_heads=3)
    same = _transfer(PKT(layers=[0, 1]), student, own_teacher(student), batch)
    torch.testing.assert_close(same, torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)
    value = _transfer(PKT(), student, teacher, batch)
    assert value.min() > 0, "widths may differ"
    torch.testing.assert_close(_transfer(PKT(), student, teacher, widened(batch)), value)
    value.sum().backward()
    assert all(p.grad is None for p in teacher.model.parameters()), "its parameters would take a gradient"
    assert any(p.grad is not None and bool(p.grad.any()) for p in student.parameters())


def test_a_row_alone_has_no_neighbours() -> None:
    torch.testing.assert_close(
        kernel_divergence(torch.ones(1, 3), torch.randn(1, 4), ["cosine", "student_t"]), torch.zeros(1)
    )


def test_it_can_be_combined_with_mixkd() -> None:
    batch, (student, teacher) = layer_batch(), layer_models()
    terms = PKT(kd_weight=1.0, sm_weight=1.0, tmkd_weight=1.0).terms(batch, student, teacher, None, MOMENT)
    assert terms.keys() == {"mle", "kd", "sm", "tmkd", "pkt"}
    assert all(term.shape == (4,) for term in terms.values())
    assert PKT().terms(batch, student, teacher, None, MOMENT).keys() == {"mle", "pkt"}


@pytest.mark.parametrize("stage", [0, 3])
def test_the_term_falls(tmp_path: Path, stage: int) -> None:
    assert falls(toy_run(tmp_path, {"name": "pkt"}, stage=stage, student=WIDER), "pkt")
