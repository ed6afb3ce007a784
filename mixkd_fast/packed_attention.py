"""Attention of variable length over the tokens of all rows, laid end to end without padding.

Legend of shape suffixes: O rows, L padded positions, T tokens of all rows, H width, h heads, d width of a head.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


class PackedRows(NamedTuple):
    """Where rows lie among the tokens."""

    starts: Tensor
    """int32 [O + 1]: row r has tokens starts[r] to starts[r + 1] - 1."""
    numbers: Tensor
    """int32 [O + 1]: 0, 1, 2, ...: the same for one token of each row."""
    longest: int
    """Tokens of the longest row."""


def pack(hidden_OLH: Tensor, lengths_O: Tensor) -> tuple[Tensor, PackedRows]:
    """Tokens [T, H] without padding on the right. Args: lengths int64 on the CPU; the device is not waited for."""
    num_rows, length, width = hidden_OLH.shape
    starts = F.pad(torch.cumsum(lengths_O, 0), (1, 0))
    shift = torch.repeat_interleave(torch.arange(num_rows) * length - starts[:-1], lengths_O)
    places = torch.arange(int(starts[-1])) + shift
    longest = int(lengths_O.max())
    # One buffer, so that one copy to the device carries it all.
    numbers = torch.cat([places, starts, torch.arange(num_rows + 1)])
    if hidden_OLH.device.type == "cuda":
        numbers = numbers.pin_memory().to(hidden_OLH.device, non_blocking=True)
    places, starts, rows = numbers.split([len(places), num_rows + 1, num_rows + 1])
    tokens = hidden_OLH.reshape(num_rows * length, width)[places]
    return tokens, PackedRows(starts.to(torch.int32), rows.to(torch.int32), longest)


def can_attend(hidden: Tensor, options: list[Any]) -> bool:
    """Whether `attend_packed` can run: on a GPU in half precision; nowhere with dropout of the attention."""
    return not why_not_attend(hidden.device, hidden.dtype, hidden.shape[-1], options)


def why_not_attend(device: torch.device, dtype: torch.dtype, width: int, layers: Sequence[Any]) -> str:
    """What keeps `attend_packed` from running, or "". Args: width = H; layers = with num_heads, attention_dropout."""
    dropout = max(layer.attention_dropout for layer in layers)
    if dropout:
        return f"the dropout of its attention is {dropout:g}, and attention of variable length has none"
    if device.type == "cpu":
        return ""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    if dtype not in HALF:
        return f"it is computed in {str(dtype).removeprefix('torch.')}; allowed: bfloat16, float16"
    head = width // layers[0].num_heads
    return "" if head % 8 == 0 and head <= 256 else f"its heads are {head} wide; allowed: multiples of 8 up to 256"


def attend_packed(query: Tensor, key: Tensor, value: Tensor, rows: PackedRows, first_token_only: bool) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V within each row: [T, h, d], or [O, h, d] for queries of the first tokens."""
    query_starts = rows.numbers if first_token_only else rows.starts
    if query.device.type == "cpu":
        return _row_by_row(query, key, value, query_starts, rows.starts)
    from torch.nn.attention.varlen import varlen_attn

    longest = 1 if first_token_only else rows.longest
    attended = varlen_attn(query, key, value, query_starts, rows.starts, longest, rows.longest)
    assert isinstance(attended, Tensor), "nothing beside it was asked for"
    return attended


def _row_by_row(query: Tensor, key: Tensor, value: Tensor, query_starts: Tensor, starts: Tensor) -> Tensor:
    """The same written out, for tests and for a CPU on which somebody asks for it; slow."""
    query_parts = query.split(query_starts.diff().tolist())
    parts = zip(query_parts, *(values.split(starts.diff().tolist()) for values in (key, value)), strict=True)
    attended = [
        F.scaled_dot_product_attention(*(part.transpose(0, 1)[None] for part in triple))[0].transpose(0, 1)
        for triple in parts
    ]
    return torch.cat(attended)
