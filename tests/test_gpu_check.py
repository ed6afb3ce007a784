"""The one command for a machine with a GPU: its parts are real, one that fails does not stop the others."""

import shlex
from pathlib import Path

import pytest
from toy import ROOT

from benchmarks.gpu_check import Part, parts, run, table
from benchmarks.gpu_training import VARIANTS, losses


def test_a_part_that_fails_hangs_or_cannot_run_stops_no_other(tmp_path: Path) -> None:
    results = run(
        {
            "good": Part("echo fine", 10),
            "bad": Part("echo broken >&2; exit 3", 10),
            "slow": Part("sleep 30", 1),
            "absent": Part("true", 10, "a-program-that-nobody-has"),
            "last": Part("echo done", 10),
        },
        tmp_path,
    )
    assert [result["outcome"] for result in results.values()] == ["passed", "failed", "failed", "left out", "passed"]
    assert results["bad"]["why"] == "status 3" and results["bad"]["last_line"] == "broken"
    assert "still running after 1 s" in results["slow"]["why"]
    assert (tmp_path / "good.log").read_text() == "fine\n"
    assert "| bad | failed status 3 | 0 | broken |" in table(results)


def test_every_part_names_files_and_modules_that_are_there(tmp_path: Path) -> None:
    for part in parts("python", tmp_path).values():
        words = shlex.split(part.command)
        for word in (word for word in words if word.startswith("tests/")):
            assert list(ROOT.glob(word)), word
        if words[words.index("python") + 1 : words.index("python") + 2] == ["-m"] and "-m" in words:
            module = words[words.index("-m") + 1]
            if module != "pytest":
                path = ROOT / module.replace(".", "/")
                assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


@pytest.mark.slow
def test_the_training_run_is_the_real_program(tmp_path: Path) -> None:
    """On the CPU in fp32, twice: the same losses; every variant only changes fields that exist."""
    first = losses(tmp_path, 3, {"training.precision": "fp32"}, gpu=False)
    again = losses(tmp_path, 3, {"training.precision": "fp32", "training.prefetch": 0}, gpu=False)
    assert len(first) == 3 and first == again
    unpadded = losses(tmp_path, 3, {"training.precision": "fp32", **VARIANTS["ZeRO 0, unpadded"]}, gpu=False)
    assert max(abs(one - other) for one, other in zip(first, unpadded, strict=True)) < 1e-4
