"""Which tokens of a batch are masked, for methods that train a masked language model.

Legend of shape suffixes: B clean rows, L positions, K masked tokens of the micro-batch, V ids of the tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mixkd_fast.errors import ModelError

if TYPE_CHECKING:
    from mixkd_fast.data.batching import Batch


class Vocabulary(nn.Module):
    """What masking has to know of a tokenizer, on the device of the module that holds it."""

    special_V: Tensor
    """bool: ids that are never masked and never put in a masked token's place."""
    ordinary: Tensor
    """int64: all other ids."""

    def __init__(self, tokenizer: Any) -> None:
        """Raises: ModelError for a tokenizer without a mask token."""
        super().__init__()
        if tokenizer.mask_token_id is None:
            raise ModelError(
                f'the tokenizer "{tokenizer.name_or_path}" has mask_token null; allowed: a tokenizer with a mask token'
            )
        self.mask_id = int(tokenizer.mask_token_id)
        known = torch.tensor(sorted(tokenizer.get_vocab().values()))
        special_V = torch.ones(int(known[-1]) + 1, dtype=torch.bool)  # gaps count as special
        special_V[known] = False
        special_V[torch.tensor(tokenizer.all_special_ids)] = True
        self.register_buffer("special_V", special_V, persistent=False)
        self.register_buffer("ordinary", (~special_V).nonzero().squeeze(1), persistent=False)

    @property
    def size(self) -> int:
        """V: rows that an embedding table needs for every id."""
        return len(self.special_V)


@dataclass(frozen=True)
class MaskedTokens:
    """A micro-batch of which some tokens are masked."""

    batch: Batch
    """The clean rows, with other ids in the chosen places."""
    places_K: Tensor
    """int64: where the chosen tokens are in the rows laid end to end, row * L + position."""
    rows_K: Tensor
    """int64: their rows."""
    targets_K: Tensor
    """int64: the ids they had."""
    valid_K: Tensor
    """bool: whether the token was allowed to be chosen; others are there only where too few are allowed, unchanged."""

    def per_row(self, values_K: Tensor) -> Tensor:
        """Sum over the chosen tokens of each clean row: [K] -> [B]."""
        return values_K.new_zeros(self.batch.num_rows).index_add(0, self.rows_K, values_K)

    @property
    def weight(self) -> float:
        """Weight of a token's loss, with which the engine's mean over rows becomes a mean over the masked tokens.

        Each micro-batch has the mean over its K tokens, and counts by its tokens among those of the step's whole
        batch: K is mask_probability of them up to rounding, so this is the mean over all masked tokens of the step.
        """
        assert self.batch.mean_tokens is not None, "only training batches have mean_tokens"
        return self.batch.num_tokens / (len(self.places_K) * self.batch.mean_tokens)


def mask_tokens(batch: Batch, vocabulary: Vocabulary, probability: float, keep_and_replace: bool) -> MaskedTokens:
    """Mask a share of the clean rows' tokens, drawn from torch's generator of the batch's device.

    K = probability * (all tokens of the micro-batch), rounded, at least 1, as in BERT's own code (Devlin et al. 2019);
    they are chosen at random among the tokens that are not special. K depends on lengths alone, so nobody waits for
    the device, and padding changes nothing.
    Args: keep_and_replace = of the chosen tokens 80 % become the mask token, 10 % a random ordinary one, 10 % stay;
    otherwise all become the mask token.
    """
    rows = slice(0, batch.num_rows)
    ids_BL, mask_BL = batch.input_ids[rows], batch.attention_mask[rows].bool()
    ids, device = ids_BL.flatten(), ids_BL.device
    allowed = (mask_BL & ~vocabulary.special_V[ids_BL]).flatten()
    # One number per token and none for padding: the draw of a row does not depend on its width.
    drawn = torch.rand(batch.num_tokens, device=device)
    score = torch.zeros(ids.shape, device=device).masked_scatter(mask_BL.flatten(), drawn)
    num_masked = max(1, round(probability * batch.num_tokens))
    places_K = torch.where(allowed, score, score - 2).topk(num_masked).indices
    valid_K, targets_K = allowed[places_K], ids[places_K]
    new_K = torch.full_like(targets_K, vocabulary.mask_id)
    if keep_and_replace:
        fate_K = torch.rand(num_masked, device=device)
        other_K = vocabulary.ordinary[torch.randint(len(vocabulary.ordinary), (num_masked,), device=device)]
        new_K = torch.where(fate_K < 0.8, new_K, torch.where(fate_K < 0.9, other_K, targets_K))
    new_K = torch.where(valid_K, new_K, targets_K)
    masked = ids.index_copy(0, places_K, new_K).view_as(ids_BL)
    types = None if batch.token_type_ids is None else batch.token_type_ids[rows]
    lengths = None if batch.row_lengths is None else batch.row_lengths[rows]
    alone = replace(
        batch,
        input_ids=masked,
        attention_mask=batch.attention_mask[rows],
        token_type_ids=types,
        row_lengths=lengths,
        teacher_logits=None,
    )
    return MaskedTokens(alone, places_K, places_K // ids_BL.shape[1], targets_K, valid_K)
