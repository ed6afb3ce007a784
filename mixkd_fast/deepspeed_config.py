"""DeepSpeed's configuration: the user's section as it is, plus what the training section decides, derived once."""

import copy
from typing import Any

from mixkd_fast.configuration import BatchArithmetic, Config, Precision, Teacher, Training
from mixkd_fast.errors import ConfigurationError
from mixkd_fast.strict_json import read_object

# Optimizer options of DeepSpeed's section -> the training field that "auto" stands for, and that must agree.
_OPTIMIZER_FIELDS = {"lr": "learning_rate", "betas": "betas", "eps": "epsilon", "weight_decay": "weight_decay"}


def student_deepspeed_config(config: Config, arithmetic: BatchArithmetic) -> dict[str, Any]:
    """What `deepspeed.initialize` gets for the student.

    Batch sizes, accumulation, clipping and precision come from the training section; the same keys in the deepspeed
    section may repeat them or say "auto". Everything else passes untouched.
    Raises: ConfigurationError naming both fields where the sections contradict each other.
    """
    section = config.deepspeed
    result = read_object(section, "deepspeed") if isinstance(section, str) else copy.deepcopy(section)
    training = config.training
    derived = {
        "train_batch_size": (arithmetic.batch_size, "training.batch_size"),
        "train_micro_batch_size_per_gpu": (arithmetic.micro_batch_size, "training.micro_batch_size"),
        "gradient_accumulation_steps": (arithmetic.accumulation, "training.batch_size / (micro_batch_size x ranks)"),
        "gradient_clipping": (training.max_grad_norm, "training.max_grad_norm"),
    }
    for key, (value, source) in derived.items():
        if result.get(key, "auto") not in ("auto", value):
            raise _contradiction(key, result[key], source, value)
        result[key] = value
    _set_precision(result, training)
    _fill_optimizer(result, training)
    stage = result.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ConfigurationError(f"deepspeed.zero_optimization.stage = {stage!r}: allowed: 0, 1, 2, 3")
    result.setdefault("zero_allow_untested_optimizer", True)  # torch's fused AdamW, unless the section brings its own
    result.setdefault("steps_per_print", None)  # the progress bar and metrics.jsonl say more
    return result


def teacher_zero3_config(
    teacher: Teacher, largest_layer_numel: int, micro_batch_size: int, precision: Precision
) -> dict[str, Any]:
    """What `deepspeed.initialize` gets for a frozen teacher under ZeRO-3.

    DeepSpeed's defaults (1e9 live parameters, parameters below 1e5 never partitioned) would keep a small teacher whole
    on every rank, so its limits are set from the largest layer: that one and the next may be whole, nothing persists.
    """
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_max_live_parameters": 2 * largest_layer_numel,
        "stage3_max_reuse_distance": largest_layer_numel,
        "stage3_prefetch_bucket_size": largest_layer_numel,
        "stage3_param_persistence_threshold": 0,
    }
    if teacher.offload is not None:
        zero["offload_param"] = {"device": teacher.offload.device}
        if teacher.offload.nvme_path is not None:
            zero["offload_param"]["nvme_path"] = teacher.offload.nvme_path
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "zero_optimization": zero,
        "steps_per_print": None,
    }
    if precision != "fp32":
        result[precision] = {"enabled": True}
    return result


def _set_precision(result: dict[str, Any], training: Training) -> None:
    for name in ("bf16", "fp16"):
        wanted = training.precision == name
        given = result.get(name, {}).get("enabled", "auto")
        if given not in ("auto", wanted):
            raise _contradiction(f"{name}.enabled", given, "training.precision", training.precision)
        if wanted or name in result:
            result[name] = {**result.get(name, {}), "enabled": wanted}


def _fill_optimizer(result: dict[str, Any], training: Training) -> None:
    """DeepSpeed's own optimizer, if its section asks for one: "auto" is filled, contradictions are refused."""
    parameters = result.get("optimizer", {}).get("params", {})
    for key, field in _OPTIMIZER_FIELDS.items():
        value, ours = parameters.get(key), getattr(training, field)
        if value == "auto":
            parameters[key] = ours
        elif value is not None and field in training.model_fields_set and value != ours:
            raise _contradiction(f"optimizer.params.{key}", value, f"training.{field}", ours)


def _contradiction(key: str, value: Any, source: str, ours: Any) -> ConfigurationError:
    return ConfigurationError(
        f"deepspeed.{key} = {value!r} contradicts {source} = {ours!r}: leave it out of the deepspeed section, "
        'or say "auto"'
    )
