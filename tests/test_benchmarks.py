"""The benchmarks: what they time is checked, wrong results are refused, tables and bars say what was measured."""

import json
import time
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import kl_rows, relative_error

from benchmarks import __main__ as program
from benchmarks import bench_kd_loss, bench_linear_kd_loss, bench_relation_kl, peers, render, timing
from benchmarks.bars import bars, predicted_ms, predictions
from benchmarks.cases import (
    KDCase,
    LinearCase,
    RelationCase,
    kd_cases,
    kd_inputs,
    linear_cases,
    linear_inputs,
    mix_cases,
    relation_cases,
    relation_inputs,
    short_cases,
)
from benchmarks.timing import Arm, Budget, WrongResult, interleave, measure, peak_bytes

CPU = torch.device("cpu")
BRIEF = Budget(seconds=0.0, least=3, most=3)
MIXED = KDCase(10, 7, torch.float32, mixed=True)


def test_every_variant_runs_in_every_round() -> None:
    counts = {"slow": 0, "fast": 0}

    def call(name: str, seconds: float) -> None:
        counts[name] += 1
        time.sleep(seconds)

    timings = interleave({"slow": lambda: call("slow", 0.02), "fast": lambda: call("fast", 0.005)}, CPU, BRIEF)
    assert timings["slow"].rounds == timings["fast"].rounds == 3
    assert 20 <= timings["slow"].lower_ms <= timings["slow"].median_ms <= timings["slow"].upper_ms
    assert 5 <= timings["fast"].median_ms < timings["slow"].median_ms
    # Three calls to learn how long one takes, then two per round, the second of them timed: each outlasts a sample.
    assert counts == {"slow": 9, "fast": 9}


def test_short_calls_are_repeated_within_a_sample() -> None:
    timings = interleave({"short": lambda: None}, CPU, BRIEF)
    assert timings["short"].calls_per_sample > 1000
    assert timings["short"].median_ms < 1e-3


def test_peak_memory_counts_what_lives_at_once() -> None:
    def one_after_the_other() -> None:
        for _ in range(3):
            torch.empty(1 << 18)

    def together() -> None:
        _ = [torch.empty(1 << 18) for _ in range(3)]

    assert peak_bytes(one_after_the_other, CPU) == 1 << 20
    assert peak_bytes(together, CPU) == 3 << 20


def test_error_is_the_relative_norm() -> None:
    truth = torch.randn(50, 3, dtype=torch.float64)
    actual = truth.float() * 1.01
    assert timing.relative_error(actual, truth) == pytest.approx(relative_error(actual, truth))
    assert timing.relative_error(torch.ones(4), torch.zeros(4, dtype=torch.float64)) == 2.0
    with pytest.raises(WrongResult, match="shape"):
        timing.relative_error(torch.ones(4), torch.zeros(5))


@pytest.mark.parametrize("value", [1.001, float("nan")])
def test_wrong_results_have_no_time(value: float) -> None:
    truth = {"loss": torch.ones((), dtype=torch.float64)}

    def arm(kind: timing.Kind, result: float) -> Arm:
        return Arm(kind, kind, lambda: (torch.tensor(result),))

    def run(*arms: Arm) -> list[dict[str, Any]]:
        return measure(arms, lambda: None, 8, 8, truth, torch.float32, {torch.float32: 1e-5}, CPU, BRIEF)

    with pytest.raises(WrongResult, match="project: relative L2 error against fp64 of loss"):
        run(arm("project", value))
    entries = run(arm("project", 1.0), arm("peer", value * 2))
    assert [entry["name"] for entry in entries] == ["copy", "project", "peer"]
    assert "time" in entries[1] and entries[1]["errors"] == {"loss": 0.0}
    assert "time" not in entries[2] and "error too large" in entries[2]["why"]


def test_truth_in_pieces_is_the_mixkd_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kd_loss, "TRUTH_ELEMENTS", 3 * MIXED.classes)
    inputs = kd_inputs(MIXED, CPU)
    student = inputs.student_logits.detach().double().requires_grad_()
    log_q = student.log_softmax(-1)
    first, second = (log_q.gather(1, y[:, None])[:, 0] for y in (inputs.labels, inputs.partner_labels))
    lam = inputs.lam.double()
    rows = kl_rows(student, inputs.teacher_logits.double(), 2.0) - lam * first - (1 - lam) * second
    loss, gradient = bench_kd_loss.truth(MIXED, inputs)
    assert loss.item() == pytest.approx(rows.mean().item(), rel=1e-12)
    assert relative_error(gradient, torch.autograd.grad(rows.mean(), student)[0]) < 1e-12


DIVERGENCES = [KDCase(10, 70, torch.float32, name) for name in ("forward_kl", "reverse_kl", "jsd")]


@pytest.mark.parametrize(
    ("source", "case"),
    [("eager", MIXED), *((source, case) for source in ("eager", "trl") for case in DIVERGENCES)],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_peers_compute_the_same_loss(source: str, case: KDCase) -> None:
    if source == "trl":
        pytest.importorskip("trl", reason="compares with trl's loss")
    loss = getattr(peers, source)(case)
    assert callable(loss), loss
    inputs = kd_inputs(case, CPU)
    value = loss(inputs)
    expected, gradient = bench_kd_loss.truth(case, inputs)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative_error(torch.autograd.grad(value, inputs.student_logits)[0], gradient) < 1e-5


@pytest.mark.parametrize("shortest", [None, 2])
def test_eager_relations_are_the_same_function(shortest: int | None) -> None:
    inputs = relation_inputs(RelationCase(3, 2, 9, 4, torch.float32, shortest), CPU)
    assert inputs.mask.sum(1).tolist() == [9, 9, 9] if shortest is None else [2, 6, 9]
    inputs.mask[1, 5:] = False
    loss = bench_relation_kl.eager(inputs)
    found = (loss.detach(), *torch.autograd.grad(loss, inputs.student, inputs.grad_output))
    for value, expected in zip(found, bench_relation_kl.truth(inputs).values(), strict=True):
        assert relative_error(value, expected) < 1e-5


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_eager_heads_are_the_same_function(monkeypatch: pytest.MonkeyPatch, divergence: Any) -> None:
    case = LinearCase(10, 70, 8, torch.float32, divergence)
    monkeypatch.setattr(bench_linear_kd_loss, "TRUTH_ELEMENTS", 3 * case.classes)
    inputs, loss = linear_inputs(case, CPU), peers.eager_linear(case)
    assert callable(loss), loss
    value = loss(inputs)
    found = (value.detach(), *torch.autograd.grad(value, (inputs.student_hidden, inputs.student_weight)))
    for actual, expected in zip(found, bench_linear_kd_loss.truth(case, inputs).values(), strict=True):
        assert relative_error(actual, expected) < 1e-5


def test_bars_of_heads() -> None:
    case = LinearCase(8192, 128256, 4096, torch.bfloat16)
    described = {"name": case.name, "rows": case.rows, "divergence": case.divergence}
    kept = bench_linear_kd_loss.kept_bytes(case)
    assert kept == (8192 + 128256) * 4096 * 2 + 128256 * 4096 * 4
    measured = arms(copy=1, eager=100, cuda=50)
    in_forward = bench_linear_kd_loss.forward_kept_bytes(case)
    assert in_forward == 8192 * 4096 * 2 + 128256 * 4096 * 4
    for arm in measured:
        arm |= {"tflop_per_s": 700.0, "peak_bytes": kept + 2**29, "forward_peak_bytes": in_forward + 2**28}
    entry = {"op": "linear_kd_loss", "case": described, "kept_bytes": kept, "arms": measured}
    entry["forward_kept_bytes"] = in_forward

    def of_cuda() -> list[tuple[float | None, bool | None]]:
        found = bars([entry], {"type": "cuda", "capability": [9, 0]})
        return [(bar["measured"], bar["passed"]) for bar in found if bar["backend"] == "cuda"]

    assert of_cuda() == [(2.0, True), (512.0, True), (None, None), (700.0, True)]
    for arm in measured:  # A buffer as large as the weight's gradient, gone before that is made.
        arm |= {"peak_bytes": kept, "forward_peak_bytes": in_forward + 128256 * 4096 * 2}
    assert of_cuda()[1] == (128256 * 4096 * 2 / 2**20, False)
    slower = bars([entry], {"type": "cpu", "capability": None})
    assert {bar["passed"] for bar in slower} == {None}


def test_bars_of_relations() -> None:
    case = {"name": "32x12x40x32 fp32", "dtype": "fp32"}
    measured = arms(copy=1, eager=20, cpu=8)
    for arm, peak in zip(measured, (10, 400, 100), strict=True):
        arm["peak_bytes"] = peak
    found = bars([{"op": "relation_kl", "case": case, "arms": measured}], {"type": "cpu", "capability": None})
    assert [(bar["measured"], bar["passed"]) for bar in found] == [(2.5, True), (0.25, True)]
    found = bars([{"op": "relation_kl", "case": case, "arms": measured}], {"type": "cuda", "capability": [9, 0]})
    assert {(bar["backend"], bar["passed"]) for bar in found} == {("triton", None)}


def arms(**medians: float) -> list[dict[str, Any]]:
    kinds = {"eager": "eager", "compiled": "compile", "copy": "copy"}
    return [
        {
            "name": name.replace("_kl", ", forward_kl"),
            "kind": kinds.get(name, "project"),
            "time": {"median_ms": median},
            "fraction_of_copy": 1.5 * medians["copy"] / median,
        }
        for name, median in medians.items()
    ]


def result(case: KDCase, **medians: float) -> dict[str, Any]:
    described = {
        "name": case.name,
        "rows": case.rows,
        "classes": case.classes,
        "divergence": case.divergence,
        "mixed": case.mixed,
        "dtype": "fp32" if case.dtype == torch.float32 else "bf16",
    }
    return {"op": "kd_loss", "case": described, "arms": arms(**medians)}


def test_bars_of_the_cpu() -> None:
    wide = KDCase(512, 32000, torch.float32)
    measured = [
        result(wide, copy=10, eager=200, compiled=22, cpu=16),
        result(KDCase(512, 32000, torch.bfloat16, "jsd"), copy=10, cpu=31, cpu_kl=20),
        result(KDCase(4096, 3, torch.float32, mixed=True), copy=1, eager=39, cpu=10),
        result(wide, copy=10, eager=200),
        result(KDCase(512, 30522, torch.float32), copy=10, eager=20, cpu=16),
    ]
    found = bars(measured, {"type": "cpu", "capability": None})
    expected = [(1.0667, True), (12.5, True), (1.375, False), (1.55, False), (3.9, False)]
    assert [(round(bar["measured"], 4), bar["passed"]) for bar in found[:5]] == expected
    assert [bar["passed"] for bar in found[5:]] == [None, None, None]


@pytest.mark.parametrize(("capability", "limit"), [([9, 0], 0.9), ([8, 0], 0.75)])
def test_bars_of_a_gpu(capability: list[int], limit: float) -> None:
    case = KDCase(8192, 128256, torch.bfloat16)
    found = bars([result(case, copy=1.0, cuda=1.8, triton=2.1)], {"type": "cuda", "capability": capability})
    assert [(bar["backend"], bar["limit"]) for bar in found] == [("cuda", limit), ("triton", 0.75)]
    assert [bar["passed"] for bar in found] == [limit < 0.8, False]


def test_predictions_are_labelled_and_leave_out_the_measured_gpu() -> None:
    assert predicted_ms(2_000_000_000, 2000.0) == pytest.approx(1.0)
    assert predicted_ms(2_000_000_000, 2000.0, share=0.5) == pytest.approx(2.0)
    entries = predictions("NVIDIA H200")
    assert {entry["label"] for entry in entries} == {"prediction"}
    assert {entry["device"] for entry in entries} == {"A100 80GB SXM", "H100 SXM"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_names_of_cases_are_distinct(device: str) -> None:
    for of_op in (kd_cases, linear_cases, mix_cases, relation_cases):
        cases = of_op(torch.device(device), False)
        assert len({case.name for case in cases}) == len(cases)


@pytest.mark.parametrize("op", ["kd_loss", "linear_kd_loss", "mix_embeddings", "relation_kl"])
def test_quick_run_writes_figures_table_and_plot(op: str, tmp_path: Path) -> None:
    file = tmp_path / "results" / "figures.json"
    program.main([op, "--quick", "--no-tests", "--json", str(file)])
    report = json.loads(file.read_text())
    assert report["command"] == f"python -m benchmarks {op} --quick --no-tests --json figures.json"
    assert report["tests"] == {"ran": False}
    assert report["versions"]["torch"] == torch.__version__
    for entry in report["results"]:
        timed = {arm["name"]: arm for arm in entry["arms"] if "time" in arm}
        assert {"copy", "eager", "reference"} <= set(timed)
        assert timed["reference"]["peak_bytes"] > 0 and max(timed["reference"]["errors"].values()) < 1e-5
        assert all("why" in arm for arm in entry["arms"] if arm["name"] not in timed)
    table = file.with_suffix(".md").read_text()
    assert table.rstrip() == render.markdown(report).rstrip()
    assert all(entry["case"]["name"] in table for entry in report["results"])
    assert "compared with fp64" in table
    picture = xml.etree.ElementTree.parse(file.with_suffix(".svg"))
    assert picture.getroot().tag.endswith("svg")


def test_a_wrong_result_is_a_failure_of_its_case_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    truth, written = bench_kd_loss.truth, []
    wrong = {"jsd": 1.001}
    monkeypatch.setattr(
        bench_kd_loss, "truth", lambda case, given: tuple(wrong.get(case.divergence, 1) * t for t in truth(case, given))
    )
    write = program.write_both
    monkeypatch.setattr(program, "write_both", lambda *given: (written.append(len(given[0]["results"])), write(*given)))
    file = tmp_path / "figures.json"
    with pytest.raises(SystemExit, match=r"kd_loss jsd 32x2048 fp32: WrongResult: .*relative L2 error"):
        program.main(["kd_loss", "--quick", "--tested", "12 passed", "--json", str(file)])
    report, page = json.loads(file.read_text()), file.with_suffix(".md").read_text()
    assert written == [1, 1, 2, 2]
    assert [entry["case"]["name"] for entry in report["results"]] == ["forward_kl 32x2048 fp32", "MixKD loss 64x3 fp32"]
    assert [entry["case"] for entry in report["failures"]] == ["jsd 32x2048 fp32"]
    assert "- kd_loss, jsd 32x2048 fp32: WrongResult" in page and "Tests before timing: 12 passed." in page


def test_cases_that_no_longer_fit_are_named(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    with pytest.raises(SystemExit, match="relation_kl 2x3x20x8 fp32: not begun within 0 s"):
        program.main(["relation_kl", "--quick", "--no-tests", "--stop-after", "0", "--json", str(file)])
    report = json.loads(file.read_text())
    assert report["results"] == [] and len(report["not_run"]) == 1
    assert "not begun within 0 s" in file.with_suffix(".md").read_text()


def test_the_short_mode_keeps_the_cases_of_the_bars() -> None:
    device, ours = torch.device("cuda"), {"type": "cuda", "capability": [9, 0]}
    for of_op, count in ((kd_cases, 11), (linear_cases, 4), (mix_cases, 4), (relation_cases, 4)):
        cases = short_cases(of_op(device, False))
        assert len(cases) == count and set(cases) <= set(of_op(device, False))
        assert cases[0].dtype == torch.bfloat16
    wide = short_cases(kd_cases(device, False))[0]
    assert bars([result(wide, copy=1.0, cuda=1.8, triton=2.1)], ours)


def test_failing_or_absent_tests_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_wrong.py").write_text("def test_wrong():\n    assert 1 == 2\n")
    (tmp_path / "tests" / "test_right.py").write_text("def test_right():\n    assert 1 == 1\n")
    monkeypatch.setattr(program, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"(?s)assert 1 == 2.*Tests fail: nothing is timed"):
        program.run_tests(["test_wrong*.py"])
    with pytest.raises(SystemExit, match=r"no tests named test_none"):
        program.run_tests(["test_right.py", "test_none*.py"])
    assert program.run_tests(["test_right.py"])["summary"].startswith("1 passed")


def test_unknown_case_is_refused() -> None:
    with pytest.raises(SystemExit, match="no case holds 'nonsense'"):
        program.main(["kd_loss", "--quick", "--no-tests", "--cases", "nonsense"])


def test_a_plan_beyond_its_bar_ends_with_status_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The median over the repeats counts; with one thread that of the processor's time."""
    from benchmarks import plan_check

    wall, cpu = iter([0.5, 1.1, 1.0] * 2), iter([1.2, 1.2, 1.0] * 2)

    def check(folder: Path, options: Any) -> dict[str, Any]:
        rates = {"predicted_rows_per_s": [9.0, 11.0], "measured_rows_per_s": 10.0, "measured_rows_per_cpu_s": 20.0}
        return {"predicted_over_measured": next(wall), "predicted_over_measured_cpu": next(cpu), **rates}

    monkeypatch.setattr(plan_check, "check", check)
    plan_check.main(["--repeats", "3", "--json", str(tmp_path / "plan.json")])
    report = json.loads((tmp_path / "plan.json").read_text())
    assert report["median"] == 1.0 and report["within"] and len(report["runs"]) == 3
    assert {"commit", "versions", "device"} <= set(report)
    page = (tmp_path / "plan.md").read_text()
    assert "| 10.0 | 9.0, 11.0 | 0.50 |" in page and "over 3 runs: 1.00 is within 15 % of 1." in page
    with pytest.raises(SystemExit, match=r"over 3 runs: 1\.20 is not within 15 % of 1"):
        plan_check.main(["--repeats", "3", "--threads", "1", "--json", str(tmp_path / "plan.json")])
    assert "| 20.0 | 9.0, 11.0 | 1.20 |" in (tmp_path / "plan.md").read_text()
    with pytest.raises(SystemExit):
        plan_check.main(["--repeats", "0"])
