"""A frozen teacher beside a trainer's student: where it lies, in which precision it runs, that it learns nothing."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mixkd_fast.build_locks import guarded_builds
from mixkd_fast.model_checks import largest_layer_numel


class FrozenModel:
    """A teacher that is only asked: in eval mode, without gradients, under the trainer's mixed precision.

    It lies whole on the trainer's device, in the dtype it was loaded in. Where the student trains under DeepSpeed
    ZeRO-3 it is partitioned too, by an engine without an optimizer. A model that is quantized or has a device map stays
    where it is. It is not entered into the accelerator's list of models: the trainer takes that list for its own, to
    find out whether the student has been prepared and what belongs into a checkpoint.
    """

    def __init__(self, model: nn.Module, accelerator: Any) -> None:
        self.model = model.requires_grad_(False).eval()
        self._accelerator = accelerator
        self._forward: Callable[..., Any] = model
        zero3 = zero3_section(accelerator)
        if zero3 is not None:
            self._forward = _partitioned(model, accelerator, zero3)
        elif not getattr(model, "hf_device_map", None) and getattr(model, "quantization_method", None) is None:
            model.to(accelerator.device)

    def __call__(self, **inputs: Any) -> Any:
        """The teacher's ModelOutput."""
        with torch.no_grad(), self._accelerator.autocast():
            return self._forward(**inputs)


def zero3_section(accelerator: Any) -> dict[str, Any] | None:
    """The ZeRO section of a trainer that partitions parameters, else None."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    zero: dict[str, Any] = {} if plugin is None else plugin.deepspeed_config.get("zero_optimization", {})
    return zero if zero.get("stage") == 3 else None


def _partitioned(model: nn.Module, accelerator: Any, zero3: dict[str, Any]) -> Any:
    """An engine for inference: the student's ZeRO-3 section without optimizer, limits from the teacher's own layers."""
    import deepspeed

    largest = largest_layer_numel(model)
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_max_live_parameters": 2 * largest,
        "stage3_max_reuse_distance": largest,
        "stage3_prefetch_bucket_size": largest,
        "stage3_param_persistence_threshold": 0,
    }
    if isinstance(zero3.get("offload_param"), dict):
        zero["offload_param"] = zero3["offload_param"]
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "steps_per_print": None}
    if accelerator.mixed_precision in ("bf16", "fp16"):
        config[accelerator.mixed_precision] = {"enabled": True}
    with guarded_builds():
        engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    return engine
