"""mixkd_fast.planning.memory against what PyTorch and DeepSpeed really hold, and DeepSpeed's own estimates.

Named so that it runs first: it counts the tensors of this process, and trainings of other tests leave some behind.
"""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from tiny_models import tiny_batch
from toy import save_toy_teacher, toy_config, write_toy_files
from transformers import AutoConfig, AutoModelForSequenceClassification

from mixkd_fast import FineTune, distill
from mixkd_fast.configuration import Config, validate
from mixkd_fast.encoder import Encoder
from mixkd_fast.planning.lengths import mnli_lengths, row_lengths
from mixkd_fast.planning.memory import ModelStates, Placement, activation_bytes, placements, rank_memory, student_states
from mixkd_fast.planning.models import PlannedModel, planned_model, planned_student, planned_teacher
from mixkd_fast.planning.workload import Workload, workload

MINILM = {"vocab_size": 2000, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "num_labels": 3}
ROWS, WIDTH = 8, 40


def minilm(family: str, dropout: float) -> Any:
    """A random model of MiniLM's size, in training."""
    fields: dict[str, Any] = {**MINILM, "intermediate_size": 1536, "max_position_embeddings": 64}
    fields |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    if family == "distilbert":
        fields |= {"hidden_dim": fields.pop("intermediate_size"), "dropout": dropout, "attention_dropout": dropout}
    if family == "deberta-v2":
        fields |= {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 256}
        fields |= {"share_att_key": True, "position_biased_input": False}
    if family == "modernbert":
        fields |= {"intermediate_size": 576, "attention_dropout": dropout, "mlp_dropout": dropout}
        fields |= {"embedding_dropout": dropout, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}
        fields |= {"bos_token_id": 1, "eos_token_id": 2}
    return AutoModelForSequenceClassification.from_config(AutoConfig.for_model(family, **fields)).train()


def kept_bytes(model: torch.nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes that autograd keeps of a forward, each storage once, the model's own tensors not counted."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()  # a graph that holds itself through its hooks would never be freed
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    assert result.requires_grad
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "modernbert", "deberta-v2"])
def test_activations_are_what_autograd_keeps(family: str, dropout: float, autocast: bool) -> None:
    model = minilm(family, dropout)
    planned = planned_model(model.config, model)
    ids = torch.randint(5, 2000, (ROWS, WIDTH))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        measured = kept_bytes(model, lambda: model(input_ids=ids, attention_mask=mask).logits)
    predicted = activation_bytes(
        planned, ROWS, WIDTH, "bf16" if autocast else "fp32", autocast=autocast, fused=False, is_gpu=False
    )
    predicted += 2 * planned.num_linear_parameters if autocast else 0
    assert predicted == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_activations_of_the_fused_encoder(family: str, dropout: float, autocast: bool) -> None:
    encoder = Encoder(minilm(family, dropout)).train()
    assert encoder.fuse() == ""
    planned = planned_model(encoder.config, encoder.model)
    batch = tiny_batch(encoder.config, lengths=[WIDTH] * ROWS, partner=None, lam=None)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        measured = kept_bytes(encoder, lambda: encoder.clean(batch).logits)
    predicted = activation_bytes(
        planned, ROWS, WIDTH, "bf16" if autocast else "fp32", autocast=autocast, fused=True, is_gpu=False
    )
    # Copies of weights: all of them under autocast, else the stacked queries, keys and values.
    predicted += 2 * planned.num_linear_parameters if autocast else 4 * 3 * 6 * 384**2
    assert predicted == pytest.approx(measured, rel=0.15)


def test_checkpointing_keeps_the_layers_inputs() -> None:
    model = minilm("bert", 0.0)
    planned = planned_model(model.config, model)
    model.gradient_checkpointing_enable()
    ids = torch.randint(5, 2000, (ROWS, WIDTH))
    measured = kept_bytes(model, lambda: model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)
    options: dict[str, Any] = {"autocast": False, "fused": False, "is_gpu": False}
    whole = activation_bytes(planned, ROWS, WIDTH, "fp32", **options)
    checkpointed = activation_bytes(planned, ROWS, WIDTH, "fp32", **options, checkpointing=True)
    # Beside the inputs, one layer is made anew in the backward.
    assert measured < checkpointed < measured + 0.2 * whole


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    save_toy_teacher(folder / "teacher", hidden_size=256, num_hidden_layers=3, intermediate_size=512)
    return folder


@pytest.mark.parametrize(
    ("stage", "precision", "offload"),
    [
        (0, "fp32", "none"),
        (0, "bf16", "none"),
        (1, "bf16", "none"),
        (2, "fp32", "none"),
        (3, "bf16", "none"),
        # DeepSpeed compiles its AdamW of the CPU first, for minutes.
        (2, "bf16", "optimizer"),
        (3, "bf16", "optimizer+parameters"),
    ],
)
def test_states_are_what_a_real_update_holds(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: Any, precision: str, offload: Any
) -> None:
    """Every tensor alive after an optimizer's update, but for buckets: weights, gradients and states, on any device."""
    most = 0

    def watched(cls: Any) -> None:
        update = cls.step

        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal most
            result = update(self, *args, **kwargs)
            most = max(most, _alive_bytes(largest_bytes=64 * 2**20))
            return result

        monkeypatch.setattr(cls, "step", step)

    watched(torch.optim.AdamW)
    watched(DeepSpeedCPUAdam)
    zero: dict[str, Any] = {"stage": stage}
    if offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if offload == "optimizer+parameters":
        zero["offload_param"] = {"device": "cpu"}
    before = _alive_bytes(largest_bytes=64 * 2**20)
    task = write_toy_files(small_run)
    fields: dict[str, Any] = {
        "task": task,
        "student": {"model": str(small_run / "teacher")},
        "training": {"steps": 2, "batch_size": 8, "precision": precision, "threads": 1},
        "deepspeed": {"zero_optimization": zero},
        "output": {"directory": str(tmp_path / "run"), "report": False},
    }
    distill(**fields, method=FineTune(), progress=False)
    config = validate(Config, {**fields, "method": {"name": "finetune"}})
    student, work = planned_student(config), workload(config, row_lengths(config), 1)
    states = student_states(student, Placement(stage, offload, None), work, zero, is_gpu=False)
    held = states.weights_bytes + states.gradients_update_bytes + states.optimizer_bytes + states.host_bytes
    assert most - before == pytest.approx(held, rel=0.05)


def _alive_bytes(largest_bytes: int) -> int:
    """Bytes of all tensors that Python can see, each storage once; DeepSpeed's stage 3 keeps an unwritten bucket."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and tensor.layout == torch.strided:
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(size for size in storages.values() if size <= largest_bytes)


def states_of(student: PlannedModel, work: Workload, stage: Any, offload: Any = "none") -> ModelStates:
    return student_states(student, Placement(stage, offload, None), work, {}, is_gpu=True)


@pytest.mark.parametrize("ranks", [1, 8, 64])
def test_states_agree_with_deepspeeds_estimators(tmp_path: Path, ranks: int) -> None:
    config = validate(
        Config,
        toy_config(tmp_path, training={"precision": "bf16", "batch_size": 64, "micro_batch_size": 1})
        | {"student": {"config": {"model_type": "bert", "vocab_size": 30522}}},
    )
    student, work = planned_student(config), workload(config, mnli_lengths(128), ranks)
    count = student.num_parameters
    stage_2 = states_of(student, work, 2)
    _, theirs = estimate_zero2_model_states_mem_needs(count, ranks, 1, cpu_offload=False)
    ours = stage_2.weights_bytes + stage_2.gradients_update_bytes + stage_2.optimizer_bytes
    assert ours == pytest.approx(theirs, rel=1e-3)
    _, theirs = estimate_zero2_model_states_mem_needs(count, ranks, 1, cpu_offload=True)
    assert states_of(student, work, 2, "optimizer").weights_bytes == theirs
    # Theirs leaves out the bf16 gradients that stage 3 keeps beside the fp32 ones: 20 bytes a parameter, not 18.
    stage_3 = states_of(student, work, 3)
    _, theirs, layer = estimate_zero3_model_states_mem_needs(
        count, student.largest_layer, ranks, 1, cpu_offload=False, cpu_offload_params=False
    )
    ours = stage_3.weights_bytes + stage_3.gradients_update_bytes + stage_3.optimizer_bytes
    assert ours == pytest.approx((theirs - layer) * 20 / 18, rel=1e-3)


def test_placements_cover_stages_offloads_and_teachers() -> None:
    assert len(placements(True)) == 16 and len(placements(False)) == 8
    assert {(p.student_stage, p.offload) for p in placements(False) if p.offload == "optimizer+parameters"} == {
        (3, "optimizer+parameters")
    }


def test_partitioning_and_offload_save_memory(tmp_path: Path) -> None:
    config = validate(
        Config,
        toy_config(tmp_path, training={"precision": "bf16", "batch_size": 64, "micro_batch_size": 1})
        | {"student": {"config": {"model_type": "bert", "vocab_size": 30522}}},
    )
    student, teacher = planned_student(config), planned_teacher(config)
    work = workload(config, mnli_lengths(128), 64)
    small_buckets = {"reduce_bucket_size": 1_000_000, "stage3_max_live_parameters": 10_000_000}

    def total(stage: Any, offload: Any = "none", teacher_stage: Any = 0) -> int:
        placement = Placement(stage, offload, teacher_stage)
        return rank_memory(student, teacher, placement, work, small_buckets, is_gpu=True).total_bytes

    assert total(0) > total(1) > total(2) > total(3) > total(3, "optimizer+parameters")
    assert total(1) > total(1, "optimizer")
    whole, shared = (
        rank_memory(student, teacher, Placement(0, "none", stage), work, {}, is_gpu=True) for stage in (0, 3)
    )
    assert shared.teacher_weights_bytes < whole.teacher_weights_bytes / 50
