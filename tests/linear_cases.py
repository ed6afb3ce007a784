"""Inputs of linear_kd_loss and an independent truth, shared by the tests of its backends.

The truth is in fp64 and without autograd: `cases.true_divergence` by logits, then the chain rule by hand. Legend of
shape suffixes: ... rows, H width of hidden states, C classes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from cases import true_divergence
from torch import Tensor

from mixkd_fast.losses import linear_kd_loss

LEAVES = ("student_hidden", "student_weight", "student_bias")
ROUNDING = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Relative error of a gradient that the contract allows, for inputs of the dtype."""


def make_heads(
    rows: tuple[int, ...] = (9,),
    classes: int = 37,
    teacher_classes: int | None = None,
    widths: tuple[int, int] = (8, 12),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    spread: float = 2.0,
    bias: bool = True,
    hard: bool = True,
    teacher_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Arguments of linear_kd_loss; logits have about the standard deviation `spread`. The student's are leaves.

    With `hard`: labels, partner labels and lam, some rows ignored, weights of rows, some of them 0.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    arguments: dict[str, Any] = {}
    sides = (("student", classes, dtype), ("teacher", teacher_classes or classes, teacher_dtype or dtype))
    for (side, count, kind), width in zip(sides, widths, strict=True):
        arguments[f"{side}_hidden"] = normal(*rows, width).to(kind)
        arguments[f"{side}_weight"] = (normal(count, width) * spread / width**0.5).to(kind)
        if bias:
            arguments[f"{side}_bias"] = normal(count).to(kind)
    if hard:
        for name in ("labels", "partner_labels"):
            arguments[name] = torch.randint(0, classes, rows, generator=generator)
        flat = arguments["labels"].view(-1)
        flat[1::4] = -100
        arguments["lam"] = torch.rand(rows, generator=generator)
        weights = torch.rand(rows, generator=generator) + 0.5
        weights.view(-1)[2::5] = 0
        arguments["row_weights"] = weights
    for name in LEAVES:
        if name in arguments:
            arguments[name].requires_grad_()
    return arguments


def in_double(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same values in fp64, the student's as new leaves."""

    def doubled(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        return value

    return {name: doubled(value) for name, value in arguments.items()}


def true_logits(arguments: dict[str, Any], side: str) -> tuple[Tensor, Tensor]:
    """(logits [N, C] of a side in fp64, their derivative by the product)."""
    hidden, weight = (arguments[f"{side}_{name}"].detach().double() for name in ("hidden", "weight"))
    logits = hidden.reshape(-1, hidden.shape[-1]) @ weight.T
    if arguments.get(f"{side}_bias") is not None:
        logits = logits + arguments[f"{side}_bias"].detach().double()
    scale, cap = arguments.get(f"{side}_scale", 1.0), arguments.get(f"{side}_softcap")
    logits = logits * scale
    slope = torch.full_like(logits, scale)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
        slope = slope * (1 - (logits / cap) ** 2)
    return logits, slope


def true_rows(
    arguments: dict[str, Any],
    row_factor: Tensor | float = 1.0,
    *,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    ignore_index: int = -100,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    **setting: Any,
) -> dict[str, Tensor]:
    """kd_rows and ce_rows [N], and the gradients of sum(row_factor * rows) by the student's leaves, in fp64.

    Args: row_factor [N], what arrives from above at each row.
    """
    student, slope = true_logits(arguments, "student")
    num_rows, classes = student.shape
    weights, keep = torch.ones(num_rows, dtype=torch.float64), torch.ones(num_rows, dtype=torch.bool)
    if arguments.get("row_weights") is not None:
        weights = arguments["row_weights"].double().reshape(-1)
        keep &= weights != 0
    hard = [arguments[name].reshape(-1) for name in ("labels", "partner_labels") if arguments.get(name) is not None]
    for labels in hard:
        keep &= labels != ignore_index
    kd, ce = torch.zeros(num_rows, dtype=torch.float64), torch.zeros(num_rows, dtype=torch.float64)
    gradient = torch.zeros_like(student)
    if kd_weight:
        teacher, _ = true_logits(arguments, "teacher")
        shared = min(classes, teacher.shape[1])
        both = student[:, :shared], teacher[:, :shared]
        kd, of_kd = true_divergence(*both, temperature=temperature, divergence=divergence, **setting)
        kd = kd_weight * kd
        gradient[:, :shared] += kd_weight * of_kd
    if ce_weight:
        lam = torch.as_tensor(arguments.get("lam", 1.0)).double().expand(num_rows) if len(hard) == 1 else None
        lam = torch.as_tensor(arguments["lam"]).double().reshape(-1).expand(num_rows) if lam is None else lam
        for labels, share in zip(hard, (lam, 1 - lam), strict=False):
            within = labels.clamp(min=0)
            ce = ce + ce_weight * share * F.cross_entropy(student, within, reduction="none")
            gradient += ce_weight * share[:, None] * (student.softmax(-1) - F.one_hot(within, classes))
    factor = torch.as_tensor(row_factor, dtype=torch.float64).expand(num_rows) * weights
    gradient = torch.where(keep[:, None], gradient * slope * factor[:, None], 0.0)
    hidden, weight = arguments["student_hidden"].detach().double(), arguments["student_weight"].detach().double()
    flat = torch.where(keep[:, None], hidden.reshape(num_rows, -1), 0.0)
    return {
        "kd_rows": torch.where(keep, kd * weights, 0.0),
        "ce_rows": torch.where(keep, ce * weights, 0.0),
        "kept_weight": torch.where(keep, weights, 0.0).sum(),
        "student_hidden": (gradient @ weight).view(hidden.shape),
        "student_weight": gradient.T @ flat,
        "student_bias": gradient.sum(0),
    }


def gradients_of(loss: Tensor, arguments: dict[str, Any], grad_output: Tensor | None = None) -> dict[str, Tensor]:
    """Gradients by the student's leaves that want one, in fp64; the graph stays usable."""
    names = [name for name in LEAVES if name in arguments and arguments[name].requires_grad]
    given = torch.autograd.grad(loss, [arguments[name] for name in names], grad_output, retain_graph=True)
    for name, gradient in zip(names, given, strict=True):
        assert gradient.dtype == arguments[name].dtype and gradient.shape == arguments[name].shape
    return {name: gradient.detach().double().cpu() for name, gradient in zip(names, given, strict=True)}


def assert_near(actual: Tensor, expected: Tensor, relative: float, what: str) -> None:
    """L2 distance at most `relative` times the expected norm; a floor for an expected 0."""
    error = float((actual.double() - expected.double()).norm())
    size = float(expected.double().norm())
    assert error <= relative * max(size, 0.05), f"{what}: {error} of {size}; allowed: {relative}"


def check_against_truth(arguments: dict[str, Any], reduction: str, tolerance: float, **options: Any) -> None:
    """Loss, parts, rows and gradients for a grad_output other than 1 against `true_rows`."""
    rows = arguments["student_hidden"].shape[:-1]
    method = {name: options.pop(name) for name in ("backend", "max_logits_mib", "logit_free") if name in options}
    true = true_rows(arguments, **options)
    grad_output = torch.tensor(-2.5, dtype=torch.float64)
    factor: Tensor = grad_output
    if reduction == "none":
        grad_output = torch.linspace(-1.5, 2.5, rows.numel(), dtype=torch.float64).view(rows)
        factor = grad_output.reshape(-1)
    elif reduction == "mean":
        factor = factor / torch.where(true["kept_weight"] == 0, 1.0, true["kept_weight"])
    expected = true_rows(arguments, factor, **options)
    result = linear_kd_loss(**arguments, reduction=reduction, return_parts=True, **options, **method)
    for name in ("kd_rows", "ce_rows"):
        actual = getattr(result, name)
        assert actual.shape == rows and not actual.requires_grad
        assert_near(actual.reshape(-1), true[name], tolerance, name)
    kd, ce = true["kd_rows"].view(rows), true["ce_rows"].view(rows)
    if reduction != "none":
        kd, ce = kd.sum(), ce.sum()
    if reduction == "mean":
        kd, ce = (x / torch.where(true["kept_weight"] == 0, 1.0, true["kept_weight"]) for x in (kd, ce))
    for actual, value, what in ((result.loss, kd + ce, "loss"), (result.kd, kd, "kd"), (result.ce, ce, "ce")):
        assert actual.shape == value.shape
        assert_near(actual.detach(), value, tolerance, what)
    gradients = gradients_of(result.loss, arguments, grad_output.to(result.loss.dtype))
    for name, gradient in gradients.items():
        assert_near(gradient, expected[name], tolerance, f"gradient of {name}")
