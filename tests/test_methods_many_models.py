"""What all methods of more than two models share: bf16, ZeRO, and a resumed run that ends where the whole one does."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from method_runs import run_method, save_masked_lm
from safetensors.torch import load_file
from toy import losses, save_toy_teacher

METHODS: dict[str, dict[str, Any]] = {
    "dml": {"students": 2, "kd_weight": 1.0, "sm_weight": 1.0, "tmkd_weight": 1.0},
    "ensemble": {"teachers": ["SECOND"], "tmkd_weight": 1.0},
    "reffakd": {"latent_size": 4, "autoencoder_steps": 20},
    "inheritance": {"masked_lm_teacher": "LM", "mle_weight": 1.0},
    "cilda": {"generator": "LM", "projection_size": 8, "tmkd_weight": 1.0},
}


def _section(folder: Path, name: str) -> dict[str, Any]:
    made = {"LM": str(save_masked_lm(folder / "lm")), "SECOND": str(save_toy_teacher(folder / "second", seed=1))}
    options = {
        key: made.get(value, value)
        if isinstance(value, str)
        else [made[v] for v in value]
        if key == "teachers"
        else value
        for key, value in METHODS[name].items()
    }
    return {"name": name, **options}


@pytest.mark.parametrize("stage", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", METHODS)
def test_bf16_is_near_fp32(tmp_path: Path, name: str, stage: int) -> None:
    section = _section(tmp_path, name)
    for precision in ("fp32", "bf16"):
        sections: dict[str, Any] = {
            "training": {"steps": 3, "precision": precision, "learning_rate": 1e-4},
            "deepspeed": {"zero_optimization": {"stage": stage}},
        }
        run_method(tmp_path, section, precision, **sections)
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=0.1)


@pytest.mark.parametrize("name", ["ensemble", "inheritance", "cilda"])
def test_a_resumed_run_is_bit_identical(tmp_path: Path, name: str) -> None:
    section = _section(tmp_path, name)
    options: dict[str, Any] = {
        "student": {"dropout": 0.1},
        "training": {"steps": 6, "checkpoint_every": 3, "evaluate_every": 3, "keep_best": False},
    }
    run_method(tmp_path, section, **options)
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    # As if it had been cut off behind its first checkpoint.
    shutil.rmtree(sorted(path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.is_dir())[-1])
    run_method(tmp_path, section, resume=True, **options)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole") and len(losses(tmp_path / "run")) == 6
    one, two = (load_file(tmp_path / folder / "student" / "model.safetensors") for folder in ("whole", "run"))
    assert all(torch.equal(one[key], two[key]) for key in one)
