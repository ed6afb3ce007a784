"""What a transformers encoder computes on its way: hidden states of its layers, their queries, keys and values.

Legend of shape suffixes: O rows of the forward, L positions, H width, h heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mixkd_fast.errors import ModelError


@dataclass
class Reading:
    """One forward, read."""

    logits: Tensor
    """[O, C]"""
    hidden_states: tuple[Tensor, ...]
    """Number of layers + 1 tensors [O, L, H]: the embedding output, then what each layer gives."""
    mask: Tensor
    """[O, L]: not 0 at positions that the rows attend to."""
    projections: dict[int, Projections]
    """Layer number (0-based) -> its queries, keys and values, for the layers that were asked for."""

    def rows(self, rows: slice) -> Reading:
        """Some rows of everything."""
        return Reading(
            self.logits[rows],
            tuple(hidden[rows] for hidden in self.hidden_states),
            self.mask[rows],
            {number: part.rows(rows) for number, part in self.projections.items()},
        )


@dataclass
class Projections:
    """A layer's queries, keys and values."""

    query: Tensor
    """[O, h, L, d]"""
    key: Tensor
    value: Tensor

    def rows(self, rows: slice) -> Projections:
        """Those of some rows."""
        return Projections(self.query[rows], self.key[rows], self.value[rows])


_PATHS = (
    ("attention.self.query", "attention.self.key", "attention.self.value"),  # BERT, RoBERTa, ELECTRA
    ("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),  # DeBERTa
    ("attention.q_lin", "attention.k_lin", "attention.v_lin"),  # DistilBERT
)
_JOINT = "attn.Wqkv"  # ModernBERT: queries, keys and values side by side


def layer_number(index: int, num_layers: int, field: str) -> int:
    """The 0-based number of a layer that may be counted from the end. Raises: ModelError that names the field."""
    if not -num_layers <= index < num_layers:
        raise ModelError(
            f"{field} = {index}: the model has {num_layers} layers; allowed: {-num_layers} to {num_layers - 1}"
        )
    return index % num_layers


@contextmanager
def reading_projections(model: nn.Module, layers: Sequence[int]) -> Iterator[Callable[[], dict[int, Projections]]]:
    """Within it, a forward of the model leaves the projections of these layers, which the yielded function gives.

    Raises: ModelError for a family whose layers are not known here.
    """
    kept: dict[tuple[int, str], Tensor] = {}
    handles = []

    def keep(number: int, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            kept[number, name] = output

        return hook

    stack = _layers(model) if layers else []
    for number in layers:
        for name, module in _site(stack[number], model).items():
            handles.append(module.register_forward_hook(keep(number, name)))
    heads = _num_heads(model)
    try:
        yield lambda: {number: _projections(kept, number, heads) for number in layers}
    finally:
        for handle in handles:
            handle.remove()


def _layers(model: nn.Module) -> list[nn.Module]:
    """The layers of the encoder: the list of modules whose first one projects as a known family does."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) and _site_or_none(module[0]) is not None:
            return list(module)
    raise ModelError(
        f"{type(model).__name__}: its layers' queries, keys and values are not found; known are those of BERT, "
        "RoBERTa, XLM-R, ELECTRA, DistilBERT, DeBERTa-v2 and ModernBERT"
    )


def _site(layer: nn.Module, model: nn.Module) -> dict[str, nn.Module]:
    site = _site_or_none(layer)
    assert site is not None, f"the layers of {type(model).__name__} differ"
    return site


def _site_or_none(layer: nn.Module) -> dict[str, nn.Module] | None:
    modules = dict(layer.named_modules())
    for paths in _PATHS:
        if all(path in modules for path in paths):
            return dict(zip(("query", "key", "value"), (modules[path] for path in paths), strict=True))
    return {"joint": modules[_JOINT]} if _JOINT in modules else None


def _num_heads(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.num_attention_heads)


def _projections(kept: dict[tuple[int, str], Tensor], number: int, heads: int) -> Projections:
    if (number, "joint") in kept:
        parts = kept[number, "joint"].chunk(3, -1)
    else:
        parts = tuple(kept[number, name] for name in ("query", "key", "value"))
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
    return Projections(query, key, value)
