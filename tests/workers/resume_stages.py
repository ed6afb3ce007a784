"""Runs (or resumes) the same configuration at some student stages in one process.

Arguments: folder with config.json, prefix of the output folders, "start" or "resume", the stages.
"""

import json
import sys
from pathlib import Path

from mixkd_fast import distill


def main() -> None:
    folder, prefix, mode = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    config = json.loads((folder / "config.json").read_text())
    for stage in map(int, sys.argv[4:]):
        config["deepspeed"] = {"zero_optimization": {"stage": stage}}
        config["output"]["directory"] = str(folder / f"{prefix}{stage}")
        distill(**config, resume=mode == "resume", progress=False)


if __name__ == "__main__":
    main()
