"""Runs beside each other: what stands in which cell, and the page."""

from pathlib import Path

import pytest
from run_folders import config_of, evaluation_line, summary_of, train_line, write_run

from mixkd_fast.compare import compare, format_table, main, write_comparison
from mixkd_fast.errors import DataError


def three_runs(folder: Path) -> list[Path]:
    runs = []
    for number, method in enumerate(("finetune", "kd", "mixkd")):
        summary = summary_of(method)
        summary["metrics"]["validation"]["accuracy"] = 0.75 + number / 100
        lines = [train_line(1), evaluation_line(1), train_line(2), evaluation_line(2)]
        runs.append(write_run(folder / f"demo_{method}", lines, summary, config_of(method)))
    return runs


def test_the_teacher_stands_once_on_top(tmp_path: Path) -> None:
    header, rows = compare(three_runs(tmp_path))
    assert [row[0] for row in rows] == [
        "teacher acme/teacher-base",
        "finetune (demo_finetune)",
        "kd (demo_kd)",
        "mixkd (demo_mixkd)",
    ]
    cells = [dict(zip(header, row, strict=True)) for row in rows]
    assert [row["accuracy"] for row in cells] == [0.84, 0.75, 0.76, 0.77]
    assert cells[0]["parameters"] == 109_482_240
    assert cells[3]["parameters"] == 45_693_699
    assert cells[0]["agreement"] is None
    assert cells[3]["agreement"] == 0.9
    assert cells[3]["train samples/s"] == 117.7
    assert [row["inference samples/s"] for row in cells] == [88.4, 341.2, 341.2, 341.2]


def test_runs_with_different_teachers_have_both(tmp_path: Path) -> None:
    runs = three_runs(tmp_path)
    other = summary_of("kd")
    other["teacher"]["model"] = "acme/other"
    runs.append(write_run(tmp_path / "other", [train_line(1)], other, config_of("kd")))
    alone = summary_of("finetune") | {"teacher": None}
    runs.append(write_run(tmp_path / "alone", [train_line(1)], alone, config_of("finetune")))
    _, rows = compare(runs)
    assert [row[0] for row in rows][:2] == ["teacher acme/teacher-base", "teacher acme/other"]
    assert len(rows) == 7


def test_the_table_is_aligned(tmp_path: Path) -> None:
    lines = format_table(*compare(three_runs(tmp_path))).splitlines()
    assert len(lines) == 6
    end = lines[0].index("accuracy") + len("accuracy")
    assert [line[:end].split()[-1] for line in lines[2:]] == ["0.8400", "0.7500", "0.7600", "0.7700"]
    assert len({len(line) for line in lines}) == 1


def test_a_second_split_adds_its_task_metric_only(tmp_path: Path) -> None:
    summary = summary_of()
    summary["metrics"]["validation_other"] = {"accuracy": 0.71, "nll": 0.6, "ece": 0.1}
    header, rows = compare([write_run(tmp_path / "run", [train_line(1)], summary)])
    row = dict(zip(header, rows[-1], strict=True))
    assert row["validation_other: accuracy"] == 0.71
    assert "validation: nll" in header
    assert "validation_other: nll" not in header


def test_splits_lose_what_their_names_share(tmp_path: Path) -> None:
    summary = summary_of(split="validation_matched")
    summary["metrics"]["validation_mismatched"] = {"accuracy": 0.71}
    header, _ = compare([write_run(tmp_path / "run", [train_line(1)], summary)])
    assert header[1:3] == ["matched: accuracy", "matched: nll"]
    assert "mismatched: accuracy" in header


def test_runs_of_one_folder_name_stay_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [write_run(tmp_path / seed / "run", [train_line(1)], summary_of()) for seed in ("seed0", "seed1")]
    _, rows = compare(runs)
    assert rows[1][0] != rows[2][0]
    monkeypatch.chdir(runs[0])
    assert compare([Path(".")])[1][-1][0] == "mixkd (run)"


def test_what_is_not_there_is_a_dash(tmp_path: Path) -> None:
    summary = {key: value for key, value in summary_of().items() if key != "inference"}
    summary["metrics"]["validation"]["nll"] = None
    line = format_table(*compare([write_run(tmp_path / "run", [train_line(1)], summary)])).splitlines()[-1]
    assert line.split().count("-") == 2


def test_the_page_has_table_and_plots(tmp_path: Path) -> None:
    runs = three_runs(tmp_path)
    hostile = write_run(tmp_path / "<b>$\\x$", [train_line(1), evaluation_line(1)], summary_of())
    page = write_comparison([*runs, hostile], tmp_path / "new" / "compare.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 3
    assert "0.7700" in page
    assert "(<b>$" not in page
    assert "(&lt;b&gt;$" in page


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(run) for run in three_runs(tmp_path)]
    assert main([*runs, "--html", str(tmp_path / "c.html")]) == 0
    shown = capsys.readouterr().out
    assert "mixkd (demo_mixkd)" in shown
    assert str(tmp_path / "c.html") in shown
    assert (tmp_path / "c.html").is_file()


def test_a_folder_without_a_finished_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", [train_line(1)])
    with pytest.raises(DataError, match=r"summary\.json is missing"):
        compare([run])
    (run / "summary.json").write_text("{")
    assert main([str(run)]) == 1
    assert "not readable JSON" in capsys.readouterr().err


def test_an_unwritable_page_is_an_error_with_its_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "c.html"
    assert main([str(three_runs(tmp_path)[0]), "--html", str(target)]) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err
