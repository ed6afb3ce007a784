"""The loss of a causal language model's tokens in a trainer: from logits, or from hidden states and heads.

Legend of shape suffixes: B rows, L positions, H width.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from accelerate.utils import DistributedType
from torch import Tensor

from mixkd_fast.causal_lm import Head
from mixkd_fast.data.next_tokens import IGNORED, next_token_labels
from mixkd_fast.errors import ModelError
from mixkd_fast.integrations.frozen_model import zero3_section
from mixkd_fast.integrations.model_calls import ModelCall, head_in_memory
from mixkd_fast.losses import KDLoss, KDLossParts, LinearKDLoss, linear_kd_loss

Loss = KDLoss | LinearKDLoss


class TokenRows(NamedTuple):
    """Of every position, unweighted and not reduced: [B, L]."""

    kd: Tensor
    task: Tensor


def checked_loss(loss: Loss | Mapping[str, Any] | None, name: str) -> Loss:
    """A loss from options. Raises: ValueError for a reduction or an ignore_index that a trainer cannot use."""
    made = KDLoss(**loss) if isinstance(loss, Mapping) else KDLoss() if loss is None else loss
    if not isinstance(made, KDLoss | LinearKDLoss):
        raise ValueError(f"{name} = {loss!r}; allowed: a KDLoss, a LinearKDLoss, or options of KDLoss")
    if made.reduction != "mean":
        raise ValueError(f"{name}.reduction = {made.reduction!r}; allowed: 'mean', which the trainer divides itself")
    if made.ignore_index != IGNORED:
        raise ValueError(f"{name}.ignore_index = {made.ignore_index}; allowed: {IGNORED}, which trainers count by")
    return made


def unweighted(loss: KDLoss) -> KDLoss:
    """The same divergence with both weights 1, not reduced, in parts."""
    options = {**loss.options._asdict(), "kd_weight": 1.0, "ce_weight": 1.0, "inplace": False}
    return KDLoss(**options, ignore_index=loss.ignore_index, reduction="none", return_parts=True, backend=loss.backend)


def targets_of(inputs: Mapping[str, Any]) -> Tensor:
    """The token that each position predicts, or -100: [B, L]. `shift_labels` are taken as they are.

    Raises: ValueError without labels.
    """
    if inputs.get("shift_labels") is not None:
        shifted: Tensor = inputs["shift_labels"]
        return shifted
    labels = inputs.get("labels")
    if labels is None:
        raise ValueError(
            "the batch has no `labels`; a causal language model learns from labels, -100 where it does not"
        )
    mask = inputs.get("attention_mask")
    # A mask of other than two dimensions is the model's own affair; the labels say then what is learnt.
    mask = torch.ones_like(labels) if mask is None or mask.shape != labels.shape else mask
    return next_token_labels(labels, labels != IGNORED, mask)


class TokenLoss:
    """`loss` between a student and a frozen teacher on the tokens of a batch."""

    def __init__(self, loss: Loss, student: Any, teacher: Any, ask: Callable[..., Any], accelerator: Any) -> None:
        """Args: ask = the teacher's forward, frozen and without gradients.

        Raises: ValueError or ModelError where a linear loss cannot reach the heads.
        """
        self.loss, self._ask, self._accelerator = loss, ask, accelerator
        self._student, self._teacher = ModelCall(student), ModelCall(teacher)
        if isinstance(loss, LinearKDLoss):
            _check_linear(loss, self._student, self._teacher, accelerator)

    def __call__(
        self, model: Any, inputs: Mapping[str, Any], divisor: Tensor | float | None, with_logits: bool
    ) -> tuple[Tensor, Any]:
        """The loss, divided by `divisor` or by the batch's own targets, and the student's ModelOutput."""
        labels = targets_of(inputs)
        if isinstance(self.loss, LinearKDLoss):
            loss = self.loss
            output, parts = self._linear(model, inputs, labels, with_logits, loss.options._asdict(), "mean", divisor)
            return parts.loss, output
        output, teacher_logits = self._logits(model, inputs, self.loss.options.kd_weight != 0)
        result = self.loss(output.logits, teacher_logits, labels, normalizer=divisor)
        return (result.loss if isinstance(result, KDLossParts) else result), output

    def rows(self, model: Any, inputs: Mapping[str, Any], with_logits: bool) -> tuple[TokenRows, Tensor, Any]:
        """Unweighted parts of every position, its targets, and the student's ModelOutput."""
        labels = targets_of(inputs)
        if isinstance(self.loss, LinearKDLoss):
            options = {**self.loss.options._asdict(), "kd_weight": 1.0, "ce_weight": 1.0}
            output, parts = self._linear(model, inputs, labels, with_logits, options, "none", None)
            return TokenRows(parts.kd_rows, parts.ce_rows), labels, output
        output, teacher_logits = self._logits(model, inputs, True)
        parts = unweighted(self.loss)(output.logits, teacher_logits, labels)
        return TokenRows(parts.kd, parts.ce), labels, output

    def _logits(self, model: Any, inputs: Mapping[str, Any], teacher: bool) -> tuple[Any, Tensor | None]:
        teacher_logits = self._teacher.logits(self._ask, inputs).logits if teacher else None
        return self._student.logits(model, inputs), teacher_logits

    def _linear(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        labels: Tensor,
        with_logits: bool,
        options: dict[str, Any],
        reduction: Any,
        divisor: Tensor | float | None,
    ) -> tuple[Any, Any]:
        loss = self.loss
        assert isinstance(loss, LinearKDLoss)
        options.pop("inplace", None)
        given: dict[str, Any] = {**loss.limits._asdict(), **options}
        teacher_hidden, heads = None, []
        if options["kd_weight"] != 0:
            teacher_hidden, _ = self._teacher.hidden_states(self._ask, inputs, 1)
            head = _with_options(self._teacher.head, loss.teacher_head)
            given.update(teacher_bias=head.bias, teacher_softcap=head.softcap, teacher_scale=head.scale)
            heads = [head]
        student_hidden, output = self._student.hidden_states(model, inputs, 0 if with_logits else 1)
        head = _with_options(self._student.head, loss.student_head)
        # What the trainer calls its model under ends with the model.
        with head_in_memory(*heads), self._accelerator.autocast():
            parts = linear_kd_loss(
                student_hidden,
                head.weight,
                teacher_hidden,
                heads[0].weight if heads else None,
                labels,
                student_bias=head.bias,
                student_softcap=head.softcap,
                student_scale=head.scale,
                normalizer=divisor,
                reduction=reduction,
                ignore_index=loss.ignore_index,
                backend=loss.backend,
                return_parts=True,
                **given,
            )
        return output, parts


def _with_options(head: Head, given: tuple[float | None, float]) -> Head:
    """What the loss itself says about the head comes before what the model's configuration says."""
    softcap, scale = given
    return head._replace(
        softcap=head.softcap if softcap is None else softcap, scale=head.scale if scale == 1.0 else scale
    )


def _check_linear(loss: LinearKDLoss, student: ModelCall, teacher: ModelCall, accelerator: Any) -> None:
    if loss.limits.process_group is not None:
        raise ValueError("loss.process_group is given; allowed in a trainer: None, its heads are whole")
    if zero3_section(accelerator) is not None or accelerator.distributed_type == DistributedType.FSDP:
        how = "DeepSpeed ZeRO-3" if zero3_section(accelerator) is not None else "FSDP"
        raise ValueError(f"loss = LinearKDLoss: the student's head is not whole under {how}; use KDLoss there")
    for name, call in (("model", student), ("teacher_model", teacher)):
        if not call.gives_hidden_states:
            raise ModelError(
                f"{name} = {type(call.core).__name__}: LinearKDLoss needs a base model, a plain linear layer as "
                "output embedding and a forward with `logits_to_keep`; use KDLoss"
            )
