"""Peak resident memory of a rank while a causal language model is loaded and asked, whole or under ZeRO-3.

Arguments: teacher folder, output folder, and where it rests: whole, device, cpu or nvme. Writes rank<N>.json. Rank 1
has nothing to learn in the second batch, and asks all the same.
"""

import json
import sys
from pathlib import Path

import torch
from teacher_memory import Peak, resident_mib

from mixkd_fast import distributed
from mixkd_fast.configuration import Teacher
from mixkd_fast.data.batching import Batch
from mixkd_fast.engine import start_distributed
from mixkd_fast.language_models import load_teacher_lm
from mixkd_fast.losses import linear_kd_loss
from mixkd_fast.models import teacher_source
from mixkd_fast.teacher import load_sharded_teacher

ROWS, WIDTH, HIDDEN, VOCABULARY = 2, 16, 8, 258


def batch_of(seed: int, idle: bool) -> Batch:
    """Random tokens that are all learnt, or none of them."""
    ids = torch.randint(0, 256, (ROWS, WIDTH), generator=torch.Generator().manual_seed(seed))
    labels = torch.full_like(ids, -100) if idle else torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], 1)
    rows = torch.full((ROWS,), WIDTH)
    return Batch(
        ids,
        torch.ones_like(ids),
        None,
        labels,
        None,
        torch.arange(ROWS),
        None,
        None,
        ROWS,
        ids.numel(),
        row_lengths=rows,
    )


def main() -> None:
    folder, output, rests = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    device = torch.device("cpu")
    start_distributed(device)
    distributed.share_cores(1)
    rank = distributed.rank()
    offload = {"device": rests, "nvme_path": f"{output}/disk" if rests == "nvme" else None}
    section = Teacher(
        model=folder, zero_stage=0 if rests == "whole" else 3, offload=offload if rests in ("cpu", "nvme") else None
    )
    generator = torch.Generator().manual_seed(0)
    student_weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    student_hidden = torch.randn(ROWS, WIDTH, HIDDEN, generator=generator)
    source = teacher_source(section, "causal_lm")
    source.skeleton()  # imports the family's code, which is not part of the measure
    before, sampler = resident_mib(), Peak()
    sampler.start()
    if rests == "whole":
        teacher = load_teacher_lm(section)
    else:
        teacher = load_sharded_teacher(section, source, "fp32", ROWS, device)
    loaded_mib = sampler.peak_mib - before
    losses, parts = [], []
    with torch.no_grad():
        for number in range(2):
            batch = batch_of(10 * number + rank, idle=number == 1 and rank == 1)
            hidden = teacher.hidden(batch)
            parts.append(teacher.head().weight.numel())
            with teacher.gathered_head():
                weight = teacher.head().weight
                parts.append(weight.numel())
                loss = linear_kd_loss(student_hidden, student_weight, hidden, weight, batch.labels)
            parts.append(teacher.head().weight.numel())
            losses.append(float(loss))
    sampler.done.set()
    sampler.join()
    figures = {"loaded_mib": loaded_mib, "peak_mib": sampler.peak_mib - before, "losses": losses, "head": parts}
    (Path(output) / f"rank{rank}.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
