"""What a sweep enumerates, and that every mistake is found before anything runs."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy import ROOT

from mixkd_fast import cli_config, cli_sweep
from mixkd_fast.configuration import Config, validate
from mixkd_fast.errors import ConfigurationError
from mixkd_fast.sweep.points import points_of
from mixkd_fast.sweep.trials import plan_trials
from mixkd_fast.sweep_file import Sweep, base_content, load_sweep

BASE: dict[str, Any] = {"task": {"name": "demo"}, "teacher": {"model": "t"}, "method": {"name": "kd"}}
SWEEPS = sorted(set((ROOT / "configs").glob("sweep_*.json")) - {ROOT / "configs" / "sweep_schema.json"})


def _sweep(**fields: Any) -> Sweep:
    return validate(Sweep, {"config": BASE, **fields})


def _random(trials: int, **fields: Any) -> list[Any]:
    return points_of(_sweep(search="random", trials=trials, fields=fields))


def test_a_grid_is_every_combination_once() -> None:
    pairs = [{"method.kd_weight": w, "method.mle_weight": 1 - w} for w in (0.25, 0.75)]
    sweep = _sweep(fields={"training.batch_size": [8, 16], "method.temperature": [1.0, 2.0, 4.0]}, coupled=[pairs])
    points = points_of(sweep)
    expected = [
        {"training.batch_size": size, "method.temperature": tau, **pair}
        for size in (8, 16)
        for tau in (1.0, 2.0, 4.0)
        for pair in pairs
    ]
    assert points == expected


def test_draws_follow_their_distributions() -> None:
    points = _random(
        400,
        a={"uniform": [2, 3]},
        b={"log_uniform": [1e-5, 1e-1]},
        c={"integer": [1, 3]},
        d={"choice": ["x", "y"]},
        e=[True, None],
    )
    a, b = (np.array([point[name] for point in points]) for name in "ab")
    assert a.min() >= 2 and a.max() <= 3 and abs(a.mean() - 2.5) < 0.06
    assert b.min() >= 1e-5 and b.max() <= 1e-1 and abs(np.log10(b).mean() + 3) < 0.25
    for name, allowed in {"c": [1, 2, 3], "d": ["x", "y"], "e": [True, None]}.items():
        drawn = [point[name] for point in points]
        assert all(drawn.count(value) > 80 for value in allowed) and all(value in allowed for value in drawn)


def test_draws_depend_on_seed_number_and_name_alone() -> None:
    one = _random(5, a={"uniform": [0, 1]}, b={"uniform": [0, 1]})
    more = _random(9, b={"uniform": [0, 1]}, a={"uniform": [0, 1]}, c=[1, 2])
    assert [{name: point[name] for name in "ab"} for point in more[:5]] == one
    assert all(point["a"] != point["b"] for point in one)
    other = points_of(_sweep(search="random", trials=5, seed=1, fields={"a": {"uniform": [0, 1]}}))
    assert [point["a"] for point in other] != [point["a"] for point in one]


WRONG: list[tuple[dict[str, Any], list[str]]] = [
    ({"fields": {"a": [1]}, "search": "random"}, ["trials", "is missing"]),
    ({"fields": {"a": [1]}, "trials": 3}, ["trials is 3", "grid"]),
    ({"fields": {"a": {"uniform": [0, 1]}}}, ["fields.a", 'search "random"']),
    ({"fields": {"a": []}}, ["fields.a", "at least 1"]),
    ({"fields": {"a": {"uniform": [1, 0]}}, "search": "random", "trials": 1}, ["fields.a", "low < high"]),
    ({"fields": {"a": {"log_uniform": [0, 1]}}, "search": "random", "trials": 1}, ["fields.a", "positive"]),
    ({"fields": {"a": {}}, "search": "random", "trials": 1}, ["fields.a", "exactly one of"]),
    ({}, ["nothing is varied"]),
    ({"seeds": [1, 1], "fields": {"a": [1]}}, ["seeds", "once"]),
    ({"fields": {"training.seed": [1]}}, ["fields.training.seed", "give seeds"]),
    ({"fields": {"output.directory": ["x"]}}, ["fields.output.directory"]),
    ({"fields": {"a b": [1]}}, ["fields.a b", "dotted name"]),
    ({"fields": {"method.temperature": [1.0]}, "coupled": [[{"method": {}}]]}, ["method is varied together with"]),
    ({"coupled": [[{"a": 1}, {"b": 1}]]}, ["coupled", "same fields"]),
    ({"partition": {"strategies": ["iid"], "parts": 1}}, ["partition.parts = 1"]),
    ({"partition": {"strategies": ["iid", "iid"], "parts": 2}}, ["partition.strategies", "once"]),
    (
        {"partition": {"strategies": ["iid"], "parts": 2}, "fields": {"task.partition.alpha": [1.0]}},
        ["fields.task.partition.alpha", "partition study"],
    ),
    ({"fields": {"a": [1]}, "rank": 2}, ["rank", 'nearest: "ranks"']),
]


@pytest.mark.parametrize(("fields", "words"), WRONG)
def test_a_wrong_sweep_file_is_refused(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        _sweep(**fields)
    assert all(word in str(caught.value) for word in words), caught.value


def test_problems_of_all_trials_come_together_and_name_the_fields(tmp_path: Path) -> None:
    fields = {"training.learning_rate": [-1.0, 1e-3, -2.0], "method.tempreature": [1.0]}
    with pytest.raises(ConfigurationError) as caught:
        plan_trials(_sweep(fields=fields, output=str(tmp_path / "out")))
    text = str(caught.value)
    assert "training.learning_rate = -1.0: " in text and "training.learning_rate = -2.0: " in text
    assert text.count('nearest: "temperature"') == 1
    assert "training.learning_rate=0.001, method.tempreature=1.0" in text
    assert not (tmp_path / "out").exists()
    wrong = {"training.micro_batch_size": [3, 4]}
    with pytest.raises(ConfigurationError, match=r"batch_size = 32: is not a multiple of 1 rank x .* 3"):
        plan_trials(_sweep(fields=wrong))
    with pytest.raises(ConfigurationError, match='metric = "f1": allowed for this task: accuracy, nll'):
        plan_trials(_sweep(fields={"method.temperature": [1.0, 2.0]}, metric="f1"))
    with pytest.raises(ConfigurationError, match="metric is missing: the tasks' first ones are accuracy, pearson"):
        plan_trials(_sweep(fields={"task.name": ["sst2", "stsb"]}))
    with pytest.raises(ConfigurationError, match=r'method "cckd" is for classification .* this is a regression\n  in '):
        plan_trials(_sweep(changes={"task.name": "stsb"}, fields={"method": [{"name": "kd"}, {"name": "cckd"}]}))
    with pytest.raises(ConfigurationError, match='metric = "dev/accuracy": the task has the splits validation'):
        plan_trials(_sweep(fields={"method.temperature": [1.0, 2.0]}, metric="dev/accuracy"))


def test_every_run_has_its_own_folder_seed_and_configuration(tmp_path: Path) -> None:
    sweep = _sweep(
        fields={"method": [{"name": "kd", "temperature": 4.0}, {"name": "finetune"}]},
        changes={"training.batch_size": 16},
        seeds=[3, 4],
        output=str(tmp_path),
    )
    trials = plan_trials(sweep, ["training.steps=5"])
    runs = [run for trial in trials for run in trial.runs]
    assert len(trials) == 2 and len({run.folder for run in runs}) == 4
    assert [run.seed for run in runs] == [3, 4, 3, 4]
    for run in runs:
        training = run.config.training
        assert (training.seed, training.batch_size, training.steps) == (run.seed, 16, 5)
        assert run.config.output.directory == str(run.folder)
    assert [trial.runs[0].config.method.name for trial in trials] == ["kd", "finetune"]
    assert trials[0].runs[0].config.method.temperature == 4.0


def test_equal_trials_are_one_and_folders_follow_the_content(tmp_path: Path) -> None:
    def folders(values: list[float], **more: Any) -> list[str]:
        trials = plan_trials(_sweep(fields={"method.temperature": values}, output=str(tmp_path), **more))
        for trial in trials:
            trial.folder.mkdir(parents=True, exist_ok=True)
        return [trial.folder.name for trial in trials]

    first = folders([1.0, 2.0, 1.0])
    assert len(first) == 2 and first[0].startswith("000-") and first[1].startswith("001-")
    longer = folders([8.0, 2.0, 1.0])
    assert longer[1:] == first[::-1] and longer[0].startswith("002-")
    assert folders([1.0, 2.0], seeds=[5, 6]) == first  # more seeds are more runs of the same trials
    assert not set(folders([1.0, 2.0], changes={"training.steps": 7})) & set(first)


def _chain(tmp_path: Path, base: dict[str, Any], **study: Any) -> list[Config]:
    study = {"strategies": ["quantity_skew"], "parts": 3, "alpha": 0.2, "seed": 9, **study}
    sweep = validate(Sweep, {"config": base, "partition": study, "output": str(tmp_path)})
    (trial,) = plan_trials(sweep)
    configs = [run.config for run in trial.runs]
    for part, config in enumerate(configs):
        partition = config.task.partition
        assert partition is not None
        assert (partition.part, partition.parts, partition.alpha, partition.seed) == (part, 3, 0.2, 9)
    return configs


def test_transfers_hand_on_what_they_say(tmp_path: Path) -> None:
    base = BASE | {"student": {"num_layers": 2, "dropout": 0.1}, "teacher": {"model": "t", "revision": "r"}}
    alone = _chain(tmp_path, base, transfer=["none"])
    assert all(config.teacher == alone[0].teacher and config.student == alone[0].student for config in alone)

    initial = _chain(tmp_path, base, transfer=["initial"])
    assert initial[0].student == alone[0].student
    for before, config in pairwise(initial):
        student = config.student
        assert student.model == f"{before.output.directory}/student" and config.teacher == alone[0].teacher
        assert student.num_layers is None and student.layers is None and student.dropout == 0.1

    taught = _chain(tmp_path, base, transfer=["teacher"])
    assert taught[0].student == alone[0].student and taught[0].teacher == alone[0].teacher
    for before, config in pairwise(taught):
        assert config.teacher is not None and config.teacher.model == f"{before.output.directory}/student"
        assert config.teacher.revision is None
        # The layers still come from the first teacher: only its answers are replaced.
        assert (config.student.model, config.student.revision, config.student.num_layers) == ("t", "r", 2)


def test_students_can_teach_without_a_first_teacher(tmp_path: Path) -> None:
    base = {"task": {"name": "demo"}, "student": {"model": "s"}, "method": {"name": "finetune"}}
    with pytest.raises(ConfigurationError, match=r"imitates no teacher; give partition\.method"):
        _chain(tmp_path, base, transfer=["teacher"])
    configs = _chain(tmp_path, base, transfer=["teacher"], method={"name": "kd", "temperature": 3.0})
    assert [config.method.name for config in configs] == ["finetune", "kd", "kd"]
    assert configs[0].teacher is None and configs[2].teacher is not None
    assert configs[2].student.model == "s"


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_shipped_sweeps_are_right(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sweep = load_sweep(path)
    assert sweep.schema_ == "./sweep_schema.json" and plan_trials(sweep)
    assert base_content(sweep)["method"]["name"] == "kd"


def test_tuned_kd_is_the_grid_over_weight_and_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    """(1 - w) * CE + w * tau^2 * KL."""
    monkeypatch.chdir(ROOT)
    trials = plan_trials(load_sweep("configs/sweep_tuned_kd.json"))
    methods = [trial.runs[0].config.method.model_dump() for trial in trials]
    assert all(method["mle_weight"] + method["kd_weight"] == pytest.approx(1) for method in methods)
    assert len({(method["kd_weight"], method["temperature"]) for method in methods}) == len(trials) == 20


def test_sweep_schema_is_published_and_describes_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_config.main(["schema", "--sweep"]) == 0
    assert capsys.readouterr().out == (ROOT / "configs" / "sweep_schema.json").read_text()
    schema = cli_config.json_schema(Sweep)
    for name, section in {**schema["$defs"], "Sweep": schema}.items():
        for field, content in section["properties"].items():
            assert content.get("description"), f"{name}.{field} has no description"


def test_dry_run_lists_and_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sweep.json"
    content = {"config": BASE, "fields": {"method.temperature": [1.0, 2.0]}, "seeds": [0, 1]}
    path.write_text(json.dumps(content | {"output": str(tmp_path / "out")}))
    assert cli_sweep.main(["--config", str(path), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "method.temperature=2.0" in shown and "2 trials, 4 runs" in shown
    assert not (tmp_path / "out").exists()
    assert cli_sweep.main(["--config", str(path), "--report-only"]) == 1
    assert "nothing has been run yet" in capsys.readouterr().err
