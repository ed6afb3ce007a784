"""An 8-bit teacher: near its fp32 self, refused where it cannot run, its kept logits apart from the others'."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from test_fast_loop import train
from tiny_models import save_tiny_model, tiny_batch, tiny_tokenizer
from toy import losses, save_toy_teacher

from mixkd_fast.configuration import Teacher
from mixkd_fast.encoder import Encoder
from mixkd_fast.mixing import Mixing
from mixkd_fast.models import load_teacher_encoder
from mixkd_fast.quantized_teacher import Fp8Linear, Quantization, quantize, why_not


@pytest.mark.parametrize("quantization", get_args(Quantization))
def test_answers_are_near_and_the_original_is_left_alone(quantization: Quantization, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "bert", tiny_tokenizer())
    encoder = load_teacher_encoder(Teacher(model=str(tmp_path)), 3, "classification")
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    low = Encoder(quantize(encoder.model, quantization))
    narrow = [m for m in low.model.modules() if "quantized" in type(m).__module__]
    # Of this small model fp8 leaves the two of each layer whose widths are no multiple of 16.
    assert len(narrow) >= 4 * len(encoder.model.bert.encoder.layer), [type(m).__name__ for m in low.model.modules()]
    batch = tiny_batch(encoder.config)
    with torch.no_grad():
        for exact, rounded in zip(encoder.both(batch, Mixing()), low.both(batch, Mixing()), strict=True):
            error = (exact.logits - rounded.logits.float()).norm() / exact.logits.norm()
            assert 0 < error < 0.1
    for name, value in encoder.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_an_fp8_layer_is_as_near_as_three_bits_of_mantissa_allow() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 64)
    # Rows of very different size, one of them all zero: each has a scale of its own.
    inputs = torch.randn(5, 7, 256) * torch.tensor([1e-3, 1.0, 0.0, 1e3, 1e5])[:, None, None]
    exact = linear.double()(inputs.double())
    rounded = Fp8Linear(linear.float())(inputs).double()
    assert rounded.shape == exact.shape
    error = (rounded - exact).norm(dim=-1) / exact.norm(dim=-1)
    # Rounding to 4 significant bits, uniform in the last: 2^-4 / sqrt(3) of each factor at most, averaged over the sum.
    assert 0.005 < error[[0, 1, 3, 4]].mean() < 0.06
    assert error[2].max() < 0.004  # the bias alone, in bf16


def test_layers_of_odd_width_stay_as_they_are() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 3))
    kinds = [type(module) for module in quantize(model, "fp8")]
    assert kinds == [Fp8Linear, torch.nn.Linear]


@pytest.mark.parametrize("quantization", get_args(Quantization))
def test_a_run_with_an_8_bit_teacher(quantization: Quantization, tmp_path: Path) -> None:
    teacher = save_toy_teacher(tmp_path / "teacher")
    train(tmp_path, teacher, "plain")
    section = {"model": str(teacher), "store_dir": str(tmp_path / "store"), "quantization": quantization}
    train(tmp_path, teacher, quantization, teacher_section=section)
    plain, low = losses(tmp_path / "plain"), losses(tmp_path / quantization)
    assert plain != low and abs(plain[0] - low[0]) < 0.05 * plain[0]
    assert len([path for path in (tmp_path / "store").iterdir() if not path.name.startswith(".")]) == 2


@pytest.mark.parametrize(
    ("quantization", "fields", "around"),
    [
        ("int8", {"zero_stage": 3}, "fp32"),
        ("int8", {"precision": "bf16"}, "fp32"),
        ("fp8", {"precision": "fp16"}, "bf16"),
    ],
)
def test_what_cannot_be_quantised_is_refused(quantization: Any, fields: dict[str, Any], around: str) -> None:
    with pytest.raises(ValueError, match=f'"{quantization}" needs zero_stage 0 and no precision but {around}'):
        Teacher(model="x", quantization=quantization, **fields)


def test_int8_is_refused_on_a_gpu_by_name() -> None:
    assert why_not("int8", torch.device("cuda", 0)) == "runs on the CPU only, and this is cuda:0"
