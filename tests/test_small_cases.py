"""Every path of every kernel once, on small tensors against fp64 on the CPU: what compute-sanitizer runs on a GPU.

Nothing is compiled by torch and nothing runs in other processes. Without a GPU the CPU's kernels take the same cases.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import gradient_of, make_logits, relative_error, setting_id
from linear_cases import LEAVES, gradients_of, make_heads
from linear_cases import in_double as heads_in_double
from relation_cases import grad_output_of, loss_and_gradients, make_relation
from relation_cases import in_double as relation_in_double
from test_mix_embeddings import PARTS, in_double, make_batch, outputs_and_gradients, true_embeddings
from torch import Tensor, nn

from mixkd_fast.losses import TopK, kd_loss, linear_kd_loss, relation_kl
from mixkd_fast.mix import mix_embeddings
from mixkd_fast.ops import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
JSD, ADAPTIVE = {"divergence": "jsd", "beta": 0.1}, {"divergence": "adaptive_kl"}
ALPHA_BETA = {"divergence": "alpha_beta", "ab_alpha": 0.2, "ab_beta": 0.7}
# Narrow with 1, 8 and 32 lanes; one block per row; clusters of blocks, or rows split over blocks, aligned and not.
KD_CASES: list[tuple[tuple[int, int], torch.dtype, dict[str, Any]]] = [
    ((70, 3), F32, {}),
    ((9, 17), BF16, JSD),
    ((5, 600), F16, ADAPTIVE),
    ((3, 1025), F32, ALPHA_BETA),
    ((3, 4096), BF16, {}),
    ((3, 5003), F16, ADAPTIVE),
    ((2, 40001), BF16, JSD),
    ((2, 65536), F32, {}),
]
PIECES = [{}, {"max_logits_mib": 0.02}, {"logit_free": True, "max_logits_mib": 0.05}]


def backends_of(op: str) -> list[Any]:
    """This device's kernels, each skipped with its reason where it is missing."""
    rows = {row.backend: row.reason for row in backends.available(op)}
    names = [name for name in backends.preferred(DEVICE) if name != "reference" and name in rows]
    if op == "relation_kl":
        names = [name for name in names if name != "cuda"]  # GPUs have Triton's kernels alone
    return [pytest.param(name, marks=pytest.mark.skipif(bool(rows[name]), reason=rows[name])) for name in names]


def moved(value: Any) -> Any:
    """On the device; leaves stay leaves."""
    if isinstance(value, Tensor):
        return value.detach().to(DEVICE).requires_grad_(value.requires_grad)
    return value.to(DEVICE) if isinstance(value, nn.Module) else value


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert relative_error(actual.detach().cpu().double(), expected.detach()) <= TOLERANCE[dtype]


def hard_options(rows: int, classes: int) -> dict[str, Tensor]:
    """Labels with an ignored row, partner labels, lam, weights with a 0."""
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randint(classes, (rows,), generator=generator) for _ in range(2))
    weights = torch.linspace(0.5, 1.5, rows)
    if rows > 2:
        first[1], weights[2] = -100, 0.0
    return {
        "labels": first,
        "partner_labels": second,
        "lam": torch.rand(rows, generator=generator),
        "row_weights": weights,
    }


def check_kd(student: Tensor, teacher: Any, backend: str, **options: Any) -> None:
    """Loss and gradient for a grad_output that is not 1."""

    def loss_and_gradient(name: str, logits: Tensor, other: Any, move: Callable[[Any], Any]) -> tuple[Tensor, Tensor]:
        given = {key: move(value) for key, value in options.items()}
        loss = kd_loss(logits, other, backend=name, ce_weight=0.5, **given)
        return loss.detach(), gradient_of(loss, logits, torch.full_like(loss, -2.5))

    wide = teacher._replace(logprobs=teacher.logprobs.double()) if isinstance(teacher, TopK) else teacher.double()
    here = TopK(*map(moved, teacher)) if isinstance(teacher, TopK) else moved(teacher)
    exact = loss_and_gradient("reference", student.detach().double().requires_grad_(), wide, lambda value: value)
    found = loss_and_gradient(backend, moved(student), here, moved)
    assert_near(found[0], exact[0], F32)
    assert_near(found[1], exact[1], student.dtype)


@pytest.mark.parametrize("backend", backends_of("kd_loss"))
@pytest.mark.parametrize(
    ("shape", "dtype", "setting"), KD_CASES, ids=lambda v: setting_id(v) if isinstance(v, dict) else str(v)
)
def test_kd_loss(shape: tuple[int, int], dtype: torch.dtype, setting: dict[str, Any], backend: str) -> None:
    student, teacher = make_logits(shape, 2.0, 0, dtype)
    check_kd(student, teacher, backend, **hard_options(*shape), **setting)


@pytest.mark.parametrize("backend", backends_of("kd_loss"))
@pytest.mark.parametrize(("classes", "kept"), [(300, 20), (40001, 64)])
def test_top_k(classes: int, kept: int, backend: str) -> None:
    student, teacher = make_logits((4, classes), 2.0, 2, F32)
    check_kd(student, TopK.from_logits(teacher, kept), backend, **hard_options(4, classes))


@pytest.mark.parametrize("backend", backends_of("linear_kd_loss"))
@pytest.mark.parametrize("pieces", PIECES, ids=str)
def test_linear_kd_loss(pieces: dict[str, Any], backend: str) -> None:
    arguments = make_heads((40,), 300, 290, (16, 24))
    here = {name: moved(value) for name, value in arguments.items()}
    found = gradients_of(linear_kd_loss(**here, **pieces, ce_weight=0.5, backend=backend), here)
    wide = heads_in_double(arguments)
    exact = gradients_of(linear_kd_loss(**wide, ce_weight=0.5, backend="reference"), wide)
    assert set(found) == set(exact) == set(LEAVES)
    for name, gradient in found.items():
        assert_near(gradient, exact[name], F32)


def part_id(value: set[str] | torch.dtype) -> str:
    """The same in every process: the order of a set is not."""
    return "+".join(sorted(value)) if isinstance(value, set | frozenset) else str(value)


@pytest.mark.parametrize("backend", backends_of("mix_embeddings"))
@pytest.mark.parametrize(("parts", "dtype"), [(PARTS[1], F32), (PARTS[-1], BF16), (PARTS[-1], F16)], ids=part_id)
def test_mix_embeddings(parts: set[str], dtype: torch.dtype, backend: str) -> None:
    arguments = make_batch(parts, dtype, 6, 6, 5, 65)
    exact = in_double(arguments)
    truth = true_embeddings(exact)
    grad_output = torch.linspace(-2, 2, truth.numel()).view(truth.shape).to(dtype)
    here = {name: moved(value) for name, value in arguments.items()}
    found = outputs_and_gradients(here, mix_embeddings(**here, backend=backend), moved(grad_output))
    for name, value in outputs_and_gradients(exact, truth, grad_output.double()).items():
        assert_near(found[name], value, dtype)


@pytest.mark.parametrize("backend", backends_of("relation_kl"))
@pytest.mark.parametrize(("dtype", "length", "width"), [(F32, 17, 33), (BF16, 70, 32), (F16, 130, 8)])
def test_relation_kl(dtype: torch.dtype, length: int, width: int, backend: str) -> None:
    arguments = make_relation(dtype, 2, 2, length, width)
    here, wide = {name: moved(value) for name, value in arguments.items()}, relation_in_double(arguments)
    found = loss_and_gradients(relation_kl(**here, backend=backend), here, grad_output_of(2))
    exact = loss_and_gradients(relation_kl(**wide, backend="reference"), wide, grad_output_of(2))
    for name, value in exact.items():
        assert_near(found[name], value, dtype)
