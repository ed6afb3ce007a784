"""What DeepSpeed gets: the user's section untouched, what is derived from training, and no contradictions."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from mixkd_fast.configuration import BatchArithmetic, Config, Teacher, validate
from mixkd_fast.deepspeed_config import autocasts, student_deepspeed_config, teacher_zero3_config
from mixkd_fast.errors import ConfigurationError
from mixkd_fast.run_folder import RunFolder

BASE: dict[str, Any] = {"task": {"name": "demo"}, "teacher": {"model": "somewhere"}}


def _merged(changes: dict[str, Any]) -> dict[str, Any]:
    return {**copy.deepcopy(BASE), **changes}


ARITHMETIC = BatchArithmetic(32, 4, 4, 2)


def test_deepspeed_section_passes_untouched_beside_what_is_derived() -> None:
    section = {"zero_optimization": {"stage": 2, "x": [1, {"y": None}]}, "flops_profiler": {"enabled": True}, "odd": 1}
    before = copy.deepcopy(section)
    result = student_deepspeed_config(validate(Config, _merged({"deepspeed": section})), ARITHMETIC)
    assert {key: result[key] for key in section} == before and section == before
    derived = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert [result[key] for key in derived] == [32, 4, 4, 1.0]
    assert "bf16" not in result and "fp16" not in result


def test_auto_is_filled_and_agreement_is_fine() -> None:
    section = {
        "train_batch_size": "auto",
        "gradient_accumulation_steps": 4,
        "bf16": {"enabled": "auto", "check_grad_overflow": True},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": 1e-6}},
        "zero_optimization": {"stage": 1},
    }
    changes = {"deepspeed": section, "training": {"precision": "bf16", "learning_rate": 1e-3}}
    result = student_deepspeed_config(validate(Config, _merged(changes)), ARITHMETIC)
    assert result["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert result["optimizer"]["params"] == {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-6}


@pytest.mark.parametrize(
    ("section", "training", "words"),
    [
        ({"train_batch_size": 64}, {}, ["deepspeed.train_batch_size = 64", "training.batch_size = 32"]),
        ({"train_micro_batch_size_per_gpu": 8}, {}, ["training.micro_batch_size = 4"]),
        ({"gradient_accumulation_steps": 1}, {}, ["deepspeed.gradient_accumulation_steps = 1", "= 4"]),
        ({"gradient_clipping": 0.5}, {}, ["deepspeed.gradient_clipping = 0.5", "training.max_grad_norm = 1.0"]),
        ({"fp16": {"enabled": True}}, {}, ["deepspeed.fp16.enabled = True", "training.precision = 'fp32'"]),
        ({"bf16": {"enabled": False}}, {"precision": "bf16"}, ["deepspeed.bf16.enabled = False", "'bf16'"]),
        (
            {"optimizer": {"params": {"lr": 1.0}}},
            {"learning_rate": 2.0},
            ["optimizer.params.lr", "training.learning_rate"],
        ),
        ({"fp16": {"enabled": True}}, {"precision": "bf16"}, ["deepspeed.fp16.enabled = True", "'bf16'"]),
        ({"bfloat16": {"enabled": True}}, {}, ["deepspeed.bf16.enabled = True", "training.precision = 'fp32'"]),
        ({"amp": {"enabled": True}}, {}, ["deepspeed.amp.enabled = True", "training.precision = 'fp32'"]),
        (
            {"optimizer": {"type": "Adam", "params": {"betas": [0.5, 0.9]}}},
            {"betas": [0.9, 0.99]},
            ["deepspeed.optimizer.params.betas = [0.5, 0.9]", "training.betas = [0.9, 0.99]"],
        ),
        (
            {"optimizer": {"type": "Adam", "params": {"eps": 1e-6}}},
            {"epsilon": 1e-7},
            ["deepspeed.optimizer.params.eps = 1e-06", "training.epsilon = 1e-07"],
        ),
        # Never in silence: weight decay is set per group of parameters, so the optimizer's own would have no effect.
        (
            {"optimizer": {"type": "Adam", "params": {"weight_decay": 0.5}}},
            {},
            ["deepspeed.optimizer.params.weight_decay = 0.5", "training.weight_decay = 0.01"],
        ),
        ({"scheduler": {"type": "WarmupLR"}}, {"warmup": 0.2}, ["deepspeed.scheduler", "training.warmup = 0.2"]),
        ({"scheduler": {"type": "WarmupLR"}}, {"schedule": "cosine"}, ["training.schedule = 'cosine'"]),
        ({"optimizer": {}}, {}, ["deepspeed.optimizer.type = None"]),
        ({"optimizer": {"type": "Adam", "params": None}}, {}, ["deepspeed.optimizer.params = None", "object"]),
        ({"bf16": True}, {}, ["deepspeed.bf16 = True: is not an object"]),
        ({"zero_optimization": 3}, {}, ["deepspeed.zero_optimization = 3: is not an object"]),
        (
            {"zero_optimization": {"stage": 3, "offload_param": "cpu"}},
            {},
            ["deepspeed.zero_optimization.offload_param = 'cpu': is not an object"],
        ),
        ({"zero_optimization": {"stage": True}}, {}, ["deepspeed.zero_optimization.stage = True", "0, 1, 2, 3"]),
        ({"zero_optimization": {"stage": "auto"}}, {}, ["deepspeed.zero_optimization.stage = 'auto'"]),
        ({"zero_optimization": {"stage": 4}}, {}, ["deepspeed.zero_optimization.stage = 4", "0, 1, 2, 3"]),
    ],
)
def test_contradictions_name_both_fields(section: dict[str, Any], training: dict[str, Any], words: list[str]) -> None:
    config = validate(Config, _merged({"deepspeed": section, "training": training}))
    with pytest.raises(ConfigurationError) as caught:
        student_deepspeed_config(config, ARITHMETIC)
    assert all(word in str(caught.value) for word in words)


def test_an_optimizer_of_deepspeed_keeps_its_options_where_training_says_nothing() -> None:
    section = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "betas": [0.8, 0.9]}}}
    result = student_deepspeed_config(validate(Config, _merged({"deepspeed": section})), ARITHMETIC)
    assert result["optimizer"] == section["optimizer"]


def test_an_optimizer_of_deepspeed_takes_what_training_says_and_it_leaves_open() -> None:
    training = {"learning_rate": 3e-5, "betas": [0.9, 0.95]}
    section: dict[str, Any] = {"optimizer": {"type": "AdamW"}}
    result = student_deepspeed_config(
        validate(Config, _merged({"deepspeed": section, "training": training})), ARITHMETIC
    )
    assert result["optimizer"] == {"type": "AdamW", "params": {"lr": 3e-5, "betas": [0.9, 0.95]}}
    section = {"optimizer": {"type": "SGD", "params": {"momentum": 0.9}}}
    result = student_deepspeed_config(
        validate(Config, _merged({"deepspeed": section, "training": training})), ARITHMETIC
    )
    assert result["optimizer"] == {"type": "SGD", "params": {"momentum": 0.9, "lr": 3e-5}}
    assert section == {"optimizer": {"type": "SGD", "params": {"momentum": 0.9}}}


def test_the_section_in_the_configuration_is_never_changed() -> None:
    section = {
        "train_batch_size": "auto",
        "fp16": {"initial_scale_power": 8},
        "bfloat16": {"enabled": "auto"},
        "optimizer": {"type": "Adam", "params": {"lr": "auto", "betas": "auto"}},
        "zero_optimization": {"stage": 2},
    }
    before = copy.deepcopy(section)
    config = validate(Config, _merged({"deepspeed": section, "training": {"precision": "bf16"}}))
    result = student_deepspeed_config(config, ARITHMETIC)
    assert section == before and config.deepspeed == before
    assert result["bf16"] == {"enabled": True} and "bfloat16" not in result
    assert result["fp16"] == {"enabled": False, "initial_scale_power": 8}
    result["optimizer"]["params"]["betas"][0] = 0.0
    assert config.training.betas == [0.9, 0.999]


def test_users_defaults_win_over_ours() -> None:
    section = {"steps_per_print": 10, "zero_allow_untested_optimizer": False}
    result = student_deepspeed_config(validate(Config, _merged({"deepspeed": section})), ARITHMETIC)
    assert {key: result[key] for key in section} == section
    result = student_deepspeed_config(validate(Config, BASE), ARITHMETIC)
    assert result["steps_per_print"] is None and result["zero_allow_untested_optimizer"] is True


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_deepspeed_understands_what_is_derived(precision: str) -> None:
    changes = {
        "training": {"batch_size": 32, "precision": precision, "max_grad_norm": 0.5},
        "deepspeed": {"zero_optimization": {"stage": 1}},
    }
    arithmetic = BatchArithmetic(32, 4, 8, 1)
    understood = DeepSpeedConfig(student_deepspeed_config(validate(Config, _merged(changes)), arithmetic))
    assert understood.train_batch_size == 32 and understood.train_micro_batch_size_per_gpu == 4
    assert understood.gradient_accumulation_steps == 8 and understood.gradient_clipping == 0.5
    assert understood.float16_config.enabled is (precision == "fp16")
    assert understood.bfloat16_config.enabled is (precision == "bf16")


@pytest.mark.parametrize("section", [{}, {"bf16": {"enabled": "auto"}}, {"zero_optimization": {"stage": 0}}])
def test_bf16_without_zero_is_autocast(section: dict[str, Any]) -> None:
    """DeepSpeed sees an fp32 model, unless its section asks for its own bf16."""
    config = validate(Config, _merged({"deepspeed": section, "training": {"precision": "bf16"}}))
    result = student_deepspeed_config(config, ARITHMETIC)
    assert not result.get("bf16", {}).get("enabled") and autocasts(config.training, result)
    own = section | {"bf16": {"enabled": True}}
    config = validate(Config, _merged({"deepspeed": own, "training": {"precision": "bf16"}}))
    result = student_deepspeed_config(config, ARITHMETIC)
    assert result["bf16"]["enabled"] is True and not autocasts(config.training, result)


def test_deepspeed_section_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text('{"zero_optimization": {"stage": 1}}')
    config = validate(Config, _merged({"deepspeed": str(path)}))
    assert student_deepspeed_config(config, ARITHMETIC)["zero_optimization"] == {"stage": 1}
    path.write_text('{"zero_optimization": {"stage": 1},\n}')
    with pytest.raises(ConfigurationError, match=r"deepspeed = .*zero\.json', line 2, column 1: not JSON"):
        student_deepspeed_config(config, ARITHMETIC)
    path.write_text("[1]")
    with pytest.raises(ConfigurationError, match=r"deepspeed = .*the top level is not an object"):
        student_deepspeed_config(config, ARITHMETIC)
    with pytest.raises(ConfigurationError, match=r"deepspeed = .*cannot be read"):
        student_deepspeed_config(validate(Config, _merged({"deepspeed": "nowhere.json"})), ARITHMETIC)


def test_resume_notices_that_the_deepspeed_file_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text('{"zero_optimization": {"stage": 1}}')
    output = {"directory": str(tmp_path / "run")}
    config = validate(Config, _merged({"deepspeed": str(path), "output": output}))
    RunFolder(config, resume=False)
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["deepspeed"] == {"zero_optimization": {"stage": 1}}
    RunFolder(config, resume=True)
    RunFolder(validate(Config, _merged({"deepspeed": written["deepspeed"], "output": output})), resume=True)
    path.write_text('{"zero_optimization": {"stage": 2}}')
    with pytest.raises(ConfigurationError, match=r"deepspeed\.zero_optimization\.stage: 1 then, 2 now"):
        RunFolder(config, resume=True)


def test_sharded_teacher_limits_follow_the_largest_layer() -> None:
    teacher = Teacher.model_validate(
        {"model": "m", "zero_stage": 3, "offload": {"device": "nvme", "nvme_path": "/disk"}}
    )
    config = teacher_zero3_config(teacher, 1000, 4, "bf16")
    zero = DeepSpeedZeroConfig(**config["zero_optimization"])
    assert (zero.max_live_parameters, zero.max_reuse_distance, zero.param_persistence_threshold) == (2000, 1000, 0)
    assert zero.offload_param is not None and str(zero.offload_param.nvme_path) == "/disk"
    assert config["bf16"] == {"enabled": True} and config["train_micro_batch_size_per_gpu"] == 4


def test_sharded_teacher_prefetches_one_layer_and_offloads_only_when_asked() -> None:
    teacher = Teacher.model_validate({"model": "m", "zero_stage": 3})
    config = teacher_zero3_config(teacher, 1000, 4, "fp32")
    assert config["zero_optimization"]["stage3_prefetch_bucket_size"] == 1000
    assert "offload_param" not in config["zero_optimization"] and "bf16" not in config and "fp16" not in config
    understood = DeepSpeedConfig(config)
    assert understood.zero_optimization_stage == 3 and understood.train_batch_size == 4
