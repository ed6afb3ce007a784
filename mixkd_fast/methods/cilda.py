"""CILDA: adversarially rewritten rows and contrastive layers (Haidar et al., COLING 2022, arXiv 2204.07674).

Legend of shape suffixes: B clean rows, L positions, K masked tokens, V words, E embedding width, P projection width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mixkd_fast.errors import ConfigurationError
from mixkd_fast.methods.base import Moment, Setting
from mixkd_fast.methods.kd import Temperature, Weight
from mixkd_fast.methods.masked_tokens import MaskedTokens, Vocabulary, mask_tokens
from mixkd_fast.methods.mixkd import MixedRowDistillation

if TYPE_CHECKING:
    from mixkd_fast.data.batching import Batch
    from mixkd_fast.models import Encoder


class Adversary(nn.Module):
    """The trained parts beside the student: the generator, and one projection per model."""

    def __init__(self, setting: Setting, generator: Encoder, projection_size: int) -> None:
        super().__init__()
        student, teacher = setting.student, setting.teacher
        assert teacher is not None
        self.generator = generator
        self.vocabulary = Vocabulary(setting.tokenizer)
        # Frozen, and in a tuple: neither trained nor checkpointed.
        self.teacher_words = (teacher.word_table,)
        self.student_words = _Words(student.word_table)
        self.student_projection = nn.Linear(_pooled_width(student.config), projection_size, bias=False)
        self.teacher_projection = nn.Linear(_pooled_width(teacher.model.config), projection_size, bias=False)


class _Words(nn.Module):
    """Probabilities over words -> weighted word embeddings. A module, so that ZeRO-3 gathers the table for it."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        assert isinstance(table.weight, nn.Parameter)
        self.weight = table.weight

    def forward(self, probabilities_KV: Tensor) -> Tensor:
        return probabilities_KV.to(self.weight.dtype) @ self.weight[: probabilities_KV.shape[1]]


class CILDA(MixedRowDistillation):
    """L = L_MixKD(x) + adversarial_weight * tau^2 KL(T(x') || S(x')) + contrastive_weight * L_NCE.

    x' is x with some tokens rewritten by a generator G, a masked language model: soft words, as probability-weighted
    word embeddings of each model's own table, from a Gumbel-softmax of G's logits. The student minimises L; G maximises
    generator_weight times what depends on x', by a gradient of the opposite sign, in the same optimizer step.
    L_NCE = -log exp(s_i t_i / c) / sum_j exp(s_i t_j / c): s and t are the student's and the teacher's layers, each
    averaged over the row's tokens, side by side, projected (both projections are learned) and brought to length 1; j
    runs over the rows of the micro-batch, c = contrastive_temperature. L_MixKD has the weights of method mixkd.
    """

    name: Literal["cilda"] = "cilda"
    """Discriminator of the method section."""
    generator: Annotated[str, Field(min_length=1)]
    """Hub name or folder of the generator, a masked language model with the student's tokenizer; it is trained."""
    adversarial_weight: Weight = 1.0
    """Weight of the distance to the teacher on the rewritten rows."""
    contrastive_weight: Weight = 1.0
    """Weight of the InfoNCE loss between the projected layers."""
    generator_weight: Weight = 1.0
    """Factor of the gradient that the generator gets, beside its opposite sign."""
    mask_probability: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Share of the tokens that are rewritten."""
    gumbel_temperature: Temperature = 1.0
    """Temperature of the Gumbel-softmax; lower is nearer to single words."""
    straight_through: bool = True
    """Forward with the most probable word alone, backward as if it were soft; false mixes words forward too."""
    contrastive_rows: Literal["both", "clean"] = "both"
    """Rows of the InfoNCE loss: clean and rewritten ones (mean of the two), or the clean ones alone."""
    contrastive_temperature: Temperature = 0.1
    """c of the InfoNCE loss."""
    projection_size: Annotated[int, Field(gt=0)] = 128
    """P: width of the projected layers."""
    _factors: ClassVar[tuple[str, ...]] = ("generator_weight",)

    @property
    def trains_classifier(self) -> bool:
        return self.needs_clean_student or self.needs_mixed_student or self.adversarial_weight > 0

    @property
    def reads_teacher(self) -> bool:
        return self.contrastive_weight > 0

    @property
    def needs_clean_teacher(self) -> bool:
        # With the layers come the logits: kept ones would save nothing.
        return super().needs_clean_teacher and not self.contrastive_weight

    def build(self, setting: Setting) -> Adversary:
        """Load the generator and draw the projections."""
        if setting.teacher is not None and _has_8_bits(setting.teacher.model):
            raise ConfigurationError("teacher.quantization: gradients do not pass through 8-bit layers; leave it out")
        generator = setting.load_masked_lm(self.generator, "method.generator")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(setting.seed)
            return Adversary(setting, generator, self.projection_size)

    def terms(
        self, batch: Batch, student: Encoder, teacher: Any | None, extras: nn.Module | None, moment: Moment
    ) -> dict[str, Tensor]:
        assert isinstance(extras, Adversary) and teacher is not None
        clean: Any
        if self.contrastive_weight:
            clean, teacher_clean = student.read(batch), teacher.read(batch)
        else:
            teacher_clean = teacher.clean(batch) if self.kd_weight else None
            clean = student.clean(batch) if self.needs_clean_student else None
        mixed = student.mixed(batch, self) if self.mixing() is not None else None
        teacher_mixed = teacher.mixed(batch, self) if self.tmkd_weight else None
        wanted = teacher_clean if self.kd_weight else None
        logits = [None if output is None else output.logits for output in (clean, mixed, wanted, teacher_mixed)]
        terms = self.objective(batch, *logits)
        masked = mask_tokens(batch, extras.vocabulary, self.mask_probability, keep_and_replace=False)
        words_KV = reverse_gradient(self.rewrite(masked, extras), self.generator_weight)
        own_words = _placed(
            student.word_table(batch.input_ids[: batch.num_rows]), extras.student_words(words_KV), masked
        )
        table: Any = extras.teacher_words[0]
        soft_words = words_KV.to(table.weight.dtype) @ table.weight[: words_KV.shape[1]]
        teacher_words = _placed(table(batch.input_ids[: batch.num_rows]), soft_words, masked)
        rewritten = student.embedded(batch, own_words, output_hidden_states=True)
        of_teacher = teacher.embedded(batch, teacher_words, output_hidden_states=True)
        if self.adversarial_weight:
            terms["adversarial"] = self.adversarial_weight * self._divergence(rewritten.logits, of_teacher.logits)
        if self.contrastive_weight:
            loss = self._contrast(batch, extras, clean.hidden_states, teacher_clean.hidden_states)
            if self.contrastive_rows == "both":
                further = self._contrast(batch, extras, rewritten.hidden_states, of_teacher.hidden_states)
                loss = (loss + further) / 2
            terms["contrastive"] = self.contrastive_weight * loss
        return terms

    def rewrite(self, masked: MaskedTokens, adversary: Adversary) -> Tensor:
        """The generator's words for the masked tokens: [K, V], rows of sum 1, no special words."""
        special_V = adversary.vocabulary.special_V
        logits_KV = adversary.generator.clean(masked.batch).logits.flatten(0, 1)[masked.places_K, : len(special_V)]
        noise_KV = -torch.empty_like(logits_KV, dtype=torch.float32).exponential_().log()
        scores_KV: Tensor = ((logits_KV.float() + noise_KV) / self.gumbel_temperature).masked_fill(
            special_V, -torch.inf
        )
        soft_KV: Tensor = scores_KV.softmax(-1)
        if not self.straight_through:
            return soft_KV
        hard_KV = torch.zeros_like(soft_KV).scatter(1, soft_KV.argmax(-1, keepdim=True), 1.0)
        straight_KV: Tensor = hard_KV + (soft_KV - soft_KV.detach())
        return straight_KV

    def _divergence(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """d(T(x'), S(x')): [B]. Written out: unlike `kd_loss`, the teacher's answer takes a gradient, to its input."""
        student, teacher = student_logits.float(), teacher_logits.float()
        if self.distance == "mse" or student.shape[-1] == 1:
            return (teacher - student).square().mean(-1)
        log_p, log_q = ((logits / self.temperature).log_softmax(-1) for logits in (teacher, student))
        return self.temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)

    def _contrast(self, batch: Batch, adversary: Adversary, own: Any, theirs: Any) -> Tensor:
        """InfoNCE of student's and teacher's hidden states of the same rows: [B]."""
        mask_BL = batch.attention_mask[: batch.num_rows]
        # The projections' own precision: bf16 where DeepSpeed keeps the module in it.
        dtype = adversary.student_projection.weight.dtype
        s_BP = F.normalize(adversary.student_projection(_pooled(own, mask_BL).to(dtype)).float(), dim=-1)
        t_BP = F.normalize(adversary.teacher_projection(_pooled(theirs, mask_BL).to(dtype)).float(), dim=-1)
        scores_BB = s_BP @ t_BP.T / self.contrastive_temperature
        return F.cross_entropy(scores_BB, torch.arange(len(s_BP), device=s_BP.device), reduction="none")


def reverse_gradient(values: Tensor, factor: float) -> Tensor:
    """The values as they are; their gradient comes back times -factor."""
    reversed_values: Tensor = _ReversedGradient.apply(values, factor)
    return reversed_values


class _ReversedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * gradient, None


def _placed(words_BLE: Tensor, soft_KE: Tensor, masked: MaskedTokens) -> Tensor:
    """The rows' own word embeddings with soft words in the masked places: [B, L, E]."""
    flat = words_BLE.flatten(0, 1)
    soft_KE = torch.where(masked.valid_K[:, None], soft_KE.to(flat.dtype), flat[masked.places_K])
    return flat.index_copy(0, masked.places_K, soft_KE).view_as(words_BLE)


def _pooled(hidden_states: Any, mask_BL: Tensor) -> Tensor:
    """Every layer's hidden states averaged over the tokens, side by side: fp32 [B, layers * H]."""
    keep_BL1 = (mask_BL != 0)[..., None].float()
    return torch.cat([(state.float() * keep_BL1).sum(1) / keep_BL1.sum(1) for state in hidden_states[1:]], -1)


def _pooled_width(config: Any) -> int:
    return int(config.num_hidden_layers) * int(config.hidden_size)


def _has_8_bits(model: nn.Module) -> bool:
    narrow = any(buffer.dtype == torch.float8_e4m3fn for buffer in model.buffers())
    return narrow or any("quantized" in type(module).__module__ for module in model.modules())
