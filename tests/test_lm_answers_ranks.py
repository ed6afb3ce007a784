"""MiniLLM and DPKD on two processes give what one gives, whatever stage student and teacher are partitioned at."""

import json
import sys
from pathlib import Path

import pytest
from toy import losses, must_run, must_run_ranks, records
from toy_lm import language_config

pytestmark = pytest.mark.slow
STAGES = [(0, 0), (0, 3), (3, 3)]
WORKER = "tests/workers/zero_stages.py"
METHODS = {
    "minillm": {"name": "minillm", "generation": {"max_new_tokens": 5}},
    "dpkd": {"name": "dpkd", "beta": 0.5, "write_every": 2, "generation": {"max_new_tokens": 5, "temperature": 0.0}},
}


@pytest.fixture(scope="module", params=METHODS)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process at stage 0, two at every stage: the same micro-batches, dealt out differently."""
    folder = tmp_path_factory.mktemp(request.param)
    config = language_config(
        folder,
        instruct=True,
        task={"generation_rows": 0},
        method=METHODS[request.param],
        training={"steps": 3, "batch_size": 8, "evaluate_every": 3, "micro_batch_size": None, "learning_rate": 1e-3},
    )
    (folder / "config.json").write_text(json.dumps(config))
    must_run([sys.executable, WORKER, str(folder), "one", "4", "0-0"])
    must_run_ranks(2, str(folder), "two", "4", *(f"{s}-{t}" for s, t in STAGES), script=WORKER)
    return folder


@pytest.mark.parametrize(("student", "teacher"), STAGES)
def test_two_ranks_give_what_one_gives(runs: Path, student: int, teacher: int) -> None:
    one, two = runs / "one-student0-teacher0", runs / f"two-student{student}-teacher{teacher}"
    assert max(losses(one)) - min(losses(one)) > 1e-3, "the losses must move for the comparison to mean anything"
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    norms = [[line["grad_norm"] for line in records(folder)] for folder in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
