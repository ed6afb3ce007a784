"""A causal language model under ZeRO-3: no rank ever holds it whole, and its losses are the whole one's."""

import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed.ops.op_builder import AsyncIOBuilder
from torch import nn
from toy import must_run_ranks
from toy_lm import save_lm

from mixkd_fast.configuration import Teacher
from mixkd_fast.errors import ModelError
from mixkd_fast.teacher import _zero_config

WORKER = "tests/workers/language_teacher_memory.py"
SHAPE = {
    "hidden_size": 320,
    "num_hidden_layers": 72,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 960,
    "tie_word_embeddings": True,
}
WIDE = {"hidden_size": 1024, "num_hidden_layers": 12, "num_key_value_heads": 8, "intermediate_size": 2560}
MIB = 2**20
HAS_AIO = AsyncIOBuilder().is_compatible(verbose=False)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lm(tmp_path_factory.mktemp("language") / "teacher", **SHAPE)


def measured(teacher: Path, rests: str, **options: Any) -> list[dict[str, Any]]:
    """What each of two ranks measured."""
    output = teacher.parent / rests
    if not output.exists():
        output.mkdir()
        must_run_ranks(2, str(teacher), str(output), rests, script=WORKER, **options)
    return [json.loads((output / f"rank{rank}.json").read_text()) for rank in range(2)]


def layer_mib() -> float:
    hidden, keys = SHAPE["hidden_size"], SHAPE["hidden_size"] // 2
    return 4 * (2 * hidden**2 + 2 * hidden * keys + 3 * hidden * SHAPE["intermediate_size"]) / MIB


def test_whole_teacher_shows_in_the_measure(teacher: Path) -> None:
    """The control: at stage 0 every rank holds all of it, so the measure below can fail."""
    size = (teacher / "model.safetensors").stat().st_size / MIB
    assert size > 72 * layer_mib() > 300
    assert all(rank["peak_mib"] >= size for rank in measured(teacher, "whole"))


@pytest.mark.parametrize("rests", ["device", "cpu"])
def test_no_rank_ever_holds_the_whole_teacher(teacher: Path, rests: str) -> None:
    """Half of it is elsewhere; some layers are whole, on their way, or freed and not given back to the system yet."""
    size = (teacher / "model.safetensors").stat().st_size / MIB
    assert 12 * layer_mib() < 0.2 * size
    for whole, parts in zip(measured(teacher, "whole"), measured(teacher, rests), strict=True):
        assert parts["peak_mib"] < whole["peak_mib"] - 0.25 * size, (whole, parts, size)


@pytest.mark.parametrize("rests", ["device", "cpu"])
def test_losses_are_those_of_the_whole_teacher(teacher: Path, rests: str) -> None:
    for whole, parts in zip(measured(teacher, "whole"), measured(teacher, rests), strict=True):
        assert parts["losses"] == pytest.approx(whole["losses"], rel=1e-5) and whole["losses"][0] > 0.1
    # The idle rank has learnt nothing from its second batch.
    assert measured(teacher, rests)[1]["losses"][1] == 0


@pytest.mark.parametrize("rests", ["device", "cpu"])
def test_the_head_is_whole_inside_gathered_head_alone(teacher: Path, rests: str) -> None:
    head = SHAPE["hidden_size"] * 258
    for rank in measured(teacher, rests):
        assert rank["head"] == [0, head, 0, 0, head, 0]


@pytest.mark.slow  # DeepSpeed compiles its async_io first, for minutes
@pytest.mark.skipif(not HAS_AIO, reason="DeepSpeed's async_io needs libaio and its header")
def test_a_teacher_on_disk_takes_less_than_one_in_memory(tmp_path: Path) -> None:
    """Two ranks would hold half of it each. DeepSpeed leaves in memory what is below 1 MiB on a rank, so it is wide."""
    teacher = save_lm(tmp_path / "teacher", **SHAPE | WIDE)
    size = (teacher / "model.safetensors").stat().st_size / MIB
    for whole, parts in zip(measured(teacher, "whole"), measured(teacher, "nvme", timeout=1200), strict=True):
        assert parts["losses"] == pytest.approx(whole["losses"], rel=1e-5)
        assert parts["peak_mib"] < whole["peak_mib"] - 0.6 * size, (whole, parts, size)


@pytest.mark.skipif(HAS_AIO, reason="libaio is here, so nothing is to be refused")
def test_a_disk_without_libaio_is_refused() -> None:
    section = Teacher(model="m", zero_stage=3, offload={"device": "nvme", "nvme_path": "disk"})
    with pytest.raises(ModelError, match=r'teacher\.offload\.device = "nvme" needs the library libaio'):
        _zero_config(section, nn.Linear(2, 2), 1, "fp32")
