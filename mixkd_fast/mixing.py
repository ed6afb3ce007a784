"""How rows are paired and how strongly they are mixed: the options of MixKD and the draw of lam.

MixKD (Liang et al., ICLR 2021, arXiv 2011.00593): x' = lam * e(x_i) + (1 - lam) * e(x_j), lam ~ Beta(alpha, alpha).
The interpolation itself is `mixkd_fast.mix`.
"""

from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mixkd_fast.section import Section


class Mixing(Section):
    """How rows are paired and interpolated."""

    alpha: Annotated[float, Field(gt=0)] = 0.4
    """Parameter of lam ~ Beta(alpha, alpha)."""
    larger_first: bool = False
    """Take max(lam, 1 - lam), so that a row is never the smaller part of its own mixed row."""
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
    """lam ~ Beta(alpha, alpha): float32 [num_rows], all equal for lam_per="batch", all >= 1/2 for larger_first."""
    count = 1 if mixing.lam_per == "batch" else num_rows
    lam = rng.beta(mixing.alpha, mixing.alpha, size=count)
    if mixing.larger_first:
        lam = np.maximum(lam, 1 - lam)
    return np.broadcast_to(lam, num_rows).astype(np.float32)
