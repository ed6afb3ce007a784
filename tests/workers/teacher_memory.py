"""Peak resident memory of a rank while a teacher is loaded and asked once, whole or under ZeRO-3.

Arguments: teacher folder, stage (0 or 3), output folder. Writes rank<N>.json.
"""

import json
import sys
import threading
from pathlib import Path

import psutil
import torch

from mixkd_fast import distributed
from mixkd_fast.configuration import Teacher
from mixkd_fast.data.batching import Batch
from mixkd_fast.engine import start_distributed
from mixkd_fast.models import load_teacher_encoder, teacher_source
from mixkd_fast.teacher import load_sharded_teacher


def resident_mib() -> float:
    """Resident memory of this process, mapped files included."""
    return psutil.Process().memory_info().rss / 2**20


class Peak(threading.Thread):
    """Samples the resident memory every millisecond."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_mib, self.done = 0.0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.001):
            self.peak_mib = max(self.peak_mib, resident_mib())


def main() -> None:
    folder, stage, output = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    device = torch.device("cpu")
    start_distributed(device)
    distributed.share_cores(1)
    section = Teacher(model=folder, zero_stage=int(stage))
    ids = torch.tensor([[2, 5, 6, 3], [2, 7, 8, 3]])
    batch = Batch(
        ids, torch.ones_like(ids), None, torch.zeros(2, dtype=torch.int64), None, torch.arange(2), None, None, 2, 8
    )
    teacher_source(section).skeleton()  # imports the family's code, which is not part of the measure
    before, sampler = resident_mib(), Peak()
    sampler.start()
    if stage == "3":
        teacher = load_sharded_teacher(section, teacher_source(section), "fp32", 2, device)
    else:
        teacher = load_teacher_encoder(section, 2, "classification")
    loaded_mib = sampler.peak_mib - before
    with torch.no_grad():
        logits = teacher.clean(batch).logits
    sampler.done.set()
    sampler.join()
    figures = {"loaded_mib": loaded_mib, "peak_mib": sampler.peak_mib - before, "logits": logits.tolist()}
    (Path(output) / f"rank{distributed.rank()}.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
