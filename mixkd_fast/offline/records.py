"""From a teacher's hidden states to what is kept of them, and what that takes on disk.

Legend of shape suffixes: P positions, C classes, K kept classes, H width, N rows.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mixkd_fast.causal_lm import Head
from mixkd_fast.errors import DataError
from mixkd_fast.offline.manifest import StoreDtype, StoreKind
from mixkd_fast.ops import HeadInputs
from mixkd_fast.ops.linear_reference import head_logits

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_CHUNK_BYTES = 256 << 20
_BYTES_OF_ROW = 40
"""Beside the records of its targets: offsets, checksums, and the sums of kind "nll"."""
MOST_TARGETS = 2**20
"""Of a shard: what a kill loses at most, and what one rank does while others wait."""


def top_k_records(
    hidden_PH: Tensor, head: Head, k: int, candidates: int, temperature: float, dtype: StoreDtype
) -> dict[str, Tensor]:
    """The k likeliest of the first `candidates` classes: indices int32 [P, K], logprobs [P, K]; for fp16 log_mass [P].

    logprobs = log softmax(z / temperature) over the teacher's whole vocabulary, computed in fp32. log_mass is the
    logarithm of the sum of the kept probabilities before they are rounded: the rest is the mass of all other classes.
    """
    at_once = max(1, _CHUNK_BYTES // (4 * head.weight.shape[0]))
    parts = []
    for chunk in hidden_PH.split(at_once):
        logits = head_logits(HeadInputs(chunk, *head), None, torch.float32)
        logprobs = (logits / temperature).log_softmax(-1)
        parts.append(logprobs[:, :candidates].topk(k, dim=-1))
    logprobs = torch.cat([part.values for part in parts])
    records = {"indices": torch.cat([part.indices for part in parts]).int(), "logprobs": logprobs.to(DTYPES[dtype])}
    return records | ({"log_mass": logprobs.logsumexp(-1)} if dtype == "fp16" else {})


def token_nll(hidden_PH: Tensor, head: Head, labels_P: Tensor) -> Tensor:
    """Negative log-likelihood of each label in nats, from fp32 logits: fp64 [P]."""
    at_once = max(1, _CHUNK_BYTES // (4 * head.weight.shape[0]))
    parts = []
    for chunk, labels in zip(hidden_PH.split(at_once), labels_P.split(at_once), strict=True):
        logits = head_logits(HeadInputs(chunk, *head), None, torch.float32)
        parts.append(F.cross_entropy(logits, labels, reduction="none"))
    return torch.cat(parts).double()


def hidden_records(hidden_PH: Tensor, dtype: StoreDtype) -> dict[str, Tensor]:
    """The hidden states in the store's dtype. Raises: DataError for values that it cannot hold."""
    kept = hidden_PH.to(DTYPES[dtype])
    if not bool(torch.isfinite(kept).all()):
        raise DataError(
            f'--dtype {dtype}: some of the teacher\'s hidden states are not finite in it; use "bf16" or "fp32"'
        )
    return {"hidden": kept}


def bytes_per_token(kind: StoreKind, dtype: StoreDtype, k: int | None, width: int | None) -> int:
    """Of the records of one target; offsets and checksums (16 bytes a row) come on top."""
    if kind == "top_k":
        assert k is not None
        return k * (4 + _BYTES[dtype]) + (4 if dtype == "fp16" else 0)
    if kind == "hidden":
        assert width is not None
        return width * _BYTES[dtype]
    return 0


def shard_cuts(num_targets_N: NDArray[np.int64], per_token: int, shard_bytes: float) -> tuple[int, ...]:
    """Where shards end: row numbers from 0 to N. None has more than shard_bytes or MOST_TARGETS, unless one row has.

    A function of the rows alone, so that every number of ranks writes the same files.
    """
    cuts, filled, targets = [0], 0, 0
    for row, count in enumerate(num_targets_N.tolist()):
        size = count * per_token + _BYTES_OF_ROW
        if filled and (filled + size > shard_bytes or targets + count > MOST_TARGETS):
            cuts.append(row)
            filled = targets = 0
        filled += size
        targets += count
    return (*cuts, len(num_targets_N))
