"""setup.py: what it builds, what it leaves out and says, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy import ROOT


def run_setup(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build into `folder`, not into the package."""
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        str(folder),
        "--build-temp",
        str(folder / "temp"),
    ]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300)


def test_an_unknown_mode_is_refused(tmp_path: Path) -> None:
    result = run_setup(tmp_path, MIXKD_BUILD="gpu")
    assert result.returncode != 0
    assert "MIXKD_BUILD is 'gpu'; allowed: auto, cpu, cuda, none" in result.stderr


def test_none_builds_nothing(tmp_path: Path) -> None:
    result = run_setup(tmp_path, MIXKD_BUILD="none")
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built with CUDA")
def test_cuda_is_refused_where_torch_has_none(tmp_path: Path) -> None:
    result = run_setup(tmp_path, MIXKD_BUILD="cuda")
    assert result.returncode != 0
    assert "MIXKD_BUILD is 'cuda', but torch" in result.stderr and "is built without CUDA" in result.stderr


def test_a_compiler_that_fails_is_an_error_only_where_the_library_is_demanded(tmp_path: Path) -> None:
    broken = {"CC": "false", "CXX": "false"}
    assert run_setup(tmp_path / "demanded", MIXKD_BUILD="cpu", **broken).returncode != 0
    result = run_setup(tmp_path / "auto", MIXKD_BUILD="auto", **broken)
    assert result.returncode == 0, result.stderr
    assert "mixkd_fast: cpu  not built: its compilation failed" in result.stdout
    report = json.loads((tmp_path / "auto" / "mixkd_fast" / "_build.json").read_text())
    assert report["cpu"].startswith("its compilation failed") and report["host"].startswith("its compilation failed")
    assert not list(tmp_path.rglob("*.so"))
