"""Distillation in `transformers.Trainer`: causal language models, and classifiers with or without MixKD.

Legend of shape suffixes: B rows, M mixed rows, C classes.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import Trainer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from mixkd_fast.data.next_tokens import IGNORED
from mixkd_fast.errors import ModelError
from mixkd_fast.integrations.accumulated_mean import AccumulatedMean, EvaluatedRows
from mixkd_fast.integrations.frozen_model import FrozenModel
from mixkd_fast.integrations.mixed_rows import KEY, Fill, MixedRows, draw_mixed_rows
from mixkd_fast.integrations.model_calls import ModelCall, WrappedEncoder, core_of, parameters_of
from mixkd_fast.integrations.token_loss import Loss, TokenLoss, checked_loss, targets_of, unweighted
from mixkd_fast.losses import KDLoss, KDLossParts
from mixkd_fast.mixing import Mixing

Task = Literal["causal_lm", "sequence_classification"]


class DistillTrainer(AccumulatedMean, Trainer):
    """A `transformers.Trainer` whose model learns from a frozen teacher.

    The loss is that of `mixkd_fast.losses.kd_loss` (or `linear_kd_loss`): kd_weight tau^2 D(teacher, student) +
    ce_weight CE(labels), a mean over the targets of the whole accumulated, cross-process batch: rows of a classifier,
    predicted tokens of a causal language model. With `mixing` a classifier's batch also has mixed rows (MixKD), whose
    `mixed_loss` has the same divisor times mixing.mixed_rows:

    L = loss(S(x), T(x), y) + mixed_loss(S(x'), T(x'), lam y_i + (1 - lam) y_j), x' = lam e(x_i) + (1 - lam) e(x_j)

    The paper's SM+TMKD is loss={"kd_weight": 0.0, "ce_weight": 1.0}, mixed_loss={"ce_weight": 1.0, "temperature": 2.0}.
    Evaluation reports `eval_loss`, `eval_kd_loss` and `eval_task_loss` of the rows as they are. What is saved is the
    student alone.
    """

    _signature_columns: list[str] | None
    _student: Any = None
    """The model that `_bind_student` has seen last."""

    def __init__(
        self,
        *arguments: Any,
        teacher_model: Any,
        loss: Loss | Mapping[str, Any] | None = None,
        mixing: Mixing | Mapping[str, Any] | None = None,
        mixed_loss: KDLoss | Mapping[str, Any] | None = None,
        task: Task | None = None,
        **more: Any,
    ) -> None:
        """A Trainer's own arguments, and by name:

        Args:
            teacher_model: a loaded model of the same task and tokenizer, in the dtype it is to have.
            loss: a `KDLoss`; a `LinearKDLoss` for causal language models, of which whole logits then never exist in
                training; or options of a `KDLoss`. Default: `KDLoss()`.
            mixing: options of the mixed rows, see `mixkd_fast.mixing.Mixing`; None: there are none.
            mixed_loss: `KDLoss` or options for the mixed rows; default `loss`.
            task: "causal_lm" or "sequence_classification"; default: what the model's class is for.
        Raises: ValueError for an option out of its range, or of the Trainer that would change the loss; ModelError for
            models that do not fit the task or each other.
        """
        self.loss = checked_loss(loss, "loss")
        super().__init__(*arguments, **more)
        # With `loss_is_scaled_for_ga`, for versions of transformers that do not know that one yet.
        self.model_accepts_loss_kwargs = True
        _check_trainer(self)
        self.task: Task = _task_of(self.model) if task is None else task
        self.teacher = FrozenModel(teacher_model, self.accelerator)
        self.mixing = Mixing(**mixing) if isinstance(mixing, Mapping) else mixing
        if self.task == "causal_lm":
            if self.mixing is not None:
                raise ValueError(f"mixing = {mixing!r}: allowed for task 'sequence_classification' alone")
        elif self.task == "sequence_classification":
            self._prepare_classification(mixed_loss)
        else:
            raise ValueError(f"task = {task!r}; allowed: 'causal_lm', 'sequence_classification'")
        self._bind_student()

    def _bind_student(self) -> None:
        """Build what calls the student; again when it is another model, as `model_init` makes one for each run."""
        student = core_of(self.model)
        if student is self._student:
            return
        if self.task == "causal_lm":
            self._token_loss = TokenLoss(self.loss, self.model, self.teacher.model, self.teacher, self.accelerator)
        else:
            _check_classifiers(self.model, self.teacher.model)
            self._student_call = ModelCall(self.model)
            if self.mixing is not None:
                self._student_encoder = WrappedEncoder(self.model)
        self._student = student

    def _prepare_classification(self, mixed_loss: KDLoss | Mapping[str, Any] | None) -> None:
        if not isinstance(self.loss, KDLoss):
            raise ValueError("loss = LinearKDLoss: allowed for task 'causal_lm' alone; a classifier's head is small")
        self._teacher_call = ModelCall(self.teacher.model)
        mixed = checked_loss(self.loss if mixed_loss is None else mixed_loss, "mixed_loss")
        assert isinstance(mixed, KDLoss)
        self.mixed_loss = mixed
        if self.mixing is None:
            return
        if self.mixing.pairing != "batch":
            raise ValueError(f"mixing.pairing = {self.mixing.pairing!r}; allowed in a Trainer: 'batch'")
        if self.args.n_gpu > 1:
            raise ValueError("mixing: not with torch.nn.DataParallel; start one process per GPU (torchrun, accelerate)")
        self._teacher_encoder = WrappedEncoder(self.teacher.model).through(self.teacher)

    def complete(self, batches: list[Any]) -> list[Any]:
        """The micro-batches with their partners."""
        if self.mixing is None or not batches:
            return batches
        for batch in batches:
            if batch.get("labels") is None:
                raise ValueError("the batch has no `labels`; mixing needs them for the mixed targets")
            _class_labels(batch["labels"])
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        drawn = draw_mixed_rows(batches, self.mixing, seed, self.state.global_step, self._fill, self.accelerator)
        return [{**batch, KEY: rows} for batch, rows in zip(batches, drawn, strict=True)]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        """The distillation loss of a micro-batch; see `transformers.Trainer`."""
        self._bind_student()
        divisor = self.divisor(num_items_in_batch)
        if self.task == "causal_lm":
            loss, outputs = self._token_loss(model, inputs, divisor, with_logits=return_outputs)
        else:
            loss, outputs = self._classification_loss(model, inputs, divisor)
        return (loss, outputs) if return_outputs else loss

    def num_targets(self, inputs: Any) -> Tensor:
        if self.task == "causal_lm":
            return targets_of(inputs).ne(IGNORED).sum()
        if inputs.get("labels") is None:
            return torch.tensor(len(inputs["input_ids"]))
        return _class_labels(inputs["labels"]).ne(IGNORED).sum()

    def weights_of_parts(self) -> tuple[float, float]:
        return self.loss.options.kd_weight, self.loss.options.ce_weight

    def evaluate_rows(self, model: Any, inputs: Any, with_outputs: bool) -> EvaluatedRows:
        self._bind_student()
        if self.task == "causal_lm":
            rows, labels, outputs = self._token_loss.rows(model, inputs, with_logits=with_outputs)
            return EvaluatedRows(rows.kd.sum(-1), rows.task.sum(-1), labels.ne(IGNORED).sum(-1), outputs)
        assert isinstance(self.loss, KDLoss)
        labels = _class_labels(inputs["labels"])
        outputs = self._student_call.logits(model, inputs)
        teacher_logits = self._teacher_call.logits(self.teacher, inputs).logits
        parts = unweighted(self.loss)(outputs.logits, teacher_logits, labels)
        assert isinstance(parts, KDLossParts)
        return EvaluatedRows(parts.kd, parts.ce, labels.ne(IGNORED), outputs)

    def _classification_loss(self, model: Any, inputs: Any, divisor: Tensor | float | None) -> tuple[Tensor, Any]:
        labels = inputs.get("labels")
        labels = None if labels is None else _class_labels(labels)
        mixed: MixedRows | None = inputs.get(KEY)
        if mixed is None:
            teacher_logits = None
            if self.loss.options.kd_weight:
                teacher_logits = self._teacher_call.logits(self.teacher, inputs).logits
            outputs = self._student_call.logits(model, inputs)
            return _value(self.loss(outputs.logits, teacher_logits, labels, normalizer=divisor)), outputs
        assert self.mixing is not None
        batch = mixed.batch(inputs, self._fill)
        clean_T, mixed_T = self._ask_teacher(batch)
        clean_S, mixed_S = self._student_encoder.through(model).both(batch, self.mixing)
        loss = _value(self.loss(clean_S.logits, clean_T, labels, normalizer=divisor))
        # The divisor of M = B k mixed rows; without one, each loss divides by the rows that it has.
        divisor_M = None if divisor is None else divisor * self.mixing.mixed_rows
        first, second = mixed.labels(inputs)
        loss = loss + _value(self.mixed_loss(mixed_S.logits, mixed_T, first, second, mixed.lam, normalizer=divisor_M))
        return loss, clean_S

    def _ask_teacher(self, batch: Any) -> tuple[Tensor | None, Tensor | None]:
        """Its logits of the clean and of the mixed rows, where they have a weight."""
        assert self.mixing is not None
        clean, mixed = self.loss.options.kd_weight != 0, self.mixed_loss.options.kd_weight != 0
        teacher = self._teacher_encoder
        with torch.no_grad():
            if clean and mixed:
                both = teacher.both(batch, self.mixing)
                return both[0].logits, both[1].logits
            return (
                teacher.clean(batch).logits if clean else None,
                teacher.mixed(batch, self.mixing).logits if mixed else None,
            )

    @property
    def _fill(self) -> Fill:
        tokenizer = self.processing_class
        pad_id = getattr(tokenizer, "pad_token_id", None)
        pad_id = core_of(self.model).config.pad_token_id if pad_id is None else pad_id
        return Fill(0 if pad_id is None else pad_id, getattr(tokenizer, "padding_side", "right"))

    def _set_signature_columns_if_needed(self) -> None:
        """The columns that either model takes: a teacher with token types must get them beside a student without."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            known: list[str] = self._signature_columns or []
            more = [name for name in parameters_of(self.teacher.model) if name not in known]
            self._signature_columns = [*known, *more]


def _value(result: Tensor | KDLossParts) -> Tensor:
    return result.loss if isinstance(result, KDLossParts) else result


def _class_labels(labels: Tensor) -> Tensor:
    if labels.is_floating_point() or labels.dim() != 1:
        shape = f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise ValueError(f"labels are {shape}; allowed: one class number per row (regressions: mixkd_fast.distill)")
    return labels


def _task_of(model: Any) -> Task:
    name = type(core_of(model)).__name__
    if name in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values():
        return "sequence_classification"
    if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return "causal_lm"
    raise ValueError(f"task is not given and {name} tells none; allowed: 'causal_lm', 'sequence_classification'")


def _check_classifiers(student: Any, teacher: Any) -> None:
    ours, theirs = core_of(student).config, core_of(teacher).config
    if ours.num_labels != theirs.num_labels:
        raise ModelError(f"teacher_model has {theirs.num_labels} classes, model {ours.num_labels}; they must agree")
    if ours.num_labels == 1 or ours.problem_type in ("regression", "multi_label_classification"):
        kind = ours.problem_type or "regression"
        raise ValueError(f"problem_type = {kind!r}; allowed: one class per row (regressions: mixkd_fast.distill)")


def _check_trainer(trainer: Any) -> None:
    """Refuse options of the Trainer that its loss would have followed and this one would not."""
    if trainer.args.label_smoothing_factor:
        raise ValueError(f"label_smoothing_factor = {trainer.args.label_smoothing_factor}; allowed: 0")
    if trainer.compute_loss_func is not None:
        raise ValueError("compute_loss_func is given; allowed: None, the loss is `loss`")
    sizes = getattr(trainer.accelerator, "parallelism_config", None)
    for name in ("tp_size", "cp_size", "sp_size"):
        size = getattr(sizes, name, 1) or 1
        if size > 1:
            raise ValueError(f"parallelism_config.{name} = {size}; allowed: 1")
    if trainer.accelerator.distributed_type == DistributedType.MEGATRON_LM:
        raise ValueError("distributed_type = MEGATRON_LM; allowed: data parallelism, DeepSpeed, FSDP")
