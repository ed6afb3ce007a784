"""Loss terms of causal language models: token means over the whole batch, masks, mixing, unequal vocabularies."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toy_lm import batch_of, random_rows, tiny_lm

from mixkd_fast.causal_lm import CausalLM
from mixkd_fast.data.batching import Draw, Padding, micro_batches
from mixkd_fast.data.next_tokens import IGNORED
from mixkd_fast.frozen_teacher import FrozenTeacher
from mixkd_fast.methods import FineTune, LanguageKD, Moment
from mixkd_fast.methods.language import token_terms

MOMENT = Moment(0, 1, 0.0)
PARTNER, LAM = np.array([3, 4, 5, 6, 7, 0, 1, 2]), np.linspace(0.1, 0.9, 8).astype(np.float32)


def student_lm(**fields: Any) -> CausalLM:
    return CausalLM(tiny_lm("llama", 96, seed=1, **fields)).double().train()


def teacher_lm(vocab_size: int = 96) -> FrozenTeacher:
    model = CausalLM(tiny_lm("gpt2", vocab_size, seed=2)).double().eval()
    return FrozenTeacher(model.requires_grad_(False), lambda: "")


def mean_over_tokens(student_logits: Any, teacher_logits: Any, labels: Any, weight: float, tau: float) -> Any:
    """(1 - w) CE + w tau^2 KL(p || q), the mean over all targets: the textbook."""
    kept = labels != IGNORED
    q, p = student_logits[kept], teacher_logits[kept]
    kl = F.kl_div((q / tau).log_softmax(-1), (p / tau).log_softmax(-1), log_target=True, reduction="none").sum(-1)
    return (1 - weight) * F.cross_entropy(q, labels[kept]) + weight * tau**2 * kl.mean()


def test_the_sum_over_rows_is_the_mean_over_tokens() -> None:
    student, teacher, batch = student_lm(), teacher_lm(), batch_of(random_rows())
    method = LanguageKD(kd_weight=0.3, temperature=2.0)
    terms = method.terms(batch, student, teacher, None, MOMENT)
    assert list(terms) == ["ce", "kd"] and all(term.shape == (8,) for term in terms.values())
    loss = sum(terms.values()).sum() / 8  # as the engine does
    teacher_logits = teacher.head().logits(teacher.hidden(batch))
    expected = mean_over_tokens(student.logits(batch), teacher_logits, batch.labels, 0.3, 2.0)
    torch.testing.assert_close(loss, expected)
    ours = torch.autograd.grad(loss, list(student.parameters()))
    theirs = torch.autograd.grad(expected, list(student.parameters()))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-9)


def test_rows_stay_visible() -> None:
    """A row's value is its own: others do not enter it, so that the guard against NaN can name it."""
    student, batch = student_lm(), batch_of(random_rows())
    terms = FineTune().terms(batch, student, None, None, MOMENT)["mle"]
    logits = student.logits(batch)
    assert batch.mean_targets is not None
    for row in range(8):
        kept = batch.labels[row] != IGNORED
        expected = F.cross_entropy(logits[row][kept], batch.labels[row][kept], reduction="sum") / batch.mean_targets
        torch.testing.assert_close(terms[row], expected)


def test_prompts_get_no_gradient() -> None:
    student, teacher, batch = student_lm(), teacher_lm(), batch_of(random_rows())
    captured = {}
    hidden = student.hidden(batch)
    hidden.retain_grad()
    captured["hidden"] = hidden
    student.hidden = lambda *_: captured["hidden"]
    sum(LanguageKD().terms(batch, student, teacher, None, MOMENT).values()).sum().backward()
    gradient = hidden.grad
    assert gradient is not None
    ignored = batch.labels == IGNORED
    assert bool((gradient[ignored] == 0).all()) and bool((gradient[~ignored].abs().sum(-1) > 0).all())


def gradients(pieces: int, method: Any, **draw: Any) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of one step of eight rows in so many micro-batches, summed as the engine does."""
    student, teacher, rows = student_lm(), teacher_lm(), random_rows()
    whole = Draw(np.arange(8), draw.get("partner_ids"), draw.get("lam"))
    total = 0.0
    for batch in micro_batches(rows, whole, 0, 1, 8 // pieces, Padding(0, "right", 1)):
        loss = sum(method.terms(batch, student, teacher, None, MOMENT).values()).sum() / 8
        loss.backward()
        total += float(loss.detach())
    return total, [parameter.grad for parameter in student.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("pieces", [2, 4])
@pytest.mark.parametrize(
    ("method", "draw"),
    [
        (FineTune(), {}),
        (LanguageKD(divergence="jsd"), {}),
        (LanguageKD(sm_weight=1.0, tmkd_weight=0.5), {"partner_ids": PARTNER, "lam": LAM}),
    ],
    ids=["finetune", "lm_kd", "mixed"],
)
def test_accumulation_equals_one_big_batch(pieces: int, method: Any, draw: dict[str, Any]) -> None:
    one, expected = gradients(1, method, **draw)
    many, found = gradients(pieces, method, **draw)
    assert many == pytest.approx(one, rel=1e-9)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-10)


def test_mixed_rows_learn_where_both_learn() -> None:
    """SM: lam CE(S(x'), y_i) + (1 - lam) CE(S(x'), y_j) at the positions that have both labels."""
    student, batch = student_lm(), batch_of(random_rows(), partner_ids=PARTNER, lam=LAM)
    assert batch.partner is not None and batch.lam is not None
    method = LanguageKD(kd_weight=0.0, sm_weight=1.0)
    terms = method.terms(batch, student, teacher_lm(), None, MOMENT)
    assert list(terms) == ["ce", "sm"]
    logits = student.head().logits(student.hidden(batch, method))
    own, other = batch.labels, batch.labels[batch.partner]
    both = (own != IGNORED) & (other != IGNORED)
    lam = batch.lam.double()[:, None].expand(own.shape)[both]
    first, second = (F.cross_entropy(logits[both], labels[both], reduction="none") for labels in (own, other))
    torch.testing.assert_close(terms["sm"].sum() / 8, (lam * first + (1 - lam) * second).mean(), rtol=1e-5, atol=1e-7)


def test_student_and_teacher_alike_have_nothing_to_learn() -> None:
    student, batch = student_lm(), batch_of(random_rows(), partner_ids=PARTNER, lam=LAM)
    teacher = FrozenTeacher(student_lm().eval().requires_grad_(False), lambda: "")
    terms = LanguageKD(kd_weight=1.0, tmkd_weight=1.0).terms(batch, student.eval(), teacher, None, MOMENT)
    assert list(terms) == ["kd", "tmkd"]
    for term in terms.values():
        torch.testing.assert_close(term, torch.zeros_like(term), rtol=0, atol=1e-9)


def test_padded_vocabularies_are_left_out() -> None:
    """The classes that only one of both has do not enter the divergence."""
    student, batch = student_lm(), batch_of(random_rows())
    wide, narrow = teacher_lm(104), teacher_lm()
    narrow.model.load_state_dict(
        {
            name: tensor[:96] if tensor.shape[:1] == (104,) else tensor
            for name, tensor in wide.model.state_dict().items()
        }
    )
    ours, theirs = (token_terms(batch, student, teacher, kd_weight=1.0)["kd"] for teacher in (wide, narrow))
    torch.testing.assert_close(ours, theirs)


def test_row_weights_weigh_rows() -> None:
    student, batch = student_lm(), batch_of(random_rows())
    plain = token_terms(batch, student, None, ce_weight=1.0)["ce"]
    weights = torch.linspace(0, 2, 8, dtype=torch.float64)
    torch.testing.assert_close(
        token_terms(batch, student, None, ce_weight=1.0, row_weights=weights)["ce"], plain * weights
    )


def test_a_teacher_is_needed_for_its_term() -> None:
    with pytest.raises(ValueError, match=r"kd_weight is 1\.0, and there is no teacher"):
        token_terms(batch_of(random_rows()), student_lm(), None, kd_weight=1.0)
