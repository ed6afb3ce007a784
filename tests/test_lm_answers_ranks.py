"""MiniLLM and DPKD on two processes give what one gives, whatever stage student and teacher are partitioned at."""

from pathlib import Path

import pytest
from stage_runs import agreeing_runs, run_stages
from toy_lm import language_config

pytestmark = pytest.mark.slow
STAGES = [(0, 0), (0, 3), (3, 3)]
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
    return run_stages(folder, config, STAGES, "4 4")


@pytest.mark.parametrize("stages", STAGES)
def test_two_ranks_give_what_one_gives(runs: Path, stages: tuple[int, int]) -> None:
    agreeing_runs(runs, stages, loss_abs=1e-4, norm_rel=1e-3)
