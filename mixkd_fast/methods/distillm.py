"""DistiLLM: skewed divergences, the student's text where it is needed (Ko et al., ICML 2024, arXiv 2402.03898)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from mixkd_fast.methods.base import Kind, Method, Moment, Setting
from mixkd_fast.methods.language import token_terms
from mixkd_fast.methods.replay import ReplayBuffer
from mixkd_fast.methods.student_rows import NOT_PLANNED, STUDENT, OnPolicy, Writer

if TYPE_CHECKING:
    from mixkd_fast.data.batching import Batch


class SkewedDistillation(Method, OnPolicy):
    """What DistiLLM and DistiLLM-2 share: the skewed divergences' options."""

    kinds: ClassVar[tuple[Kind, ...]] = ("causal_lm",)
    skew_alpha: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """a of skew_forward_kl KL(p || a p + (1 - a) q) and skew_reverse_kl KL(q || (1 - a) p + a q)."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """tau of the softened distributions; the terms are multiplied by tau^2."""
    max_logits_mib: Annotated[int, Field(gt=0)] = 512
    """Most memory for logits of student and teacher at once, in MiB."""

    def divergence_options(self) -> dict[str, Any]:
        """These options as `token_terms` takes them."""
        return {
            "temperature": self.temperature,
            "alpha": self.skew_alpha,
            "max_logits_mib": self.max_logits_mib,
        }


class DistiLLM(SkewedDistillation):
    """L = tau^2 D(T(x), S(x)) + ce_weight CE(S(x_d), y_d), means over the answers' tokens; D = a skewed KL.

    Adaptive off-policy: at each evaluation, if L_val >= L_prev + loss_margin then phi <- min(phi + phi_step, 1) and
    L_prev <- L_val. A step draws r from U(0, 1): if r < phi (1 - t / T), or r < phi with the replay buffer below
    replay_capacity, the student writes the rows, which are pushed and trained on; else if r < phi they are drawn from
    the buffer; else they are the data set's, (x_d, y_d).
    """

    name: Literal["distillm"] = "distillm"
    """Discriminator of the method section."""
    divergence: Literal["skew_forward_kl", "skew_reverse_kl"] = "skew_reverse_kl"
    """D: KL(p || a p + (1 - a) q), or KL(q || (1 - a) p + a q)."""
    ce_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the labels of the data set's rows, also in steps whose rows are the student's: one more forward of the
    student there."""
    phi_step: Annotated[float, Field(gt=0, le=1)] = 0.1
    """How much phi rises at an evaluation that is worse."""
    loss_margin: Annotated[float, Field(ge=0)] = 0.1
    """How much worse, in nats per token of the first evaluation split."""
    replay_capacity: Annotated[int, Field(gt=0)] = 1000
    """Rows of the replay buffer, of all ranks together."""

    @property
    def not_planned(self) -> list[str]:
        return [NOT_PLANNED]

    def build(self, setting: Setting) -> ReplayBuffer:
        """The replay buffer and phi; nothing to train."""
        writer = Writer(setting, self)
        return ReplayBuffer(writer, setting, self.replay_capacity, self.phi_step, self.loss_margin)

    def prepare_batch(
        self, batch: Batch, student: Any, teacher: Any | None, extras: nn.Module | None, moment: Moment
    ) -> Batch:
        """Rows of the student, of the buffer, or the batch itself."""
        buffer = _buffer(extras)
        branch = buffer.branch(moment)
        if branch == "dataset":
            return batch
        if branch == "generate":
            rows = buffer.writer.write(batch, student.generate, STUDENT, moment.step)
            buffer.push(rows)
        else:
            rows = buffer.replayed(batch, moment)
        rows.companion = batch if self.ce_weight > 0 else None
        return rows

    def terms(
        self, batch: Batch, student: Any, teacher: Any | None, extras: nn.Module | None, moment: Moment
    ) -> dict[str, Tensor]:
        options = self.divergence_options() | {"divergence": self.divergence}
        if batch.companion is None:
            return token_terms(batch, student, teacher, kd_weight=1.0, ce_weight=self.ce_weight, **options)
        labels = token_terms(
            batch.companion, student, None, ce_weight=self.ce_weight, max_logits_mib=self.max_logits_mib
        )
        return labels | token_terms(batch, student, teacher, kd_weight=1.0, **options)

    def after_evaluation(self, metrics: Mapping[str, Mapping[str, float]], extras: nn.Module | None) -> None:
        """L_val is the nll of the first evaluation split."""
        _buffer(extras).evaluated(next(iter(metrics.values()))["nll"])


def _buffer(extras: nn.Module | None) -> ReplayBuffer:
    assert isinstance(extras, ReplayBuffer)
    return extras
