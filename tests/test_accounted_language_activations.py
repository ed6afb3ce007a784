"""The plan's activations of causal language models against what autograd keeps, and adapters as peft makes them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mixkd_fast.adapters import add_adapters, count_trained
from mixkd_fast.configuration import Config, validate
from mixkd_fast.lora import Lora
from mixkd_fast.planning.decoders import adapter_parameters
from mixkd_fast.planning.language_memory import decoder_activation_bytes
from mixkd_fast.planning.models import planned_model, planned_student

ROWS, WIDTH = 4, 64
SIZES = {"vocab_size": 500, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 384, "num_key_value_heads": 2},
    "qwen3": {"intermediate_size": 384, "num_key_value_heads": 2, "head_dim": 32},
    "mistral": {"intermediate_size": 512, "num_key_value_heads": 1, "sliding_window": None},
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
}


def small(family: str) -> Any:
    """A random model in training."""
    ids = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": 1}
    config = AutoConfig.for_model(family, **SIZES, **ids, max_position_embeddings=WIDTH, **FAMILIES[family])
    return AutoModelForCausalLM.from_config(config).train()


def measured_activations(model: Any, autocast: bool) -> int:
    """Bytes that autograd keeps of the forward up to the last hidden states; weights and their copies left out."""
    ids = torch.randint(5, 400, (ROWS, WIDTH))
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    # Under autocast; no activation has the shape of a weight.
    weights = {tuple(p.shape) for p in model.parameters() if p.dim() == 2}
    weights |= {shape[::-1] for shape in weights}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()  # a graph that holds itself through its hooks would never be freed
        address = tensor.untyped_storage().data_ptr()
        if address not in own and tuple(tensor.shape) not in weights:
            kept[address] = tensor
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        hidden = model.base_model(input_ids=ids, use_cache=False)[0]
        result = hidden * hidden  # keeps it, as a loss does
    assert result.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_what_autograd_keeps(family: str, mode: str) -> None:
    model = small(family)
    planned = planned_model(model.config, model)
    if mode == "bf16":
        model = model.bfloat16()
    autocast = mode == "autocast"
    predicted = decoder_activation_bytes(
        planned, ROWS, WIDTH, "fp32" if mode == "fp32" else "bf16", autocast=autocast, is_gpu=False
    )
    assert predicted == pytest.approx(measured_activations(model, autocast), rel=0.15)


def test_checkpointing_keeps_the_layers_inputs() -> None:
    model = small("llama")
    planned = planned_model(model.config, model)
    model.gradient_checkpointing_enable()
    measured = measured_activations(model, autocast=False)
    whole, again = (
        decoder_activation_bytes(planned, ROWS, WIDTH, "fp32", autocast=False, is_gpu=False, checkpointing=on)
        for on in (False, True)
    )
    # Beside the inputs, one layer is made anew in the backward.
    assert measured < again < measured + 0.35 * whole


@pytest.mark.parametrize(
    "section", [Lora(r=8), Lora(r=4, target_modules=["q_proj", "v_proj"]), Lora(r=2, modules_to_save=["lm_head"])]
)
def test_adapters_are_counted_as_peft_makes_them(section: Lora) -> None:
    model = small("llama")
    trained, _ = adapter_parameters(model, section)
    add_adapters(model, section, None, 0, None)
    assert trained == count_trained(model)


@pytest.mark.parametrize("mode", ["fp32", "autocast"])
def test_activations_beside_adapters(tmp_path: Path, mode: str) -> None:
    model = small("llama")
    model.save_pretrained(tmp_path)
    fields = {"task": {"kind": "causal_lm", "name": "x"}, "method": {"name": "finetune"}}
    config = validate(Config, {**fields, "student": {"model": str(tmp_path), "lora": {"r": 8}}})
    planned = planned_student(config)
    autocast = mode == "autocast"
    add_adapters(model, Lora(r=8), None, 0, torch.bfloat16 if autocast else None)
    predicted = decoder_activation_bytes(
        planned, ROWS, WIDTH, "bf16" if autocast else "fp32", autocast=autocast, is_gpu=False
    )
    assert predicted == pytest.approx(measured_activations(model, autocast), rel=0.15)
