"""Writing a student as transformers does, and reading it back."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from mixkd_fast.pretrained import quiet


def save_model(model: Any, weights: dict[str, Tensor], tokenizer: Any, folder: Path, merge: bool = False) -> None:
    """Save a transformers model with the given weights (safetensors), its configuration and its tokenizer.

    A model with adapters becomes an adapter folder as PEFT writes it; with merge one model, of its whole state.
    """
    try:
        with quiet():
            if merge:
                from mixkd_fast.adapters import merged

                # Its own state: what is tied must be one again.
                whole: Any = merged(model, weights)
                whole.save_pretrained(folder)
            else:
                model.save_pretrained(folder, state_dict=weights)
    except SafetensorError as error:
        raise OSError(f"safetensors: {error}") from error  # the library's own class for a disk that is full
    tokenizer.save_pretrained(folder)


def load_model(folder: Path, causal_lm: bool = False) -> tuple[nn.Module, Any]:
    """A saved sequence-classification (or causal language) model in evaluation mode, and its tokenizer.

    Of an adapter folder the model that its configuration names, in the revision it names, with the adapters in it.
    """
    adapters = folder / "adapter_config.json"
    revision = json.loads(adapters.read_text()).get("revision") if adapters.is_file() else None
    of_base = {} if revision is None else {"revision": revision}
    family = AutoModelForCausalLM if causal_lm else AutoModelForSequenceClassification
    with quiet():
        model = family.from_pretrained(folder, use_safetensors=True, **of_base)
    return model.eval(), AutoTokenizer.from_pretrained(folder)
