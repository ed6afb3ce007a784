"""What a distillation method is: options plus a rule that turns (batch, student, teacher) into loss terms.

Legend of shape suffixes: B clean rows of the micro-batch, M = B * mixed_rows mixed rows, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mixkd_fast.errors import ConfigurationError
from mixkd_fast.mix import first_rows
from mixkd_fast.mixing import Mixing
from mixkd_fast.section import Section

if TYPE_CHECKING:
    from mixkd_fast.data.batching import Batch
    from mixkd_fast.data.tokenization import TokenRows
    from mixkd_fast.models import Encoder

Kind = Literal["classification", "regression", "causal_lm"]


@dataclass(frozen=True)
class Moment:
    """Where the run stands; schedules of methods depend on it."""

    step: int
    total_steps: int
    epoch: float


class Texts(Protocol):
    """Rows of ordinary text beside the data set."""

    def __len__(self) -> int: ...

    def batch(self, numbers: NDArray[np.int64]) -> Batch:
        """These rows as one training batch, on the CPU."""
        ...


class RowScores(NamedTuple):
    """How likely a model finds rows of text."""

    rows: NDArray[np.int64]
    """[N]: numbers in the source, ascending; rows that were too long for a prompt and an answer are not scored."""
    mean_nll: NDArray[np.float64]
    """[N]: mean negative log-likelihood of a row's targets, in nats."""
    read_by: tuple[str, int, str]
    """Hash of the tokenizer, and max_length in tokens, that made sequences of the rows; hash of these sequences."""


class RowChoice(NamedTuple):
    """Which rows are trained on, and why."""

    rows: NDArray[np.int64]
    """[N]: numbers in the source of all rows that have a score, ascending."""
    scores: NDArray[np.float64]
    """[N]: higher is better."""
    kept: NDArray[np.bool_]
    """[N]"""


@dataclass(frozen=True)
class Setting:
    """What a run has before its first step, for methods that prepare something. All calls are collective."""

    student: Encoder
    teacher: Any | None
    """A `FrozenTeacher`."""
    rows: TokenRows
    """All training rows, the same on every rank."""
    num_labels: int
    """1 for a regression, 0 for a causal language model."""
    kind: Kind
    tokenizer: Any
    seed: int
    """training.seed"""
    device: torch.device
    collect: Callable[[Callable[[Batch], Tensor]], NDArray[np.float32]]
    """Apply a function Batch -> [B, width] to all training rows, shared among the ranks: [N, width] in row order."""
    load_teacher: Callable[[str, str], Any]
    """(hub name or folder, field for messages) -> a further `FrozenTeacher` for this task, whole in memory."""
    load_masked_lm: Callable[[str, str], Encoder]
    """(hub name or folder, field for messages) -> a masked language model with the student's tokenizer, fp32 on the
    CPU; its logits are [B, L, V]."""
    load_texts: Callable[[list[str], str], Texts]
    """(files of plain text, field for messages) -> packed rows of a causal language model."""
    new_student: Callable[[int], Encoder]
    """Seed -> one more student as the configuration describes it, fp32 on the CPU."""
    share: Callable[[Any], Any]
    """A value of every rank -> rank 0's, on every rank."""
    sum_over_ranks: Callable[[Tensor], Tensor] = torch.Tensor.clone
    """Sum a tensor over all ranks, for what a pass of `collect` adds up by itself; one rank's by default."""
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    """A value of every rank -> all of them in rank order, on every rank; one rank's by default."""


class Method(Section):
    """Base of all methods: frozen options and the loss. What is trained beside the student is made by `build`."""

    uses_teacher: ClassVar[bool] = True
    """Whether a run of this method needs a teacher, unless its options say otherwise (`needs_teacher`)."""
    kinds: ClassVar[tuple[Kind, ...]] = ("classification", "regression")
    """Kinds of tasks that the method is defined for."""
    takes_stored_teacher: ClassVar[bool] = False
    """Whether its loss asks the teacher about the corpus's own rows alone, by `token_terms`: a store can answer."""

    def mixing(self) -> Mixing | None:
        """How rows are paired and interpolated, or None if the method needs no mixed rows."""
        return None

    @property
    def needs_teacher(self) -> bool:
        """Whether a run with these options needs a teacher."""
        return self.uses_teacher

    @property
    def needs_clean_teacher(self) -> bool:
        """Whether the teacher's logits of the clean rows enter the loss: those may be kept from epoch to epoch."""
        return False

    @property
    def reads_teacher(self) -> bool:
        """Whether the teacher runs on the clean rows in every step, whatever is kept: its layers enter the loss."""
        return False

    @property
    def needs_mixed_teacher(self) -> bool:
        """Whether the teacher runs on the mixed rows."""
        return False

    @property
    def needs_clean_student(self) -> bool:
        """Whether the student runs on the clean rows."""
        return True

    @property
    def reads_layers(self) -> bool:
        """Whether the loss reads what layers compute (hidden states, projections), of the student or the teacher."""
        return self.reads_teacher

    @property
    def not_planned(self) -> list[str]:
        """What of this method `mixkd-fast plan` does not count, as noun phrases for its list of assumptions.

        A method that reads layers, or prepares modules in `build`, says so by default; one that knows better overrides
        it.
        """
        texts = []
        if self.reads_layers:
            texts.append(
                "reading hidden states and projections of layers: they are kept for the backward, and models that are "
                "read run their own forward instead of the fused one"
            )
        if type(self).build is not Method.build:
            texts.append("modules that the method prepares or trains beside the student")
        return texts

    @property
    def trains_classifier(self) -> bool:
        """Whether the student's logits are trained; if not, evaluations say nothing and the last weights are kept."""
        return True

    def check_kind(self, kind: str) -> None:
        """Raises: ConfigurationError where the method is for tasks of other kinds."""
        if kind not in self.kinds:
            name = getattr(self, "name", type(self).__name__)
            raise ConfigurationError(f'method "{name}" is for {" and ".join(self.kinds)} tasks; this is a {kind}')

    @property
    def without_effect(self) -> list[str]:
        """Options that are not at their default and change nothing beside the others, each with the reason."""
        return []

    def unless_default(self, names: Iterable[str], why: str) -> list[str]:
        """For `without_effect`: those of the options that are not at their default."""
        fields = type(self).model_fields
        return [f"method.{name}: {why}" for name in names if getattr(self, name) != fields[name].default]

    def check(self, setting: Setting) -> None:
        """Called before `build`. Raises: ModelError for models that the method cannot compare."""

    def build(self, setting: Setting) -> nn.Module | None:
        """Further trainable modules (projections, more students); trained and checkpointed beside the student.

        Their buffers are checkpointed too. Frozen models belong into a tuple, where torch does not see them.
        """
        return None

    def choose_rows(self, scores: Callable[[str, str], RowScores]) -> RowChoice | None:
        """Which training rows to train on, asked before the run; None for all of them.

        Args: scores = (folder of a store of kind "nll", field for messages) -> its scores of the training rows.
        """
        return None

    def teacher_logits(self, batch: Batch, teacher: Any, extras: nn.Module | None) -> Tensor:
        """What the run reports and compares with as the teacher's answers in evaluation: logits [B, C]."""
        logits: Tensor = teacher.clean(batch).logits
        return logits

    def more_students(self, extras: nn.Module | None) -> list[Encoder]:
        """Students among the extras; evaluated and saved at the end of the run as student_2, student_3, ..."""
        return []

    def terms(
        self, batch: Batch, student: Encoder, teacher: Any | None, extras: nn.Module | None, moment: Moment
    ) -> dict[str, Tensor]:
        """Weighted loss terms of a micro-batch.

        Args: batch with B clean rows; student and teacher take `clean(batch)`, `mixed(batch, mixing)`, and
        `both(batch, mixing)`, which is one forward; the teacher is frozen and gives no gradient; extras is what
        `build` returned.
        Returns: name -> tensor [B], one value per clean row. The training loss is the sum of all terms over the
        rows of the whole accumulated, cross-rank batch, divided by its number of rows: the engine divides.
        """
        raise NotImplementedError

    @property
    def prepares_batches(self) -> bool:
        """Whether `prepare_batch` does anything; the run counts the targets of the step anew after it."""
        return type(self).prepare_batch is not Method.prepare_batch

    def prepare_batch(
        self, batch: Batch, student: Any, teacher: Any | None, extras: nn.Module | None, moment: Moment
    ) -> Batch:
        """The micro-batch to train on in the place of this one, such as rows that the student generates.

        Called before the step for every micro-batch, on every rank, without gradients, the student in evaluation
        mode; torch's generator is seeded by (seed, step, rank). The number of rows must stay; `mean_targets` is set
        anew by the run, over all micro-batches and ranks, and so is that of a `companion`.
        """
        return batch

    def after_evaluation(self, metrics: Mapping[str, Mapping[str, float]], extras: nn.Module | None) -> None:
        """Called on every rank after each evaluation, before a checkpoint: split -> metric -> value of the student."""

    @property
    def follows_steps(self) -> bool:
        """Whether `after_step` does anything; the host waits for the device after each step of a method that does."""
        return type(self).after_step is not Method.after_step

    def after_step(self, student: Encoder, extras: nn.Module | None, moment: Moment) -> None:
        """Called after every optimizer step, for moving averages and the like."""


def supervised_loss(logits: Tensor, batch: Batch) -> Tensor:
    """The loss of the batch's own targets, unreduced: [B].

    Cross entropy with hard or soft labels for [B, C] logits, squared error for a regression's [B, 1].
    """
    return _target_loss(logits, batch, slice(0, batch.num_rows))


def mixed_supervised_loss(logits_M: Tensor, batch: Batch) -> Tensor:
    """The loss of the mixed targets y' = lam * y_i + (1 - lam) * y_j, averaged over each row's mixed rows: [B].

    For classification this equals lam * CE(s, y_i) + (1 - lam) * CE(s, y_j); a regression takes (s - y')^2.
    """
    assert batch.partner is not None and batch.lam is not None
    num_mixed = batch.partner.shape[0]
    if batch.labels.is_floating_point():
        own = first_rows(batch.labels, num_mixed, batch.num_rows)
        target = batch.lam * own + (1 - batch.lam) * batch.labels[batch.partner]
        return per_clean_row((logits_M.float().squeeze(-1) - target).square(), batch)
    first = torch.arange(num_mixed, device=logits_M.device) % batch.num_rows
    own_loss = _target_loss(logits_M, batch, first)
    partner_loss = _target_loss(logits_M, batch, batch.partner)
    return per_clean_row(batch.lam * own_loss + (1 - batch.lam) * partner_loss, batch)


def per_clean_row(values_M: Tensor, batch: Batch) -> Tensor:
    """Mean over the mixed rows of each clean row: [M] -> [B]."""
    return values_M.view(-1, batch.num_rows).mean(0)


def _target_loss(logits: Tensor, batch: Batch, rows: slice | Tensor) -> Tensor:
    logits = logits.float()
    if batch.labels.is_floating_point():
        return (logits.squeeze(-1) - batch.labels[rows]).square()
    if batch.soft_labels is not None:
        return F.cross_entropy(logits, batch.soft_labels[rows], reduction="none")
    return F.cross_entropy(logits, batch.labels[rows], reduction="none")
