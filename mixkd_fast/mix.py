"""Mixup of word embeddings: who is mixed with whom, how strongly, and the interpolation itself.

MixKD (Liang et al., ICLR 2021, arXiv 2011.00593): x' = lam * e(x_i) + (1 - lam) * e(x_j), lam ~ Beta(alpha, alpha).
Everything about mixing stands here; teacher and student both use it with the same (i, j, lam).

Legend of shape suffixes: N clean rows of the global batch, R rows at hand, M mixed rows, L positions, H width.
"""

from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from mixkd_fast.section import Section


class Mixing(Section):
    """How rows are paired and interpolated."""

    alpha: Annotated[float, Field(gt=0)] = 0.4
    """Parameter of lam ~ Beta(alpha, alpha)."""
    lam_per: Literal["row", "batch"] = "row"
    """A lam for every mixed row, or one for the whole global batch."""
    pairing: Literal["batch", "dataset"] = "batch"
    """Partners are a random permutation of the global batch, or any rows of the training set."""
    mixed_rows: Annotated[int, Field(ge=1, le=16)] = 1
    """Mixed rows per clean row."""
    position: Literal["before_layer_norm", "after_layer_norm"] = "before_layer_norm"
    """Mix word and token-type embeddings before position and LayerNorm, or the embedding module's output."""
    padding: Literal["embedding", "zero"] = "embedding"
    """What a padded position of one row of the pair contributes: its pad embedding, or zero."""


def draw_lam(mixing: Mixing, num_rows: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """lam ~ Beta(alpha, alpha): float32 [num_rows], all equal for lam_per="batch"."""
    if mixing.lam_per == "batch":
        return np.full(num_rows, rng.beta(mixing.alpha, mixing.alpha), dtype=np.float32)
    return rng.beta(mixing.alpha, mixing.alpha, size=num_rows).astype(np.float32)


def first_rows(rows_R: Tensor, num_mixed: int, num_rows: int) -> Tensor:
    """The first row of each mixed pair, [num_mixed, ...]: mixed row m belongs to clean row m % num_rows."""
    return rows_R[:num_rows].repeat(num_mixed // num_rows, *[1] * (rows_R.dim() - 1))


def mixed_attention_mask(mask_RL: Tensor, partner_M: Tensor, lam_M: Tensor, num_rows: int) -> Tensor:
    """keep = (keep_i and lam > 0) or (keep_j and lam < 1): the union, except that lam = 0 or 1 keeps one row's own.

    Args: mask_RL int64 [R, L], 1 = token; partner_M int64 [M], index into R; lam_M float32 [M] in [0, 1];
    num_rows B: mixed row m has clean row m % B as its first row.
    Returns: int64 [M, L].
    """
    own = first_rows(mask_RL, partner_M.shape[0], num_rows).bool() & (lam_M > 0)[:, None]
    other = mask_RL[partner_M].bool() & (lam_M < 1)[:, None]
    return (own | other).to(mask_RL.dtype)


def interpolate(first: Tensor, second: Tensor, lam_M: Tensor) -> Tensor:
    """lam * first + (1 - lam) * second in at least fp32, rounded once to the inputs' dtype; lam = 1 gives `first`.

    Args: first, second of one shape [M, ...]; lam_M [M], broadcast over all but the first dimension.
    """
    lam = lam_M.to(torch.promote_types(first.dtype, torch.float32)).view(-1, *[1] * (first.dim() - 1))
    return (lam * first + (1 - lam) * second).to(first.dtype)


def positions_of(mask: Tensor, padding_idx: int) -> Tensor:
    """Positions of models that count them from the mask (RoBERTa): padding_idx + running count, pads at padding_idx."""
    return torch.cumsum(mask, dim=1) * mask + padding_idx
