"""Tables of embeddings as the fused op reads them: their weights, without a call of their modules."""

from typing import Any

import torch
from torch import Tensor, nn


def is_plain_table(module: nn.Module) -> bool:
    """Whether a module does no more than read rows of a table that lies here whole.

    Hooks may change what it gives; under ZeRO-3 they gather the table, which is otherwise one rank's part or empty.
    """
    if type(module) is not nn.Embedding or module._forward_hooks or module._forward_pre_hooks:
        return False
    plain = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
    return plain and not hasattr(module.weight, "ds_id")


def table_of(module: nn.Module) -> Tensor:
    """The table of a plain module, whose padding row receives no gradient."""
    assert isinstance(module, nn.Embedding)
    if module.padding_idx is None or not (module.weight.requires_grad and torch.is_grad_enabled()):
        return module.weight
    frozen: Tensor = _WithoutGradientOfRow.apply(module.weight, module.padding_idx)
    return frozen


class _WithoutGradientOfRow(torch.autograd.Function):
    """A table as it is; in backward one of its rows gets gradient 0, as nn.Embedding does it for its padding row."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, row: int) -> Tensor:
        ctx.row = row
        return table.view_as(table)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # In place: it was made for this one use of the table, and a copy would be as large as the table.
        gradient[ctx.row] = 0
        return gradient, None
