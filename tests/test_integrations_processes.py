"""Two processes: a step of each trainer is that of one big batch, and evaluation counts every row once."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import ROOT, environment, free_port

pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")

import trainer_cases as cases
from test_integrations_transformers import mixkd_truth


def launch(folder: Path, kind: str) -> None:
    """The worker under torchrun, two processes on the CPU."""
    (folder / "runs").mkdir()
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]
    command += [str(ROOT / "tests/workers/trainer_steps.py"), str(folder), kind]
    env = environment(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def load(folder: Path, name: str) -> dict[str, Any]:
    result: dict[str, Any] = torch.load(folder / f"{name}.pt", weights_only=False)
    return result


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two-processes")
    launch(folder, "transformers")
    return folder


@pytest.mark.parametrize("loss", cases.LM_LOSSES)
def test_a_step_on_tokens(steps: Path, loss: str) -> None:
    result = load(steps, f"lm-{loss}")
    cases.assert_same_step(result["weights"], cases.lm_truth(), cases.weights(cases.lm_models()[0]))
    student, teacher = cases.lm_models()
    with torch.no_grad():
        kd, task, count = cases.lm_parts(student.eval(), teacher.eval(), cases.lm_rows(), 2.0)
    assert result["loss"] == pytest.approx(float((kd + 0.5 * task) / count), rel=1e-4), "the loss that is logged"


@pytest.mark.parametrize("name", ["mixkd", "mixkd-zero"])
def test_a_mixkd_step(steps: Path, tmp_path: Path, name: str) -> None:
    mixing = {"padding": "zero", "lam_per": "batch", "mixed_rows": 1} if name == "mixkd-zero" else {}
    result = load(steps, name)
    cases.assert_same_step(result["weights"], mixkd_truth(tmp_path, mixing), cases.weights(cases.class_models()[0]))


@pytest.mark.parametrize("name", ["lm-kl", "lm-linear", "mixkd"])
def test_evaluation_counts_every_row_once(steps: Path, tmp_path: Path, name: str) -> None:
    """Eight rows in batches of three, two processes: four rows are there twice to fill up."""
    result = load(steps, name)
    if name == "mixkd":
        trainer = cases.mixkd_trainer(tmp_path, 8, 1)
    else:
        trainer = cases.lm_trainer(tmp_path, 8, 1, cases.LM_LOSSES[name.removeprefix("lm-")])
    trainer.model.load_state_dict(result["weights"], strict=False)
    for key, value in trainer.evaluate().items():
        if key.endswith("loss"):
            assert result["metrics"][key] == pytest.approx(value, rel=1e-4), key


def test_student_and_teacher_under_zero3(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    launch(tmp_path, "zero3")
    assert load(tmp_path, "lm-kl")["held"] == 0, "the teacher is partitioned, none of it whole between forwards"
    start = cases.weights(cases.lm_models()[0])
    cases.assert_same_step(load(tmp_path, "lm-kl")["weights"], cases.lm_truth(), start)
    start = cases.weights(cases.class_models()[0])
    cases.assert_same_step(load(tmp_path, "mixkd")["weights"], mixkd_truth(tmp_path, {}), start)
