"""Distillation of a classifier in `transformers.Trainer`: `DistillTrainer` with KD, or with MixKD.

Tiny random models and data, nothing is downloaded. Run: python examples/hf_trainer.py
"""

import tempfile
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from mixkd_fast.integrations import DistillTrainer

KD = {"temperature": 2.0, "ce_weight": 1.0}
MIXKD = {"loss": {"kd_weight": 0.0, "ce_weight": 1.0}, "mixing": {"alpha": 0.4}, "mixed_loss": KD}


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


def main(
    steps: int = 60, micro_batch_size: int = 8, accumulation_steps: int = 2, seed: int = 0, **distillation: Any
) -> list[float]:
    """Train for `steps` optimizer steps and return the loss of each. `distillation`: options of DistillTrainer."""
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
        options = distillation or {"loss": KD}
        trainer = DistillTrainer(student, arguments, teacher_model=teacher, train_dataset=rows, **options)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    for name, options in (("KD", {"loss": KD}), ("MixKD", MIXKD)):
        losses = main(**options)
        print(f"{name}: loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps")
