"""Language models on two processes give what one gives, whatever stage student and teacher are partitioned at."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stage_runs import agreeing_runs, run_stages
from toy import records
from toy_lm import language_config, save_lm

STAGES = [(2, 0), (3, 0), (3, 3)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process at stage 0, two at every stage: the same global batch, cut differently."""
    folder = tmp_path_factory.mktemp("stages")
    save_lm(folder / "teacher", seed=3, tie_word_embeddings=True)
    config = language_config(
        folder,
        instruct=True,
        task={"generation_rows": 3},
        method={"name": "lm_kd", "divergence": "skew_reverse_kl", "tmkd_weight": 0.5},
        training={"steps": 4, "batch_size": 8, "evaluate_every": 2, "micro_batch_size": None, "learning_rate": 1e-3},
    )
    return run_stages(folder, config, STAGES, "4 2")


@pytest.mark.parametrize("stages", STAGES)
def test_two_ranks_give_what_one_gives(runs: Path, stages: tuple[int, int]) -> None:
    one, two = agreeing_runs(runs, stages, loss_abs=1e-5, norm_rel=1e-4)
    first, second = (records(folder, "evaluation")[-1]["metrics"] for folder in (one, two))
    assert second == pytest.approx(first, rel=1e-4)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, two)]
    assert summaries[0]["samples"] == summaries[1]["samples"] and len(summaries[0]["samples"]["validation"]) == 3
    assert summaries[1]["teacher"]["metrics"]["validation"] == pytest.approx(
        summaries[0]["teacher"]["metrics"]["validation"], rel=1e-4
    )
    weights = [load_file(folder / "student" / "model.safetensors") for folder in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=2e-5, rtol=1e-4)
