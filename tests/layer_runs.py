"""Short real runs of the methods that compare inner layers, and models whose layers they compare."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_batch, tiny_config, tiny_encoder
from toy import records, save_toy_teacher, toy_config

from mixkd_fast import distill
from mixkd_fast.data.batching import Batch
from mixkd_fast.frozen_teacher import FrozenTeacher

WIDER = {
    "config": {
        "model_type": "bert",
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
}
"""A student of another width and another number of heads than the toy teacher's."""


def toy_run(
    folder: Path, method: dict[str, Any], output: str = "run", stage: int = 0, student: Any = None, **training: Any
) -> list[dict[str, float]]:
    """The terms of every step of a 20-step run through the whole program.

    Nothing drops out, and weights are large enough that the teacher's attention is not uniform.
    """
    if not (folder / "teacher").exists():
        save_toy_teacher(folder / "teacher", initializer_range=0.2)
    shape = {"steps": 20, "batch_size": 16, "micro_batch_size": 16, "evaluate_every": 20, "learning_rate": 3e-3}
    config = toy_config(folder, output, method=method, training=shape | training)
    config["student"] = student or {"num_layers": 2}
    config["deepspeed"] = {"zero_optimization": {"stage": stage}}
    distill(**config, progress=False)
    return [line["terms"] for line in records(folder / output)]


def falls(terms: list[dict[str, float]], name: str) -> bool:
    """Whether a term's mean over the last five steps is clearly below that over the first five."""
    values = [step[name] for step in terms if name in step]
    return sum(values[-5:]) < 0.8 * sum(values[:5])


def layer_batch(**options: Any) -> Batch:
    """Four rows of different lengths with partners, as a step of one micro-batch has them."""
    batch = tiny_batch(tiny_config("bert"), [9, 5, 7, 3], partner=[2, 0, 3, 1], lam=[0.6, 0.9, 0.5, 0.8], **options)
    return replace(batch, mean_tokens=6.0, mean_mixed_tokens=(9 + 9 + 7 + 5) / 4)


def layer_models(layers: int = 2, **fields: Any) -> tuple[Any, Any]:
    """A student of two layers and a teacher of four, in fp64."""
    student = tiny_encoder(
        "bert", layers=layers, seed=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **fields
    )
    teacher = tiny_encoder("bert", layers=4, seed=2)
    return student.double(), FrozenTeacher(teacher.double(), str)


def own_teacher(student: Any) -> FrozenTeacher:
    """The student as its own teacher."""
    return FrozenTeacher(student, str)


def widened(batch: Batch, by: int = 5) -> Batch:
    """The same rows with more padding on the right."""

    def pad(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else torch.nn.functional.pad(values, (0, by))

    ids, mask = pad(batch.input_ids), pad(batch.attention_mask)
    assert ids is not None and mask is not None
    return replace(batch, input_ids=ids, attention_mask=mask, token_type_ids=pad(batch.token_type_ids))


def flipped(batch: Batch) -> Batch:
    """The same rows with their padding on the left."""
    order = torch.argsort(batch.attention_mask, dim=1, stable=True)
    types = batch.token_type_ids
    return replace(
        batch,
        input_ids=batch.input_ids.gather(1, order),
        attention_mask=batch.attention_mask.gather(1, order),
        token_type_ids=None if types is None else types.gather(1, order),
        row_lengths=None,
    )


def halves(batch: Batch) -> list[Batch]:
    """The same step as two micro-batches, with the partners that are not among their own rows appended."""
    assert batch.partner is not None and batch.lam is not None
    parts = []
    for start in (0, 2):
        own = [start, start + 1]
        partners = batch.partner[own].tolist()
        rows = own + [row for row in dict.fromkeys(partners) if row not in own]
        types = batch.token_type_ids
        assert batch.row_lengths is not None
        parts.append(
            replace(
                batch,
                input_ids=batch.input_ids[rows],
                attention_mask=batch.attention_mask[rows],
                token_type_ids=None if types is None else types[rows],
                labels=batch.labels[rows],
                row_ids=batch.row_ids[rows],
                row_lengths=batch.row_lengths[rows],
                partner=torch.tensor([rows.index(row) for row in partners]),
                lam=batch.lam[own],
                num_rows=2,
            )
        )
    return parts
