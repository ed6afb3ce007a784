"""MiniLLM: policy gradient on KL(q || p) over whole answers (Gu et al., ICLR 2024, arXiv 2306.08543).

Legend of shape suffixes: B clean rows of the micro-batch, L positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mixkd_fast.losses import linear_kd_loss
from mixkd_fast.methods.base import Kind, Method, Moment, Setting
from mixkd_fast.methods.language import token_terms
from mixkd_fast.methods.mixed_sampling import MixedSampler
from mixkd_fast.methods.student_rows import NOT_PLANNED, STUDENT, TEXT, OnPolicy, Writer, generator
from mixkd_fast.methods.token_scores import IGNORED, Side, both_sides, log_probabilities

if TYPE_CHECKING:
    from mixkd_fast.data.batching import Batch


class TextWriter(Writer):
    """A `Writer` that also has the ordinary text to train on, where files of it were given."""

    def __init__(self, setting: Setting, options: MiniLLM) -> None:
        super().__init__(setting, options)
        files = options.pretraining_files
        self.texts = setting.load_texts(files, "pretraining_files") if files else None

    def beside(self, batch: Batch, step: int) -> Batch:
        """As many rows of ordinary text: drawn from the files, else the batch itself.

        The draw depends on (seed, step, first row of the micro-batch), as those of `Writer.write`.
        """
        if self.texts is None:
            return batch
        draws = generator(self.seed, TEXT, step, int(batch.row_ids[0]))
        return self.texts.batch(draws.integers(len(self.texts), size=batch.num_rows)).to(batch.input_ids.device)


class MiniLLM(Method, OnPolicy):
    """L = KL(q || p) of answers, by its gradient; + lm_weight * the language-model loss on ordinary text.

    y is drawn token by token from p~ = a p + (1 - a) q, a = teacher_share. With r_t = log p(y_t) - log q(y_t) and the
    rewards to come R_{t+1} = r_{t+1} + ... + r_T, the terms (sums over an answer, means over the tokens of the batch):

        single_step = sum_t w_t KL(q_t || p_t), exact over the vocabulary
        pg = -sum_t min(rho_t R_{t+1}, clip(rho_t, 1 - c, 1 + c) R_{t+1}),  rho_t = q(y_t) / p~(y_t)

    w_t is rho_t without a gradient. With a = 0, length_normalization false and clip 0 the gradient of their sum is, in
    expectation, that of the KL(q || p) of whole answers.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("causal_lm",)
    name: Literal["minillm"] = "minillm"
    """Discriminator of the method section."""
    teacher_share: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """a: every token is drawn from a p + (1 - a) q."""
    importance: Literal["token", "sequence"] = "token"
    """Weight of a token for that: the ratio of the token alone (as the paper approximates it), or products over the
    answer so far (exact on average, of high variance)."""
    length_normalization: bool = True
    """R_{t+1} is the mean of the rewards to come, not their sum, so that long answers are not preferred or shunned."""
    clip: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """c: a token whose ratio has left [1 - c, 1 + c] gets no gradient that leads further out (PPO); 0 clips nothing.
    Needs importance "token"."""
    lm_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the cross entropy on ordinary text: of pretraining_files, or else on the rows of the data set."""
    pretraining_files: list[str] = Field(default=[])
    """Files of plain text (.txt, or a column "text") for that: packed as plain text is, as many rows a step as of the
    data set, drawn at random."""
    max_logits_mib: Annotated[int, Field(gt=0)] = 512
    """Most memory for logits of student and teacher at once, in MiB."""

    @model_validator(mode="after")
    def _clips_ratios_of_tokens(self) -> MiniLLM:
        if self.clip > 0 and self.importance == "sequence":
            raise ValueError(f'clip is {self.clip}; allowed with importance "sequence": 0')
        return self

    @model_validator(mode="after")
    def _reads_what_it_uses(self) -> MiniLLM:
        if self.pretraining_files and self.lm_weight == 0:
            raise ValueError(
                f"pretraining_files names {len(self.pretraining_files)}, but lm_weight is 0; allowed: none"
            )
        return self

    @model_validator(mode="after")
    def _draws_from_the_models(self) -> MiniLLM:
        for name, plain in (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0)):
            if getattr(self.generation, name) != plain:
                raise ValueError(
                    f"generation.{name} is {getattr(self.generation, name)}; allowed for minillm: {plain}, because the "
                    "weights of its tokens are those of draws from the models' own distributions"
                )
        return self

    @property
    def not_planned(self) -> list[str]:
        texts = [NOT_PLANNED, "the teacher's forward per token of them"]
        return [*texts, "the student's forward and backward on ordinary text"] if self.lm_weight > 0 else texts

    def build(self, setting: Setting) -> TextWriter:
        """What writes rows; nothing to train."""
        return TextWriter(setting, self)

    def prepare_batch(
        self, batch: Batch, student: Any, teacher: Any | None, extras: nn.Module | None, moment: Moment
    ) -> Batch:
        """Answers drawn from both models, with the ordinary text as their companion."""
        assert teacher is not None and isinstance(extras, TextWriter)
        sampler = MixedSampler(student, teacher, self.teacher_share)
        rows = extras.write(batch, sampler.generate, STUDENT, moment.step)
        if self.lm_weight > 0:
            rows.companion = extras.beside(batch, moment.step)
        return rows

    def terms(
        self, batch: Batch, student: Any, teacher: Any | None, extras: nn.Module | None, moment: Moment
    ) -> dict[str, Tensor]:
        assert teacher is not None and batch.mean_targets is not None
        divisor = batch.mean_targets or 1.0
        with both_sides(batch, student, teacher) as (ours, theirs, labels):
            log_q, log_p = log_probabilities(ours, theirs, labels, self.max_logits_mib)
            gain, weight = self._gain(log_q, log_p, labels != IGNORED)
            single = self._single_step(ours, theirs, labels, weight, divisor)
        terms = {"pg": -gain.sum(1) / divisor, "single_step": single}
        if self.lm_weight > 0:
            assert batch.companion is not None
            terms["lm"] = token_terms(
                batch.companion, student, None, ce_weight=self.lm_weight, max_logits_mib=self.max_logits_mib
            )["ce"]
        return terms

    def _gain(self, log_q: Tensor, log_p: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """What the policy gradient wants more of, and the weights w_t of the exact part: [B, L], 0 outside kept."""
        values = log_q.detach()
        reward = torch.where(kept, log_p - values, 0.0)
        # log of q / (a p + (1 - a) q), from log p - log q alone.
        log_ratio = torch.where(kept, -_log_mixture(reward, self.teacher_share), 0.0)
        following = kept.to(reward.dtype)
        if self.importance == "token":
            ratio = torch.where(kept, (log_ratio + log_q - values).exp(), 0.0)
            weight, future = ratio.detach(), _later(reward)
        else:
            # A reward at t' depends on all tokens up to it, the divergence at t on those before it.
            product = log_ratio.cumsum(1)
            future = _later(product.exp() * reward)
            weight = (product - log_ratio).exp() * following
            ratio = torch.where(kept, (log_q - values).exp(), 0.0)
        if self.length_normalization:
            future = future / _later(following).clamp(min=1)
        gain = ratio * future
        if self.clip > 0:
            gain = torch.minimum(gain, ratio.clamp(1 - self.clip, 1 + self.clip) * future)
        return torch.where(kept, gain, 0.0), weight

    def _single_step(self, ours: Side, theirs: Side, labels: Tensor, weight: Tensor, divisor: float) -> Tensor:
        """sum_t w_t KL(q_t || p_t) / divisor: [B]."""
        parts = linear_kd_loss(
            ours.hidden,
            ours.head.weight,
            theirs.hidden,
            theirs.head.weight,
            labels,
            student_bias=ours.head.bias,
            student_softcap=ours.head.softcap,
            student_scale=ours.head.scale,
            teacher_bias=theirs.head.bias,
            teacher_softcap=theirs.head.softcap,
            teacher_scale=theirs.head.scale,
            divergence="reverse_kl",
            row_weights=weight,
            normalizer=divisor,
            max_logits_mib=self.max_logits_mib,
            return_parts=True,
        )
        # One number carries the gradient of all rows; the engine sums them, so an equal share for each is right.
        share = (parts.loss - parts.loss.detach()) / len(labels)
        return parts.kd_rows.detach().sum(1) / divisor + share


def _log_mixture(reward: Tensor, share: float) -> Tensor:
    """log(share p / q + 1 - share) from reward = log p - log q."""
    if share == 0:
        return torch.zeros_like(reward)
    keeps = torch.full_like(reward, 1 - share).log()
    return torch.logaddexp(reward + torch.full_like(reward, share).log(), keeps)


def _later(values: Tensor) -> Tensor:
    """Sum over the positions after each one: [B, L]."""
    return values.flip(1).cumsum(1).flip(1) - values
