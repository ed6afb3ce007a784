"""report.html, the model card and the comparison, from run folders as runs leave them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mixkd_fast import compare as compare_module
from mixkd_fast.compare import compare, format_table
from mixkd_fast.errors import DataError
from mixkd_fast.model_card import write_model_card
from mixkd_fast.page import MAX_POINTS, line_plot, number
from mixkd_fast.report import read_records, write_report

CONFIG = {
    "task": {"name": "rte", "hub": "nyu-mll/glue"},
    "teacher": {"model": "big <b>teacher</b>", "zero_stage": 3},
    "method": {"name": "mixkd", "alpha": 0.4},
    "training": {"steps": 4},
}


def _summary(accuracy: float = 0.75, method: str = "mixkd") -> dict[str, Any]:
    return {
        "version": "1.2.3",
        "task": "rte",
        "method": method,
        "teacher": {
            "model": "big <b>teacher</b>",
            "parameters": 1234567,
            "metrics": {"validation": {"accuracy": 0.9, "nll": 0.31}},
            "model_type": "bert",
            "layers": 6,
            "hidden_size": 64,
        },
        "student": {"model_type": "bert", "layers": 2, "hidden_size": 32, "parameters": 54321},
        "data": {
            "train_rows": 100, "extra_rows": 7, "evaluation_rows": {"validation": 50}, "max_length": 32,
            "mean_length": 9.5, "truncated_rows": 3, "content_hash": "ab" * 32,
        },
        "training": {
            "steps": 4, "epochs": 1.0, "seconds": 2.0, "total_seconds": 3.0, "samples_per_s": 50.0,
            "tokens_per_s": 500.0, "batch_size": 25,
            "micro_batch_size": 25, "accumulation": 1, "ranks": 1, "device": "cpu (2 threads)",
            "precision": "fp32", "zero_stage": 0, "teacher_zero_stage": 3, "peak_memory_mib": 300.0, "skipped_steps": 0,
            "stopped_early": False,
        },
        "inference": {"samples_per_s": 900.0, "teacher_samples_per_s": 300.0},
        "best": {"step": 4, "split": "validation", "metric": "accuracy", "value": accuracy},
        "metrics": {"validation": {"accuracy": accuracy, "nll": 0.5, "teacher_agreement": 0.8}},
        "backends": {"kd_loss": {"name": "reference", "reason": "because & only"}},
        "versions": {"torch": "9.9"},
        "started": "2026-01-01T00:00:00+00:00",
        "finished": "2026-01-01T00:01:00+00:00",
    }  # fmt: skip


def _train(step: int, loss: float | None = 1.0) -> dict[str, Any]:
    return {
        "kind": "train", "step": step, "epoch": step / 4, "loss": loss, "terms": {"mle": 0.6, "tmkd": 0.4},
        "learning_rate": 1e-4, "grad_norm": 1.5, "samples_per_s": 10.0, "tokens_per_s": 99.0, "step_ms": 2.0,
        "memory_mib": 200.0, "skipped_steps": 0,
    }  # fmt: skip


def _folder(path: Path, lines: list[Any], summary: dict[str, Any] | None = None, cut: str = "") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + cut)
    if summary is not None:
        (path / "summary.json").write_text(json.dumps(summary))
    return path


def _evaluation(step: int, accuracy: float) -> dict[str, Any]:
    metrics = {"accuracy": accuracy, "nll": 0.5}
    return {"kind": "evaluation", "step": step, "epoch": 1.0, "split": "validation", "metrics": metrics, "seconds": 0.1}


def test_report_shows_results_plots_and_facts_and_needs_nothing_else(tmp_path: Path) -> None:
    lines = [_train(1), _train(2, 0.9), _evaluation(2, 0.7), _train(3, 0.8), _train(4, 0.7), _evaluation(4, 0.75)]
    text = write_report(_folder(tmp_path, lines, _summary())).read_text()
    for expected in (
        "0.7500",
        "0.9000",
        "1,234,567",
        "54,321",
        "Training loss",
        "tokens per second",
        "because &amp; only",
    ):
        assert expected in text, expected
    assert text.count("<svg") >= 8
    assert "big &lt;b&gt;teacher" in text and "<b>teacher" not in text
    # The only addresses are names of XML formats inside the drawings; nothing is loaded.
    assert not re.search(r'(src|href)="(?!#)', text.replace("xlink:", ""))
    assert "<script" not in text and "@import" not in text


def test_report_of_an_interrupted_run_skips_the_cut_line(tmp_path: Path) -> None:
    text = write_report(_folder(tmp_path, [_train(1), _train(2)], cut='{"kind": "train", "st')).read_text()
    assert "has not finished" in text and "1 unreadable line" in text and "No evaluation yet" in text


@pytest.mark.parametrize("lines", [[], [_train(1, None)], [_evaluation(1, 0.5)]])
def test_report_of_hardly_anything_is_still_a_page(tmp_path: Path, lines: list[Any]) -> None:
    assert write_report(_folder(tmp_path, lines)).read_text().endswith("</html>\n")


def test_report_without_a_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no run: config\.json is missing"):
        write_report(tmp_path)


def test_long_curves_are_thinned() -> None:
    steps = list(range(50 * MAX_POINTS))
    drawing = line_plot("long", {"loss": (steps, [float(step % 7) for step in steps])})
    assert 0 < len(drawing) < 400_000


def test_records_are_read_line_by_line(tmp_path: Path) -> None:
    path = _folder(tmp_path, [_train(1)], cut="[1, 2]\n{}\n") / "metrics.jsonl"
    records, broken = read_records(path)
    assert [record["step"] for record in records] == [1] and broken == 2


def test_numbers_read_well() -> None:
    shown = [number(value) for value in (1234567, 0.75, 12345.678, 1e-5, float("nan"), None, "text", True)]
    assert shown == ["1,234,567", "0.7500", "12,345.7", "1.00e-05", "not finite", "-", "text", "True"]


def test_model_card_front_matter_is_yaml_and_states_the_run(tmp_path: Path) -> None:
    config = CONFIG | {"method": {"name": "mixkd", "alpha": 0.4, "odd": 'quote " colon: #'}}
    text = write_model_card(tmp_path, _summary(), config).read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["library_name"] == "transformers" and front["pipeline_tag"] == "text-classification"
    assert front["datasets"] == ["nyu-mll/glue"] and "knowledge-distillation" in front["tags"]
    assert front["model-index"][0]["results"][0]["metrics"][0] == {"type": "accuracy", "value": 0.75}
    for expected in ("big <b>teacher</b>", "100 training rows", "alpha = 0.4", "(1-λ)", '"zero_stage": 3', "torch 9.9"):
        assert expected in text, expected


def test_comparison_has_the_teacher_once_and_a_row_per_run(tmp_path: Path) -> None:
    first = _folder(tmp_path / "kd", [_train(1), _evaluation(1, 0.7)], _summary(0.7, "kd"))
    second = _folder(tmp_path / "mix", [_train(1), _evaluation(1, 0.8)], _summary(0.8))
    header, rows = compare([first, second])
    assert [row[0] for row in rows] == ["teacher big <b>teacher</b>", "kd (kd)", "mixkd (mix)"]
    assert [row[header.index("accuracy")] for row in rows] == [0.9, 0.7, 0.8]
    assert [row[header.index("inference samples/s")] for row in rows] == [300.0, 900.0, 900.0]
    lines = format_table(header, rows).splitlines()
    assert len({line.rstrip().rfind(" ") for line in lines[2:]}) == 1, "columns are aligned"


def test_compare_command_prints_the_table_and_writes_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _folder(tmp_path / "kd", [_train(1), _evaluation(1, 0.7)], _summary(0.7, "kd"))
    assert compare_module.main([str(run), "--html", str(tmp_path / "out" / "all.html")]) == 0
    assert "0.7000" in capsys.readouterr().out
    assert "<svg" in (tmp_path / "out" / "all.html").read_text()


def test_compare_names_the_unfinished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = _folder(tmp_path / "kd", [_train(1)])
    assert compare_module.main([str(run)]) == 1
    assert "holds no finished run" in capsys.readouterr().err
