"""The sizes of a causal language model and the floating-point operations of its forward, from its structure.

Layers are counted as they are in the model (on the meta device, without memory): any dense family works. Every
multiply-add counts as 2; softmax, activations, normalisation and look-ups are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from mixkd_fast.errors import ModelError
from mixkd_fast.lora import Lora
from mixkd_fast.student_layers import layer_list

Lengths = Sequence[int] | NDArray[np.int64]
# Tensors of the feed-forward width that autograd keeps, by the name of the activation; 3 of them in a gated part.
_KEPT_BY_ACTIVATION = {"relu": 1, "gelu": 2, "gelu_fast": 5, "gelu_new": 5}


@dataclass(frozen=True)
class DecoderShape:
    """What decides what a causal language model costs."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    head_size: int
    vocab_size: int
    linear_parameters: int
    """Weights of all linear layers inside the Transformer layers: each is multiplied once per token."""
    head_parameters: int
    """Weights of the output layer, whether or not they are the word embeddings'."""
    windows: tuple[int | None, ...]
    """Of every layer: how many positions a token sees, None for all before it."""
    hidden_norms: int
    """Normalisations of the hidden width in a layer."""
    head_norms: int
    """Normalisations of queries and keys, head by head."""
    is_gated: bool
    """Whether the feed-forward part multiplies two projections of its input."""
    is_rms: bool
    """Whether they normalise by the root mean square, in fp32, as Llama does."""
    kept_inner: int
    """Tensors of the feed-forward width that autograd keeps in a layer."""
    readers: int
    """Linear layers that read a normalised hidden state; autocast casts it for each of them."""
    embedding_size: int | None = None
    num_labels: int = 0

    @property
    def attention_size(self) -> int:
        """Width of queries and of attended values."""
        return self.num_heads * self.head_size

    @property
    def key_value_size(self) -> int:
        """Width of keys, and of values."""
        return self.num_key_value_heads * self.head_size

    @classmethod
    def of(cls, config: Any, model: Any) -> "DecoderShape":
        """The shape of a transformers model, maybe on the meta device. Raises: ModelError for a mixture of experts."""
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        for name in ("num_experts", "num_local_experts", "n_routed_experts"):
            if getattr(text, name, None):
                raise ModelError(
                    f"model_type = {config.model_type!r}: a mixture of experts ({name} = {getattr(text, name)}) is not "
                    "planned; allowed: dense models"
                )
        layers = layer_list(model)[1]
        hidden, heads = int(text.hidden_size), int(text.num_attention_heads)
        head_size = int(getattr(text, "head_dim", None) or hidden // heads)
        first = dict(layers[0].named_modules())
        linear = [module for module in first.values() if _matrix(module)]
        norms = [module for module in first.values() if "norm" in type(module).__name__.casefold()]
        widths = [next(norm.parameters()).numel() for norm in norms if any(True for _ in norm.parameters())]
        inner = _inner_size(text)
        gated = _is_gated(first, hidden, inner)
        activation = getattr(text, "hidden_activation", None) or getattr(text, "hidden_act", None)
        activation = activation or getattr(text, "activation_function", None)
        output: Any = model.get_output_embeddings()
        return cls(
            num_layers=len(layers),
            hidden_size=hidden,
            intermediate_size=inner,
            num_heads=heads,
            num_key_value_heads=int(getattr(text, "num_key_value_heads", None) or heads),
            head_size=head_size,
            vocab_size=int(text.vocab_size),
            linear_parameters=sum(_matrix(module) for module in layers.modules()),
            head_parameters=int(output.weight.numel()),
            windows=_windows(text, len(layers)),
            hidden_norms=sum(width == hidden for width in widths),
            head_norms=sum(width != hidden for width in widths),
            is_gated=gated,
            is_rms=any("rms" in type(norm).__name__.casefold() for norm in norms),
            # The input of a gated part's activation, its output, the other product, and what is multiplied on.
            kept_inner=4 if gated else _KEPT_BY_ACTIVATION.get(str(activation), 2),
            # The layer after attention reads the attended values, whose width may be the same.
            readers=sum(_sizes(module)[0] == hidden for module in linear) - int(heads * head_size == hidden),
        )


def decoder_flops(shape: DecoderShape, lengths: Lengths) -> float:
    """FLOPs of one forward's body over rows of these lengths; the output layer is apart (`head_flops`)."""
    tokens = float(np.sum(np.asarray(lengths, dtype=np.float64)))
    return 2.0 * tokens * shape.linear_parameters + decoder_attention_flops(shape, lengths)


def decoder_attention_flops(shape: DecoderShape, lengths: Lengths) -> float:
    """The part of them spent on scores and weighted values: of the pairs that a token sees, itself included.

    Queries of all heads are multiplied, whether or not they share keys and values.
    """
    pairs = sum(_pairs(lengths, window) for window in shape.windows)
    return 4.0 * pairs * shape.attention_size


def head_flops(head_parameters: int, tokens: float) -> float:
    """FLOPs of the output layer for so many positions."""
    return 2.0 * tokens * head_parameters


def _pairs(lengths: Lengths, window: int | None) -> float:
    """Pairs of a query and a key over all rows: sum over positions t of min(t + 1, window)."""
    lengths_N = np.asarray(lengths, dtype=np.float64)
    if window is None:
        return float((lengths_N * (lengths_N + 1) / 2).sum())
    inside = np.minimum(lengths_N, window)
    return float((inside * (inside + 1) / 2 + (lengths_N - inside) * window).sum())


def _matrix(module: nn.Module) -> int:
    """Weights of a linear layer; GPT-2 has a class of its own for them."""
    weight = getattr(module, "weight", None)
    is_linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    return int(weight.numel()) if is_linear and weight is not None else 0


def _sizes(module: Any) -> tuple[int, int]:
    """Width of what a linear layer reads and writes."""
    rows, columns = (int(size) for size in module.weight.shape)
    return (columns, rows) if isinstance(module, nn.Linear) else (rows, columns)


def adapter_parameters(model: nn.Module, section: Lora) -> tuple[int, int]:
    """Parameters that `student.lora` trains, and the sum of the ranks of one layer's adapters."""
    names, whole = section.target_modules, set(section.modules_to_save or ())
    layers, trained, adapters = layer_list(model)[1], 0, 0
    inside = {id(module) for layer in layers for module in layer.modules()}
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last in whole:
            trained += sum(parameter.numel() for parameter in module.parameters())
        elif _matrix(module) and (id(module) in inside if names == "all-linear" else last in names):
            trained += section.r * sum(_sizes(module))
            adapters += 1
    return trained, section.r * adapters // max(1, len(layers))


def _inner_size(text: Any) -> int:
    for name in ("intermediate_size", "ffn_dim", "n_inner"):
        if getattr(text, name, None):
            return int(getattr(text, name))
    return 4 * int(text.hidden_size)


def _is_gated(modules: dict[str, nn.Module], hidden: int, inner: int) -> bool:
    """Whether two products of the hidden width make the feed-forward part's inside (or one of twice its width)."""
    widths = [module.out_features for module in modules.values() if isinstance(module, nn.Linear)]
    # Where inside and hidden width are equal, the other layers would be counted too; no model is made so.
    return 2 * inner in widths or (inner != hidden and widths.count(inner) >= 2)


def _windows(text: Any, num_layers: int) -> tuple[int | None, ...]:
    window = getattr(text, "sliding_window", None)
    if not window or getattr(text, "use_sliding_window", True) is False:
        return (None,) * num_layers
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * num_layers
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)
