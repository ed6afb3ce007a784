"""How far a language model is from its teacher where its own text leads: what on-policy distillation makes small.

Perplexity is about the text of others, and says nothing of it.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mixkd_fast.causal_lm import CausalLM
from mixkd_fast.configuration import Task
from mixkd_fast.data.language_tokens import tokenize_language_rows
from mixkd_fast.data.loading import load_evaluation
from mixkd_fast.data.next_tokens import generated_mask, left_padded_prompts
from mixkd_fast.data.prompts import PromptStyle
from mixkd_fast.data.tokenization import TokenRows, default_cache_dir
from mixkd_fast.language_task import Sampling
from mixkd_fast.pretrained import with_padding
from mixkd_fast.saving import load_model


@torch.no_grad()
def divergence_on_own_text(
    student_folder: Path, teacher_folder: Path, task: Task, max_new_tokens: int, num_rows: int = 256, seed: int = 0
) -> dict[str, float]:
    """KL(student || teacher) in nats a token, at the tokens of text that the student draws at temperature 1.

    The student continues the prompts of the first rows of the last evaluation split; of plain text the prompt is the
    first half of a block. At each token it is sum_v q(v) * (log q(v) - log p(v)) over the whole vocabulary; by the
    chain rule their sum over a text is, on average, the divergence of the texts. The mean is over all tokens.
    Args: max_new_tokens = longest text. Both models need the same tokenizer.
    Returns: "kl", and "tokens", of which it is the mean.
    """
    model, tokenizer = load_model(student_folder, causal_lm=True)
    student, teacher = CausalLM(model), CausalLM(load_model(teacher_folder, causal_lm=True)[0])
    tokenizer = with_padding(tokenizer)
    _, splits = load_evaluation(task)
    cache_dir = Path(task.cache_dir) if task.cache_dir else default_cache_dir()
    rows = tokenize_language_rows(
        list(splits.values())[-1], tokenizer, task.max_length, cache_dir, PromptStyle.of(task)
    )
    eos_ids = torch.tensor([tokenizer.eos_token_id])
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=1.0)
    total, count = 0.0, 0
    for start in range(0, min(num_rows, len(rows)), 64):
        prompts, mask = _prompts(rows, range(start, min(start + 64, num_rows, len(rows))), tokenizer.pad_token_id)
        written = student.generate(prompts, mask, sampling, seed + start, eos_ids, tokenizer.pad_token_id)
        kept = generated_mask(written, eos_ids)
        divergence = _divergence(student, teacher, torch.cat([prompts, written], 1), torch.cat([mask, kept], 1))
        total += float((divergence[:, -written.shape[1] :] * kept).sum())
        count += int(kept.sum())
    return {"kl": total / count, "tokens": count}


def _prompts(rows: TokenRows, chosen: range, pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, int64 [R, P], padded on the left."""
    given = rows.prompt_lengths
    assert given is not None
    lengths = [int(given[row]) or max(1, int(rows.lengths[row]) // 2) for row in chosen]
    ids = torch.full((len(chosen), max(lengths)), pad_id)
    for place, (row, length) in enumerate(zip(chosen, lengths, strict=True)):
        ids[place, :length] = torch.from_numpy(rows.row(row)[:length].astype(np.int64))
    return left_padded_prompts(ids, torch.tensor(lengths), pad_id)


def _divergence(student: CausalLM, teacher: CausalLM, input_ids: Tensor, mask: Tensor) -> Tensor:
    """KL(student || teacher) of the prediction of every token: [R, L], nothing at the first.

    Args: input_ids, mask int64 [R, L], padded on the left; later padding is seen by nothing that counts.
    """
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    log_q, log_p = (
        F.log_softmax(lm.model(input_ids=input_ids, attention_mask=mask, position_ids=positions).logits.double(), -1)
        for lm in (student, teacher)
    )
    return F.pad((log_q.exp() * (log_q - log_p)).sum(-1)[:, :-1], (1, 0))
