"""Which layers of a model a smaller one is made of: their names, their configuration, their tensors.

Works on transformers models and configurations by their structure, so that no family has to be listed.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from mixkd_fast.errors import ModelError

ReadTensor: TypeAlias = Callable[[], Tensor]


def num_layers(config: Any) -> int:
    """Number of Transformer layers of a transformers configuration."""
    return int(config.num_hidden_layers)


def chosen_layers(available: int, first: int | None, layers: Sequence[int] | None) -> list[int]:
    """The source's layers that make the student, 0-based, in the student's order.

    Args: available = layers of the source; first = student.num_layers; layers = student.layers; one of
    them at most. Both None: all.
    Raises: ModelError if a layer is asked for that the source does not have, or none at all.
    """
    assert first is None or layers is None
    if layers is not None:
        if not layers:
            raise ModelError("student.layers is empty; list at least one layer, or leave it out to keep all")
        outside = [layer for layer in layers if not 0 <= layer < available]
        if outside:
            raise ModelError(
                f"student.layers asks for layer {outside[0]}, but the model it is copied from has {available} layers "
                f"(0 to {available - 1})"
            )
        return list(layers)
    if first is not None and first > available:
        raise ModelError(f"student.num_layers is {first}, but the model it is copied from has {available} layers")
    return list(range(available if first is None else first))


def select_in_config(config: Any, layers: Sequence[int]) -> None:
    """Make `config` (in place) the configuration of the chosen layers, each with its own attention type.

    Fields that hold one entry per layer (ModernBERT's layer_types, Longformer's attention_window) are picked alike.
    """
    available = num_layers(config)
    for name, value in list(vars(config).items()):
        per_layer = "layer" in name or name == "attention_window"
        if per_layer and isinstance(value, list) and len(value) == available:
            setattr(config, name, [value[layer] for layer in layers])
    config.num_hidden_layers = len(layers)


def layer_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and module of the list that holds the model's layers.

    Raises: ModelError if no list has one entry per layer (ALBERT, whose layers share one set of weights), or several.
    """
    count = num_layers(model.config)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    # Lists inside a layer (a model of 2 layers with 2 feed-forward parts each) belong to that layer.
    outer = [(name, module) for name, module in found if not any(name.startswith(f"{other}.") for other, _ in found)]
    if len(outer) != 1:
        raise ModelError(
            f"layers of {type(model).__name__} cannot be copied one by one: it has {len(outer)} lists of {count} "
            "layers (its layers share their weights or are not kept in one list); leave student.num_layers and "
            "student.layers out, or describe the student by student.config"
        )
    return outer[0]


def check_layers_fit(source: nn.Module, student: nn.Module, layers: Sequence[int]) -> None:
    """Refuse a choice of layers whose tensors differ from those of the student's layer at that place.

    ModernBERT's first layer has no attention norm, for one: no other layer can stand in its place.
    """
    source_layers, student_layers = layer_list(source)[1], layer_list(student)[1]
    for place, layer in enumerate(layers):
        theirs = {name: tensor.shape for name, tensor in source_layers[layer].state_dict().items()}
        ours = {name: tensor.shape for name, tensor in student_layers[place].state_dict().items()}
        if theirs != ours:
            name = sorted(set(theirs.items()) ^ set(ours.items()))[0][0]
            raise ModelError(
                f"layer {layer} of {type(source).__name__} cannot become layer {place} of the student: they differ in "
                f"{name!r}; keep layer {place} of the source at place {place} (student.layers = {list(layers)})"
            )


def pick_layers(
    tensors: Iterable[tuple[str, ReadTensor]], source: nn.Module, layers: Sequence[int]
) -> Iterator[tuple[str, ReadTensor]]:
    """Rename stored tensors so that layers[k] becomes layer k; those of other layers are left out, the rest kept.

    A layer that is listed twice comes twice. Names in files may lack the prefix of the base model ("bert.").
    Raises: ModelError if a chosen layer has no tensors.
    """
    name = layer_list(source)[0].removeprefix(f"{getattr(source, 'base_model_prefix', '')}.")
    pattern = re.compile(rf"((?:.*\.)?{re.escape(name)}\.)(\d+)(\..*)")
    seen: set[int] = set()
    for key, read in tensors:
        match = pattern.fullmatch(key)
        if match is None:
            yield key, read
            continue
        before, layer, after = match.groups()
        seen.add(int(layer))
        for place, chosen in enumerate(layers):
            if chosen == int(layer):
                yield f"{before}{place}{after}", read
    absent = sorted(set(layers) - seen)
    if absent:
        raise ModelError(
            f"the student's layers {list(layers)}: the source stores no tensors named {name}.{absent[0]}.*"
        )
