"""What each position of a causal language model predicts. The only place of the project that shifts labels.

Rows of a data set and rows that a model has generated both come through here.
Legend of shape suffixes: R rows, L positions, P positions of the longest prompt, T generated tokens.
"""

import torch
from torch import Tensor

IGNORED = -100
"""Label of a position that predicts nothing."""


def next_token_labels(input_ids: Tensor, response_mask: Tensor, attention_mask: Tensor) -> Tensor:
    """labels[r, t] = input_ids[r, t + 1] where token t + 1 belongs to the response, else IGNORED.

    Position t predicts a token only if it holds one itself; the last position predicts none.
    Args: input_ids int64 [R, L]; response_mask [R, L], not 0 for tokens to be learnt; attention_mask [R, L], not 0 for
    tokens (padding on either side).
    Returns: int64 [R, L].
    """
    labels = torch.full_like(input_ids, IGNORED)
    learnt = (response_mask[:, 1:] != 0) & (attention_mask[:, 1:] != 0) & (attention_mask[:, :-1] != 0)
    labels[:, :-1] = torch.where(learnt, input_ids[:, 1:], IGNORED)
    return labels


def response_mask(prompt_lengths: Tensor, attention_mask: Tensor) -> Tensor:
    """1 for the tokens after each row's prompt: int64 [R, L]. For rows that are padded on the right.

    Args: prompt_lengths int64 [R], on any device; attention_mask int64 [R, L].
    """
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    after = positions >= prompt_lengths.to(attention_mask.device, non_blocking=True)[:, None]
    return after.to(attention_mask.dtype) * attention_mask


def left_padded_prompts(input_ids: Tensor, prompt_lengths: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    """The prompts alone, padded on the left as generation wants them.

    Args: input_ids int64 [R, L], rows padded on the right; prompt_lengths int64 [R] on the CPU, at least 1.
    Returns: ids and mask, int64 [R, P], on the device of input_ids.
    """
    width = int(prompt_lengths.max())
    lengths = prompt_lengths.to(input_ids.device)
    sources = torch.arange(width, device=input_ids.device) - (width - lengths)[:, None]
    mask = sources >= 0
    ids = torch.where(mask, input_ids.gather(1, sources.clamp(min=0)), pad_id)
    return ids, mask.to(torch.int64)


def generated_mask(generated: Tensor, eos_ids: Tensor) -> Tensor:
    """1 for generated tokens up to and with the first end of text: int64 [R, T].

    Args: generated int64 [R, T]; eos_ids int64 [any number], none of them ends nothing.
    """
    ends = torch.isin(generated, eos_ids.to(generated.device))
    return (ends.cumsum(1) - ends.to(torch.int64) == 0).to(torch.int64)


def with_answers(
    prompt_ids: Tensor, prompt_mask: Tensor, generated: Tensor, answer_mask: Tensor, pad_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts (padded on the left) and answers joined, padded on the right as training wants them.

    Args: prompt_ids, prompt_mask int64 [R, P]; generated, answer_mask int64 [R, T], `generated_mask`.
    Returns: input_ids, attention_mask and response_mask, int64 [R, P + T].
    """
    joined, mask = torch.cat([prompt_ids, generated], 1), torch.cat([prompt_mask, answer_mask], 1)
    response = torch.cat([torch.zeros_like(prompt_mask), answer_mask], 1)
    # Tokens before padding, each kind in its own order.
    order = torch.argsort(1 - mask, dim=1, stable=True)
    attention_mask = mask.gather(1, order)
    return joined.gather(1, order).masked_fill(attention_mask == 0, pad_id), attention_mask, response.gather(1, order)
