"""`mixkd-fast plan` for causal language models: products, rows, the 70B example, and what moves where."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from linear_cases import make_heads
from test_configs import CONFIGS
from test_linear_kd_loss_kernels import peak_of
from torch.utils.flop_counter import FlopCounterMode
from toy import ROOT, save_toy_teacher, toy_config
from toy_lm import FAMILIES, language_config, sentences, tiny_lm, write_lines
from transformers import AutoModelForCausalLM, MixtralConfig

from mixkd_fast import cli_plan
from mixkd_fast.configuration import Config, load_config, validate
from mixkd_fast.errors import ConfigurationError, ModelError
from mixkd_fast.planning.decoders import DecoderShape, decoder_attention_flops, decoder_flops, head_flops
from mixkd_fast.planning.language_memory import loss_bytes
from mixkd_fast.planning.lengths import row_lengths
from mixkd_fast.planning.memory import Placement, RankMemory
from mixkd_fast.planning.plan import Plan, make_plan
from mixkd_fast.planning.row_lengths import LARGEST_FILES_BYTES
from mixkd_fast.teaching import TeachOptions, teach

LARGE = ROOT / "configs" / "lm_70b.json"


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_flops_are_those_pytorch_counts(family: str) -> None:
    model = tiny_lm(family, attn_implementation="eager").requires_grad_(False)
    shape = DecoderShape.of(model.config, model)
    ids = torch.randint(4, 90, (3, 11))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False)
    # PyTorch counts the scores of all pairs, the plan those that a causal kernel computes.
    attention = decoder_attention_flops(shape, [11] * 3)
    assert attention == 4 * 3 * 66 * shape.attention_size * shape.num_layers
    whole = decoder_flops(shape, [11] * 3) - attention + attention * 121 / 66 + head_flops(shape.head_parameters, 33)
    assert whole == counter.get_total_flops()


def test_windows_bound_the_pairs() -> None:
    model = tiny_lm("gemma2", sliding_window=4, num_hidden_layers=2)
    shape = DecoderShape.of(model.config, model)
    assert shape.windows == (4, None)
    pairs = sum(min(t + 1, 4) + t + 1 for length in (3, 9) for t in range(length))
    assert decoder_attention_flops(shape, np.array([3, 9])) == 4 * pairs * shape.attention_size


def test_mixtures_of_experts_are_refused() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MixtralConfig(**sizes, intermediate_size=48, vocab_size=64))
    with pytest.raises(ModelError, match="mixture of experts"):
        DecoderShape.of(model.config, model)


def test_rows_are_the_tasks_own(tmp_path: Path) -> None:
    packed = row_lengths(validate(Config, language_config(tmp_path)))
    assert packed.longest == 48 and packed.mean > 40 and "packed" in packed.source
    assert packed.num_rows is not None and 25 < packed.num_rows < 40
    assert packed.target_share == pytest.approx(47 / 48, abs=0.01)
    answers = row_lengths(validate(Config, language_config(tmp_path, instruct=True)))
    # "Q: colour of apple? the apple\nA: " and "it is red" with its end.
    assert answers.num_rows == 64 and answers.mean < 48 and 0.2 < answers.target_share < 0.4
    large = tmp_path / "large.jsonl"
    with large.open("w") as file:  # a hole takes no space on disk
        file.truncate(LARGEST_FILES_BYTES + 1)
    unread = {**language_config(tmp_path)["task"], "train_files": [str(large)]}
    assumed = row_lengths(validate(Config, {**language_config(tmp_path), "task": unread}))
    assert assumed.mean == 48 and assumed.num_rows is None and "assumed" in assumed.source
    hub = {"kind": "causal_lm", "hub": "someone/texts", "max_length": 512}
    assumed = row_lengths(validate(Config, {**language_config(tmp_path), "task": hub}))
    assert assumed.mean == 512 and assumed.num_rows is None and "assumed" in assumed.source


def test_streamed_rows_are_measured_as_they_are_streamed(tmp_path: Path) -> None:
    for number in range(3):
        write_lines(tmp_path / f"part-{number}.jsonl", [{"text": text} for text in sentences(100, number)])
    fields = language_config(tmp_path)
    fields["task"] |= {"train_files": [str(tmp_path / "part-*.jsonl")], "streaming": True}
    streamed = row_lengths(validate(Config, fields))
    documents = [min(48, len(text.encode()) + 1) for number in range(3) for text in sentences(100, number)]
    assert streamed.num_rows == 300 and "300 of 300 streamed rows" in streamed.source
    assert streamed.mean == pytest.approx(np.mean(documents)), "not packed: a document is a row"
    words = toy_config(tmp_path, teacher={"model": str(save_toy_teacher(tmp_path / "bert"))})
    words["task"] |= {"train_files": [str(tmp_path / "train*.jsonl")], "streaming": True}
    words["task"] |= {"label_names": ["bad", "good"]}
    (tmp_path / "train_text.jsonl").unlink()
    assert row_lengths(validate(Config, words)).num_rows == 96


def test_a_store_answers_in_the_teachers_place(tmp_path: Path) -> None:
    fields = language_config(tmp_path, instruct=True)
    with_model = make_plan(validate(Config, fields), ["H100"], [1])
    taught = teach(validate(Config, fields), TeachOptions("hidden", tmp_path / "store"), progress=False)
    student = tiny_lm(num_hidden_layers=1).config.to_dict()
    described = {"teacher": {"offline": str(tmp_path / "store")}, "plan": {"student": student}}
    described["student"] = {"model": "someone/student", "tokenizer": str(tmp_path / "teacher")}
    stored = make_plan(validate(Config, fields | described), ["H100"], [1])
    assert stored.teacher is None and stored.placement == Placement(0, "none", None)
    head = (tmp_path / "store" / "head.safetensors").stat().st_size
    work = stored.devices[0].counts[0].work
    assert work is not None and work.teacher_clean_share == 0.0 and work.teacher_rows == 0
    beside = work.micro_batch_size * work.widest * 2 * taught.store.origin.width
    without = dataclasses.replace(work, stored=None)
    kept, alone = (loss_bytes(stored.student, None, given, 0, None) for given in (work, without))
    assert kept[1] - alone[1] == head + beside and kept[0] == 2 * alone[0]
    seconds = {part.name: part.seconds for part in stored.devices[0].counts[0].throughput.parts}
    assert seconds["teacher, kept head"] > 0 and "teacher, clean rows" not in seconds
    # With a model beside it, which is asked about evaluation rows alone.
    model = make_plan(
        validate(Config, fields | {"teacher": {**fields["teacher"], **described["teacher"]}}), ["H100"], [1]
    )
    assert model.teacher is not None and with_model.teacher is not None
    works = [plan.devices[0].counts[0].work for plan in (model, with_model)]
    assert [given.teacher_clean_share for given in works if given is not None] == [0.0, 1.0]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_plans_or_names_what_is_not_here(path: Path) -> None:
    config = load_config(path)
    names = [config.student.model, config.teacher.model if config.teacher is not None else None]
    try:
        plan = make_plan(config, ["H100"], [1])
    except ModelError as error:
        assert any(name is not None and name in str(error) for name in names), error
    else:
        assert plan.devices[0].counts[0].throughput is not None


def test_the_loss_holds_what_the_plan_says(tmp_path: Path) -> None:
    """Forward and backward of one linear_kd_loss with trained fp32 heads; the gradients themselves are the model's."""
    plan = make_plan(validate(Config, language_config(tmp_path, instruct=True)), ["H100"], [1])
    work = plan.devices[0].counts[0].work
    assert work is not None and plan.teacher is not None
    rows, width = 4, 256
    for limit in (4, 8, 512):
        given = dataclasses.replace(work, micro_batch_size=rows, widest=width, max_logits_mib=limit)
        wide: dict[str, Any] = {"hidden_size": 64, "vocab_size": 4096, "head_parameters": 64 * 4096}
        student, teacher = (
            dataclasses.replace(model, shape=dataclasses.replace(model.shape, **wide))
            for model in (plan.student, plan.teacher)
        )
        logits, heads = loss_bytes(student, teacher, given, 0, 0)
        arguments = make_heads((rows * width,), 4096, widths=(64, 64), bias=False)
        inputs = 2 * 4 * rows * width * 64  # of both models: there before the loss
        peak = peak_of(limit, arguments, reduction="mean", backend="cpu")
        planned = logits + heads - inputs
        # Where whole logits are allowed, a backend may still compute them in parts.
        assert (0.5 if limit == 512 else 0.7) * planned < peak < 1.1 * planned, limit


@pytest.fixture(scope="module")
def large() -> Plan:
    """70B teaches 8B."""
    return make_plan(load_config(LARGE), ["H100"], [1, 8, 64])


def memory_of(plan: Plan, placement: Placement, ranks: int) -> RankMemory:
    """Of one placement at one number of ranks."""
    return next(count.memory[placement] for count in plan.devices[0].counts if count.ranks == ranks)


def test_large_models_are_planned_from_their_shapes_alone(large: Plan) -> None:
    assert large.teacher is not None
    assert large.teacher.num_parameters == 70_553_706_496
    assert large.student.num_parameters == 8_030_261_248
    assert large.placement == Placement(3, "none", 3)


def test_a_teacher_that_does_not_fit_does_in_parts(large: Plan) -> None:
    device, parts = large.devices[0], Placement(3, "none", 3)
    assert not device.fits(memory_of(large, Placement(3, "none", 0), 8))
    assert device.fits(memory_of(large, parts, 8)) and not device.fits(memory_of(large, parts, 1))
    memory = memory_of(large, parts, 8)
    assert memory.teacher_weights_bytes == 2 * 70_553_706_496 // 8
    # Two of the largest parts (the word embeddings) may be whole, and the forward's own tensors.
    assert memory.teacher_working_bytes > 2 * 2 * 128_256 * 8192
    # The logits keep their limit; beside them are both heads, the gradient of one in fp32, and hidden states.
    assert memory.logits_bytes == 2048 * 2**20
    heads = 128_256 * (2 * 8192 + (2 + 4) * 4096)
    states = 8 * 2048 * 2 * (8192 + 2 * 4096)
    assert memory.heads_bytes == heads + states


def test_an_offloaded_teacher_leaves_the_device(large: Plan) -> None:
    resting = memory_of(large, Placement(3, "optimizer+parameters", 3, "cpu"), 1)
    assert resting.teacher_weights_bytes == 0 and resting.teacher_host_bytes == 2 * 70_553_706_496
    assert resting.host_bytes > resting.teacher_host_bytes and large.devices[0].fits(resting)
    offload = ["teacher.offload.device=nvme", "teacher.offload.nvme_path=/disk"]
    plan = make_plan(load_config(LARGE, offload), ["H100"], [8])
    assert plan.placement == Placement(3, "none", 3, "nvme")
    memory = memory_of(plan, plan.placement, 8)
    assert memory.teacher_host_bytes == 0 and memory.teacher_nvme_bytes == 2 * 70_553_706_496 // 8
    speed = plan.devices[0].counts[0].throughput
    assert speed is not None
    (fetched,) = [part for part in speed.parts if part.name == "teacher, from nvme"]
    # 64 rows a rank in 8 micro-batches, each of which reads the teacher from the node's disk once.
    assert fetched.seconds == pytest.approx(8 * 2 * 70_553_706_496 / 6e9)


def test_adapters_shrink_what_is_trained() -> None:
    whole = make_plan(load_config(LARGE), ["H100"], [8])
    narrow = make_plan(load_config(LARGE, ['student.lora={"r": 16}']), ["H100"], [8])
    # 32 layers: q, o 2 x (4096 + 4096), k, v 2 x (4096 + 1024), gate, up, down 3 x (4096 + 14336), times 16.
    assert narrow.student.num_trained == 32 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18432)
    before, after = (memory_of(plan, plan.placement, 8) for plan in (whole, narrow))
    assert after.student.optimizer_bytes < before.student.optimizer_bytes / 100
    assert after.student.weights_bytes == pytest.approx(before.student.weights_bytes, rel=0.01)

    def seconds(plan: Plan, name: str) -> float:
        speed = plan.devices[0].counts[0].throughput
        assert speed is not None
        return sum(part.seconds for part in speed.parts if part.name.startswith(name))

    # Of four products (forward, again, two backward) one is left out.
    assert seconds(narrow, "student") < 0.85 * seconds(whole, "student")
    assert seconds(narrow, "exchange") < seconds(whole, "exchange")


def test_micro_batches_share_the_gathering_of_the_teacher() -> None:
    def exchange(micro_batch_size: int) -> float:
        plan = make_plan(load_config(LARGE, [f"training.micro_batch_size={micro_batch_size}"]), ["H100"], [8])
        speed = plan.devices[0].counts[0].throughput
        assert speed is not None
        return next(part.seconds for part in speed.parts if part.name == "exchange")

    assert exchange(2) == pytest.approx(4 * exchange(8), rel=0.05)


def test_command_prints_the_large_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_plan.main(["--config", str(LARGE), "--gpu", "H100", "--devices", "8"]) == 0
    text = capsys.readouterr().out
    assert "* ZeRO 3; teacher ZeRO 3 " in text and "teacher ZeRO 3 on the CPU" in text
    assert "70,553,706,496 parameters" in text and "assumed, every row as long as task.max_length" in text


def test_a_description_needs_its_family() -> None:
    with pytest.raises(ConfigurationError, match='plan: teacher needs "model_type"'):
        load_config(LARGE, ['plan.teacher={"hidden_size": 8}'])
    with pytest.raises(ModelError, match=r"plan\.teacher: model_type 'lama' is not a family.*did you mean 'llama'"):
        make_plan(load_config(LARGE, ['plan.teacher.model_type="lama"']), ["H100"], [8])


def test_tiny_models_are_planned_on_this_cpu(tmp_path: Path) -> None:
    fields: dict[str, Any] = language_config(tmp_path, instruct=True, teacher={"zero_stage": 3})
    plan = make_plan(validate(Config, fields), ["cpu"], [1])
    (count,) = plan.devices[0].counts
    assert count.throughput is not None and count.throughput.step_s > 0
    names = {part.name for part in count.throughput.parts}
    assert names == {
        "student, clean rows",
        "student, clean rows, head",
        "teacher, clean rows",
        "teacher, clean rows, head",
        "optimizer",
    }
