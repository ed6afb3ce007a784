"""Floating-point operations of a model's matrix products, from its shape and the lengths of its rows.

Every multiply-add counts as 2. Left out: softmax, activation functions, normalisation and table look-ups, which move
bytes rather than multiply, and the one convolution of the largest DeBERTa-v2 models (below 1 %).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from mixkd_fast.errors import ModelError
from mixkd_fast.planning.decoders import DecoderShape, Lengths, decoder_attention_flops, decoder_flops

FAMILIES = (
    "bert",
    "roberta",
    "xlm-roberta",
    "camembert",
    "electra",
    "distilbert",
    "modernbert",
    "deberta",
    "deberta-v2",
)


@dataclass(frozen=True)
class EncoderShape:
    """The sizes that decide what a sequence-classification encoder costs."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    vocab_size: int
    num_positions: int
    """Rows of the learned table of positions; 0 where there is none."""
    num_types: int
    """Rows of the table of token types; 0 where there is none."""
    num_labels: int
    has_pooler: bool
    """Whether a hidden_size x hidden_size layer stands between the first token and the classifier."""
    embedding_size: int | None = None
    """Width of the embedding tables where it differs from hidden_size (ELECTRA); a projection follows them."""
    is_gated: bool = False
    """Whether the feed-forward part multiplies two projections of the input (ModernBERT)."""
    relative_span: int = 0
    """Furthest relative distance with an embedding of its own (DeBERTa); 0 without relative attention."""
    relative_terms: int = 0
    """How many of content-to-position and position-to-content scores are computed (DeBERTa)."""
    span_follows_rows: bool = False
    """Whether distances beyond the longest row are cut off before they are multiplied (DeBERTa, not version 2)."""

    @classmethod
    def of(cls, config: Any) -> "EncoderShape":
        """The shape that a transformers configuration describes.

        Raises: ModelError for a family whose arithmetic is not known here.
        """
        family = config.model_type
        if family not in FAMILIES:
            raise ModelError(f"model_type = {family!r}: its arithmetic is not known; known: {', '.join(FAMILIES)}")
        embedding_size = getattr(config, "embedding_size", config.hidden_size)
        has_positions = family != "modernbert" and getattr(config, "position_biased_input", True)
        is_related = bool(getattr(config, "relative_attention", False))
        return cls(
            num_layers=int(config.num_hidden_layers),
            hidden_size=int(config.hidden_size),
            intermediate_size=int(config.hidden_dim if family == "distilbert" else config.intermediate_size),
            num_heads=int(config.num_attention_heads),
            vocab_size=int(config.vocab_size),
            num_positions=int(config.max_position_embeddings) if has_positions else 0,
            num_types=int(getattr(config, "type_vocab_size", 0)),
            num_labels=int(config.num_labels),
            has_pooler=True,
            embedding_size=int(embedding_size) if embedding_size != config.hidden_size else None,
            is_gated=family == "modernbert",
            relative_span=_relative_span(config) if is_related else 0,
            relative_terms=len({"c2p", "p2c"} & set(config.pos_att_type or ())) if is_related else 0,
            span_follows_rows=family == "deberta",
        )


def forward_flops(shape: EncoderShape | DecoderShape, lengths: Lengths, first_token_only: bool = False) -> float:
    """FLOPs of the matrix products of one forward over rows with these numbers of tokens; of a decoder's body.

    Projections, attention scores and values, feed-forward, pooler, classifier; for padded rows give the padded
    length. Every layer's attention counts as if each token saw its whole row (ModernBERT's windows are wider than
    most rows).
    Args: first_token_only = the last layer computes keys and values of all tokens, and the rest of the first one.
    """
    if isinstance(shape, DecoderShape):
        return decoder_flops(shape, lengths)
    tokens_per_row = np.asarray(lengths, dtype=np.float64)
    rows, tokens, pairs = float(tokens_per_row.size), float(tokens_per_row.sum()), float((tokens_per_row**2).sum())
    width = shape.hidden_size
    flops = 2.0 * rows * (width * width * shape.has_pooler + width * shape.num_labels)
    if shape.embedding_size is not None:
        flops += 2.0 * tokens * shape.embedding_size * width
    num_whole = shape.num_layers - int(first_token_only)
    flops += num_whole * _layer_flops(shape, queries=tokens, keys=tokens, pairs=pairs)
    if first_token_only:
        flops += _layer_flops(shape, queries=rows, keys=tokens, pairs=tokens)
    if shape.relative_terms:
        longest = int(tokens_per_row.max(initial=0.0))
        flops += shape.num_layers * _relative_flops(shape, tokens, longest)
    return flops


def attention_flops(shape: EncoderShape | DecoderShape, lengths: Lengths, first_token_only: bool = False) -> float:
    """The part of `forward_flops` spent on scores and weighted values: many small products, slower than the rest."""
    if isinstance(shape, DecoderShape):
        return decoder_attention_flops(shape, lengths)
    tokens_per_row = np.asarray(lengths, dtype=np.float64)
    tokens, pairs = float(tokens_per_row.sum()), float((tokens_per_row**2).sum())
    scores = (shape.num_layers - int(first_token_only)) * pairs + int(first_token_only) * tokens
    return 4.0 * scores * shape.hidden_size


def _layer_flops(shape: EncoderShape, queries: float, keys: float, pairs: float) -> float:
    """One layer. Args: queries, keys = tokens that are asked for and looked at; pairs = scores that are computed."""
    width = shape.hidden_size
    feed_forward = (3 if shape.is_gated else 2) * width * shape.intermediate_size
    key_value = 2 * width * width
    query_output = 2 * width * width
    return 2.0 * (keys * key_value + queries * (query_output + feed_forward) + 2 * pairs * width)


def _relative_flops(shape: EncoderShape, tokens: float, longest: int) -> float:
    """DeBERTa's scores against relative positions, whose embeddings are projected once per forward and layer."""
    distances = 2 * (min(longest, shape.relative_span) if shape.span_follows_rows else shape.relative_span)
    width = shape.hidden_size
    return 2.0 * shape.relative_terms * distances * width * (width + tokens)


def _relative_span(config: Any) -> int:
    buckets = int(getattr(config, "position_buckets", -1) or -1)
    furthest = int(config.max_relative_positions)
    return buckets if buckets > 0 else furthest if furthest > 0 else int(config.max_position_embeddings)
