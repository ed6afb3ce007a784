"""The forward of a BERT-like classifier in as few operations as its answer needs, with the model's own parameters.

The mathematics is the model's; what differs is the work:
- clean and mixed rows go through the layers together, their embeddings made by one `mix_embeddings`;
- the classifier sees the first token only, so the last layer computes keys and values of all tokens and everything
  else of that one;
- queries, keys and values come from one matrix product;
- without padding, if asked for: the tokens of all rows in one row of tokens, with attention of variable length.

Legend of shape suffixes: R rows of ids, B clean rows, M mixed rows, O rows of the forward, L positions, T tokens that
are not padding, H width, h heads, C classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

from mixkd_fast.encoder_parts import EncoderParts, LayerParts, why_not_now
from mixkd_fast.encoder_tables import table_of
from mixkd_fast.mix import mix_embeddings, mixed_attention_mask, positions_of
from mixkd_fast.mixing import Mixing
from mixkd_fast.ops.dropout import dropout
from mixkd_fast.packed_attention import PackedRows, attend_packed, can_attend, pack, why_not_attend

if TYPE_CHECKING:
    from mixkd_fast.data.batching import Batch


_SHAPES = 128
"""How often the layers of one model may be compiled: widths in steps of 8 up to 512, training and evaluation."""


@dataclass
class Logits:
    """What the fused forward gives: the same name as in a transformers ModelOutput."""

    logits: Tensor
    """[O, C]"""


class LayerWeights(NamedTuple):
    """A layer's parameters in the dtype of the forward; queries, keys and values stacked."""

    qkv_weight: Tensor
    qkv_bias: Tensor
    attention_weight: Tensor
    attention_bias: Tensor
    attention_norm_weight: Tensor
    attention_norm_bias: Tensor
    intermediate_weight: Tensor
    intermediate_bias: Tensor
    output_weight: Tensor
    output_bias: Tensor
    output_norm_weight: Tensor
    output_norm_bias: Tensor


class LayerOptions(NamedTuple):
    """What is no tensor: heads, the epsilons of both LayerNorms, the dropouts, the activation."""

    num_heads: int
    attention_eps: float
    output_eps: float
    attention_dropout: float
    attention_output_dropout: float
    output_dropout: float
    activation: Callable[[Tensor], Tensor]


class FusedEncoder:
    """Computes the logits of a model from its parts. Gradients reach the model's own parameters."""

    def __init__(self, model: nn.Module, parts: EncoderParts) -> None:
        self._model, self.parts = model, parts
        self._layers: Callable[..., Tensor] = run_layers
        self._packed_layers: Callable[..., Tensor] = run_packed_layers
        self._kept: tuple[tuple[object, ...], list[LayerWeights]] | None = None

    unpadded = False
    """Leave padding out of every layer where that can be done: half precision on a GPU, no dropout of attention."""

    def why_padded(self, device: torch.device, dtype: torch.dtype, training: bool) -> str:
        """What keeps the layers from leaving out padding when they compute in `dtype` on `device`, or ""."""
        options = [_options(layer, training) for layer in self.parts.layers]
        return why_not_attend(device, dtype, self.parts.layers[0].query.in_features, options)

    def why_not_now(self) -> str:
        """What keeps the model from being computed here at this moment, or ""."""
        return why_not_now(self._model, self.parts)

    def compile(self, *, dynamic: bool, mode: str | None = None, backend: str = "inductor") -> None:
        """Let torch.compile make the layers: once for any shape (dynamic), or once for each shape."""
        limits = _compilation_limits()
        self._layers = torch.compile(run_layers, dynamic=dynamic, mode=mode, backend=backend, **limits)
        self._packed_layers = torch.compile(run_packed_layers, dynamic=True, backend=backend, **limits)

    def __call__(self, batch: Batch, mixing: Mixing | None, include_clean: bool, token_types: Tensor | None) -> Logits:
        """Logits of the clean rows (mixing None), of the mixed rows, or of both, clean ones first.

        Args: token_types int64 [R, L], None counts as type 0.
        """
        parts, training = self.parts, self._model.training
        num_mixed = batch.partner.shape[0] if mixing is not None and batch.partner is not None else 0
        include_clean = include_clean or mixing is None
        mask_OL = _attention_mask(batch, num_mixed, include_clean)
        embedded = self._embed(batch, mixing, num_mixed, include_clean, token_types)
        embedded = dropout(embedded, parts.embedding_dropout if training else 0.0)
        device = embedded.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else embedded.dtype
        # Every cast is made here, once: autocast would look at each operation again.
        with torch.autocast(device, enabled=False):
            hidden = embedded.to(dtype)
            if parts.projection is not None:
                hidden = F.linear(hidden, parts.projection.weight.to(dtype), _cast(parts.projection.bias, dtype))
            options = [_options(layer, training) for layer in parts.layers]
            lengths = _lengths(batch, num_mixed, include_clean)
            if self.unpadded and lengths is not None and can_attend(hidden, options):
                tokens, rows = pack(hidden, lengths)
                first = self._packed_layers(tokens, rows, self._weights(dtype), options)
                return Logits(self._answer(first, dtype, autocast))
            bias = torch.zeros(mask_OL.shape, dtype=dtype, device=hidden.device)
            bias = bias.masked_fill_(mask_OL == 0, torch.finfo(dtype).min)
            first = self._layers(hidden, bias, self._weights(dtype), options)
            return Logits(self._answer(first, dtype, autocast))

    def _answer(self, first: Tensor, dtype: torch.dtype, autocast: bool) -> Tensor:
        # The head costs nothing, and bf16 logits would cost three digits: fp32 where its weights are.
        return self.parts.head(self._model, first.float() if autocast else first)

    def _embed(
        self, batch: Batch, mixing: Mixing | None, num_mixed: int, include_clean: bool, types: Tensor | None
    ) -> Tensor:
        """LN(mixed words + positions + mixed token types): [O, L, E]."""
        parts = self.parts
        partner, lam = batch.partner, batch.lam
        if num_mixed == 0 or partner is None or lam is None:
            partner, lam = batch.input_ids.new_zeros(0), batch.input_ids.new_zeros(0, dtype=torch.float32)
        type_table = None if parts.types is None else table_of(parts.types)
        if type_table is not None and types is None:
            types = torch.zeros_like(batch.input_ids)
        positions = None
        if parts.counts_positions is not None:
            present = batch.input_ids.ne(parts.counts_positions).to(torch.int64)
            positions = positions_of(_rows(present, batch, num_mixed, include_clean), parts.counts_positions)
        zero_padding = mixing is not None and mixing.padding == "zero"
        return mix_embeddings(
            batch.input_ids,
            table_of(parts.words),
            partner,
            lam,
            padding_mask=batch.attention_mask == 0 if zero_padding else None,
            position_weight=table_of(parts.positions),
            token_type_ids=types if type_table is not None else None,
            token_type_weight=type_table,
            position_ids=positions,
            layer_norm=parts.norm,
            include_clean=include_clean,
            num_rows=batch.num_rows,
        )

    def _weights(self, dtype: torch.dtype) -> list[LayerWeights]:
        """Every layer's weights in `dtype`; those of a frozen model are kept."""
        tensors = [p for layer in self.parts.layers for p in _parameters(layer)]
        if any(tensor.requires_grad for tensor in tensors):
            return [_layer_weights(layer, dtype) for layer in self.parts.layers]
        state = (dtype, *((tensor.data_ptr(), tensor._version) for tensor in tensors))
        if self._kept is None or self._kept[0] != state:
            self._kept = state, [_layer_weights(layer, dtype) for layer in self.parts.layers]
        return self._kept[1]


def _compilation_limits() -> dict[str, Any]:
    """Room for every padded width of teacher and student, which are the same code to torch.compile."""
    if {"recompile_limit", "isolate_recompiles"} <= inspect.signature(torch.compile).parameters.keys():
        return {"recompile_limit": _SHAPES, "isolate_recompiles": True}
    # Older versions of torch have one limit for the process.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * _SHAPES)
    return {}


def run_layers(hidden: Tensor, bias: Tensor, weights: list[LayerWeights], options: list[LayerOptions]) -> Tensor:
    """All layers, the last for the first token only. hidden [O, L, H], bias [O, L], added to scores -> [O, 1, H]."""
    last = len(weights) - 1
    for number, (weight, option) in enumerate(zip(weights, options, strict=True)):
        hidden = _layer(hidden, bias, weight, option, first_token_only=number == last)
    return hidden


def _layer(hidden: Tensor, bias: Tensor, weight: LayerWeights, option: LayerOptions, first_token_only: bool) -> Tensor:
    rows, length, width = hidden.shape
    heads = option.num_heads
    if first_token_only:
        keys_values = F.linear(hidden, weight.qkv_weight[width:], weight.qkv_bias[width:])
        key, value = keys_values.view(rows, length, 2, heads, -1).permute(2, 0, 3, 1, 4)
        hidden = hidden[:, :1]
        query = F.linear(hidden, weight.qkv_weight[:width], weight.qkv_bias[:width])
        query = query.view(rows, 1, heads, -1).transpose(1, 2)
    else:
        joint = F.linear(hidden, weight.qkv_weight, weight.qkv_bias)
        query, key, value = joint.view(rows, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    attended = _attention(query, key, value, bias, option.attention_dropout)
    return _after_attention(hidden, attended, weight, option)


def _after_attention(hidden: Tensor, attended: Tensor, weight: LayerWeights, option: LayerOptions) -> Tensor:
    """The layer from its attention on, token by token: add and norm, feed-forward, add and norm."""
    update = F.linear(attended, weight.attention_weight, weight.attention_bias)
    update = dropout(update, option.attention_output_dropout)
    hidden = _norm(hidden + update, weight.attention_norm_weight, weight.attention_norm_bias, option.attention_eps)
    update = option.activation(F.linear(hidden, weight.intermediate_weight, weight.intermediate_bias))
    update = F.linear(update, weight.output_weight, weight.output_bias)
    update = dropout(update, option.output_dropout)
    return _norm(hidden + update, weight.output_norm_weight, weight.output_norm_bias, option.output_eps)


def _attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, probability: float) -> Tensor:
    """softmax(Q K^T / sqrt(d) + bias) V of [R, h, n, d] queries: [R, n, h * d]."""
    rows, heads, num_queries, width = query.shape
    if query.device.type == "cpu":
        # The flash attention of the CPU takes several times as long for rows this short, most of it in its backward.
        shape = (rows * heads, -1, width)
        scores = torch.bmm(query.reshape(shape) * width**-0.5, key.reshape(shape).transpose(1, 2))
        scores = scores.view(rows, heads, num_queries, -1) + bias[:, None, None]
        shares = dropout(F.softmax(scores, -1), probability)
        attended = torch.bmm(shares.view(rows * heads, num_queries, -1), value.reshape(shape))
        attended = attended.view(rows, heads, num_queries, width)
    else:
        mask = bias[:, None, None].expand(-1, -1, num_queries, -1)
        attended = F.scaled_dot_product_attention(query, key, value, mask, probability)
    return attended.transpose(1, 2).reshape(rows, num_queries, heads * width)


def run_packed_layers(
    hidden_TH: Tensor, rows: PackedRows, weights: list[LayerWeights], options: list[LayerOptions]
) -> Tensor:
    """All layers on tokens without padding, the last for the first token of each row only -> [O, 1, H]."""
    last = len(weights) - 1
    for number, (weight, option) in enumerate(zip(weights, options, strict=True)):
        hidden_TH = _packed_layer(hidden_TH, rows, weight, option, first_token_only=number == last)
    return hidden_TH[:, None]


def _packed_layer(
    hidden: Tensor, rows: PackedRows, weight: LayerWeights, option: LayerOptions, first_token_only: bool
) -> Tensor:
    width, heads = hidden.shape[1], option.num_heads
    if first_token_only:
        keys_values = F.linear(hidden, weight.qkv_weight[width:], weight.qkv_bias[width:])
        key, value = keys_values.view(-1, 2, heads, width // heads).unbind(1)
        hidden = hidden[rows.starts[:-1].long()]
        query = F.linear(hidden, weight.qkv_weight[:width], weight.qkv_bias[:width]).view(-1, heads, width // heads)
    else:
        joint = F.linear(hidden, weight.qkv_weight, weight.qkv_bias)
        query, key, value = joint.view(-1, 3, heads, width // heads).unbind(1)
    attended = attend_packed(query, key, value, rows, first_token_only).reshape(-1, width)
    return _after_attention(hidden, attended, weight, option)


def _norm(values: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(values, weight.shape, weight, bias, eps)


def _lengths(batch: Batch, num_mixed: int, include_clean: bool) -> Tensor | None:
    """Tokens of every row of the forward, int64 [O] on the CPU, if the batch knows them."""
    if batch.row_lengths is None or (num_mixed and batch.mixed_lengths is None):
        return None
    parts = [batch.row_lengths[: batch.num_rows]] if include_clean else []
    if num_mixed and batch.mixed_lengths is not None:
        parts.append(batch.mixed_lengths)
    return torch.cat(parts)


def _attention_mask(batch: Batch, num_mixed: int, include_clean: bool) -> Tensor:
    return _rows(batch.attention_mask, batch, num_mixed, include_clean)


def _rows(mask_RL: Tensor, batch: Batch, num_mixed: int, include_clean: bool) -> Tensor:
    """A mask of the rows of the forward, [O, L]: the clean ones, then the union of each pair."""
    parts = [mask_RL[: batch.num_rows]] if include_clean else []
    if num_mixed:
        assert batch.partner is not None and batch.lam is not None
        parts.append(mixed_attention_mask(mask_RL, batch.partner, batch.lam, batch.num_rows))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _options(layer: LayerParts, training: bool) -> LayerOptions:
    dropouts = (layer.attention_dropout, layer.attention_output_dropout, layer.output_dropout)
    return LayerOptions(
        layer.num_heads,
        layer.attention_norm.eps,
        layer.output_norm.eps,
        *(dropouts if training else (0.0, 0.0, 0.0)),
        layer.activation,
    )


def _parameters(layer: LayerParts) -> list[Tensor]:
    linear = (layer.query, layer.key, layer.value, layer.attention_output, layer.intermediate, layer.output)
    return [p for module in (*linear, layer.attention_norm, layer.output_norm) for p in (module.weight, module.bias)]


def _layer_weights(layer: LayerParts, dtype: torch.dtype) -> LayerWeights:
    projections = (layer.query, layer.key, layer.value)
    return LayerWeights(
        torch.cat([module.weight for module in projections]).to(dtype),
        torch.cat([module.bias for module in projections]).to(dtype),
        *_linear(layer.attention_output, dtype),
        *_linear(layer.attention_norm, dtype),
        *_linear(layer.intermediate, dtype),
        *_linear(layer.output, dtype),
        *_linear(layer.output_norm, dtype),
    )


def _linear(module: nn.Linear | nn.LayerNorm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return module.weight.to(dtype), module.bias.to(dtype)


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)
