"""What one optimizer step of one rank computes, from the configuration: which rows, by which model, how wide."""

import math
from dataclasses import dataclass

from mixkd_fast.configuration import DEFAULT_EPOCHS, Config, Precision, batch_arithmetic
from mixkd_fast.encoder_parts import FAMILIES
from mixkd_fast.planning.lengths import BatchLengths, sample_batches
from mixkd_fast.planning.models import PlannedModel
from mixkd_fast.planning.row_lengths import RowLengths
from mixkd_fast.planning.stored_answers import StoredAnswers, stored_answers

BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Workload:
    """The rows and forwards of one rank's step. Shares are per step: 1 runs in every step, 0 in none."""

    ranks: int
    batch_size: int
    micro_batch_size: int
    accumulation: int
    lengths: BatchLengths
    widest: int
    """Positions of the widest micro-batch that the data allows; memory must hold it."""
    student_clean: bool
    student_mixed: bool
    teacher_clean_share: float
    teacher_mixed: bool
    student_precision: Precision
    teacher_precision: Precision
    fused_encoder: bool
    """training.fused_encoder; it applies to families of encoder_parts whose weights are whole on each rank."""
    gradient_checkpointing: bool
    steps: int | None
    """Steps of the run; None where the number of training rows is not known."""
    target_share: float = 1.0
    """Of a causal_lm: share of the clean tokens that pass the output layers."""
    max_logits_mib: int = 512
    """Of a causal_lm: the method's limit of logits."""
    stored: StoredAnswers | None = None
    """Of a causal_lm: answers to the clean rows that come from a teacher store."""

    @property
    def mixed_rows(self) -> int:
        """Mixed rows of a micro-batch."""
        return int(self.lengths.mixed.shape[1])

    def is_fused(self, model: PlannedModel, stage: int) -> bool:
        """Whether the engine computes this model itself: last layer for the first token, one product for q, k, v."""
        return self.fused_encoder and model.family in FAMILIES and not model.own_forward and stage != 3

    @property
    def student_rows(self) -> int:
        """Rows of a micro-batch that the student learns from at once."""
        return self.micro_batch_size * self.student_clean + self.mixed_rows * self.student_mixed

    @property
    def teacher_rows(self) -> int:
        """Rows of a micro-batch's largest teacher forward."""
        return max(self.micro_batch_size * (self.teacher_clean_share > 0), self.mixed_rows * self.teacher_mixed)


def workload(config: Config, lengths: RowLengths, ranks: int) -> Workload:
    """The step of `ranks` ranks. Raises: ConfigurationError where they cannot share the batch evenly."""
    training, method = config.training, config.method
    arithmetic = batch_arithmetic(training, ranks)
    mixing = method.mixing()
    is_length_planned = training.batching == "length"
    sample = sample_batches(lengths, arithmetic.micro_batch_size, mixing, is_length_planned, training.batch_size)
    steps = training.steps
    if steps is None and lengths.num_rows is not None:
        steps = math.ceil((training.epochs or DEFAULT_EPOCHS) * lengths.num_rows / training.batch_size)
    language = config.task.kind == "causal_lm"
    stores = config.teacher is None or (config.teacher.store and not method.reads_teacher)
    epochs = None if steps is None or lengths.num_rows is None else steps * training.batch_size / lengths.num_rows
    # The teacher's answers on clean rows are the same in every epoch: the first one keeps them.
    share = 1.0 if epochs is None or not stores else min(1.0, 1.0 / epochs)
    if language:
        # Nothing of a language model's teacher is kept: it is asked in every step.
        asked = config.teacher is not None and method.needs_teacher and getattr(method, "kd_weight", 1.0) > 0
        share = float(asked and config.teacher is not None and config.teacher.offline is None)
    return Workload(
        ranks=ranks,
        batch_size=arithmetic.batch_size,
        micro_batch_size=arithmetic.micro_batch_size,
        accumulation=arithmetic.accumulation,
        lengths=sample,
        widest=lengths.widest,
        student_clean=method.needs_clean_student,
        student_mixed=mixing is not None,
        teacher_clean_share=share if language or method.needs_clean_teacher or method.reads_teacher else 0.0,
        teacher_mixed=method.needs_mixed_teacher,
        student_precision=training.precision,
        teacher_precision=(config.teacher.precision if config.teacher else None) or training.precision,
        fused_encoder=training.fused_encoder,
        gradient_checkpointing=training.gradient_checkpointing,
        steps=steps,
        target_share=lengths.target_share,
        max_logits_mib=int(getattr(method, "max_logits_mib", 512)),
        stored=stored_answers(config),
    )
