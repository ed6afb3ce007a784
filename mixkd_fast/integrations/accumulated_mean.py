"""What `transformers.Trainer` divides by: the targets of the whole accumulated batch of all processes.

A mean per micro-batch, or per process, weighs a target by how few others it happens to stand with. Here every
micro-batch's loss is a sum divided by one number, so that any cut of a batch gives the gradient of the batch.
Legend of shape suffixes: B rows.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor


class EvaluatedRows(NamedTuple):
    """What an evaluation step found, unweighted sums over each row's targets, and the model's outputs."""

    kd_B: Tensor
    """tau^2 D(teacher, student)"""
    task_B: Tensor
    """Cross entropy with the labels."""
    targets_B: Tensor
    """Targets of each row that are not ignored."""
    outputs: Any
    """The student's ModelOutput, or None where no logits were asked for."""


if TYPE_CHECKING:
    # Where it is used: in front of a Trainer.
    from transformers import Trainer as _Next
else:
    _Next = object


class AccumulatedMean(ABC, _Next):
    """To be named before a `transformers.Trainer` among the bases of a class.

    The class gives `num_targets`, `evaluate_rows`, `weights_of_parts` and a `compute_loss` that divides by `divisor`.
    Evaluation then reports, over all targets of the data set and not as a mean of batch means: `eval_loss` (weighted
    as in training), `eval_kd_loss` and `eval_task_loss` (both unweighted).
    """

    # Read by transformers' training_step: the loss is divided by the accumulated batch's targets already.
    loss_is_scaled_for_ga = True

    args: Any
    accelerator: Any
    _evaluated: list[Tensor] | None = None

    @abstractmethod
    def num_targets(self, inputs: Any) -> Tensor:
        """How many targets of a micro-batch enter the mean: an integer tensor of one element."""

    @abstractmethod
    def evaluate_rows(self, model: Any, inputs: Any, with_outputs: bool) -> EvaluatedRows:
        """What `prediction_step` reports of a batch; called without gradients."""

    @abstractmethod
    def weights_of_parts(self) -> tuple[float, float]:
        """Weights of the kd and the task loss in the training loss."""

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """The micro-batches of the next optimizer step and how many targets they have together."""
        # What the base class counts depends on the model's class and on the version: labels may be counted unshifted.
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = self.complete(batches)
        return batches, self.count_targets(batches, device)

    def complete(self, batches: list[Any]) -> list[Any]:
        """What the micro-batches of a step get before they are counted and trained on. Collective."""
        return batches

    def count_targets(self, batches: list[Any], device: torch.device) -> Tensor | None:
        """Targets of these micro-batches, of all processes' unless `average_tokens_across_devices` is off."""
        if not batches:
            return None
        count = torch.stack([self.num_targets(batch).to(device) for batch in batches]).sum()
        if self._counts_all_processes:
            count = self.accelerator.gather(count.view(1)).sum()
        return count

    def divisor(self, num_items_in_batch: Tensor | int | None) -> Tensor | float | None:
        """What the sum over a micro-batch of this process is divided by; None: its own targets.

        Gradients are averaged over processes, so a count of all of them is divided by their number.
        """
        if num_items_in_batch is None or not self._counts_all_processes:
            return num_items_in_batch
        processes: int = self.accelerator.num_processes
        return num_items_in_batch / processes

    @property
    def _counts_all_processes(self) -> bool:
        return bool(self.args.average_tokens_across_devices and self.accelerator.num_processes > 1)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Any, Any]:
        """Loss, logits and labels of an evaluation batch; see `transformers.Trainer`."""
        trainer: Any = self
        if inputs.get("labels") is None:
            step: tuple[Tensor | None, Any, Any] = super().prediction_step(
                model, inputs, prediction_loss_only, ignore_keys=ignore_keys
            )
            return step
        inputs = trainer._prepare_inputs(inputs)
        with torch.no_grad(), trainer.compute_loss_context_manager():
            rows = self.evaluate_rows(model, inputs, not prediction_loss_only)
        sums = torch.stack([rows.kd_B.float(), rows.task_B.float(), rows.targets_B.float()], dim=1)
        if self._evaluated is not None:
            # Leaves out the rows that fill up the last batch of the processes.
            self._evaluated.append(self.accelerator.gather_for_metrics(sums).sum(0))
        loss = self._weighted(*sums.sum(0).unbind())
        if prediction_loss_only:
            return loss, None, None
        ignored = {"loss", *(ignore_keys or ["past_key_values"])}
        logits = tuple(value for name, value in rows.outputs.items() if name not in ignored)
        return loss, logits[0] if len(logits) == 1 else logits, inputs["labels"]

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The base class's loop, its mean of batch means replaced by means over all targets."""
        self._evaluated = []
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._evaluated:
            kd, task, targets = torch.stack(self._evaluated).cpu().double().sum(0).unbind()
            output.metrics[f"{metric_key_prefix}_loss"] = self._weighted(kd, task, targets).item()
            output.metrics[f"{metric_key_prefix}_kd_loss"] = (kd / targets.clamp(min=1)).item()
            output.metrics[f"{metric_key_prefix}_task_loss"] = (task / targets.clamp(min=1)).item()
        return output

    def _weighted(self, kd: Tensor, task: Tensor, targets: Tensor) -> Tensor:
        kd_weight, task_weight = self.weights_of_parts()
        return (kd_weight * kd + task_weight * task) / targets.clamp(min=1)
