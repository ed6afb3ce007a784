"""The key of the teacher's logits: the same for the same teacher and rows, another for what may change them."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from toy import save_toy_teacher
from transformers import AutoModelForSequenceClassification

from mixkd_fast.teacher_store import store_key, store_key_of_files


class Small(nn.Module):
    """A model with everything a state can hold."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(6, dtype=dtype).reshape(2, 3))
        self.bias = nn.Parameter(torch.ones(2, dtype=dtype), requires_grad=False)
        self.scalar = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("saved", torch.tensor([True, False]))
        self.register_buffer("hidden", torch.arange(4), persistent=False)
        self.register_buffer("empty", torch.empty(0, 3))
        self.extra = {"packed": (torch.arange(3.0), 0.5)}  # as layers keep it that are quantised

    def get_extra_state(self) -> object:
        return self.extra


class Other(Small):
    """The same state in another class, which may compute something else with it."""


def changed(change: Callable[[Small], object]) -> Small:
    model = Small()
    with torch.no_grad():
        change(model)
    return model


def _rename(model: Small) -> None:
    model.renamed = model.bias
    del model.bias


def _next_bit(tensor: Tensor) -> None:
    tensor.view(-1)[1].nextafter_(torch.tensor(torch.inf))


CHANGES: dict[str, Callable[[Small], object]] = {
    "the last bit of a weight": lambda model: _next_bit(model.weight),
    "the sign of a zero": lambda model: model.weight.view(-1)[0].neg_(),
    "a scalar": lambda model: model.scalar.add_(1),
    "a buffer": lambda model: model.saved.logical_not_(),
    "a buffer that is not saved": lambda model: model.hidden.add_(1),
    "a shape": lambda model: setattr(model, "weight", nn.Parameter(model.weight.view(3, 2))),
    "an order of values": lambda model: setattr(model, "weight", nn.Parameter(model.weight.flip(0))),
    "a name": _rename,
    "a tensor in extra state": lambda model: model.extra["packed"][0].add_(1),
    "a number in extra state": lambda model: model.extra.update(packed=(torch.arange(3.0), 0.25)),
    "a setting": lambda model: setattr(model, "config", SimpleNamespace(to_dict=lambda: {"hidden_act": "relu"})),
    "the dtype": lambda model: model.to(torch.bfloat16),
}


def test_the_same_model_and_rows_have_the_same_key() -> None:
    key = store_key(Small(), "rows", "fp32")
    assert key == store_key(Small(), "rows", "fp32") and len(key) == 64
    strided = changed(lambda model: setattr(model, "weight", nn.Parameter(model.weight.t().contiguous().t())))
    assert not strided.weight.is_contiguous() and store_key(strided, "rows", "fp32") == key


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_of_the_model_changes_the_key(change: str) -> None:
    assert store_key(changed(CHANGES[change]), "rows") != store_key(Small(), "rows")


def test_class_rows_and_facts_change_the_key() -> None:
    keys = {
        store_key(Small(), "rows"),
        store_key(Other(), "rows"),
        store_key(Small(), "other rows"),
        store_key(Small(), "rows", ""),
        store_key(Small(), "rows", "bf16"),
        store_key(Small(), "rows", "bf1", "6"),
        store_key(Small(), "rowsbf16"),
    }
    assert len(keys) == 7


def test_bf16_and_fp16_of_the_same_bytes_differ() -> None:
    ones = [torch.ones(3, dtype=torch.int16).view(dtype) for dtype in (torch.bfloat16, torch.float16, torch.int16)]
    keys = set()
    for tensor in ones:
        model = Small()
        model.register_buffer("more", tensor)
        keys.add(store_key(model, "rows"))
    assert len(keys) == 3


def test_a_partitioned_model_is_refused() -> None:
    model = Small()
    model.weight.ds_id = 0
    with pytest.raises(ValueError, match="store_key_of_files"):
        store_key(model, "rows")


def test_a_teacher_has_its_key_wherever_it_is_loaded_from(tmp_path: Path) -> None:
    folders = [save_toy_teacher(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    models = [AutoModelForSequenceClassification.from_pretrained(folder) for folder in folders]
    keys = [store_key(model, "rows") for model in models]
    assert keys[0] == keys[1] != keys[2]
    models[0].config.hidden_act = "relu"
    assert store_key(models[0], "rows") != keys[1]
    files = [[folder / "model.safetensors", folder / "config.json"] for folder in folders]
    of_files = [store_key_of_files(paths, "rows") for paths in (*files, files[0][::-1], files[0][:1])]
    assert of_files[0] == of_files[1] == of_files[3] and len(set(of_files)) == 3
    assert len({of_files[0], store_key_of_files(files[0], "others"), store_key_of_files(files[0], "rows", "bf16")}) == 3
