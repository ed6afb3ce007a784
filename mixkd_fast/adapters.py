"""Low-rank adapters of a causal language model by the peft library: added, saved, merged. Its only importer."""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from mixkd_fast.errors import ModelError
from mixkd_fast.lora import Lora
from mixkd_fast.pretrained import seeded

_NAME = "default"


def add_adapters(
    model: nn.Module,
    section: Lora,
    base: str | None,
    seed: int,
    frozen_dtype: torch.dtype | None,
    revision: str | None = None,
) -> nn.Module:
    """Freeze a whole transformers model in memory and put trained fp32 adapters into it, in place.

    Args: base = hub name or folder of the model's weights, written into the adapter's configuration; None where the
    adapters will be merged; frozen_dtype = of the frozen weights, None leaves them; revision = of the base on the hub,
    written likewise.
    Raises: ModelError if the layers named are not there, or are ones whose output the engine computes itself.
    """
    transformers_model: Any = model
    tied = bool(getattr(transformers_model.config.get_text_config(), "tie_word_embeddings", False))
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=section.target_modules,
        modules_to_save=section.modules_to_save,
    )
    model.requires_grad_(False)
    try:
        with seeded(seed):
            transformers_model.add_adapter(config, adapter_name=_NAME)
    except ValueError as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"student.lora.target_modules = {section.target_modules!r}: {reason}") from error
    output, words = transformers_model.get_output_embeddings(), transformers_model.get_input_embeddings()
    if isinstance(output, BaseTunerLayer) or isinstance(words, BaseTunerLayer):
        raise ModelError(
            f"student.lora.target_modules = {section.target_modules!r}: names the word embeddings or the output layer, "
            "which have no adapters here; name them in student.lora.modules_to_save to train them whole"
        )
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if tied and any(id(parameter) in trained for part in (output, words) for parameter in part.parameters()):
        raise ModelError(
            f"student.lora.modules_to_save = {section.modules_to_save!r}: names word embeddings and output layer of a "
            "model in which they are one; leave them out"
        )
    transformers_model.peft_config[_NAME].base_model_name_or_path = base
    transformers_model.peft_config[_NAME].revision = None if base is None else revision
    for parameter in model.parameters():
        if frozen_dtype is not None and not parameter.requires_grad:
            parameter.data = parameter.data.to(frozen_dtype)
    return model


def base_of(name: str) -> str:
    """How an adapter's configuration names its base: a folder by its whole path, a hub name as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def has_adapters(model: nn.Module) -> bool:
    """Whether `add_adapters` has been here."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def count_trained(model: nn.Module) -> int:
    """Number of trained parameters, whole also where ZeRO-3 keeps a share of each."""
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in model.parameters() if p.requires_grad)


def merged(model: Any, weights: dict[str, Tensor]) -> nn.Module:
    """A plain model on the CPU whose weights are W + (alpha / r) B A.

    Args: model = with adapters, possibly partitioned, of which only the structure is read; weights = its whole state.
    Raises: ModelError if the state does not hold every weight.
    """
    with torch.device("meta"):
        plain = type(model)(copy.deepcopy(model.config))
    wrapped = get_peft_model(plain, copy.deepcopy(model.peft_config[_NAME]), low_cpu_mem_usage=True)
    plain.load_state_dict(weights, strict=False, assign=True)
    plain.tie_weights()
    lacking = [name for name, parameter in plain.named_parameters() if parameter.device.type == "meta"]
    if lacking:
        raise ModelError(f"student.lora.merge: the student's state lacks {lacking[0]}")
    with torch.no_grad():
        result: nn.Module = wrapped.merge_and_unload()
    return result
