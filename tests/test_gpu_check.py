"""The one command for a machine with a GPU: parts are real, none stops another, what is not checked is no success."""

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import ROOT

from benchmarks import gpu_backends, gpu_check, gpu_training
from benchmarks.gpu_check import Part, page, run, skipped_altogether, table
from benchmarks.gpu_parts import OUR_KERNELS, parts
from benchmarks.gpu_training import VARIANTS, RunFailed, compare, losses

PARTS = parts("python", "OUT")


def test_a_part_that_fails_hangs_or_cannot_run_stops_no_other(tmp_path: Path) -> None:
    written: list[list[str]] = []
    results = run(
        {
            "good": Part("echo fine", 10),
            "bad": Part("echo broken >&2; exit 3", 10),
            "slow": Part("sleep 30", 1),
            "absent": Part("true", 10, "a-program-that-nobody-has"),
            "last": Part("echo done", 10),
        },
        tmp_path,
        save=lambda results: written.append(list(results)),
    )
    assert [result["outcome"] for result in results.values()] == ["passed", "failed", "failed", "left out", "passed"]
    assert results["bad"]["why"] == "status 3" and results["bad"]["last_line"] == "broken"
    assert "still running after 1 s" in results["slow"]["why"]
    assert "a-program-that-nobody-has is not installed" in results["absent"]["why"]
    assert (tmp_path / "good.log").read_text() == "fine\n"
    assert "| bad | failed: status 3 | 0 | broken |" in table(results)
    assert [len(names) for names in written] == [1, 2, 3, 4, 5]


def test_what_does_not_fit_is_not_run_and_neighbours_run_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_check, "LEAST_S", 0.5)
    waits = "touch {0}; for n in $(seq 80); do [ -e {1} ] && exit 0; sleep 0.1; done; exit 1"
    one, other = tmp_path / "one", tmp_path / "other"
    chosen = {
        "one": Part(waits.format(one, other), 9, beside="both"),
        "other": Part(waits.format(other, one), 9, beside="both"),
        "long": Part("sleep 30", 60),
        "late": Part("true", 60),
    }
    started = time.monotonic()
    results = run(chosen, tmp_path, budget_s=5)
    assert [result["outcome"] for result in results.values()] == ["passed", "passed", "failed", "not run"]
    assert "no time was left" in results["late"]["why"] and time.monotonic() - started < 15


def test_a_part_alone_has_all_of_the_time_and_is_told_when_to_stop(tmp_path: Path) -> None:
    results = run({"alone": Part("sleep 1.5; echo stop after {seconds}; echo {tested}", 1)}, tmp_path, budget_s=100)
    assert results["alone"]["outcome"] == "passed"
    log = (tmp_path / "alone.log").read_text()
    assert log.startswith("stop after 7") and log.endswith("not run before these measurements\n")


TESTS_PART = Part("{python} -m pytest -q -p no:cacheprovider --junitxml {{junit}} {files}", 60)


def test_tests_that_are_all_skipped_are_no_success_and_benchmarks_say_so(tmp_path: Path) -> None:
    (tmp_path / "test_ran.py").write_text("def test_it():\n    assert 1 + 1 == 2\n")
    skip = "import pytest\n\n@pytest.mark.skip(reason='no CUDA device')\ndef test_it():\n    pass\n"
    (tmp_path / "test_skipped.py").write_text(skip)
    (tmp_path / "test_absent.py").write_text("import pytest\npytest.importorskip('nobody_has_this')\n")
    command = TESTS_PART.command.format(python=sys.executable, files=tmp_path)
    said = {"op_tests": Part(command, 60), "benchmark": Part("echo {tested}", 10)}
    results = run(said, tmp_path)
    assert results["op_tests"]["outcome"] == "failed"
    why = results["op_tests"]["why"]
    assert "test_skipped skipped" in why and "no CUDA device" in why and "test_absent skipped" in why
    assert "test_ran" not in why
    said_of_tests = results["benchmark"]["last_line"]
    assert said_of_tests.startswith("NOT PASSED (failed: 1 passed, 2 skipped") and "all of" in said_of_tests
    (tmp_path / "test_skipped.py").unlink()
    (tmp_path / "test_absent.py").unlink()
    results = run(said, tmp_path)
    assert results["op_tests"]["outcome"] == "passed" and "1 passed" in results["benchmark"]["last_line"]
    assert skipped_altogether(tmp_path / "none.xml") == "no test was reported"


def test_the_program_writes_both_files_and_its_status_says_what_was_not_checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    known = {"good": Part("true", 10), "absent": Part("true", 10, "a-program-that-nobody-has")}
    monkeypatch.setattr(gpu_check, "parts", lambda python, out: known)
    for only, status in (("good", 0), ("good,absent", 1)):
        monkeypatch.setattr(sys, "argv", ["gpu_check", "--only", only, "--out", str(tmp_path)])
        with pytest.raises(SystemExit) as ended:
            gpu_check.main()
        assert ended.value.code == status
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert {"commit", "versions", "device", "missing_peers"} <= set(report) and set(report["parts"]) == set(known)
    assert (tmp_path / "gpu_check.md").read_text().strip() == page(report).strip()
    assert "a-program-that-nobody-has is not installed" in page(report)


def test_the_most_important_part_is_first_and_every_kernel_is_sanitized() -> None:
    assert list(PARTS)[:5] == ["build", "backends", "op_tests", "training", "train_step"]
    kernels = set()
    for path in (ROOT / "mixkd_fast" / "ops").glob("triton_*.py"):
        kernels |= set(re.findall(r"@triton\.jit.*\ndef (\w+_kernel)\(", path.read_text()))
    assert len(kernels) > 8
    assert [name for name in kernels if not any(part in name for part in OUR_KERNELS)] == []
    for source in (ROOT / "csrc" / "cuda").glob("*.cu*"):
        assert "__global__" not in source.read_text() or "namespace mixkd" in source.read_text(), source


@pytest.mark.parametrize("name", [name for name, part in PARTS.items() if "pytest" in part.command])
def test_files_of_tests_are_there(name: str) -> None:
    for word in (word for word in shlex.split(PARTS[name].command) if word.startswith("tests/")):
        assert list(ROOT.glob(word)), word


def programs() -> list[list[str]]:
    """The commands of this project's own programs, with every option as it would be given."""
    found = []
    for part in PARTS.values():
        command = part.command.format(seconds="10", tested="1 passed", junit="FILE")
        words = shlex.split(command)
        if words[1] == "-m" and words[2] != "pytest":
            found.append(words[1:])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("words", programs(), ids=lambda words: " ".join(words[1:3]))
def test_every_program_takes_its_options(words: list[str]) -> None:
    """With --help behind them, options are parsed and nothing is run; unknown ones are errors."""
    options = [*words, "--help"] if words[1] != "benchmarks.gpu_backends" else words
    done = subprocess.run([sys.executable, *options], cwd=ROOT, capture_output=True, text=True, check=False)
    if words[1] == "benchmarks.gpu_backends":
        assert torch.cuda.is_available() or (done.returncode == 1 and "no CUDA device" in done.stderr)
    else:
        assert done.returncode == 0, done.stderr
        given = {word for word in words if word.startswith("--")}
        assert given <= set(re.findall(r"--[a-z-]+", done.stdout))


def test_missing_kernels_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    rows = [
        gpu_backends.backends.Row("kd_loss", "cuda", False, "its compilation failed"),
        gpu_backends.backends.Row("kd_loss", "triton", True, ""),
        gpu_backends.backends.Row("relation_kl", "cuda", False, "none by design"),
        gpu_backends.backends.Row("kd_loss", "cpu", False, "not asked for"),
    ]
    monkeypatch.setattr(gpu_backends.backends, "available", lambda: rows)
    found = gpu_backends.missing()
    assert len(found) == 2 and found[0] == "kd_loss by cuda: its compilation failed" and "TRITON_INTERPRET" in found[1]


def test_each_variant_of_the_training_has_its_own_outcome() -> None:
    assert list(VARIANTS)[:3] == ["ZeRO 0", "ZeRO 2", "ZeRO 3"]
    saved: list[int] = []

    def train(name: str, changes: dict[str, Any], gpu: bool) -> list[float]:
        if name == "ZeRO 2":
            raise RunFailed("it broke\nout of memory")
        if name == "ZeRO 3":
            return [1.0, float("nan")]
        return [1.0, 2.0] if not gpu else [1.01, 2.02]

    def reason(changes: dict[str, Any]) -> str:
        return "needs 9.0" if "teacher.quantization" in changes else ""

    outcomes = compare(VARIANTS, train, reason, 3, lambda found: saved.append(len(found)))
    assert outcomes["ZeRO 0"]["outcome"] == "passed" and outcomes["ZeRO 0"]["difference"] == pytest.approx(0.01)
    assert outcomes["ZeRO 2"]["outcome"] == outcomes["ZeRO 3"]["outcome"] == "failed"
    assert outcomes["ZeRO 0, fp8 teacher"] == {"outcome": "left out", "why": "needs 9.0"}
    assert saved[-1] == len(VARIANTS) and len(saved) == len(VARIANTS) - 1
    facts = {"versions": {"torch": "2"}, "device": {"name": "a GPU"}, "commit": "abc", "date": "today"}
    text = gpu_training.page({**facts, "steps": 2, "tolerance": 0.05, "variants": outcomes})
    assert "| ZeRO 2 | failed: out of memory |  |" in text and "left out: needs 9.0" in text


@pytest.mark.slow
def test_the_training_run_is_the_real_program(tmp_path: Path) -> None:
    """On the CPU in fp32, twice: the same losses; every variant only changes fields that exist."""
    first = losses(tmp_path / "first", 3, {"training.precision": "fp32"}, gpu=False)
    again = losses(tmp_path / "again", 3, {"training.precision": "fp32", "training.prefetch": 0}, gpu=False)
    assert len(first) == 3 and first == again
    changes = {"training.precision": "fp32", **VARIANTS["ZeRO 0, unpadded"]}
    unpadded = losses(tmp_path / "unpadded", 3, changes, gpu=False)
    assert max(abs(one - other) for one, other in zip(first, unpadded, strict=True)) < 1e-4
    with pytest.raises(RunFailed, match=r"training\.nonsense"):
        losses(tmp_path / "wrong", 3, {"training.nonsense": 1}, gpu=False)
