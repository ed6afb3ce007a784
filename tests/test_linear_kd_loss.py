"""The contract of linear_kd_loss: formula, options, parts, dropped rows, refusals; by every backend of the CPU."""

import functools
from typing import Any

import pytest
import torch
from cases import SETTINGS, setting_id
from linear_cases import check_against_truth, gradients_of, in_double, make_heads
from torch import Tensor

from mixkd_fast.losses import LinearKDLoss, LinearKDLossParts, TopK, kd_loss, linear_kd_loss

pytestmark = pytest.mark.usefixtures("linear_backend")
check_exactly = functools.partial(check_against_truth, tolerance=1e-11)


@pytest.mark.parametrize("setting", SETTINGS, ids=setting_id)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_formula(setting: dict[str, Any], reduction: str) -> None:
    arguments = in_double(make_heads())
    check_exactly(arguments, reduction, temperature=2.0, kd_weight=0.7, ce_weight=0.3, **setting)


@pytest.mark.parametrize(
    "changes", [{"classes": 5, "teacher_classes": 9}, {"classes": 9, "teacher_classes": 5}], ids=str
)
def test_vocabularies_of_unequal_width(changes: dict[str, int]) -> None:
    check_exactly(in_double(make_heads(**changes)), "sum", ce_weight=0.5, temperature=1.5)


def test_softcap_scale_and_bias() -> None:
    arguments = in_double(make_heads(rows=(3, 4), spread=6.0))
    arguments |= {"student_softcap": 5.0, "teacher_softcap": 8.0, "student_scale": 0.7, "teacher_scale": -1.3}
    for reduction in ("mean", "sum", "none"):
        check_exactly(arguments, reduction, ce_weight=0.5, temperature=2.0)


def test_without_labels_weights_and_bias() -> None:
    check_exactly(in_double(make_heads(hard=False, bias=False)), "mean", divergence="jsd")


def test_hard_labels_alone_need_no_teacher() -> None:
    arguments = in_double(make_heads())
    arguments = {name: None if name.startswith("teacher") else value for name, value in arguments.items()}
    check_exactly(arguments, "mean", kd_weight=0.0, ce_weight=1.0)


def whole_logits(arguments: dict[str, Any]) -> Tensor:
    """The student's, [..., C], differentiable."""
    return torch.nn.functional.linear(
        arguments["student_hidden"], arguments["student_weight"], arguments.get("student_bias")
    )


@pytest.mark.parametrize("tail_mass", [True, False])
def test_a_teacher_of_which_the_likeliest_classes_are_known(tail_mass: bool) -> None:
    arguments = in_double(make_heads(rows=(2, 5)))
    teacher = torch.nn.functional.linear(*(arguments[f"teacher_{name}"] for name in ("hidden", "weight", "bias")))
    arguments |= {"teacher_hidden": TopK.from_logits(teacher, 4, temperature=2.0, tail_mass=tail_mass)}
    arguments |= {"teacher_weight": None, "teacher_bias": None}
    rows = {name: arguments[name] for name in ("labels", "partner_labels", "lam", "row_weights")}
    options: dict[str, Any] = {"temperature": 2.0, "ce_weight": 0.5, "divergence": "reverse_kl"}
    expected = kd_loss(
        whole_logits(arguments), arguments["teacher_hidden"], **rows, **options, backend="reference", return_parts=True
    )
    result = linear_kd_loss(**arguments, **options, return_parts=True)
    torch.testing.assert_close(result[:3], tuple(expected))
    torch.testing.assert_close(gradients_of(result.loss, arguments), gradients_of(expected[0], arguments))


@pytest.mark.parametrize("normalizer", [7.0, torch.tensor([7.0]), 0.0], ids=str)
def test_the_divisor_of_a_larger_batch(normalizer: Any) -> None:
    arguments = in_double(make_heads())
    summed = linear_kd_loss(**arguments, reduction="sum")
    given = linear_kd_loss(**arguments, normalizer=normalizer)
    torch.testing.assert_close(given, summed / (float(normalizer) or 1.0))
    expected = gradients_of(summed / (float(normalizer) or 1.0), arguments)
    torch.testing.assert_close(gradients_of(given, arguments), expected)


def test_a_divisor_in_fp64_is_not_rounded() -> None:
    arguments = in_double(make_heads())
    for logit_free in (False, True):
        options: dict[str, Any] = {"divergence": "jsd", "logit_free": logit_free}
        summed = linear_kd_loss(**arguments, **options, reduction="sum")
        given = linear_kd_loss(**arguments, **options, normalizer=3.3)
        torch.testing.assert_close(given, summed / 3.3, rtol=1e-14, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_dropped_rows_may_hold_nan(reduction: Any) -> None:
    arguments = in_double(make_heads(rows=(4, 5)))
    keep = (arguments["labels"] != -100) & (arguments["row_weights"] != 0)
    poisoned = dict(arguments)
    for name in ("student_hidden", "teacher_hidden"):
        value = torch.where(keep[..., None], arguments[name].detach(), torch.nan)
        poisoned[name] = value.requires_grad_(name == "student_hidden")
    results = [linear_kd_loss(**given, ce_weight=0.5, reduction=reduction) for given in (arguments, poisoned)]
    torch.testing.assert_close(results[1], results[0])
    expected, actual = (
        gradients_of(loss, given, torch.full_like(loss, 3.0))
        for loss, given in zip(results, (arguments, poisoned), strict=True)
    )
    torch.testing.assert_close(actual, expected)
    assert (actual["student_hidden"][~keep] == 0).all() and (actual["student_hidden"][keep] != 0).any()


def test_all_rows_dropped_and_no_rows() -> None:
    for arguments in (make_heads(), make_heads(rows=(0,)), make_heads(rows=(2, 0, 3))):
        arguments["labels"].fill_(-100)
        for reduction in ("mean", "sum"):
            loss = linear_kd_loss(**arguments, ce_weight=1.0, reduction=reduction)
            assert loss == 0 and loss.requires_grad
            assert all((gradient == 0).all() for gradient in gradients_of(loss, arguments).values())


def test_a_nan_row_stays_alone() -> None:
    arguments = make_heads(hard=False)
    arguments["student_hidden"].data[3] = torch.nan
    loss = linear_kd_loss(**arguments, reduction="none")
    assert loss.isnan().tolist() == [row == 3 for row in range(9)]
    gradient = gradients_of(loss, arguments, torch.ones_like(loss))["student_hidden"]
    assert gradient[3].isnan().all() and gradient[[0, 1, 2, 4]].isfinite().all()


def test_the_teacher_builds_no_state_and_gets_no_gradient() -> None:
    arguments = make_heads()
    for name in ("teacher_hidden", "teacher_weight", "teacher_bias"):
        arguments[name].requires_grad_()
    linear_kd_loss(**arguments).backward()
    assert all(arguments[f"teacher_{name}"].grad is None for name in ("hidden", "weight", "bias"))


@pytest.mark.parametrize("logit_free", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_teacher_computed_in_inference_mode(reduction: Any, logit_free: bool) -> None:
    arguments = in_double(make_heads())
    options: dict[str, Any] = {"divergence": "jsd", "reduction": reduction, "logit_free": logit_free}
    loss = linear_kd_loss(**arguments, **options)
    expected = gradients_of(loss, arguments, torch.ones_like(loss))
    with torch.inference_mode():
        made = {name: value.clone() for name, value in arguments.items() if name.startswith("teacher")}
    assert made["teacher_hidden"].is_inference()
    loss = linear_kd_loss(**{**arguments, **made}, **options)
    torch.testing.assert_close(gradients_of(loss, arguments, torch.ones_like(loss)), expected)


@pytest.mark.parametrize("logit_free", [False, True])
@pytest.mark.parametrize("setting", SETTINGS, ids=setting_id)
def test_the_loss_alone_without_gradients(setting: dict[str, Any], logit_free: bool) -> None:
    if logit_free and setting["divergence"] == "adaptive_kl":
        pytest.skip("adaptive_kl sorts whole rows")
    arguments = in_double(make_heads())
    options: dict[str, Any] = {"temperature": 2.0, "ce_weight": 0.5, "logit_free": logit_free, **setting}
    expected = linear_kd_loss(**arguments, **options).detach()
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            torch.testing.assert_close(linear_kd_loss(**arguments, **options), expected)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_bias_in_fp64_is_an_input_in_fp64(side: str) -> None:
    arguments = make_heads()
    name = f"{side}_bias"
    arguments[name] = arguments[name].detach().double().requires_grad_(side == "student")
    for logit_free in (False, True):
        result = linear_kd_loss(**arguments, logit_free=logit_free, return_parts=True)
        assert {value.dtype for value in result} == {torch.float64}
        check_against_truth(arguments, "mean", 1e-6, logit_free=logit_free)


@pytest.mark.parametrize("frozen", ["student_hidden", "student_weight", "student_bias"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_what_is_frozen_gets_nothing_and_changes_nothing(frozen: str, reduction: Any) -> None:
    arguments = in_double(make_heads())
    loss = linear_kd_loss(**arguments, reduction=reduction)
    expected = gradients_of(loss, arguments, torch.full_like(loss, 2.0))
    arguments[frozen] = arguments[frozen].detach()
    again = linear_kd_loss(**arguments, reduction=reduction)
    gradients = gradients_of(again, arguments, torch.full_like(loss, 2.0))
    assert frozen not in gradients
    torch.testing.assert_close(gradients, {name: expected[name] for name in gradients})


def test_a_tied_embedding_gathers_both_gradients() -> None:
    arguments = in_double(make_heads(bias=False))
    ids = torch.arange(9) % 37
    table = arguments["student_weight"]

    def loss_of(weight: Tensor) -> Tensor:
        loss: Tensor = linear_kd_loss(**{**arguments, "student_hidden": table[ids].tanh(), "student_weight": weight})
        return loss

    through_both = torch.autograd.grad(loss_of(table), table)[0]
    through_embedding = torch.autograd.grad(loss_of(table.detach()), table)[0]
    head = table.detach().clone().requires_grad_()
    through_head = torch.autograd.grad(loss_of(head), head)[0]
    assert through_embedding.norm() > 0 and through_head.norm() > 0
    torch.testing.assert_close(through_both, through_embedding + through_head)


def test_a_graph_used_twice_and_grad_output() -> None:
    arguments = in_double(make_heads())
    for reduction in ("mean", "none"):
        loss = linear_kd_loss(**arguments, reduction=reduction)
        ones = torch.ones_like(loss)
        first = gradients_of(loss, arguments, ones)
        torch.testing.assert_close(gradients_of(loss, arguments, -3 * ones), {n: -3 * g for n, g in first.items()})
        torch.testing.assert_close(gradients_of(loss, arguments, ones), first)
        loss.backward(ones, retain_graph=True)
        loss.backward(ones)
        for name, gradient in first.items():
            torch.testing.assert_close(arguments[name].grad, 2 * gradient)
            arguments[name].grad = None


def test_no_graph_without_gradients() -> None:
    arguments = make_heads()
    with torch.no_grad():
        assert not linear_kd_loss(**arguments).requires_grad
    arguments = {name: value.detach() for name, value in arguments.items()}
    assert not linear_kd_loss(**arguments).requires_grad


def test_gradcheck() -> None:
    arguments = in_double(make_heads(rows=(4,), classes=6, widths=(3, 2)))
    leaves = [arguments.pop(name) for name in ("student_hidden", "student_weight", "student_bias")]

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        given = {"student_hidden": hidden, "student_weight": weight, "student_bias": bias, "student_softcap": 3.0}
        result: Tensor = linear_kd_loss(**given, **arguments, temperature=2.0, divergence="jsd", ce_weight=0.5)
        return result

    assert torch.autograd.gradcheck(loss, leaves)


def test_the_module_is_the_function() -> None:
    arguments = make_heads()
    module = LinearKDLoss(temperature=2.0, divergence="jsd", student_softcap=4.0, return_parts=True, ce_weight=0.2)
    expected = linear_kd_loss(
        **arguments, temperature=2.0, divergence="jsd", student_softcap=4.0, return_parts=True, ce_weight=0.2
    )
    result = module(**arguments)
    assert isinstance(result, LinearKDLossParts)
    torch.testing.assert_close(result, expected)
    assert "temperature=2.0" in repr(module)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"student_weight": torch.zeros(37, 9)}, r"student_weight has shape \(37, 9\); allowed: \[C >= 1, 8\]"),
    ({"teacher_weight": torch.zeros(0, 12)}, r"teacher_weight has shape \(0, 12\); allowed: \[C >= 1, 12\]"),
    ({"student_bias": torch.zeros(3)}, r"student_bias has shape \(3,\); allowed: \[37\]"),
    ({"teacher_weight": None}, "teacher_weight is None; needed with teacher_hidden"),
    ({"teacher_hidden": None}, "teacher_weight is given, but teacher_hidden is None"),
    ({"teacher_hidden": torch.zeros(8, 12)}, r"teacher_hidden has shape \(8, 12\); allowed: \[9, H >= 1\]"),
    ({"teacher_hidden": None, "teacher_weight": None, "teacher_bias": None}, "teacher_hidden is None; allowed only"),
    ({"student_hidden": torch.zeros(9, 8).long()}, "student_hidden is torch.int64; allowed: a floating dtype"),
    ({"student_softcap": 0.0}, "student_softcap is 0.0; allowed: a finite number above 0, or None"),
    ({"teacher_scale": 0.0}, "teacher_scale is 0.0; allowed: a finite number other than 0"),
    ({"max_logits_mib": 0}, "max_logits_mib is 0; allowed: a finite number above 0"),
    ({"divergence": "kl"}, "divergence is 'kl'; allowed"),
    ({"reduction": "sum", "normalizer": 2.0}, "normalizer is 2.0; allowed: None"),
    ({"labels": torch.full((9,), 37)}, "labels holds 37; allowed: 0 to 36"),
    ({"labels": torch.zeros(8).long()}, r"labels has shape \(8,\); allowed: \[9\]"),
    ({"logit_free": True, "divergence": "adaptive_kl"}, "logit_free cannot be had with divergence 'adaptive_kl'"),
    ({"student_weight": torch.zeros(37, 8, device="meta")}, "student_weight is on meta; allowed: cpu"),
    ({"teacher_weight": torch.zeros(37, 12, device="meta")}, "teacher_weight is on meta; allowed: cpu"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_kd_loss(**{**make_heads(), **changes}, ce_weight=0.5)
