"""TRL's GKD trainer with this project's losses and with denominators that fit what it generates."""

import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from trl.experimental.gkd import GKDTrainer as TrlGKDTrainer
from trl.models.utils import unwrap_model_for_generation

from mixkd_fast.data.next_tokens import IGNORED
from mixkd_fast.integrations.accumulated_mean import AccumulatedMean, EvaluatedRows
from mixkd_fast.integrations.token_loss import Loss, TokenLoss, checked_loss, targets_of


class GKDTrainer(AccumulatedMean, TrlGKDTrainer):
    """`trl.experimental.gkd.GKDTrainer` with any loss of this project.

    From TRL come the collator, the generation by student (`lmbda`) or teacher (`seq_kd`), the teacher and everything
    else; overridden are `compute_loss`, `training_step`, and what `AccumulatedMean` overrides:

    - the loss is `loss`, a mean over the answers' tokens of the whole accumulated, cross-process batch. The default is
      TRL's own: the generalised JSD with the arguments' `beta` at temperature 1, where beta 0 is KL(teacher || student)
      and beta 1 KL(student || teacher) in both. (`temperature` of the arguments is that of sampling, as in TRL.)
    - answers are generated before the step for all its micro-batches, so that the tokens that are divided by are those
      that are trained on. TRL divides by the number of the data set's tokens, whatever was generated, and with several
      processes by that of all of them, which then is averaged over processes once more.
    """

    def __init__(self, *arguments: Any, loss: Loss | Mapping[str, Any] | None = None, **more: Any) -> None:
        """TRL's own arguments, and `loss`: a `KDLoss`, a `LinearKDLoss`, or options of a `KDLoss`."""
        super().__init__(*arguments, **more)
        self.model_accepts_loss_kwargs = True
        self.teacher_model.requires_grad_(False)
        self.loss = checked_loss({"divergence": "jsd", "beta": self.beta} if loss is None else loss, "loss")
        self._token_loss = TokenLoss(self.loss, self.model, self.teacher_model, self._ask_teacher, self.accelerator)

    def complete(self, batches: list[Any]) -> list[Any]:
        """The micro-batches, with generated answers where those are drawn."""
        return [self.with_answers(batch) for batch in batches]

    def with_answers(self, inputs: Any) -> Any:
        """A micro-batch, its answers replaced by the student's with probability `lmbda`, else with `seq_kd` by the
        teacher's."""
        if random.random() < self.lmbda:
            model = self.model_wrapped
        elif self.seq_kd:
            model = self.teacher_model
        else:
            return inputs
        was_training = model.training
        model.eval()
        inputs = self._prepare_inputs(inputs)
        with unwrap_model_for_generation(
            model,
            self.accelerator,
            generation_kwargs=self.generation_kwargs,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        ) as unwrapped:
            ids, mask, labels = self.generate_on_policy_outputs(unwrapped, inputs, self.generation_config)
        model.train(was_training)
        return {**inputs, "input_ids": ids, "attention_mask": mask, "labels": labels}

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The step of TRL's base class: the answers are there already."""
        # `super` of TRL's class and not of this one: TRL would generate here, once more.
        loss: Tensor = super(TrlGKDTrainer, self).training_step(model, inputs, num_items_in_batch)
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        """The distillation loss of a micro-batch; see `transformers.Trainer`."""
        divisor = self.divisor(num_items_in_batch)
        loss, outputs = self._token_loss(model, _tokens(inputs), divisor, with_logits=return_outputs)
        return (loss, outputs) if return_outputs else loss

    def num_targets(self, inputs: Any) -> Tensor:
        return targets_of(_tokens(inputs)).ne(IGNORED).sum()

    def weights_of_parts(self) -> tuple[float, float]:
        return self.loss.options.kd_weight, self.loss.options.ce_weight

    def evaluate_rows(self, model: Any, inputs: Any, with_outputs: bool) -> EvaluatedRows:
        rows, labels, outputs = self._token_loss.rows(model, _tokens(inputs), with_logits=with_outputs)
        return EvaluatedRows(rows.kd.sum(-1), rows.task.sum(-1), labels.ne(IGNORED).sum(-1), outputs)

    def _ask_teacher(self, **inputs: Any) -> Any:
        with torch.no_grad():
            return self.teacher_model.eval()(**inputs)


def _tokens(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What TRL's collator makes for the models, without the prompts that it makes for generation."""
    return {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
