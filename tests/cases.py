"""Inputs and independent truth that every backend of the row losses is tested with.

The truth is written in probabilities, in fp64, with the gradient tau * (q u - q sum(q u)), u = dD/dq, stated
per divergence: it shares neither code nor autograd with the package. Legend: ... rows, C classes.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SETTINGS: list[dict[str, Any]] = [
    {"divergence": "forward_kl"},
    {"divergence": "reverse_kl"},
    {"divergence": "jsd", "beta": 0.5},
    {"divergence": "jsd", "beta": 0.1},
    {"divergence": "skew_forward_kl", "alpha": 0.1},
    {"divergence": "skew_reverse_kl", "alpha": 0.1},
    {"divergence": "skew_reverse_kl", "alpha": 0.1, "detach_mixture": True},
    {"divergence": "alpha_beta", "ab_alpha": 0.2, "ab_beta": 0.7},
    {"divergence": "alpha_beta", "ab_alpha": 0.5, "ab_beta": 0.0},
    {"divergence": "alpha_beta", "ab_alpha": 0.0, "ab_beta": 0.5},
    {"divergence": "adaptive_kl"},
    {"divergence": "tvd"},
    {"divergence": "mse"},
]
"""Options of kd_loss: every divergence, with its variants."""

SHAPES = [(1, 1), (4, 2), (7, 3), (2, 5, 17), (3, 257), (2, 30522), (1, 131073)]


def setting_id(setting: dict[str, Any]) -> str:
    """A readable test id."""
    return "-".join(f"{value}" for value in setting.values())


def load_vectors() -> list[dict[str, Any]]:
    """The high-precision cases made by vectors/make_vectors.py."""
    cases: list[dict[str, Any]] = json.loads(
        (Path(__file__).parent / "vectors" / "divergences.json").read_text(encoding="utf-8")
    )
    return cases


def make_logits(shape: tuple[int, ...], scale: float, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Student (requires gradient) and teacher logits, normal with standard deviation `scale`."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(shape, generator=generator) * scale for _ in range(2))
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def true_divergence(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float,
    divergence: str,
    beta: float = 0.5,
    alpha: float = 0.1,
    ab_alpha: float = 0.2,
    ab_beta: float = 0.7,
    detach_mixture: bool = False,
) -> tuple[Tensor, Tensor]:
    """(tau^2 D per row [...], its gradient by the student logits [..., C]) in fp64, for full support."""
    s, t = student.detach().double(), teacher.detach().double()
    if divergence == "mse":
        return (s - t).square().mean(-1), 2 * (s - t) / s.shape[-1]
    log_q, log_p = (s / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    if divergence == "forward_kl":
        terms, q_u = p * (log_p - log_q), -p
    elif divergence == "reverse_kl":
        terms, q_u = q * (log_q - log_p), q * (log_q - log_p + 1)
    elif divergence == "jsd":
        log_m = (beta * p + (1 - beta) * q).log()
        terms = beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)
        q_u = (1 - beta) * q * (log_q - log_m)
    elif divergence == "skew_forward_kl":
        m = alpha * p + (1 - alpha) * q
        terms, q_u = p * (log_p - m.log()), -(1 - alpha) * p * q / m
    elif divergence == "skew_reverse_kl":
        m = (1 - alpha) * p + alpha * q
        terms = q * (log_q - m.log())
        q_u = q * (log_q - m.log() + 1 - (0.0 if detach_mixture else 1.0) * alpha * q / m)
    elif divergence == "alpha_beta":
        a, b = ab_alpha, ab_beta
        if a == 0:
            terms = (q**b * b * (log_q - log_p) - q**b + p**b) / b**2
            q_u = q**b * (log_q - log_p)
        elif b == 0:
            terms = (p**a * a * (log_p - log_q) - p**a + q**a) / a**2
            q_u = -(p**a - q**a) / a
        else:
            s_ = a + b
            terms = -(p**a * q**b - a / s_ * p**s_ - b / s_ * q**s_) / (a * b)
            q_u = -(p**a * q**b - q**s_) / a
    elif divergence == "adaptive_kl":
        g_head, g_tail = _adaptive_weights(p, q)
        whole = g_head + g_tail
        w_head, w_tail = (torch.where(whole == 0, 0.0, g / whole) for g in (g_head, g_tail))
        terms = w_head * p * (log_p - log_q) + w_tail * q * (log_q - log_p)
        q_u = -w_head * p + w_tail * q * (log_q - log_p + 1)
    elif divergence == "tvd":
        terms, q_u = (p - q).abs() / 2, q * (q - p).sign() / 2
    else:
        raise ValueError(divergence)
    gradient = temperature * (q_u - q * q_u.sum(-1, keepdim=True))
    return temperature**2 * terms.sum(-1), gradient


def _adaptive_weights(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Distances over head and tail, [..., 1] each, row by row in plain Python."""
    rows_p, rows_q = p.reshape(-1, p.shape[-1]), q.reshape(-1, q.shape[-1])
    weights = []
    for row_p, row_q in zip(rows_p, rows_q, strict=True):
        values = row_p.tolist()
        distance = (row_p - row_q).abs()
        head, mass = [], 0.0
        for index in sorted(range(len(values)), key=lambda i, v=values: (-v[i], i)):
            if mass > 0.5:
                break
            head.append(index)
            mass += values[index]
        in_head = torch.zeros_like(row_p, dtype=torch.bool)
        in_head[head] = True
        weights.append(torch.stack([distance[in_head].sum(), distance[~in_head].sum()]))
    pairs = torch.stack(weights).reshape(*p.shape[:-1], 2)
    return pairs[..., :1], pairs[..., 1:]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """L2 norm of the difference over the norm of `expected`."""
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=1e-30))


def kl_rows(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """tau^2 KL(p || q) by torch's own kl_div, differentiable."""
    p = (teacher / temperature).softmax(-1)
    log_q = (student / temperature).log_softmax(-1)
    return temperature**2 * F.kl_div(log_q, p, reduction="none").sum(-1)


def mixed_batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Student [6, 5], teacher, labels, partner labels and lam, with lam = 0 and 1 among them."""
    student, teacher = make_logits((6, 5), 1.5, 0, dtype)
    labels, partner_labels = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([4, 1, 0, 2, 3, 0])
    return (
        student,
        teacher,
        labels,
        partner_labels,
        torch.tensor([0.0, 1.0, 0.5, 0.25, 0.9, 0.4], dtype=dtype),
    )


def gradient_of(loss: Tensor, student: Tensor, grad_output: Tensor | None = None) -> Tensor:
    """d loss / d student; the graph stays usable."""
    return torch.autograd.grad(loss, student, grad_output, retain_graph=True)[0]
