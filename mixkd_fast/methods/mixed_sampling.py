"""Answers drawn token by token from a mixture of teacher and student.

Legend of shape suffixes: R rows, P positions of the prompts, T drawn tokens, C classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mixkd_fast.errors import ModelError
from mixkd_fast.language_task import Sampling

if TYPE_CHECKING:
    from mixkd_fast.causal_lm import CausalLM
    from mixkd_fast.frozen_teacher import FrozenTeacher


class MixedSampler:
    """y_t ~ share * p(. | y before t) + (1 - share) * q(. | y before t), teacher p, student q, both with a cache."""

    def __init__(self, student: CausalLM, teacher: FrozenTeacher, share: float) -> None:
        self.student, self.teacher, self.share = student, teacher, share

    @torch.no_grad()
    def generate(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        options: Sampling,
        seed: int,
        eos_ids: Tensor,
        pad_id: int,
        num_tokens: int | None = None,
    ) -> Tensor:
        """Continue prompts: int64 [R, T]; arguments as of `CausalLM.generate`.

        Of the options max_new_tokens alone is read: the temperature is 1, and every token can come. Where student or
        teacher is partitioned by ZeRO-3 the call is collective, and lasts until the last rank is done.
        """
        device = prompt_ids.device
        random = torch.Generator(device).manual_seed(seed)
        models: list[tuple[Any, float]] = [(self.student, 1 - self.share)]
        if self.share > 0:
            models.append((self.teacher, self.share))
        caches: list[Any] = [None] * len(models)
        new_ids, mask = prompt_ids, prompt_mask
        ended = torch.zeros(len(prompt_ids), dtype=torch.bool, device=device)
        together = any(hasattr(p, "ds_id") for model, _ in models for p in model.model.parameters())
        own = min(options.max_new_tokens, *(_room(model, prompt_ids) for model, _ in models))
        tokens: list[Tensor] = []
        for _ in range(_longest(own, together, device)):
            if len(tokens) >= own:
                # Others go on: any forward will do, one that needs no further positions.
                new_ids, caches = prompt_ids[:, -1:], [None] * len(models)
                mask = torch.ones_like(new_ids)
            parts = []
            for number, (model, weight) in enumerate(models):
                logits, caches[number] = model.next_logits(new_ids, mask, caches[number])
                parts.append((logits, weight))
            if len(tokens) < own:
                token = torch.multinomial(_mixture(parts, num_tokens), 1, generator=random)[:, 0]
                tokens.append(token.where(~ended, pad_id))
                ended = ended | torch.isin(token, eos_ids)
            if _all_ended(ended | (len(tokens) >= own), together):
                break
            new_ids = tokens[-1][:, None]
            mask = torch.cat([mask, torch.ones_like(new_ids)], 1)
        return torch.stack(tokens, 1)


def _mixture(parts: list[tuple[Tensor, float]], num_tokens: int | None) -> Tensor:
    """Weighted mean of the distributions over the classes that all models have, below num_tokens: [R, C]."""
    classes = min(logits.shape[-1] for logits, _ in parts)
    allowed = classes if num_tokens is None else min(classes, num_tokens)
    dtype = torch.float64 if any(logits.dtype == torch.float64 for logits, _ in parts) else torch.float32
    mixed = sum(weight * logits[:, :classes].to(dtype).softmax(-1)[:, :allowed] for logits, weight in parts)
    assert isinstance(mixed, Tensor)
    return mixed


def _room(model: Any, prompt_ids: Tensor) -> int:
    """Raises: ModelError where there is none."""
    limit = getattr(model.model.config, "max_position_embeddings", None)
    if limit and limit <= prompt_ids.shape[1]:
        raise ModelError(f"a prompt of {prompt_ids.shape[1]} tokens leaves the model no position for an answer")
    return limit - prompt_ids.shape[1] if limit else 2**31


def _longest(own: int, together: bool, device: torch.device) -> int:
    """The most tokens that any rank may draw, where they must go on together."""
    if not (together and torch.distributed.is_initialized()):
        return own
    most = torch.tensor(own, device=device)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return int(most)


def _all_ended(ended: Tensor, together: bool) -> bool:
    """Of all ranks, where they must go on together."""
    done = ended.all()
    if together and torch.distributed.is_initialized():
        done = done.to(torch.int64)
        torch.distributed.all_reduce(done, op=torch.distributed.ReduceOp.MIN)
    return bool(done)
