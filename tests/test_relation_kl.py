"""relation_kl on every backend of the CPU: its equation, gradients, masks, identities, refusals."""

import math
from typing import Any

import pytest
import torch
from relation_cases import STUDENT, grad_output_of, in_double, loss_and_gradients, make_relation, true_relation
from torch import Tensor

from mixkd_fast.losses import relation_kl
from mixkd_fast.ops import backends


def exactness(backend: str) -> tuple[torch.dtype, float, float]:
    """The most exact dtype of a backend, with its relative and absolute tolerance."""
    return (torch.float32, 1e-4, 1e-5) if backend == "triton" else (torch.float64, 1e-9, 1e-12)


@pytest.mark.parametrize("teacher_width", [8, 13])
def test_the_definition_and_its_stated_gradient(relation_backend: str, teacher_width: int) -> None:
    dtype, rtol, atol = exactness(relation_backend)
    arguments = make_relation(dtype, rows=4, heads=3, teacher_width=teacher_width)
    arguments["student_mask"][3] = 0
    loss = relation_kl(**arguments, backend=relation_backend)
    torch.testing.assert_close(loss.double(), true_relation(arguments), rtol=rtol, atol=atol)
    assert loss[3] == 0 and (loss[:2] > 0).all()
    grad_output = grad_output_of(4)
    found = loss_and_gradients(loss, arguments, grad_output)
    arguments = in_double(arguments)
    first, second = (arguments[name].detach() for name in STUDENT)
    exclude = (arguments["student_mask"] == 0)[:, None, None, :]
    q = ((first @ second.mT) / math.sqrt(8)).masked_fill(exclude, -math.inf).softmax(-1)
    scores = arguments["teacher_first"] @ arguments["teacher_second"].mT / math.sqrt(teacher_width)
    p = scores.masked_fill(exclude, -math.inf).softmax(-1)
    change = (q - p) * grad_output.double()[:, None, None, None] / 3 / math.sqrt(8)
    change = torch.where(exclude | exclude.mT, 0.0, change)
    torch.testing.assert_close(found["student_first"], change @ second, rtol=rtol, atol=atol)
    torch.testing.assert_close(found["student_second"], change.mT @ first, rtol=rtol, atol=atol)


def test_gradcheck_and_repeated_backward(relation_backend: str) -> None:
    dtype, _, _ = exactness(relation_backend)
    arguments = make_relation(dtype, rows=2, heads=2, length=3, width=4)
    arguments["student_mask"][0, 1] = 0
    leaves = [arguments[name].detach().clone().requires_grad_() for name in STUDENT]
    rest = [arguments[name] for name in ("teacher_first", "teacher_second", "student_mask")]
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(lambda a, b: relation_kl(a, b, *rest, backend=relation_backend), leaves)
    loss = relation_kl(*leaves, *rest, backend=relation_backend)
    factors = torch.tensor([1.0, -2.0], dtype=dtype)
    once = torch.autograd.grad(loss, leaves, torch.ones_like(factors), retain_graph=True)
    scaled = torch.autograd.grad(loss, leaves, factors, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, torch.ones_like(factors))
    for first, other, repeated in zip(once, scaled, again, strict=True):
        torch.testing.assert_close(repeated, first, rtol=0, atol=0)
        torch.testing.assert_close(other, first * factors[:, None, None, None])


def test_one_tensor_on_both_sides_adds_its_gradients_up(relation_backend: str) -> None:
    arguments = make_relation(torch.float32, length=9)
    value, teacher = arguments["student_first"].detach().requires_grad_(), arguments["teacher_first"]
    loss = relation_kl(value, value, teacher, teacher, arguments["student_mask"], backend=relation_backend)
    (actual,) = torch.autograd.grad(loss.sum(), value)
    apart = [value.detach().clone().requires_grad_() for _ in range(2)]
    loss = relation_kl(*apart, teacher, teacher, arguments["student_mask"], backend=relation_backend)
    torch.testing.assert_close(actual, sum(torch.autograd.grad(loss.sum(), apart)))


def test_only_the_student_gets_a_gradient_and_only_where_it_wants_one(relation_backend: str) -> None:
    arguments = make_relation(torch.float32)
    for name in ("teacher_first", "teacher_second"):
        arguments[name] = arguments[name].clone().requires_grad_()
    loss = relation_kl(**arguments, backend=relation_backend)
    leaves = [arguments[name] for name in (*STUDENT, "teacher_first", "teacher_second")]
    both = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
    assert both[2] is None and both[3] is None
    for place, name in enumerate(STUDENT):
        alone = arguments | {other: arguments[other].detach() for other in STUDENT if other != name}
        (gradient,) = torch.autograd.grad(relation_kl(**alone, backend=relation_backend).sum(), arguments[name])
        torch.testing.assert_close(gradient, both[place], rtol=0, atol=0)
    detached = arguments | {name: arguments[name].detach() for name in STUDENT}
    plain = relation_kl(**detached, backend=relation_backend)
    assert not plain.requires_grad
    torch.testing.assert_close(plain, loss.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_where_student_and_teacher_agree(relation_backend: str, dtype: torch.dtype) -> None:
    arguments = make_relation(dtype, length=17, scale=2.0)
    for name in ("first", "second"):
        arguments[f"teacher_{name}"] = arguments[f"student_{name}"].detach().clone()
    loss = relation_kl(**arguments, backend=relation_backend)
    assert (loss == 0).all()
    for gradient in torch.autograd.grad(loss.sum(), [arguments[name] for name in STUDENT]):
        assert gradient.abs().max() < 1e-6


def test_a_common_shift_of_all_scores_changes_nothing(relation_backend: str) -> None:
    """Scores + 900 in the student alone: the softmax is the same, what fp32 cancels is not the whole score."""
    arguments = make_relation(torch.float32, width=8, scale=0.5)
    first, second = (arguments[name].detach().clone() for name in STUDENT)
    first[..., 0], second[..., 0] = 30 * math.sqrt(8), 30.0
    arguments |= {"student_first": first.requires_grad_(), "student_second": second.requires_grad_()}
    loss = relation_kl(**arguments, backend=relation_backend)
    torch.testing.assert_close(loss.double(), true_relation(arguments), rtol=1e-3, atol=1e-3)


def test_more_padding_changes_nothing_and_padding_is_not_looked_at(relation_backend: str) -> None:
    arguments = make_relation(torch.float32, rows=4, length=9)
    wide = {}
    for name, value in arguments.items():
        if name == "student_mask":
            wide[name] = torch.nn.functional.pad(value, (0, 4))
            continue
        padded = torch.nn.functional.pad(value.detach(), (0, 0, 0, 4))
        padding = torch.nn.functional.pad(arguments["student_mask"], (0, 4)) == 0
        poisoned = padded.masked_fill(padding[:, None, :, None], math.nan)
        wide[name] = poisoned.requires_grad_(value.requires_grad)
    grad_output = grad_output_of(4)
    short, long = (
        loss_and_gradients(relation_kl(**given, backend=relation_backend), given, grad_output)
        for given in (arguments, wide)
    )
    torch.testing.assert_close(long["loss"], short["loss"], rtol=1e-6, atol=1e-6)
    for name in STUDENT:
        torch.testing.assert_close(long[name][:, :, :9], short[name], rtol=1e-5, atol=1e-6)
        assert (long[name][:, :, 9:] == 0).all()
        assert (long[name].transpose(1, 2)[wide["student_mask"] == 0] == 0).all()


@pytest.mark.parametrize("name", [*STUDENT, "teacher_first", "teacher_second"])
def test_nan_in_a_token_makes_its_row_nan_and_no_other(relation_backend: str, name: str) -> None:
    arguments = make_relation(torch.float32)
    clean = relation_kl(**arguments, backend=relation_backend)
    poisoned = arguments[name].detach().clone()
    poisoned[1, 1, 0, 2] = math.nan
    arguments[name] = poisoned.requires_grad_(name in STUDENT)
    loss = relation_kl(**arguments, backend=relation_backend)
    assert loss.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(loss[[0, 2]], clean[[0, 2]], rtol=0, atol=0)
    for gradient in torch.autograd.grad(loss.sum(), [arguments[side] for side in STUDENT]):
        assert gradient[1].isnan().any() and gradient[[0, 2]].isfinite().all()


def test_the_masks_of_both_count(relation_backend: str) -> None:
    """Tokens of one side alone are left out: the loss of the tokens that both have, taken out and put together."""
    dtype, rtol, atol = exactness(relation_backend)
    arguments = make_relation(dtype, rows=1, length=8)
    student = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 0]])
    teacher = torch.tensor([[1, 0, 1, 1, 1, 1, 1, 0]])
    both = (student * teacher)[0].bool()
    compact = {name: value.detach()[:, :, both] for name, value in arguments.items() if name != "student_mask"} | {
        "student_mask": torch.ones(1, int(both.sum()))
    }
    expected = relation_kl(**compact, backend="reference")
    for kind in (torch.long, torch.bool, torch.float32):
        given = arguments | {"student_mask": student.to(kind), "teacher_mask": teacher.to(kind)}
        torch.testing.assert_close(relation_kl(**given, backend=relation_backend), expected, rtol=rtol, atol=atol)
        swapped = arguments | {"student_mask": teacher.to(kind), "teacher_mask": student.to(kind)}
        torch.testing.assert_close(relation_kl(**swapped, backend=relation_backend), expected, rtol=rtol, atol=atol)


def test_rows_without_tokens_and_no_rows(relation_backend: str) -> None:
    arguments = make_relation(torch.float32)
    arguments["student_mask"][:] = 0
    loss = relation_kl(**arguments, backend=relation_backend)
    gradients = torch.autograd.grad(loss.sum(), [arguments[name] for name in STUDENT])
    assert loss.tolist() == [0.0] * 3 and all((gradient == 0).all() for gradient in gradients)
    for empty in (make_relation(torch.float32, rows=0), make_relation(torch.float32, length=1)):
        if len(empty["student_mask"]) == 0:
            assert relation_kl(**empty, backend=relation_backend).shape == (0,)
            continue
        # One token attends to itself alone: p = q = 1.
        assert (relation_kl(**empty, backend=relation_backend) == 0).all()


def test_mixed_precision_keeps_the_arithmetic_in_fp32(relation_backend: str) -> None:
    """Under autocast too; a teacher of another dtype than the student's; fp64 of either makes it fp64."""
    arguments = make_relation(torch.bfloat16, length=11)
    arguments |= {name: arguments[name].float() for name in ("teacher_first", "teacher_second")}
    with torch.autocast("cpu", torch.bfloat16):
        loss = relation_kl(**arguments, backend=relation_backend)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), true_relation(arguments), rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(loss.sum(), [arguments[name] for name in STUDENT])
    assert all(gradient.dtype == torch.bfloat16 for gradient in gradients)
    arguments |= {name: arguments[name].double() for name in ("teacher_first", "teacher_second")}
    if relation_backend == "triton":
        with pytest.raises(ValueError, match=r"an input is torch.float64; allowed with backend 'triton': float32"):
            relation_kl(**arguments, backend=relation_backend)
        return
    loss = relation_kl(**arguments, backend=relation_backend)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, true_relation(arguments), rtol=1e-10, atol=1e-12)
    gradients = torch.autograd.grad(loss.sum(), [arguments[name] for name in STUDENT])
    assert all(gradient.dtype == torch.bfloat16 and gradient.norm() > 0 for gradient in gradients)


def test_strides_of_every_kind(relation_backend: str) -> None:
    arguments = make_relation(torch.float32, heads=3, length=6, width=5)
    expected = true_relation(arguments).detach()

    def strided(value: Tensor, kind: str) -> Tensor:
        value = value.detach()
        if kind == "every second":
            spread = torch.full((*value.shape[:-1], 2 * value.shape[-1]), math.nan)
            spread[..., ::2] = value
            return spread[..., ::2]
        return value.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) if kind == "backwards" else value.contiguous()

    for kind in ("contiguous", "every second", "backwards"):
        given: dict[str, Any] = {
            name: value if name == "student_mask" else strided(value, kind).requires_grad_(name in STUDENT)
            for name, value in arguments.items()
        }
        loss = relation_kl(**given, backend=relation_backend)
        torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-5, atol=1e-5)
        found = loss_and_gradients(loss, given, grad_output_of(3))
        again = in_double(given)
        wanted = loss_and_gradients(relation_kl(**again, backend="reference"), again, grad_output_of(3))
        for name in STUDENT:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5)
    one = {**arguments, "student_second": arguments["student_second"][:, :, :1].expand(-1, -1, 6, -1)}
    torch.testing.assert_close(
        relation_kl(**one, backend=relation_backend).double(), true_relation(one), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_first": torch.zeros(3, 2, 8)}, r"student_first has shape \(3, 2, 8\); allowed: \[O, h >= 1, L, d"),
        ({"student_second": torch.zeros(3, 2, 7, 9)}, r"student_second has shape .* allowed: \[3, 2, 7, 8\]"),
        ({"teacher_first": torch.zeros(3, 1, 7, 8)}, r"teacher_first has shape .* allowed: \[3, 2, 7, d >= 1\]"),
        ({"teacher_second": torch.zeros(3, 2, 7, 9)}, r"teacher_second has shape .* allowed: \[3, 2, 7, 8\]"),
        ({"student_mask": torch.ones(3, 6)}, r"student_mask has shape \(3, 6\); allowed: \[3, 7\]"),
        ({"teacher_mask": torch.ones(3, 7, 1)}, r"teacher_mask has shape"),
        ({"student_mask": torch.ones(3, 7, dtype=torch.complex64)}, r"student_mask is torch.complex64; allowed: "),
        ({"student_second": torch.zeros(3, 2, 7, 8).bfloat16()}, r"student_second is torch.bfloat16; allowed: "),
        ({"teacher_second": torch.zeros(3, 2, 7, 8).half()}, r"teacher_second is torch.float16; allowed: "),
        ({"student_first": torch.zeros(3, 2, 7, 8).long()}, r"student_first is torch.int64; allowed: float32"),
        ({"teacher_first": torch.zeros(3, 2, 7, 8, device="meta")}, r"teacher_first is on meta; allowed: cpu"),
    ],
)
def test_refusals(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        relation_kl(**(make_relation(torch.float32) | changes))


def test_no_graph_break_under_torch_compile(relation_backend: str) -> None:
    arguments = make_relation(torch.float32, length=5)
    leaves = [arguments[name] for name in STUDENT]
    rest = [value for name, value in arguments.items() if name not in STUDENT]

    def loss(first: Tensor, second: Tensor) -> Tensor:
        return relation_kl(first, second, *rest, backend=relation_backend)

    torch.compiler.reset()
    compiled, plain = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), loss(*leaves)
    torch.testing.assert_close(compiled, plain)
    gradients = [torch.autograd.grad(value, leaves, grad_output_of(3)) for value in (compiled, plain)]
    torch.testing.assert_close(*gradients)


def test_auto_takes_what_the_table_prefers() -> None:
    arguments = make_relation(torch.float32)
    for row in backends.available("relation_kl"):
        if not row.available:
            with pytest.raises(RuntimeError, match=f"backend '{row.backend}' of relation_kl is not available: .+"):
                relation_kl(**arguments, backend=row.backend)
    chosen = backends.select("relation_kl", "cpu").name
    same = [relation_kl(**arguments, backend=name) for name in ("auto", chosen)]
    torch.testing.assert_close(*same, rtol=0, atol=0)
