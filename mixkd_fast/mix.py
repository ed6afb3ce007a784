"""Mixup of word embeddings for any trainer: the fused op, and the rules for masks and positions. Needs torch only.

MixKD (Liang et al., ICLR 2021, arXiv 2011.00593): x' = lam * e(x_i) + (1 - lam) * e(x_j), lam ~ Beta(alpha, alpha).
Everything about interpolating stands here; teacher and student both use it with the same (i, j, lam). Who is mixed with
whom is `mixkd_fast.mixing`.

Legend of shape suffixes: R rows at hand, B clean rows, M mixed rows, O rows of the output, L positions, H width.
"""

import torch
from torch import Tensor, nn

from mixkd_fast.ops import MixInputs, checks
from mixkd_fast.ops.checks import FLOATING, INTEGER, refuse

INDEX_NAMES = ("input_ids", "partner", "position_ids", "token_type_ids")
"""What holds rows of a table, as the kernels' errors call it."""


def mix_embeddings(
    input_ids: Tensor,
    weight: Tensor,
    partner: Tensor,
    lam: Tensor | float,
    *,
    padding_mask: Tensor | None = None,
    position_weight: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    token_type_weight: Tensor | None = None,
    position_ids: Tensor | None = None,
    layer_norm: nn.LayerNorm | None = None,
    include_clean: bool = False,
    num_rows: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mixed embeddings of every row and its partner, in one pass, with gradients to every table.

    For mixed row m with i = m % B and j = partner[m], at every position:
    x = (u W_i + v W_j) + (P + (u Y_i + v Y_j)), u = lam_m, v = 1 - lam_m, then LayerNorm
    with W word, P position and Y token-type embeddings; what is not given is left out. lam = 1 gives row i's plain
    embedding exactly. Arithmetic in fp32 (fp64 for fp64 tables), rounded once.

    Args:
        input_ids: integer [R, L], in [0, V).
        weight: [V, H], the table of word embeddings; fp32, bf16, fp16 or fp64.
        partner: integer [M], the row of each mixed row's partner, in [0, R).
        lam: floating [M] or one number, in [0, 1]: the weight of the first row.
        padding_mask: bool [R, L], True where a token is padding: u or v is 0 there. None mixes pad embeddings as they
            are.
        position_weight: [P, H] of the dtype of `weight`.
        token_type_ids: integer [R, L], together with token_type_weight.
        token_type_weight: [T, H] of the dtype of `weight`.
        position_ids: integer [O, L], or None for 0 to L - 1; only with position_weight.
        layer_norm: over the width H; its weight, bias and eps are used, and its gradients flow.
        include_clean: puts the B clean rows (lam = 1, no partner) before the mixed ones, so that one model call sees
            both.
        num_rows: B, default M: rows 0 to B - 1 of input_ids are the clean ones; rows from B on are partners only.
        backend: "auto" or a name of `mixkd_fast.ops.backends`.

    Returns: [M, L, H], or [B + M, L, H] with include_clean, in the dtype of `weight`.

    Raises: ValueError for shapes and dtypes that do not fit together, and on the CPU for an index out of range; on a
    GPU the tokens of such an index are NaN, for the device is not waited for. RuntimeError for a missing backend.

    Source: MixKD, Liang et al. 2021 (arXiv 2011.00593), mixing before LayerNorm.
    """
    # Imported here, so that `python -m mixkd_fast.ops.backends` is not loaded by its own package first.
    from mixkd_fast.ops import backends

    _check_tables(weight, position_weight, token_type_ids, token_type_weight, position_ids, layer_norm)
    _check_shape("input_ids", input_ids, (None, None))
    rows, length = input_ids.shape
    _check_shape("partner", partner, (None,))
    num_rows = partner.shape[0] if num_rows is None else num_rows
    if not 0 <= num_rows <= rows or (num_rows == 0 and partner.shape[0] > 0):
        refuse("num_rows", num_rows, f"1 to {rows}, the rows of input_ids")
    output_rows = partner.shape[0] + (num_rows if include_clean else 0)
    for name, indices, shape in (
        ("token_type_ids", token_type_ids, (rows, length)),
        ("position_ids", position_ids, (output_rows, length)),
        ("padding_mask", padding_mask, (rows, length)),
    ):
        if indices is not None:
            _check_shape(name, indices, shape)
    if padding_mask is not None and padding_mask.dtype != torch.bool:
        refuse("padding_mask", padding_mask.dtype, "torch.bool, True where a token is padding")
    if position_weight is not None and position_ids is None and length > position_weight.shape[0]:
        limit = position_weight.shape[0]
        raise ValueError(f"input_ids has {length} positions; allowed: up to {limit}, the rows of position_weight")
    norm_weight, norm_bias = _affine(layer_norm)
    given = {
        "input_ids": input_ids,
        "partner": partner,
        "lam": lam,
        "padding_mask": padding_mask,
        "position_weight": position_weight,
        "token_type_ids": token_type_ids,
        "token_type_weight": token_type_weight,
        "position_ids": position_ids,
        "layer_norm.weight": norm_weight,
        "layer_norm.bias": norm_bias,
    }
    checks.check_devices(weight.device, given.items(), "weight")
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if isinstance(lam, Tensor):
        _check_shape("lam", lam, tuple(partner.shape))
        lam = lam.detach().to(compute)
    else:
        lam = torch.full(partner.shape, lam, dtype=compute, device=partner.device)
    inputs = MixInputs(
        _indices("input_ids", input_ids),
        weight.contiguous(),
        _indices("partner", partner),
        lam.contiguous(),
        None if padding_mask is None else padding_mask.contiguous(),
        None if position_weight is None else position_weight.contiguous(),
        None if token_type_ids is None else _indices("token_type_ids", token_type_ids),
        None if token_type_weight is None else token_type_weight.contiguous(),
        None if position_ids is None or position_weight is None else _indices("position_ids", position_ids),
        norm_weight,
        norm_bias,
        1e-5 if layer_norm is None else layer_norm.eps,
        layer_norm is not None,
        num_rows,
        include_clean,
    )
    name = backends.resolve("mix_embeddings", weight.device.type, backend, compute == torch.float64)
    try:
        mixed: Tensor = backends.load("mix_embeddings", name)(inputs)
    except (RuntimeError, IndexError) as error:
        raise checks.readable(error, INDEX_NAMES) from None
    return mixed


def _check_tables(
    weight: Tensor,
    position_weight: Tensor | None,
    token_type_ids: Tensor | None,
    token_type_weight: Tensor | None,
    position_ids: Tensor | None,
    layer_norm: nn.LayerNorm | None,
) -> None:
    _check_shape("weight", weight, (None, None))
    if weight.dtype not in FLOATING:
        refuse("weight", weight.dtype, "float32, bfloat16, float16 or float64")
    width = weight.shape[1]
    for name, table in (("position_weight", position_weight), ("token_type_weight", token_type_weight)):
        if table is not None:
            _check_shape(name, table, (None, width))
            if table.dtype != weight.dtype:
                refuse(name, table.dtype, f"{weight.dtype}, the dtype of weight")
    if (token_type_ids is None) != (token_type_weight is None):
        raise ValueError("token_type_ids and token_type_weight belong together; give both or neither")
    if position_ids is not None and position_weight is None:
        raise ValueError("position_ids is given but not position_weight, the table that it indexes")
    if layer_norm is not None and tuple(layer_norm.normalized_shape) != (width,):
        refuse("layer_norm.normalized_shape", tuple(layer_norm.normalized_shape), f"({width},), the width of weight")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    """None stands for any size."""
    fits = tensor.dim() == len(shape)
    if not fits or any(size not in (None, have) for size, have in zip(shape, tensor.shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed: [{wanted}]")


def _indices(name: str, values: Tensor) -> Tensor:
    """As contiguous int64."""
    if values.dtype not in INTEGER:
        refuse(name, values.dtype, "an integer dtype")
    return values.to(torch.int64).contiguous()


def _affine(layer_norm: nn.LayerNorm | None) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias, contiguous; each may be missing."""
    if layer_norm is None:
        return None, None
    weight, bias = layer_norm.weight, layer_norm.bias
    return None if weight is None else weight.contiguous(), None if bias is None else bias.contiguous()


def first_rows(rows_R: Tensor, num_mixed: int, num_rows: int) -> Tensor:
    """The first row of each mixed pair, [num_mixed, ...]: mixed row m belongs to clean row m % num_rows."""
    if num_mixed % max(1, num_rows):
        return rows_R[torch.arange(num_mixed, device=rows_R.device) % num_rows]
    return rows_R[:num_rows].repeat(num_mixed // max(1, num_rows), *[1] * (rows_R.dim() - 1))


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
