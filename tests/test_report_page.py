"""report.html: whole, self-contained, and written for every state in which a run can be left."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from run_folders import evaluation_line, summary_of, train_line, write_run

from mixkd_fast.errors import DataError
from mixkd_fast.page import MAX_POINTS, bar_plot, downsample, line_plot, running_mean
from mixkd_fast.report import main, write_report


class Outline(HTMLParser):
    """Text, captions and the addresses a browser would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.captions, self.loads, self.tags = "", [], [], []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "data", "action") and not (value or "").startswith("#"):
                self.loads.append(f"{tag} {name}={value}")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "figcaption" and data.strip():
            self.captions.append(data)
            self.tags.append("")
        self.text += data


def outline(directory: Path) -> Outline:
    return Outline(write_report(directory).read_text(encoding="utf-8"))


def test_a_finished_run(tmp_path: Path) -> None:
    lines = [train_line(step) for step in range(1, 21)] + [evaluation_line(10), evaluation_line(20)]
    page = outline(write_run(tmp_path / "run", lines, summary_of()))
    for expected in ("0.7800", "0.8400", "45,693,699", "acme/teacher-base", "not part of this version", "2.13.0"):
        assert expected in page.text
    words = " | ".join(page.captions).lower()
    for expected in ("loss", "accuracy", "nll", "samples", "tokens", "memory", "learning rate", "gradient norm"):
        assert expected in words
    assert page.tags.count("svg") == len(page.captions)
    assert "not finished" not in page.text


def test_the_page_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    path = write_report(write_run(tmp_path / "run", [train_line(1), evaluation_line(1)], summary_of()))
    page = path.read_text(encoding="utf-8")
    assert Outline(page).loads == []
    assert not {"script", "link", "iframe", "img"} & set(Outline(page).tags)
    assert re.findall(r"@import|url\((?!#)[^)]*\)", page) == []


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [train_line(1), evaluation_line(1)], summary_of())
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


@pytest.mark.parametrize("lines", [[], [train_line(1)], [train_line(1), train_line(2)]], ids=["none", "one", "two"])
def test_a_run_without_evaluation(tmp_path: Path, lines: list[str]) -> None:
    page = outline(write_run(tmp_path / "run", lines))
    assert "No evaluation yet" in page.text
    assert "has not finished" in page.text
    assert bool(page.captions) == bool(lines)


@pytest.mark.parametrize("last", [train_line(3)[:70], '{"kind": "train"}', "\u0000\u0000", "7"])
def test_a_cut_last_line_is_left_out_and_named(tmp_path: Path, last: str) -> None:
    page = outline(write_run(tmp_path / "run", [train_line(1), evaluation_line(2), last]))
    assert "1 unreadable line" in page.text
    assert "0.7800" in page.text


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf, 1e308, -1e308])
def test_values_that_cannot_be_drawn_break_nothing(tmp_path: Path, bad: float | None) -> None:
    lines = [train_line(1), train_line(2, loss=bad, grad_norm=bad, terms={"mle": bad, "tmkd": 0.1}), train_line(3)]
    lines += [evaluation_line(2, accuracy=bad), evaluation_line(3)]
    svg = write_report(write_run(tmp_path / "run", lines)).read_text(encoding="utf-8")
    assert len(Outline(svg).captions) >= 8
    assert re.findall(r' d="[^"]*(?:nan|inf)', svg) == []


def test_what_users_name_is_escaped_and_starts_no_formula(tmp_path: Path) -> None:
    names = ["<script>alert(1)</script>", "a$\\frac$", "_hidden", 'quote" & more']
    lines = [train_line(1), *(evaluation_line(1, name) for name in names)]
    page = outline(write_run(tmp_path / "<b>$x$", lines))
    assert "script" not in page.tags
    for name in names:
        assert name in page.text


def test_damaged_or_missing_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", [train_line(1)])
    (run / "summary.json").write_text("{")
    with pytest.raises(DataError, match=r"summary\.json is not readable JSON"):
        write_report(run)
    assert main([str(tmp_path)]) == 1
    assert "config.json is missing" in capsys.readouterr().err


def test_downsampling_keeps_spikes_and_ends_in_bounds() -> None:
    heights: list[float | None] = [math.sin(i / 999) for i in range(50_000)]
    heights[31_415], heights[777], heights[5] = 9.0, -9.0, None
    kept = downsample(heights)
    assert len(kept) <= MAX_POINTS
    assert kept == sorted(set(kept))
    assert {31_415, 777} <= set(kept)
    assert downsample([None] * 5000) == sorted(set(downsample([None] * 5000)))
    assert downsample(heights[:MAX_POINTS]) == list(range(MAX_POINTS))


def test_the_running_mean_passes_over_what_is_not_finite() -> None:
    steps = list(range(1000))
    heights: list[float | None] = [2.0 + (-1) ** step for step in steps]
    heights[500], heights[501] = math.nan, None
    places, means = running_mean(steps, heights)
    assert len(places) == 998
    assert not {500, 501} & set(places)
    assert means == pytest.approx([2.0] * 998, abs=0.1)
    assert len(running_mean(range(50_000), [1.0] * 50_000)[0]) <= MAX_POINTS


def test_a_long_run_stays_small(tmp_path: Path) -> None:
    path = write_report(write_run(tmp_path / "run", [train_line(step) for step in range(1, 20_001)]))
    assert path.stat().st_size < 2_000_000


def test_a_plot_without_a_drawable_point_is_left_out() -> None:
    assert line_plot("nothing", {"a": ([1, 2], [None, math.nan])}) == ""
    assert "<svg" in line_plot("one", {"a": ([1, 2], [None, 3.0])})


@pytest.mark.parametrize("values", [{"a": 0.0}, {"a": -0.2, "b": 0.1}, {"a": -0.2}, {"$x$": 1.0, "_y": 2.0}])
@pytest.mark.filterwarnings("error")
def test_bars_of_any_sign(values: dict[str, float]) -> None:
    assert "<svg" in bar_plot("bars", values)
