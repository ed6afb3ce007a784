"""Language models on two processes give what one gives, whatever stage student and teacher are partitioned at."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy import losses, must_run, must_run_ranks, records
from toy_lm import language_config, save_lm

STAGES = [(2, 0), (3, 0), (3, 3)]
WORKER = "tests/workers/zero_stages.py"


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
    (folder / "config.json").write_text(json.dumps(config))
    must_run([sys.executable, WORKER, str(folder), "one", "4", "0-0"])
    must_run_ranks(2, str(folder), "two", "2", *(f"{s}-{t}" for s, t in STAGES), script=WORKER)
    return folder


@pytest.mark.parametrize(("student", "teacher"), STAGES)
def test_two_ranks_give_what_one_gives(runs: Path, student: int, teacher: int) -> None:
    one, two = runs / "one-student0-teacher0", runs / f"two-student{student}-teacher{teacher}"
    assert max(losses(one)) - min(losses(one)) > 1e-3, "the losses must move for the comparison to mean anything"
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    norms = [[line["grad_norm"] for line in records(folder)] for folder in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
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
