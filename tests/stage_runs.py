"""One configuration trained by one process and, at several stages of ZeRO, by two; and what has to agree."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from toy import losses, must_run, must_run_ranks, records

WORKER = "tests/workers/zero_stages.py"


def run_stages(folder: Path, config: dict[str, Any], stages: list[tuple[int, int]], micro_batch_sizes: str) -> Path:
    """Train with one process at stage 0 and with two at every (student's, teacher's) stage, with the same global batch.

    Args: micro_batch_sizes = of the one process and of the two, "4 2".
    """
    (folder / "config.json").write_text(json.dumps(config))
    of_one, of_two = micro_batch_sizes.split()
    must_run([sys.executable, WORKER, str(folder), "one", of_one, "0-0"])
    must_run_ranks(2, str(folder), "two", of_two, *(f"{s}-{t}" for s, t in stages), script=WORKER)
    return folder


def agreeing_runs(folder: Path, stages: tuple[int, int], loss_abs: float, norm_rel: float) -> tuple[Path, Path]:
    """The folders of both runs, after comparing every step's loss and gradient norm."""
    one, two = folder / "one-student0-teacher0", folder / "two-student{}-teacher{}".format(*stages)
    assert max(losses(one)) - min(losses(one)) > 1e-3, "the losses must move for the comparison to mean anything"
    assert losses(two) == pytest.approx(losses(one), abs=loss_abs)
    norms = [[line["grad_norm"] for line in records(run)] for run in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=norm_rel)
    return one, two
