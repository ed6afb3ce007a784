"""DeepSpeed's configuration: the user's section as it is, plus what the training section decides, derived once."""

import copy
from typing import Any

from mixkd_fast.configuration import BatchArithmetic, Config, Precision, Teacher, Training
from mixkd_fast.errors import ConfigurationError
from mixkd_fast.strict_json import read_object

# Optimizer options of DeepSpeed's section -> the training field that "auto" stands for, and that must agree.
_OPTIMIZER_FIELDS = {"lr": "learning_rate", "betas": "betas", "eps": "epsilon", "weight_decay": "weight_decay"}
_OBJECTS = ("zero_optimization", "bf16", "fp16", "amp", "optimizer", "scheduler")


def student_deepspeed_config(config: Config, arithmetic: BatchArithmetic) -> dict[str, Any]:
    """What `deepspeed.initialize` gets for the student.

    Batch sizes, accumulation, clipping and precision come from the training section; the same keys in the deepspeed
    section may repeat them or say "auto". Everything else passes untouched.
    Raises: ConfigurationError naming both fields where the sections contradict each other.
    """
    section = config.deepspeed
    result = read_object(section, "deepspeed") if isinstance(section, str) else copy.deepcopy(section)
    training = config.training
    if "bfloat16" in result and "bf16" not in result:
        result["bf16"] = result.pop("bfloat16")  # DeepSpeed's older name
    for key in _OBJECTS:
        _object(result, key, key)
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
    _check_scheduler(result, training)
    _check_zero(result)
    result.setdefault("zero_allow_untested_optimizer", True)  # torch's fused AdamW, unless the section brings its own
    result.setdefault("steps_per_print", None)  # the progress bar and metrics.jsonl say more
    return result


def autocasts(training: Training, result: dict[str, Any]) -> bool:
    """Whether the student runs in bf16 by autocast over fp32 weights, which DeepSpeed sees as an fp32 model."""
    return training.precision == "bf16" and not result.get("bf16", {}).get("enabled", False)


def teacher_zero3_config(
    teacher: Teacher,
    largest_layer_numel: int,
    micro_batch_size: int,
    precision: Precision,
    largest_share_numel: int | None = None,
) -> dict[str, Any]:
    """What `deepspeed.initialize` gets for a frozen teacher under ZeRO-3.

    Args: largest_share_numel = most elements of one parameter that a rank keeps; DeepSpeed's buffers for NVMe must hold
    as many, and its own size (1e8) is too small for the word embeddings of large models and a waste for others.

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
        if teacher.offload.device == "nvme" and largest_share_numel is not None:
            zero["offload_param"]["buffer_size"] = largest_share_numel
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "zero_optimization": zero,
        "steps_per_print": None,
    }
    if precision != "fp32":
        result[precision] = {"enabled": True}
    return result


def _object(section: dict[str, Any], key: str, name: str) -> dict[str, Any]:
    """The object under `key`, empty if it is not there."""
    value = section.get(key, {})
    if not isinstance(value, dict):
        raise ConfigurationError(f"deepspeed.{name} = {value!r}: is not an object {{...}}; leave it out or give one")
    return value


def _set_precision(result: dict[str, Any], training: Training) -> None:
    for name in ("bf16", "fp16"):
        wanted = training.precision == name
        given = result.get(name, {}).get("enabled", "auto")
        if given not in ("auto", wanted):
            raise _contradiction(f"{name}.enabled", given, "training.precision", training.precision)
        if name == "bf16" and wanted and given == "auto" and result.get("zero_optimization", {}).get("stage", 0) == 0:
            # Autocast does it: DeepSpeed's wrapper without ZeRO would double the weights and slow every step.
            wanted = False
        if wanted or name in result:
            result[name] = {**result.get(name, {}), "enabled": wanted}
    amp = result.get("amp", {}).get("enabled", False)
    if amp is not False:
        raise _contradiction("amp.enabled", amp, "training.precision", training.precision)


def _fill_optimizer(result: dict[str, Any], training: Training) -> None:
    """DeepSpeed's own optimizer, if its section asks for one: "auto" is filled, contradictions are refused.

    What its section leaves open comes from the training section: the learning rate, and Adam's options given there.
    """
    if "optimizer" not in result:
        return
    optimizer = result["optimizer"]
    parameters = _object(optimizer, "params", "optimizer.params")
    takes_adam_options = "adam" in str(optimizer.get("type")).lower()
    for key, field in _OPTIMIZER_FIELDS.items():
        value, ours = parameters.get(key), getattr(training, field)
        is_given = field in training.model_fields_set
        # Weight decay is set per group of parameters, which hides the optimizer's own.
        binds = is_given or key == "weight_decay"
        if value == "auto" or (value is None and (key == "lr" or (is_given and takes_adam_options))):
            parameters[key] = copy.copy(ours)
        elif value is not None and binds and value != ours:
            raise _contradiction(f"optimizer.params.{key}", value, f"training.{field}", ours)
    if not isinstance(optimizer.get("type"), str):
        raise ConfigurationError(
            f'deepspeed.optimizer.type = {optimizer.get("type")!r}: name an optimizer of DeepSpeed, such as "AdamW", '
            "or leave deepspeed.optimizer out"
        )
    optimizer["params"] = parameters


def _check_scheduler(result: dict[str, Any], training: Training) -> None:
    """DeepSpeed's scheduler replaces the training section's, so that one must not be asked for too."""
    for field in ("schedule", "warmup"):
        if "scheduler" in result and field in training.model_fields_set:
            raise ConfigurationError(
                f"deepspeed.scheduler = {result['scheduler']!r} contradicts training.{field} = "
                f"{getattr(training, field)!r}: leave one of them out"
            )


def _check_zero(result: dict[str, Any]) -> None:
    zero = result.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise ConfigurationError(f"deepspeed.zero_optimization.stage = {stage!r}: allowed: 0, 1, 2, 3")
    for key in ("offload_optimizer", "offload_param"):
        _object(zero, key, f"zero_optimization.{key}")


def _contradiction(key: str, value: Any, source: str, ours: Any) -> ConfigurationError:
    return ConfigurationError(
        f"deepspeed.{key} = {value!r} contradicts {source} = {ours!r}: leave it out of the deepspeed section, "
        'or say "auto"'
    )
