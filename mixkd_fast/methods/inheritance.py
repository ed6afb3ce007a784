"""Knowledge inheritance: masked-language-model training that starts from a teacher's answers and grows out of them.

Qin et al., NAACL 2022 (arXiv 2105.13880).
Legend of shape suffixes: B clean rows, L positions, K masked tokens, H width, V words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mixkd_fast.losses import kd_loss
from mixkd_fast.methods.base import Method, Moment, Setting, supervised_loss
from mixkd_fast.methods.kd import Temperature, Weight
from mixkd_fast.methods.masked_tokens import MaskedTokens, Vocabulary, mask_tokens

if TYPE_CHECKING:
    from mixkd_fast.data.batching import Batch
    from mixkd_fast.models import Encoder


class MaskedLMHead(nn.Module):
    """Hidden states [K, H] -> logits [K, V], as BERT's: Linear, GELU, LayerNorm, then a row per word.

    The rows are the student's own word embeddings (the same parameter) where those are a plain table, else new ones.
    """

    def __init__(self, student: Encoder, vocabulary: Vocabulary, teacher: Encoder) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        # Frozen, and in a tuple: neither trained nor checkpointed.
        self.frozen = (teacher,)
        width, table = int(student.config.hidden_size), student.word_table
        tied = table if isinstance(table, nn.Embedding) else None
        word_width, words = (width, vocabulary.size) if tied is None else (tied.embedding_dim, tied.num_embeddings)
        self.transform = nn.Linear(width, word_width)
        self.norm = nn.LayerNorm(word_width)
        self.decoder = nn.Linear(word_width, words)
        nn.init.zeros_(self.decoder.bias)
        if tied is not None:
            self.decoder.weight = tied.weight

    def forward(self, hidden_KH: Tensor) -> Tensor:
        """fp32 or the autocast dtype [K, V]."""
        logits_KV: Tensor = self.decoder(self.norm(F.gelu(self.transform(hidden_KH))))
        return logits_KV


class Inheritance(Method):
    """L = mean over masked tokens of (1 - r) * CE(S(m), w) + r * tau^2 KL(T(m) || S(m)), + mle_weight * CE(S(x), y).

    m is a masked token of the masked text, w the word that stood there; T is a masked language model, S the student's
    encoder under a head of its own. r = max(0, 1 - t / T_kd) falls from 1 at step t = 0 to 0 at
    T_kd = inheritance_share * (all steps): the student starts with its teacher's answers and ends with plain
    masked-language-model training. Terms: "mlm" is the first summand, "inheritance" the second.
    """

    uses_teacher: ClassVar[bool] = False
    name: Literal["inheritance"] = "inheritance"
    """Discriminator of the method section."""
    masked_lm_teacher: Annotated[str, Field(min_length=1)]
    """Hub name or folder of the teacher, a masked language model with the student's tokenizer."""
    temperature: Temperature = 1.0
    """tau of the softened distributions over words; the term is multiplied by tau^2."""
    inheritance_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """T_kd as a share of all steps: from there on the teacher is not asked any more."""
    mask_probability: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the tokens that are masked (80 % mask token, 10 % another word, 10 % unchanged)."""
    mle_weight: Weight = 0.0
    """Weight of the classification loss on the clean rows, beside the masked-language-model training."""

    @property
    def trains_classifier(self) -> bool:
        return self.mle_weight > 0

    def rate(self, moment: Moment) -> float:
        """r = max(0, 1 - t / T_kd)."""
        return max(0.0, 1.0 - moment.step / (self.inheritance_share * moment.total_steps))

    def build(self, setting: Setting) -> MaskedLMHead:
        """Load the teacher and draw the student's head."""
        teacher = setting.load_masked_lm(self.masked_lm_teacher, "method.masked_lm_teacher")
        teacher = teacher.to(setting.device).eval().requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(setting.seed)
            return MaskedLMHead(setting.student, Vocabulary(setting.tokenizer), teacher)

    def terms(
        self, batch: Batch, student: Encoder, teacher: Any | None, extras: nn.Module | None, moment: Moment
    ) -> dict[str, Tensor]:
        assert isinstance(extras, MaskedLMHead)
        masked = mask_tokens(batch, extras.vocabulary, self.mask_probability, keep_and_replace=True)
        terms = self._masked_terms(masked, student, extras, self.rate(moment))
        if self.mle_weight:
            terms["mle"] = self.mle_weight * supervised_loss(student.clean(batch).logits, batch)
        return terms

    def _masked_terms(
        self, masked: MaskedTokens, student: Encoder, head: MaskedLMHead, rate: float
    ) -> dict[str, Tensor]:
        teacher_KV = None
        if rate > 0:
            with torch.no_grad():
                teacher_KV = head.frozen[0].clean(masked.batch).logits.flatten(0, 1)[masked.places_K]
        hidden_BLH = student.clean(masked.batch, output_hidden_states=True).hidden_states[-1]
        loss_K, kd_K, _ = kd_loss(
            head(hidden_BLH.flatten(0, 1)[masked.places_K]),
            teacher_KV,
            masked.targets_K,
            temperature=self.temperature,
            kd_weight=rate,
            ce_weight=1.0 - rate,
            row_weights=masked.weight * masked.valid_K.float(),
            reduction="none",
            return_parts=True,
        )
        # The summands come detached from one pass over the logits: the first term carries the gradient of both.
        return {"mlm": masked.per_row(loss_K - kd_K), "inheritance": masked.per_row(kd_K)}
