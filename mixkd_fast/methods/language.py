"""What methods for causal language models share: the fused loss over tokens, as terms per row.

Legend of shape suffixes: B clean rows of the micro-batch, M mixed rows, O either of them, L positions, H width.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor

from mixkd_fast.losses import linear_kd_loss
from mixkd_fast.methods.base import Kind, Method
from mixkd_fast.mix import first_rows
from mixkd_fast.mixing import Mixing
from mixkd_fast.ops import DivergenceName, TopK

if TYPE_CHECKING:
    from mixkd_fast.causal_lm import CausalLM, Head
    from mixkd_fast.data.batching import Batch
    from mixkd_fast.frozen_teacher import FrozenTeacher


def token_terms(
    batch: Batch,
    student: CausalLM,
    teacher: FrozenTeacher | None,
    *,
    ce_weight: float = 0.0,
    kd_weight: float = 0.0,
    row_weights: Tensor | None = None,
    mixing: Mixing | None = None,
    max_logits_mib: int = 512,
    **options: Any,
) -> dict[str, Tensor]:
    """The terms "ce" and "kd" of a micro-batch, whichever has a weight: each [B], summed over a row's targets and
    divided by `batch.mean_targets`.

    The engine sums them over all rows of the step and divides by their number: what comes out is the mean over the
    targets of the whole accumulated, cross-rank batch,
    sum over targets of [ce_weight CE(q_t, y_t) + kd_weight tau^2 D(p_t, q_t)] / (their number).

    Args: teacher is needed at a positive kd_weight; row_weights [B] or [B, L] weigh tokens (the divisor stays the
    number of targets); mixing = the mixed rows instead: positions from which both rows learn, their labels mixed by
    lam, divided by their own number; max_logits_mib = most memory for logits at once; options of the divergence as in
    `losses.linear_kd_loss`.
    """
    if kd_weight > 0 and teacher is None:
        raise ValueError(f"kd_weight is {kd_weight}, and there is no teacher; allowed: 0")
    # Asked first and read last: it is the larger model, whose memory is then free for the student's.
    answers: Tensor | TopK | None = None
    its_head: AbstractContextManager[Head | None] = nullcontext()
    if teacher is not None and kd_weight > 0:
        answers = teacher.distribution(batch, mixing, options.get("temperature", 1.0))
        its_head = teacher.head_of(answers, batch)
    student_hidden = student.hidden(batch, mixing)
    labels, partner_labels, lam, divisor = _targets(batch, mixing)
    if row_weights is not None and row_weights.dim() == 1:
        row_weights = row_weights[:, None].expand(labels.shape)
    with its_head as theirs:
        ours = student.head()
        parts = linear_kd_loss(
            student_hidden,
            ours.weight,
            answers,
            None if theirs is None else theirs.weight,
            labels,
            partner_labels,
            lam,
            student_bias=ours.bias,
            student_softcap=ours.softcap,
            student_scale=ours.scale,
            teacher_bias=None if theirs is None else theirs.bias,
            teacher_softcap=None if theirs is None else theirs.softcap,
            teacher_scale=1.0 if theirs is None else theirs.scale,
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            row_weights=row_weights,
            normalizer=divisor * (len(labels) // batch.num_rows),
            max_logits_mib=max_logits_mib,
            return_parts=True,
            **options,
        )
    terms = {}
    for name, weight, tokens_OL in (("ce", ce_weight, parts.ce_rows), ("kd", kd_weight, parts.kd_rows)):
        if weight > 0:
            rows_O = tokens_OL.detach().sum(1) / divisor
            terms[name] = rows_O.view(-1, batch.num_rows).mean(0)
    # One call made both terms' gradient, so it goes to the first of them: the sum over all terms has it once.
    first = next(iter(terms))
    terms[first] = terms[first] + (parts.loss - parts.loss.detach()) / batch.num_rows
    return terms


def _targets(batch: Batch, mixing: Mixing | None) -> tuple[Tensor, Tensor | None, Tensor | None, float]:
    """Labels [O, L], the partner's, lam [O, L], and what sums over a row are divided by."""
    if mixing is None:
        assert batch.mean_targets is not None, "only training batches of a causal language model have mean_targets"
        return batch.labels[: batch.num_rows], None, None, batch.mean_targets or 1.0
    assert batch.partner is not None and batch.lam is not None and batch.mean_mixed_targets is not None
    own = first_rows(batch.labels, batch.partner.shape[0], batch.num_rows)
    lam = batch.lam[:, None].expand(own.shape)
    # A position that only one of both learns from is dropped: the loss ignores a row with either label missing.
    return own, batch.labels[batch.partner], lam, batch.mean_mixed_targets or 1.0


class LanguageMethod(Method):
    """Base of methods for causal language models: the divergence's options and `token_terms` with them."""

    kinds: ClassVar[tuple[Kind, ...]] = ("causal_lm",)
    divergence: DivergenceName = "forward_kl"
    """Between teacher p and student q: forward_kl KL(p||q), reverse_kl KL(q||p), jsd, skew_forward_kl,
    skew_reverse_kl, alpha_beta, adaptive_kl, tvd, mse."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """tau of the softened distributions; the term is multiplied by tau^2. Unused by "mse"."""
    jsd_beta: Annotated[float, Field(ge=0, le=1)] = 0.5
    """beta of "jsd": share of the teacher in the mixture; 0 is forward_kl, 1 is reverse_kl."""
    skew_alpha: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """a of the skewed divergences."""
    ab_alpha: float = 0.2
    """alpha of "alpha_beta"."""
    ab_beta: float = 0.7
    """beta of "alpha_beta"."""
    detach_mixture: bool = False
    """skew_reverse_kl: no gradient through the student inside the mixture (DistiLLM-2)."""
    max_logits_mib: Annotated[int, Field(gt=0)] = 512
    """Most memory for logits of student and teacher at once, in MiB."""

    def divergence_options(self) -> dict[str, Any]:
        """These options as `token_terms` takes them."""
        return {
            "divergence": self.divergence,
            "temperature": self.temperature,
            "beta": self.jsd_beta,
            "alpha": self.skew_alpha,
            "ab_alpha": self.ab_alpha,
            "ab_beta": self.ab_beta,
            "detach_mixture": self.detach_mixture,
            "max_logits_mib": self.max_logits_mib,
        }

    def token_terms(
        self, batch: Batch, student: CausalLM, teacher: FrozenTeacher | None, **options: Any
    ) -> dict[str, Tensor]:
        """`token_terms` of this module with the method's divergence; options replace and add to its own."""
        return token_terms(batch, student, teacher, **self.divergence_options() | options)
