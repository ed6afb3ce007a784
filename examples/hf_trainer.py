"""Distillation in a `transformers.Trainer`: a subclass whose compute_loss has three lines.

Tiny random models and data, nothing is downloaded. Run: python examples/hf_trainer.py
"""

import tempfile
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from mixkd_fast.losses import KDLoss


class DistillationTrainer(Trainer):
    """Trains `model` against `teacher`; the mean runs over the rows of the whole accumulated batch."""

    def __init__(self, teacher: PreTrainedModel, kd_loss: KDLoss, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.teacher = teacher.requires_grad_(False).eval().to(self.args.device)
        self.kd_loss = kd_loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs, rows = model(**inputs), self.rows_per_process(num_items_in_batch)
        loss = self.kd_loss(outputs.logits, self.teacher_logits(inputs), inputs["labels"], normalizer=rows)
        return (loss, outputs) if return_outputs else loss

    def teacher_logits(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The frozen teacher's logits of a batch."""
        return self.teacher(**{name: value for name, value in inputs.items() if name != "labels"}).logits

    def rows_per_process(self, num_items_in_batch: Any) -> Any:
        """Gradients are averaged over processes; the count is that of all of them unless the arguments say no."""
        if num_items_in_batch is None or not self.args.average_tokens_across_devices:
            return num_items_in_batch
        return num_items_in_batch / self.accelerator.num_processes


def tiny_bert(layers: int, hidden_size: int) -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=64,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * hidden_size,
        max_position_embeddings=16,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


def main(steps: int = 60, micro_batch_size: int = 8, accumulation_steps: int = 2, seed: int = 0) -> list[float]:
    """Train for `steps` optimizer steps and return the loss of each."""
    torch.manual_seed(seed)
    teacher, student = tiny_bert(2, 32), tiny_bert(1, 16)
    with torch.no_grad():
        teacher.classifier.weight *= 20
    input_ids = torch.randint(1, 64, (128, 8))
    with torch.no_grad():
        labels = teacher.eval()(input_ids).logits.argmax(-1)
    rows = [{"input_ids": ids, "labels": label} for ids, label in zip(input_ids, labels, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=micro_batch_size,
            gradient_accumulation_steps=accumulation_steps,
            learning_rate=5e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=seed,
        )
        kd_loss = KDLoss(temperature=2.0, ce_weight=1.0)
        trainer = DistillationTrainer(teacher, kd_loss, model=student, args=arguments, train_dataset=rows)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps")
