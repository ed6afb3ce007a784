"""Every student stage x teacher stage in one launch, each a run of the public `distill`.

Arguments: folder with config.json (a toy configuration), prefix of the output folders, micro-batch size, and stages as
STUDENT-TEACHER (all of them if none is named).
"""

import json
import sys
from pathlib import Path

from mixkd_fast import distill

STAGES = [(student, teacher) for student in (0, 1, 2, 3) for teacher in (0, 3)]


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    folder, prefix, micro_batch_size = Path(arguments[0]), arguments[1], int(arguments[2])
    config = json.loads((folder / "config.json").read_text())
    named = [tuple(map(int, text.split("-"))) for text in arguments[3:]]
    for student_stage, teacher_stage in named or STAGES:
        config["teacher"]["zero_stage"] = teacher_stage
        config["deepspeed"] = {"zero_optimization": {"stage": student_stage}}
        config["training"]["micro_batch_size"] = micro_batch_size
        config["output"]["directory"] = str(folder / f"{prefix}-student{student_stage}-teacher{teacher_stage}")
        distill(**config, progress=False)


if __name__ == "__main__":
    main()
