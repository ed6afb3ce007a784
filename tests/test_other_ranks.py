"""A checkpoint of some ranks resumes on others: the same rows, weights and moments, to the rounding of fp32."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy import losses, must_run, must_run_ranks, program, records, run, run_ranks, toy_config

from mixkd_fast import universal
from mixkd_fast.errors import CheckpointError

WORKER = "tests/workers/other_ranks.py"
STAGES = (0, 1, 2, 3)
TAG = "engine"
CASES: dict[str, dict[str, Any]] = {
    **{f"stage{stage}": {"deepspeed": {"zero_optimization": {"stage": stage}}} for stage in STAGES},
    # One pass over a subgroup per few parameters, so that what subgroups share shows.
    "subgroups": {"deepspeed": {"zero_optimization": {"stage": 3, "sub_group_size": 5000}}},
    "bf16-3": {"deepspeed": {"zero_optimization": {"stage": 3}}, "training": {"precision": "bf16"}},
}
# Every case in one direction; the others, which start more processes, for what may differ there.
CHANGES = {(2, 1): list(CASES), (2, 4): ["stage0", "stage2", "subgroups"], (1, 2): ["stage1", "stage3"]}
# What is not marked slow.
QUICK = {(2, 1): ["stage0", "stage2"], (2, 4): ["subgroups"], (1, 2): ["stage3"]}
QUICK_ONES = [(case, *change) for change, cases in QUICK.items() for case in cases]
ALL = [
    pytest.param(case, *change, marks=[] if (case, *change) in QUICK_ONES else [pytest.mark.slow])
    for change, cases in CHANGES.items()
    for case in cases
]


def test_files_of_model_states_are_in_the_order_of_the_ranks(tmp_path: Path) -> None:
    """Fragments of frozen parameters are joined in this order."""
    names = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(12)]
    for name in (*reversed(names), "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        (tmp_path / name).touch()
    assert [path.name for path in universal.model_state_files(tmp_path)] == names


def _config(folder: Path, case: str, output: str) -> dict[str, Any]:
    """Both halves of the run matter: large weight decay in one group only, warm-up, moments that are far from 0."""
    sections = CASES[case]
    training = {
        "steps": 8,
        "micro_batch_size": 2,
        "checkpoint_every": 4,
        "keep_checkpoints": 3,
        "evaluate_every": 8,
        "weight_decay": 2.0,
        "schedule": "constant",
    }
    config = toy_config(
        folder, output, **{**sections, "training": {**training, **sections.get("training", {})}, "method": "probe"}
    )
    return config


def _start_over(folder: Path, source: str, target: str) -> None:
    """A copy of a run as it was after its first checkpoint."""
    shutil.copytree(folder / source, folder / target)
    shutil.rmtree(folder / target / "checkpoints" / "step-00000008")
    for name in ("student", "best"):
        shutil.rmtree(folder / target / name)


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case that is asked for, whole on 1 and on 2 ranks, and continued from step 4 on others."""
    folder = tmp_path_factory.mktemp("ranks")
    changes = QUICK if request.config.option.markexpr == "not slow" else CHANGES
    for ranks in (1, 2):
        cases = sorted({case for (before, _), some in changes.items() if before == ranks for case in some})
        names = []
        for case in cases:
            name = f"{case}-whole{ranks}"
            (folder / f"{name}.json").write_text(json.dumps(_config(folder, case, name)))
            names.append(name)
        must_run_ranks(ranks, str(folder), "start", *names, script=WORKER)
    for (before, after), cases in changes.items():
        names = []
        for case in cases:
            name = f"{case}-{before}to{after}"
            _start_over(folder, f"{case}-whole{before}", name)
            config = _config(folder, case, name)
            (folder / f"{name}.json").write_text(json.dumps(config))
            _rename_output(folder / name, config)
            names.append(name)
        output = must_run_ranks(after, str(folder), "resume", *names, script=WORKER)
        assert output.count(f"after step 4 of 8, written by {before} ranks") == len(cases)
    return folder


def _rename_output(folder: Path, config: dict[str, Any]) -> None:
    """The copied run's configuration names the copy, as if it had been written there."""
    resolved = json.loads((folder / "config.json").read_text())
    resolved["output"]["directory"] = config["output"]["directory"]
    (folder / "config.json").write_text(json.dumps(resolved))


@pytest.mark.parametrize(("case", "before", "after"), ALL)
def test_losses_go_on_where_they_were(runs: Path, case: str, before: int, after: int) -> None:
    whole, resumed = losses(runs / f"{case}-whole{before}"), losses(runs / f"{case}-{before}to{after}")
    assert len(resumed) == 8 and max(whole[4:]) - min(whole[4:]) > 1e-3
    tolerance = 2e-2 if "bf16" in case else 2e-5
    assert resumed == pytest.approx(whole, rel=tolerance)


@pytest.mark.parametrize(("case", "before", "after"), [which for which in ALL if "bf16" not in str(which.values[0])])
def test_weights_end_where_the_uninterrupted_ones_do(runs: Path, case: str, before: int, after: int) -> None:
    whole = load_file(runs / f"{case}-whole{before}" / "student" / "model.safetensors")
    resumed = load_file(runs / f"{case}-{before}to{after}" / "student" / "model.safetensors")
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, atol=2e-5, rtol=1e-4, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize("case", [pytest.param("stage2", marks=pytest.mark.slow), "subgroups"])
def test_moments_end_where_the_uninterrupted_ones_do(runs: Path, case: str) -> None:
    """The optimizer states after step 8, of 2 ranks and of 2 continued on 4, put together by DeepSpeed's converter."""
    whole, resumed = (
        universal.universal_state(runs / f"{case}-{kind}" / "checkpoints" / "step-00000008", TAG) / TAG / "zero"
        for kind in ("whole2", "2to4")
    )
    compared = 0
    for path in sorted(whole.rglob("exp_avg*.pt")):
        values = [torch.load(root / path.relative_to(whole), weights_only=False) for root in (whole, resumed)]
        first, second = (value["param"] if isinstance(value, dict) else value for value in values)
        torch.testing.assert_close(second, first, atol=1e-6, rtol=1e-3)
        compared += bool(first.abs().sum() > 0)
    assert compared > 40


def test_evaluations_are_those_of_the_uninterrupted_run(runs: Path) -> None:
    for case, before, after in QUICK_ONES:
        first, second = (
            records(runs / f"{case}-{kind}", "evaluation")[-1]["metrics"]
            for kind in (f"whole{before}", f"{before}to{after}")
        )
        assert second == pytest.approx(first, abs=1e-5)


def test_a_conversion_is_used_again_and_a_damaged_one_made_anew(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "step-00000004"
    shutil.copytree(runs / "stage2-2to1" / "checkpoints" / "step-00000004", checkpoint)
    assert (checkpoint / "universal").is_dir(), "the run has converted it"
    (checkpoint / ".writing-universal").mkdir()  # of a conversion that was killed
    folder = universal.universal_state(checkpoint, TAG)
    assert "Converting" not in capsys.readouterr().err
    victim = next(folder.rglob("exp_avg.pt"))
    before = victim.read_bytes()
    victim.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    universal.universal_state(checkpoint, TAG)
    assert "again: altered" in capsys.readouterr().err
    assert not (checkpoint / ".writing-universal").exists()
    value = torch.load(victim, weights_only=False)
    assert torch.is_tensor(value["param"] if isinstance(value, dict) else value)


def test_no_room_leaves_the_checkpoint_and_says_how_much_is_needed(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "step-00000004"
    shutil.copytree(runs / "stage2-whole2" / "checkpoints" / "step-00000004", checkpoint)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    with pytest.raises(CheckpointError, match=r"it takes \d+ MiB on that disk, and 1 MiB are free.*resume on as many"):
        universal.universal_state(checkpoint, TAG)
    assert sorted(os.listdir(checkpoint)) == ["manifest.json", "state"]


def test_a_checkpoint_that_deepspeed_cannot_read_says_why(runs: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "step-00000004"
    shutil.copytree(runs / "stage2-whole2" / "checkpoints" / "step-00000004", checkpoint)
    next(checkpoint.rglob("*_optim_states.pt")).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="DeepSpeed's converter: "):
        universal.universal_state(checkpoint, TAG)
    assert not (checkpoint / ".writing-universal").exists()


def test_a_batch_that_the_new_ranks_do_not_divide_is_refused(runs: Path) -> None:
    result = run_ranks(3, str(runs), "resume", "stage2-whole2", script=WORKER)
    assert result.returncode != 0
    assert "training.batch_size = 8: is not a multiple of 3 ranks" in result.stderr


def test_a_token_budget_needs_as_many_micro_batches(tmp_path: Path) -> None:
    training = {
        "steps": 8,
        "micro_batch_size": 4,
        "checkpoint_every": 4,
        "batching": "length",
        "tokens_per_micro_batch": 64,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(toy_config(tmp_path, training=training)))
    must_run(program("--config", str(path)))
    result = run(program("--config", str(path), "--resume", "--set", "training.micro_batch_size=8"))
    assert result.returncode == 1
    assert "had 2 micro-batches, and now they have 1; set training.micro_batch_size = 4" in result.stderr
