"""Which module of a BERT-like classifier does what: the families that `fused_encoder` computes by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LayerParts:
    """One layer: attention, dropout, add & norm, feed-forward, dropout, add & norm."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    attention_output: nn.Linear
    attention_norm: nn.LayerNorm
    intermediate: nn.Linear
    activation: _Activation
    output: nn.Linear
    output_norm: nn.LayerNorm
    num_heads: int
    attention_dropout: float
    """Of the attention probabilities; like those below it applies in training only."""
    attention_output_dropout: float
    output_dropout: float


@dataclass(frozen=True)
class EncoderParts:
    """A classifier that answers from its first token."""

    words: nn.Embedding
    positions: nn.Embedding
    types: nn.Embedding | None
    norm: nn.LayerNorm
    embedding_dropout: float
    projection: nn.Linear | None
    """From the width of the embeddings to that of the layers."""
    counts_positions: int | None
    """The padding id of a family whose positions count the tokens that are not padding; None: 0, 1, 2, ..."""
    layers: tuple[LayerParts, ...]
    head: Callable[[Any, Tensor], Tensor]
    """(model, first token of the last layer [R, 1, H]) -> logits [R, C]."""

    def modules(self) -> Iterator[nn.Module]:
        """Every module whose parameters are read without calling it."""
        for values in (vars(self), *(vars(layer) for layer in self.layers)):
            # Activations are called.
            yield from (v for name, v in values.items() if isinstance(v, nn.Module) and name != "activation")


def parts_of(model: nn.Module) -> EncoderParts | str:
    """The parts of a transformers sequence classifier, or why it is computed by its own forward."""
    config: Any = getattr(model, "config", None)
    family = getattr(config, "model_type", None)
    if family not in FAMILIES or type(model).__name__ not in _CLASSES:
        return f"{type(model).__name__} is not one of {', '.join(_CLASSES)}"
    if not type(model).__module__.startswith("transformers.models.") or "forward" in vars(model):
        return "its forward is not that of transformers"
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        return "the configuration makes it a decoder"
    if getattr(config, "chunk_size_feed_forward", 0):
        return "chunk_size_feed_forward is set"
    try:
        parts = FAMILIES[family](model)
    except AttributeError as error:
        return f"this version of transformers names its parts otherwise ({error})"
    odd = next((m for m in parts.modules() if not _is_plain(m)), None)
    if odd is not None:
        return f"it contains a {type(odd).__name__}"
    return parts


def _is_plain(module: nn.Module) -> bool:
    # Parameters are read: of a subclass, such as an adapter or a quantised layer, something would be lost.
    return type(module) in (nn.Linear, nn.LayerNorm, nn.Embedding)


def why_not_now(model: nn.Module, parts: EncoderParts) -> str:
    """What keeps the parts from being read at this moment, or "": hooks that must see calls, partitioned parameters."""
    present = set()
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return "a forward hook is registered inside it"
        if module._backward_hooks or module._backward_pre_hooks:
            return "a backward hook is registered inside it"
        if getattr(module, "gradient_checkpointing", False):
            return "gradient checkpointing is on"
        present.add(module)
    for module in parts.modules():
        if module not in present:
            return "a layer has been replaced"
        if any(hasattr(parameter, "ds_id") for parameter in module._parameters.values()):
            return "its parameters are partitioned"
        table = isinstance(module, nn.Embedding)
        if table and (module.max_norm is not None or module.sparse or module.scale_grad_by_freq):
            return "a table of embeddings does more than look up"
    return ""


def _bert_layers(stack: Any) -> tuple[LayerParts, ...]:
    return tuple(
        LayerParts(
            query=layer.attention.self.query,
            key=layer.attention.self.key,
            value=layer.attention.self.value,
            attention_output=layer.attention.output.dense,
            attention_norm=layer.attention.output.LayerNorm,
            intermediate=layer.intermediate.dense,
            activation=layer.intermediate.intermediate_act_fn,
            output=layer.output.dense,
            output_norm=layer.output.LayerNorm,
            num_heads=layer.attention.self.num_attention_heads,
            attention_dropout=layer.attention.self.dropout.p,
            attention_output_dropout=layer.attention.output.dropout.p,
            output_dropout=layer.output.dropout.p,
        )
        for layer in stack
    )


def _bert_like(base: Any, head: Callable[[Any, Tensor], Tensor], counts_positions: int | None) -> EncoderParts:
    table = base.embeddings
    return EncoderParts(
        words=table.word_embeddings,
        positions=table.position_embeddings,
        types=table.token_type_embeddings,
        norm=table.LayerNorm,
        embedding_dropout=table.dropout.p,
        projection=getattr(base, "embeddings_project", None),
        counts_positions=counts_positions,
        layers=_bert_layers(base.encoder.layer),
        head=head,
    )


# Heads are functions of the model, so that a copy of the model does not answer with the original's.
def _pooled_head(model: Any, first: Tensor) -> Tensor:
    logits: Tensor = model.classifier(model.dropout(model.bert.pooler(first)))
    return logits


def _first_token_head(model: Any, first: Tensor) -> Tensor:
    logits: Tensor = model.classifier(first)
    return logits


def _distilbert_head(model: Any, first: Tensor) -> Tensor:
    logits: Tensor = model.classifier(model.dropout(torch.relu(model.pre_classifier(first[:, 0]))))
    return logits


def _bert(model: Any) -> EncoderParts:
    return _bert_like(model.bert, _pooled_head, None)


def _roberta(model: Any) -> EncoderParts:
    return _bert_like(model.roberta, _first_token_head, model.roberta.embeddings.padding_idx)


def _electra(model: Any) -> EncoderParts:
    return _bert_like(model.electra, _first_token_head, None)


def _distilbert(model: Any) -> EncoderParts:
    table = model.distilbert.embeddings
    layers = tuple(
        LayerParts(
            query=layer.attention.q_lin,
            key=layer.attention.k_lin,
            value=layer.attention.v_lin,
            attention_output=layer.attention.out_lin,
            attention_norm=layer.sa_layer_norm,
            intermediate=layer.ffn.lin1,
            activation=layer.ffn.activation,
            output=layer.ffn.lin2,
            output_norm=layer.output_layer_norm,
            num_heads=layer.attention.n_heads if hasattr(layer.attention, "n_heads") else model.config.n_heads,
            attention_dropout=layer.attention.dropout.p,
            attention_output_dropout=0.0,
            output_dropout=layer.ffn.dropout.p,
        )
        for layer in model.distilbert.transformer.layer
    )
    return EncoderParts(
        words=table.word_embeddings,
        positions=table.position_embeddings,
        types=None,
        norm=table.LayerNorm,
        embedding_dropout=table.dropout.p,
        projection=None,
        counts_positions=None,
        layers=layers,
        head=_distilbert_head,
    )


FAMILIES: dict[str, Callable[[Any], EncoderParts]] = {
    "bert": _bert,
    "roberta": _roberta,
    "xlm-roberta": _roberta,
    "electra": _electra,
    "distilbert": _distilbert,
}
_CLASSES = (
    "BertForSequenceClassification",
    "RobertaForSequenceClassification",
    "XLMRobertaForSequenceClassification",
    "ElectraForSequenceClassification",
    "DistilBertForSequenceClassification",
)
