"""One SGD step of trainers on tiny models, and the same step computed independently in fp64 from the whole batch."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tiny_models import randomise, tiny_config
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
)

from mixkd_fast.integrations import DistillTrainer
from mixkd_fast.losses import LinearKDLoss

LEARNING_RATE = 0.5
LM_VOCABULARY = 40
# (prompt, answer) lengths: a mean per micro-batch is far from the mean over all tokens.
LM_LENGTHS = ((2, 2), (3, 1), (1, 3), (2, 1), (3, 14), (2, 17), (4, 12), (1, 16))
CLASS_LENGTHS = (9, 5, 7, 12, 4, 11, 6, 8)

# Loss options: what differs between trainers must not depend on them.
LM_LOSSES: dict[str, Any] = {
    "kl": {"temperature": 2.0, "ce_weight": 0.5},
    "linear": LinearKDLoss(temperature=2.0, ce_weight=0.5),
}
# The paper's SM+TMKD, with KD on the clean rows beside it.
CLEAN_LOSS = {"kd_weight": 0.7, "ce_weight": 1.0, "temperature": 2.0}
MIXED_LOSS = {"kd_weight": 1.0, "ce_weight": 0.5, "temperature": 2.0}
MIXING = {"alpha": 1.0, "mixed_rows": 2}


def tiny_llama(layers: int = 1, hidden_size: int = 16, seed: int = 0, vocabulary: int = LM_VOCABULARY) -> Any:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def lm_models() -> tuple[Any, Any]:
    """Student and teacher."""
    return tiny_llama(seed=1), tiny_llama(2, 24, seed=2)


def lm_rows() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(3)
    rows = []
    for prompt, answer in LM_LENGTHS:
        ids = torch.randint(2, LM_VOCABULARY, (prompt + answer,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def collate(rows: list[dict[str, Any]], padding_id: int = 0) -> dict[str, Tensor]:
    """Rows padded on the right to the longest; class labels are numbers."""
    width = max(len(row["input_ids"]) for row in rows)

    def column(name: str, fill: int) -> Tensor:
        return torch.tensor([[*row[name], *[fill] * (width - len(row[name]))] for row in rows])

    masks = [{"attention_mask": [1] * len(row["input_ids"])} for row in rows]
    batch = {"input_ids": column("input_ids", padding_id)}
    batch["attention_mask"] = torch.tensor(
        [m["attention_mask"] + [0] * (width - len(m["attention_mask"])) for m in masks]
    )
    if "token_type_ids" in rows[0]:
        batch["token_type_ids"] = column("token_type_ids", 0)
    if isinstance(rows[0]["labels"], list):
        batch["labels"] = column("labels", -100)
    else:
        batch["labels"] = torch.tensor([row["labels"] for row in rows])
    return batch


def class_models(student_family: str = "bert", teacher_family: str = "bert") -> tuple[Any, Any]:
    """Student and teacher without dropout."""
    made = []
    for family, layers, seed in ((student_family, 1, 1), (teacher_family, 2, 2)):
        fields = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        if family == "distilbert":
            fields = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = tiny_config(family, layers=layers, **fields)
            # Not by `from_config`, which partitions the model at once where a trainer has said ZeRO-3.
            model = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)](config)
            randomise(model)
        made.append(model)
    return made[0], made[1]


def class_rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(4)
    rows = []
    for number, length in enumerate(CLASS_LENGTHS):
        ids = torch.randint(3, 96, (length,), generator=generator).tolist()
        types = [0] * (length // 2) + [1] * (length - length // 2)
        rows.append({"input_ids": ids, "token_type_ids": types, "labels": number % 3})
    return rows


def arguments(folder: Path, micro_batch_size: int, accumulation: int, **more: Any) -> TrainingArguments:
    """One step of SGD, so that the change of the weights is the gradient."""
    return TrainingArguments(**options(folder, micro_batch_size, accumulation, **more))


def options(folder: Path, micro_batch_size: int, accumulation: int, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "per_device_eval_batch_size": 3,
        "optim": "sgd",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
        "seed": 0,
        **more,
    }


def student_as(made: str, student: Any, models: Callable[[], tuple[Any, Any]]) -> dict[str, Any]:
    """Made "once": the student itself; "anew": a function that makes the same, which the Trainer calls in each run."""
    return {"model": student} if made == "once" else {"model_init": lambda: models()[0]}


def lm_trainer(
    folder: Path, micro_batch_size: int, accumulation: int, loss: Any, made: str = "once", **more: Any
) -> Any:
    training_arguments = arguments(folder, micro_batch_size, accumulation, **more)
    student, teacher = lm_models()
    return DistillTrainer(
        **student_as(made, student, lm_models),
        args=training_arguments,
        teacher_model=teacher,
        loss=loss,
        data_collator=collate,
        train_dataset=lm_rows(),
        eval_dataset=lm_rows(),
    )


def mixkd_trainer(
    folder: Path,
    micro_batch_size: int,
    accumulation: int,
    training: dict[str, Any] | None = None,
    made: str = "once",
    **mixing: Any,
) -> Any:
    training_arguments = arguments(folder, micro_batch_size, accumulation, **(training or {}))
    student, teacher = class_models()
    return DistillTrainer(
        **student_as(made, student, class_models),
        args=training_arguments,
        teacher_model=teacher,
        loss=CLEAN_LOSS,
        mixing={**MIXING, **mixing},
        mixed_loss=MIXED_LOSS,
        data_collator=collate,
        train_dataset=class_rows(),
        eval_dataset=class_rows(),
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def lm_parts(student: Any, teacher: Any, rows: list[dict[str, Any]], temperature: float) -> tuple[Tensor, Tensor, int]:
    """Sums over the answers' tokens of tau^2 KL(teacher || student) and of the cross entropy, row by row, unpadded."""
    kd, task, count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        prompt = row["labels"].count(-100)
        student_logits = student(input_ids=ids).logits[0, prompt - 1 : -1].double()
        with torch.no_grad():
            teacher_logits = teacher(input_ids=ids).logits[0, prompt - 1 : -1].double()
        p, log_q = (teacher_logits / temperature).softmax(-1), (student_logits / temperature).log_softmax(-1)
        kd = kd + temperature**2 * (p * (p.log() - log_q)).sum()
        task = task + F.cross_entropy(student_logits, ids[0, prompt:], reduction="sum")
        count += ids.shape[1] - prompt
    return kd, task, count


def stepped(student: Any, loss: Tensor) -> dict[str, Tensor]:
    """The weights after one step of SGD."""
    gradients = torch.autograd.grad(loss, list(student.parameters()), allow_unused=True)
    return {
        name: (value.detach() - LEARNING_RATE * (0 if gradient is None else gradient)).float()
        for (name, value), gradient in zip(student.named_parameters(), gradients, strict=True)
    }


def lm_truth(loss_of: Callable[[Tensor, Tensor, int], Tensor] | None = None) -> dict[str, Tensor]:
    """One step on all rows at once: (0.5 CE + tau^2 KL) / number of answer tokens."""
    student, teacher = (deepcopy(model).double().eval() for model in lm_models())
    kd, task, count = lm_parts(student, teacher, lm_rows(), 2.0)
    return stepped(student, (kd + 0.5 * task) / count if loss_of is None else loss_of(kd, task, count))


def assert_same_step(found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]) -> None:
    """Differences are small against the largest change of each parameter."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        change = (value - start[name]).abs().max()
        assert (found[name] - value).abs().max() <= 1e-4 * change + 1e-6, name
    assert any((value - start[name]).abs().max() > 1e-3 for name, value in expected.items())
