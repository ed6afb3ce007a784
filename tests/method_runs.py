"""Short runs of a method through `distill` on the toy task, and what their tests read from them."""

from pathlib import Path
from typing import Any

import torch
from toy import records, toy_config, toy_tokenizer
from transformers import BertConfig, BertForMaskedLM

from mixkd_fast import distill
from mixkd_fast.distillation import Result

RANDOM_STUDENT = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.2,
}
TRAINING = {"steps": 20, "batch_size": 16, "micro_batch_size": 8, "learning_rate": 5e-3, "evaluate_every": 10}


def save_masked_lm(folder: Path, seed: int = 0, tokenizer: Any = None, **fields: Any) -> Path:
    """A small masked language model of random, decided weights, with the toy tokenizer, as a user would have it."""
    tokenizer = tokenizer or toy_tokenizer()
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(seed)
    config = BertConfig(
        **{"vocab_size": len(tokenizer), "max_position_embeddings": 32, "initializer_range": 0.2, **shape, **fields},
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForMaskedLM(config)
    with torch.no_grad():
        model.cls.predictions.bias.normal_(std=2.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run_method(
    folder: Path,
    method: dict[str, Any],
    output: str = "run",
    resume: bool = False,
    teacher: bool = True,
    **sections: Any,
) -> Result:
    """20 steps of a method by its section, with a student of random weights unless a section says otherwise."""
    student = {"config": RANDOM_STUDENT, "num_layers": None} | sections.pop("student", {})
    training = TRAINING | sections.pop("training", {})
    config = toy_config(folder, output, method=method, student=student, training=training, **sections)
    config["teacher"] |= sections.get("teacher_options", {})
    config.pop("teacher_options", None)
    if not teacher:
        del config["teacher"]
    return distill(**config, tokenizer=toy_tokenizer(), resume=resume, progress=False)


def term_of(folder: Path, name: str) -> list[float]:
    """A loss term at every step."""
    return [line["terms"][name] for line in records(folder)]


def ends_of(folder: Path, name: str) -> tuple[float, float]:
    """A term's mean over the first and over the last five steps."""
    values = term_of(folder, name)
    return sum(values[:5]) / 5, sum(values[-5:]) / 5
