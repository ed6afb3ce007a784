"""Answers of models to the instructions of an evaluation split: for ROUGE-L, and for people to read."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixkd_fast import distributed
from mixkd_fast.data.batching import EvaluationBatches
from mixkd_fast.data.next_tokens import left_padded_prompts
from mixkd_fast.data.tokenization import TokenRows
from mixkd_fast.evaluation import EvaluationPlan
from mixkd_fast.language_task import Sampling, vocabulary_size
from mixkd_fast.metrics import rouge_l

Generate = Callable[[Tensor, Tensor, Sampling, int, Tensor, int, int], Tensor]
"""(prompt ids, prompt mask, options, seed, ids that end a text, pad id, number of tokens) -> tokens; see
`CausalLM.generate`."""


class Answers:
    """The first rows of an evaluation split of instructions, answered and compared with their references.

    Student and teacher see the same prompts and draw from the same seeds.
    """

    def __init__(
        self,
        rows: TokenRows,
        references: Sequence[str],
        plan: EvaluationPlan,
        tokenizer: Any,
        options: Sampling,
        seed: int,
    ) -> None:
        """Args: references = the responses of the first rows; there are as many answers."""
        self.rows, self.references, self.plan, self.tokenizer = rows, references, plan, tokenizer
        self.options, self.seed, self.count = options, seed, len(references)
        self.num_tokens = vocabulary_size(tokenizer)
        self.teacher_texts: list[str] | None = None

    @classmethod
    def of_splits(
        cls,
        options: Sampling,
        seed: int,
        rows: Mapping[str, TokenRows],
        references: Mapping[str, Sequence[str]],
        plan: EvaluationPlan,
        tokenizer: Any,
    ) -> dict[str, "Answers"]:
        """One for every split that has references."""
        return {split: cls(rows[split], of, plan, tokenizer, options, seed) for split, of in references.items()}

    def judge(self, generate: Generate, metrics: dict[str, float]) -> list[str]:
        """A model's answers; their ROUGE-L joins its metrics, as the first if it picks the best checkpoint."""
        texts = self.of(generate)
        others = dict(metrics)
        metrics.clear()
        score = {"rouge_l": rouge_l(self.references, texts)}
        metrics |= score | others if self.plan.metric_names[0] == "rouge_l" else others | score
        return texts

    def judge_teacher(self, generate: Generate, metrics: dict[str, float]) -> None:
        """`judge` for the teacher, whose answers are kept for `samples`."""
        self.teacher_texts = self.judge(generate, metrics)

    def samples(self, texts: Sequence[str]) -> list[dict[str, str]]:
        """Prompt, reference and answers of every row, for people to read."""
        theirs = self.teacher_texts
        return [
            {"prompt": prompt, "reference": reference, "student": text}
            | ({} if theirs is None else {"teacher": theirs[row]})
            for row, (prompt, reference, text) in enumerate(zip(self.prompts(), self.references, texts, strict=True))
        ]

    def prompts(self) -> list[str]:
        """The prompts as a model sees them, special tokens left out."""
        rows, lengths = self.rows, self.rows.prompt_lengths
        assert lengths is not None
        ids = [rows.row(index)[: lengths[index]].tolist() for index in range(self.count)]
        return self._texts(ids)

    def of(self, generate: Generate) -> list[str]:
        """The answers to the first rows, in order, on every rank. Collective."""
        found: list[tuple[int, list[int]]] = []
        pad_id = self.plan.padding.token_id
        rank, ranks = distributed.rank(), distributed.world_size()
        chosen = np.arange(self.count)
        batches = EvaluationBatches(self.rows, self.plan.batch_size, rank, ranks, self.plan.padding, chosen)
        # What training rows end with.
        eos_ids = torch.tensor([self.tokenizer.eos_token_id], dtype=torch.int64)
        ends = set(eos_ids.tolist())
        for number, batch in enumerate(batches):
            assert batch.prompt_lengths is not None
            batch = batch.to(self.plan.device)
            assert batch.prompt_lengths is not None
            ids, mask = left_padded_prompts(batch.input_ids, batch.prompt_lengths, pad_id)
            # The draws belong to the batch, which is the same for every number of ranks.
            seed = _seed(self.seed, number * ranks + rank)
            generated = generate(ids, mask, self.options, seed, eos_ids, pad_id, self.num_tokens).cpu()
            for row_id, tokens in zip(batch.row_ids.tolist(), generated.tolist(), strict=True):
                if row_id >= 0:
                    end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
                    found.append((row_id, tokens[:end]))
        gathered = dict(pair for pairs in distributed.gather_objects(found) for pair in pairs)
        return self._texts([gathered[index] for index in range(self.count)])

    def _texts(self, ids: Sequence[list[int]]) -> list[str]:
        return [str(self.tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in ids]


def _seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence([seed % 2**64, number]).generate_state(1, np.uint64)[0] >> 1)
