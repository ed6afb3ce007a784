"""TRL's GKD trainer on the rows and models of `trainer_cases`."""

from pathlib import Path
from typing import Any

import torch
import trainer_cases as cases
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from trl.experimental.gkd import GKDConfig
from trl.experimental.gkd import GKDTrainer as TrlGKDTrainer

from mixkd_fast.integrations import GKDTrainer
from mixkd_fast.losses import LinearKDLoss

LOSSES: dict[str, Any] = {
    "trl-kl": {"temperature": 2.0, "ce_weight": 0.5},
    "trl-linear": LinearKDLoss(temperature=2.0, ce_weight=0.5),
}


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[END]", *(f"w{number}" for number in range(cases.LM_VOCABULARY - 2))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", eos_token="[END]", unk_token="w0")


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """What TRL's own collator gives: the rows, and their prompts padded on the left."""
    prompts = [row["input_ids"][: row["labels"].count(-100)] for row in rows]
    width = max(map(len, prompts))
    return {
        **cases.collate(rows),
        "prompts": torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts]),
        "prompt_attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
    }


def trainer(
    folder: Path, micro_batch_size: int, accumulation: int, loss: Any, trainer_class: Any = GKDTrainer, **more: Any
) -> Any:
    student, teacher = cases.lm_models()
    given = {"lmbda": 0.0, "gradient_checkpointing": False, "bf16": False, "max_new_tokens": 6, **more}
    rows = Dataset.from_list(cases.lm_rows())
    return trainer_class(
        model=student,
        teacher_model=teacher,
        args=GKDConfig(**cases.options(folder, micro_batch_size, accumulation, **given)),
        data_collator=collate,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer(),
        **({"loss": loss} if issubclass(trainer_class, GKDTrainer) else {}),
    )


def peer(folder: Path, micro_batch_size: int, accumulation: int, **more: Any) -> Any:
    """TRL's own trainer."""
    return trainer(folder, micro_batch_size, accumulation, None, TrlGKDTrainer, **more)
