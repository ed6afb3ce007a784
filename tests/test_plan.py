"""mixkd_fast.planning and `mixkd-fast plan`: products are PyTorch's own count; rows, shares, speed and text."""

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, tiny_batch, tiny_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from toy import ROOT, environment, toy_tokenizer, write_toy_files
from transformers import AutoModelForSequenceClassification, BertConfig, DebertaConfig, GPT2Config

from mixkd_fast import cli_plan
from mixkd_fast.configuration import Config, validate
from mixkd_fast.encoder import Encoder
from mixkd_fast.errors import ConfigurationError, ModelError
from mixkd_fast.methods import AnyMethod, Method, Setting
from mixkd_fast.mixing import Mixing
from mixkd_fast.planning.assumptions import assumptions
from mixkd_fast.planning.flops import EncoderShape, attention_flops, forward_flops
from mixkd_fast.planning.hardware import GPUS, MATMUL_EFFICIENCY, gpu_rates
from mixkd_fast.planning.lengths import mnli_lengths, row_lengths, sample_batches
from mixkd_fast.planning.memory import Placement
from mixkd_fast.planning.models import planned_student, planned_teacher
from mixkd_fast.planning.plan import make_plan
from mixkd_fast.planning.row_lengths import RowLengths
from mixkd_fast.planning.throughput import throughput
from mixkd_fast.planning.workload import workload

BERT = {"model_type": "bert", "vocab_size": 30522}
FUSED = ("bert", "roberta", "electra", "distilbert")


def config_of(folder: Path, **sections: Any) -> Config:
    """A MixKD configuration whose teacher is a folder with nothing but a config.json."""
    if not (folder / "teacher").is_dir():
        BertConfig(num_labels=3).save_pretrained(folder / "teacher")
    fields = {
        "task": {"name": "mnli"},
        "teacher": {"model": str(folder / "teacher")},
        "student": {"num_layers": 6},
        "method": {"name": "mixkd"},
        "training": {"batch_size": 64, "precision": "bf16", "epochs": 4.0},
        "deepspeed": {"zero_optimization": {"stage": 0}},
    }
    return validate(Config, fields | sections)


def counted(work: Any) -> int:
    """FLOPs of matrix products that PyTorch counts itself."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_flops_are_those_pytorch_counts(family: str) -> None:
    fields: dict[str, Any] = {"attn_implementation": "eager"}
    if family == "deberta-v2":
        fields["conv_kernel_size"] = 0
    model = tiny_model(family, **fields).requires_grad_(False)
    ids = torch.randint(4, 90, (3, 11))
    flops = counted(lambda: model(input_ids=ids, attention_mask=torch.ones_like(ids)))
    assert forward_flops(EncoderShape.of(model.config), [11] * 3) == flops


def test_deberta_of_version_1_cuts_distances_at_the_longest_row() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = DebertaConfig(**sizes, vocab_size=96, relative_attention=True, pos_att_type=["c2p", "p2c"])
    model = AutoModelForSequenceClassification.from_config(config).eval().requires_grad_(False)
    ids = torch.randint(4, 90, (3, 11))
    assert forward_flops(EncoderShape.of(config), [11] * 3) == counted(lambda: model(input_ids=ids))


@pytest.mark.parametrize("family", FUSED)
def test_first_token_flops_are_those_of_the_fused_encoder(family: str) -> None:
    encoder = Encoder(tiny_model(family).requires_grad_(False))
    assert encoder.fuse() == ""
    batch = tiny_batch(encoder.config, lengths=(9, 9), partner=None, lam=None)
    flops = counted(lambda: encoder.clean(batch))
    shape = EncoderShape.of(encoder.config)
    assert forward_flops(shape, [9] * 2, first_token_only=True) == flops
    assert forward_flops(shape, [9] * 2) > flops


def test_flops_add_up() -> None:
    shape = EncoderShape.of(BertConfig())
    one, two = forward_flops(shape, [40]), forward_flops(shape, np.array([40, 40]))
    assert two == 2 * one
    assert attention_flops(shape, [40]) == 12 * 4 * 40 * 40 * 768
    # 12 layers of 7.1 M weights, two operations a weight and token, and attention.
    assert one == pytest.approx(2 * 40 * 85.0e6, rel=0.02)


def test_unknown_families_are_refused() -> None:
    with pytest.raises(ModelError, match=r"model_type = 'gpt2'.*known: bert"):
        EncoderShape.of(GPT2Config())


def test_shipped_lengths_are_mnlis() -> None:
    lengths = mnli_lengths(128)
    assert lengths.counts.sum() == 26413 and lengths.longest == 128
    assert lengths.mean == pytest.approx(39.97, abs=0.01)
    cut = mnli_lengths(64)
    assert cut.longest == 64 and cut.counts.sum() == 26413 and cut.mean < lengths.mean


def test_random_batches_pad_and_planned_ones_hardly() -> None:
    lengths = mnli_lengths(128)
    random = sample_batches(lengths, 32, None, is_length_planned=False, batch_size=32)
    planned = sample_batches(lengths, 32, None, is_length_planned=True, batch_size=32)
    assert random.padding_overhead > 0.8 and planned.padding_overhead < 0.15
    assert random.mixed.shape[1] == 0
    for sample in (random, planned):
        assert sample.clean.max() <= 128 and not (sample.clean % 8).any()


def test_mixed_rows_are_as_wide_as_their_micro_batch(tmp_path: Path) -> None:
    config = config_of(tmp_path, method={"name": "mixkd", "mixed_rows": 2, "pairing": "dataset"})
    work = workload(config, mnli_lengths(128), ranks=1)
    assert work.mixed_rows == 128 and (work.lengths.mixed[:, :64] == work.lengths.clean).all()
    alone = workload(config_of(tmp_path, method={"name": "kd"}), mnli_lengths(128), ranks=1)
    assert work.lengths.clean.mean() > alone.lengths.clean.mean()  # partners from elsewhere widen it


def test_lengths_come_from_local_files_of_the_task(tmp_path: Path) -> None:
    config = config_of(tmp_path, task=write_toy_files(tmp_path))
    assert "tokenizer of the task's own rows is not here" in row_lengths(config).source
    toy_tokenizer().save_pretrained(tmp_path / "teacher")
    lengths = row_lengths(config)
    assert lengths.num_rows == 96 and 5 <= lengths.mean <= 11 and "96 of the task's 96" in lengths.source


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({"name": "finetune"}, (True, False, 0.0, False)),
        ({"name": "kd"}, (True, False, 0.25, False)),
        ({"name": "mixkd"}, (True, True, 0.0, True)),
        ({"name": "mixkd", "kd_weight": 1.0, "tmkd_weight": 0.0}, (True, True, 0.25, False)),
        ({"name": "mixkd", "mle_weight": 0.0}, (False, True, 0.0, True)),
        (
            {"name": "mixkd", "mle_weight": 0.0, "sm_weight": 0.0, "tmkd_weight": 0.0, "kd_weight": 1.0},
            (True, False, 0.25, False),
        ),
        ({"name": "cckd", "mle_weight": 0.0}, (True, False, 0.25, False)),
        ({"name": "label_revision", "select_share": 0.5, "tmkd_weight": 1.0}, (True, True, 0.25, True)),
        ({"name": "data_partition", "sm_weight": 1.0}, (True, True, 0.25, False)),
        ({"name": "rdd"}, (True, False, 0.25, False)),
    ],
)
def test_only_needed_forwards_are_planned(tmp_path: Path, method: dict[str, Any], expected: tuple[Any, ...]) -> None:
    config = config_of(tmp_path, method=method)
    work = workload(config, row_lengths(config), ranks=2)
    shares = (work.student_clean, work.student_mixed, work.teacher_clean_share, work.teacher_mixed)
    assert shares == (*expected[:2], pytest.approx(expected[2], rel=1e-3), expected[3])
    assert work.micro_batch_size == 32 and work.steps == -(-4 * 392_702 // 64)


class Reader(Method):
    """A method of a user's own, which has no weights, reads a layer and trains a projection."""

    name: Literal["reader"] = "reader"

    @property
    def reads_layers(self) -> bool:
        return True

    def build(self, setting: Setting) -> nn.Module:
        return nn.Linear(2, 2)


def test_methods_without_weights_are_planned_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    config = config_of(tmp_path).model_copy(update={"method": Reader()})
    work = workload(config, row_lengths(config), ranks=1)
    assert (work.student_clean, work.student_mixed) == (True, False)
    assert (work.teacher_clean_share, work.teacher_mixed) == (0.0, False)
    left_out = _left_out(config)
    assert len(left_out) == 2 and "own forward instead of the fused one" in left_out[0]
    assert left_out[1] == "Not counted of method reader: modules that the method prepares or trains beside the student."


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"name": "finetune"}, None),
        ({"name": "mixkd", "kd_weight": 1.0}, None),
        ({"name": "cckd"}, None),
        ({"name": "label_revision"}, None),
        ({"name": "label_revision", "select_share": 0.5}, "two forwards of the student and one of the teacher"),
        ({"name": "data_partition"}, "one forward of the student over all training rows"),
        ({"name": "pkt"}, "hidden states and projections of layers"),
        ({"name": "minilm"}, "hidden states and projections of layers"),
        ({"name": "rdd", "stage_share": 0.0}, None),
        ({"name": "rdd"}, "two dropout passes of the teacher over the clean rows of the first 50% of the steps"),
    ],
)
def test_the_plan_says_what_a_method_costs_beside_it(tmp_path: Path, method: dict[str, Any], said: str | None) -> None:
    left_out = _left_out(config_of(tmp_path, method=method))
    assert len(left_out) == (said is not None) and all(str(said) in text for text in left_out)


def test_every_method_that_reads_layers_says_so() -> None:
    for kind in get_args(get_args(AnyMethod)[0]):
        source = "".join(inspect.getsource(base.terms) for base in kind.__mro__ if "terms" in vars(base))
        if ".read(" in source or "_readings(" in source or "_last_layer(" in source:
            says = (kind.reads_layers, kind.reads_teacher)
            assert says != (Method.reads_layers, Method.reads_teacher), (
                f"{kind.__name__} reads layers and does not say so"
            )


def _left_out(config: Config) -> list[str]:
    texts = assumptions(make_plan(config, ["H100"], [1]), config)
    return [text for text in texts if text.startswith("Not counted of method")]


def test_steps_are_unknown_without_the_number_of_rows(tmp_path: Path) -> None:
    config = config_of(tmp_path, task={"name": "mine", "hub": "someone/rows"})
    assert workload(config, row_lengths(config), 1).steps is None
    assert make_plan(config, ["H100"], [1]).devices[0].counts[0].throughput.hours is None


def test_student_layers_and_configs_are_honoured(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    teacher, student = planned_teacher(config), planned_student(config)
    assert teacher is not None and (teacher.shape.num_layers, student.shape.num_layers) == (12, 6)
    assert teacher.num_parameters == 109_484_547 and student.num_parameters == 66_957_315
    own = planned_student(config_of(tmp_path, student={"config": {**BERT, "num_hidden_layers": 2}, "dropout": 0.0}))
    assert own.shape.num_layers == 2 and own.shape.num_labels == 3 and not own.has_dropout


def test_speed_follows_the_hardware(tmp_path: Path) -> None:
    config = config_of(tmp_path, training={"batch_size": 8192, "precision": "bf16", "steps": 10})
    plan = make_plan(config, ["A100", "H100", "H200"], [1, 8, 64])
    speeds = [[count.throughput.rows_per_s for count in device.counts] for device in plan.devices]
    for speed in speeds:
        assert speed[0] < speed[1] < speed[2] and speed[1] <= 8 * speed[0] * 1.01
    assert speeds[0][0] < speeds[1][0] < speeds[2][0]
    one = plan.devices[1].counts[0]
    assert one.throughput is not None and one.work is not None
    assert one.throughput.step_s == pytest.approx(sum(part.seconds for part in one.throughput.parts))
    assert one.throughput.hours == pytest.approx(10 * one.throughput.step_s / 3600)
    # Products alone would take this long; the rest may add to it, but not dominate at batch 8192.
    flops = sum(part.flops for part in one.throughput.parts)
    bound = flops / (MATMUL_EFFICIENCY * GPUS["H100"].flops_per_s["bf16"])
    assert bound < one.throughput.step_s < 3 * bound


def test_more_stages_exchange_more(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    work, student = workload(config, mnli_lengths(128), 16), planned_student(config)
    teacher = planned_teacher(config)

    def sent(stage: int, teacher_stage: int) -> float:
        placement = Placement(stage, "none", teacher_stage)
        device = GPUS["H100"]
        speed = throughput(student, teacher, work, placement, device, lambda _: gpu_rates(device, "bf16"))
        return next(part.bytes_moved for part in speed.parts if part.name == "exchange")

    # Stage 0 sends fp32 gradients there and back; stage 1 bf16 gradients there and bf16 weights back.
    assert sent(0, 0) == pytest.approx(2 * sent(1, 0))
    assert sent(3, 0) == pytest.approx(1.5 * sent(1, 0)) and sent(0, 3) > sent(0, 0)


def test_rank_counts_that_cannot_share_the_batch_say_so(tmp_path: Path) -> None:
    plan = make_plan(config_of(tmp_path), ["H100"], [1, 24, 128])
    reasons = [count.impossible for count in plan.devices[0].counts]
    assert reasons[0] is None and "24 ranks" in str(reasons[1]) and "fewer rows than 128 ranks" in str(reasons[2])
    with pytest.raises(ConfigurationError, match="none of these numbers of ranks"):
        make_plan(config_of(tmp_path), ["H100"], [1024])


def test_cpu_is_measured(tmp_path: Path) -> None:
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = config_of(
        tmp_path,
        student={"config": {**BERT, **small}},
        training={"batch_size": 8, "steps": 10, "threads": 1},
        method={"name": "finetune"},
    )
    threads = torch.get_num_threads()
    device = make_plan(config, ["cpu"], [1, 8]).devices[0]
    assert torch.get_num_threads() == threads
    assert [count.ranks for count in device.counts] == [1] and not device.is_gpu
    assert device.student_rates.linear_forward > 1e8 and device.student_rates.copy > 1e8
    with pytest.raises(ConfigurationError, match="fp16"):
        make_plan(config_of(tmp_path, training={"precision": "fp16"}), ["cpu"], [1])


def test_command_prints_and_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    path.write_text(config_of(tmp_path).model_dump_json(by_alias=True))
    arguments = ["--config", str(path), "--gpu", "H100", "--devices", "1,8,128"]
    arguments += ["--json", str(tmp_path / "plan.json"), "--set", "deepspeed.zero_optimization.stage=2"]
    code = cli_plan.main(arguments)
    text = capsys.readouterr().out
    assert code == 0 and "* ZeRO 2; teacher ZeRO 0" in text and "128 ranks: cannot be used" in text
    assert "50% of them in matrix products" in text and "50 GB/s per GPU between nodes" in text
    written = json.loads((tmp_path / "plan.json").read_text())
    (device,) = written["devices"]
    assert device["name"] == "H100" and written["configured"]["student_stage"] == 2
    first, *_, last = device["counts"]
    assert len(first["memory"]) == 16 and all(row["fits"] for row in first["memory"])
    assert last["impossible"] and last["throughput"] is None


def test_command_explains_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    path.write_text(config_of(tmp_path, teacher={"model": str(tmp_path / "nowhere")}).model_dump_json(by_alias=True))
    assert cli_plan.main(["--config", str(path)]) == 1
    assert "teacher.model" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli_plan.main(["--config", str(path), "--devices", "0,x"])
    assert "positive whole numbers" in capsys.readouterr().err


def test_planning_imports_no_deepspeed_and_reads_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(config_of(tmp_path).model_dump_json(by_alias=True))
    assert not list((tmp_path / "teacher").glob("*.safetensors"))
    code = (
        "import sys; from mixkd_fast import cli_plan; "
        f"code = cli_plan.main(['--config', {str(path)!r}, '--gpu', 'A100', '--devices', '1']); "
        "assert 'deepspeed' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_widest_batch_is_that_of_the_longest_row() -> None:
    counts = np.zeros(37, dtype=np.int64)
    counts[36] = 5
    assert RowLengths(counts, None, 128, "").widest == 40 and RowLengths(counts, None, 38, "").widest == 38


def test_what_keeps_models_from_the_fused_forward_costs(tmp_path: Path) -> None:
    plain = make_plan(config_of(tmp_path), ["H200"], [1])
    checkpointed = make_plan(
        config_of(
            tmp_path, training={"batch_size": 64, "epochs": 4.0, "precision": "bf16", "gradient_checkpointing": True}
        ),
        ["H200"],
        [1],
    )
    quantized = {"model": str(tmp_path / "teacher"), "quantization": "fp8"}
    narrow = make_plan(config_of(tmp_path, teacher=quantized), ["H200"], [1])

    def flops(plan: Any, who: str) -> float:
        (count,) = plan.devices[0].counts
        return float(sum(part.flops for part in count.throughput.parts if part.name.startswith(who)))

    # One forward more, and the last layer whole.
    assert 1.33 < flops(checkpointed, "student") / flops(plain, "student") < 1.6
    assert flops(checkpointed, "teacher") == flops(plain, "teacher") < flops(narrow, "teacher")


def test_partners_from_the_whole_data_set_widen_planned_batches() -> None:
    lengths = mnli_lengths(128)
    near = sample_batches(lengths, 32, Mixing(), True, 32)
    far = sample_batches(lengths, 32, Mixing(pairing="dataset"), True, 32)
    random = sample_batches(lengths, 32, Mixing(), False, 32)
    assert near.padding_overhead < 0.2 < 1.0 < far.padding_overhead
    assert abs(far.padding_overhead - random.padding_overhead) < 0.5
