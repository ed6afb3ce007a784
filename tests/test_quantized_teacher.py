"""An 8-bit teacher: near its fp32 self, refused where it cannot run, its kept logits apart from the others'."""

from pathlib import Path

import pytest
import torch
from test_fast_loop import train
from tiny_models import save_tiny_model, tiny_batch, tiny_tokenizer
from toy import losses, save_toy_teacher

from mixkd_fast.configuration import Teacher
from mixkd_fast.encoder import Encoder
from mixkd_fast.mixing import Mixing
from mixkd_fast.models import load_teacher_encoder, quantize


def test_answers_are_near_and_the_original_is_left_alone(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "bert", tiny_tokenizer())
    encoder = load_teacher_encoder(Teacher(model=str(tmp_path)), 3, "classification")
    low = Encoder(quantize(encoder.model))
    kinds = {type(module).__name__ for module in low.model.modules()}
    assert any("Quantized" in type(m).__module__ or "quantized" in type(m).__module__ for m in low.model.modules()), (
        kinds
    )
    batch = tiny_batch(encoder.config)
    with torch.no_grad():
        for exact, rounded in zip(encoder.both(batch, Mixing()), low.both(batch, Mixing()), strict=True):
            error = (exact.logits - rounded.logits).norm() / exact.logits.norm()
            assert 0 < error < 0.1


def test_a_run_with_an_8_bit_teacher(tmp_path: Path) -> None:
    teacher = save_toy_teacher(tmp_path / "teacher")
    train(tmp_path, teacher, "plain")
    section = {"model": str(teacher), "store_dir": str(tmp_path / "store"), "quantization": "int8"}
    train(tmp_path, teacher, "int8", teacher_section=section)
    plain, low = losses(tmp_path / "plain"), losses(tmp_path / "int8")
    assert plain != low and abs(plain[0] - low[0]) < 0.05 * plain[0]
    assert len([path for path in (tmp_path / "store").iterdir() if not path.name.startswith(".")]) == 2


@pytest.mark.parametrize("fields", [{"zero_stage": 3}, {"precision": "bf16"}])
def test_what_cannot_be_quantised_is_refused(fields: dict) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match='quantization "int8" needs zero_stage 0 and no precision but fp32'):
        Teacher(model="x", quantization="int8", **fields)
