"""Answers of two ranks whose prompts leave unlike room, by partitioned models and by the same ones whole.

Arguments: folder for RANK.json, which holds for every way of drawing the answers of both models.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from toy_lm import tiny_lm

from mixkd_fast import distributed
from mixkd_fast.causal_lm import CausalLM
from mixkd_fast.configuration import Teacher
from mixkd_fast.engine import start_distributed
from mixkd_fast.frozen_teacher import FrozenTeacher
from mixkd_fast.language_task import Sampling
from mixkd_fast.methods.mixed_sampling import MixedSampler
from mixkd_fast.teacher import shard_loaded_teacher

LIMIT, WIDTHS = 16, (14, 3)
"""Positions of the models, of which GPT-2 has a table, and of each rank's prompts."""


def asked(family: str, seed: int, partitioned: bool) -> FrozenTeacher:
    lm: Any = CausalLM(tiny_lm(family, seed=seed, max_position_embeddings=LIMIT))
    section = Teacher(model="unused", zero_stage=3)
    return FrozenTeacher(shard_loaded_teacher(section, lm, "fp32", 1) if partitioned else lm, str)


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    torch.set_num_threads(1)
    start_distributed(torch.device("cpu"))
    rank = distributed.rank()
    ids = torch.arange(1, 1 + WIDTHS[rank])[None].repeat(2, 1)
    inputs = (ids, torch.ones_like(ids), Sampling(max_new_tokens=9), 3, torch.tensor([256]), 257)
    found: dict[str, list[Any]] = {"mixed": [], "generate": []}
    for partitioned in (True, False):
        student, teacher = asked("gpt2", 1, partitioned), asked("llama", 2, partitioned)
        found["mixed"].append(MixedSampler(student, teacher, 0.2).generate(*inputs).tolist())
        found["generate"].append(student.generate(*inputs).tolist())
    (Path(arguments[0]) / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
