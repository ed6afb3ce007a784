"""MiniPLM: scores of texts by two models, the choice between them, and runs that train on what is chosen."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from toy import losses, must_run
from toy_lm import byte_tokenizer, language_config, save_lm, tiny_lm, write_lines
from transformers import AutoModelForCausalLM

from mixkd_fast.cli import main
from mixkd_fast.configuration import Config, validate
from mixkd_fast.data.loading import load_splits
from mixkd_fast.distillation import run_config
from mixkd_fast.errors import ConfigurationError, DataError
from mixkd_fast.methods import MiniPLM
from mixkd_fast.methods.base import RowScores
from mixkd_fast.methods.miniplm import difference_sampling
from mixkd_fast.offline.reading import OfflineStore
from mixkd_fast.offline_preparation import scores_of
from mixkd_fast.teaching import TeachOptions, teach

NUM_ROWS = 48


def made_corpus() -> list[tuple[str, bool]]:
    """Texts that follow a rule (a cycle of letters from anywhere in it) and texts of random letters, mixed."""
    rng, cycle = random.Random(0), "abcdefghijkl"
    rows = []
    for number in range(NUM_ROWS):
        start, length = rng.randrange(12), rng.randint(18, 30)
        learnable = number % 2 == 0
        text = "".join(cycle[(start + i) % 12] if learnable else rng.choice(cycle) for i in range(length))
        rows.append((text, learnable))
    rng.shuffle(rows)
    return rows


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[bool]]:
    """A teacher that has learnt the rule, a reference that has not, and both models' scores."""
    folder = tmp_path_factory.mktemp("miniplm")
    rows = made_corpus()
    config = language_config(folder)
    config["task"]["train_files"] = [write_lines(folder / "made.jsonl", [{"text": text} for text, _ in rows])]
    teacher = tiny_lm(seed=3).train()
    tokenizer = byte_tokenizer()
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=5e-3)
    rng = random.Random(1)
    for _ in range(60):
        starts = [rng.randrange(12) for _ in range(16)]
        texts = ["".join("abcdefghijkl"[(start + i) % 12] for i in range(24)) for start in starts]
        ids = torch.tensor(tokenizer(texts).input_ids)
        teacher(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    teacher.eval().save_pretrained(folder / "teacher")
    save_lm(folder / "reference", num_hidden_layers=1, seed=4)
    config["method"] = {
        "name": "miniplm",
        "teacher_nll": str(folder / "teacher_nll"),
        "reference_nll": str(folder / "reference_nll"),
    }
    for name in ("teacher", "reference"):
        given = validate(Config, config | {"teacher": {"model": str(folder / name)}})
        teach(given, TeachOptions("nll", folder / f"{name}_nll", shard_mib=0.0005), progress=False)
    del config["teacher"]
    # A student of another tokenizer (its order of tokens is another): rows are chosen as texts.
    student = byte_tokenizer(pad=False)
    student.add_special_tokens({"pad_token": "<other>"})
    save_lm(folder / "start", "gpt2", student, seed=5)
    config["student"] = {"model": str(folder / "start")}
    return folder, config, [learnable for _, learnable in rows]


def test_scores_are_those_of_an_independent_forward(corpus: tuple[Path, dict[str, Any], list[bool]]) -> None:
    folder, config, _ = corpus
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher").eval().double()
    store = OfflineStore(folder / "teacher_nll", "x")
    assert store.origin.num_shards > 3 and store.origin.num_rows == NUM_ROWS
    found = store.rows(np.arange(NUM_ROWS))
    texts = [json.loads(line)["text"] for line in Path(config["task"]["train_files"][0]).read_text().splitlines()]
    for row in range(0, NUM_ROWS, 7):
        ids = [*byte_tokenizer()(texts[row]).input_ids, 256]
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = -sum(float(logprobs[place - 1, ids[place]]) for place in range(1, len(ids)))
        assert float(found["nll"][row]) == pytest.approx(expected, rel=1e-5)
        assert int(found["tokens"][row]) == len(ids) - 1 and int(found["source_rows"][row]) == row


def test_what_the_teacher_finds_learnable_is_chosen(
    corpus: tuple[Path, dict[str, Any], list[bool]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, config, learnable = corpus
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ["select", "--config", str(tmp_path / "config.json"), "--output"]
    assert main([*arguments, str(tmp_path / "chosen.jsonl"), "--examples", "2"]) == 0
    shown = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "chosen.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == [number for number, good in enumerate(learnable) if good]
    assert all(row["score"] > 0 and len(row["text"]) > 10 for row in rows)
    assert "24 of 48 scored rows kept" in shown and shown.count("dropped") == 4 and shown.count("  kept\n") == 4
    assert main([*arguments, str(tmp_path / "chosen.parquet")]) == 0
    again = pq.read_table(tmp_path / "chosen.parquet").to_pylist()
    assert [row | {"score": 0} for row in again] == [row | {"score": 0} for row in rows]
    assert [row["score"] for row in again] == pytest.approx([row["score"] for row in rows])
    assert main([*arguments, str(tmp_path / "chosen.csv")]) == 1 and ".parquet" in capsys.readouterr().err
    assert folder.exists()


def test_twenty_steps_through_the_program(corpus: tuple[Path, dict[str, Any], list[bool]], tmp_path: Path) -> None:
    _, config, learnable = corpus
    config = {**config, "output": {"directory": str(tmp_path / "run"), "report": False}}
    config["training"] = config["training"] | {"steps": 20, "evaluate_every": 10}
    (tmp_path / "config.json").write_text(json.dumps(config))
    must_run([sys.executable, "-m", "mixkd_fast.train", "--config", str(tmp_path / "config.json")])
    course = losses(tmp_path / "run")
    assert len(course) == 20 and sum(course[-4:]) / 4 < 0.8 * course[0]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["data"]["chosen_rows"] == sum(learnable) == 24 and summary["data"]["scored_rows"] == 48
    # The same as plain training on the chosen texts.
    texts = [json.loads(line) for line in Path(config["task"]["train_files"][0]).read_text().splitlines()]
    chosen = [row for row, good in zip(texts, learnable, strict=True) if good]
    plain = {
        **config,
        "method": {"name": "finetune"},
        "output": {"directory": str(tmp_path / "plain"), "report": False},
    }
    plain["task"] = {**config["task"], "train_files": [write_lines(tmp_path / "chosen.jsonl", chosen)]}
    run_config(validate(Config, plain), progress=False)
    assert losses(tmp_path / "plain") == pytest.approx(course, rel=1e-5)


def test_other_texts_and_other_kinds_are_refused(
    corpus: tuple[Path, dict[str, Any], list[bool]], tmp_path: Path
) -> None:
    folder, config, _ = corpus
    fewer = {
        **config,
        "task": {**config["task"], "train_rows": 20},
        "output": {"directory": str(tmp_path / "run"), "report": False},
    }
    with pytest.raises(DataError, match=r"method.teacher_nll = .* corpus \(texts and row numbers\)"):
        run_config(validate(Config, fewer), progress=False)
    with_teacher = validate(Config, config | {"teacher": {"model": str(folder / "reference")}, "student": {}})
    teach(with_teacher, TeachOptions("hidden", tmp_path / "hidden"), progress=False)
    wrong = {**config, "method": {**config["method"], "reference_nll": str(tmp_path / "hidden")}}
    with pytest.raises(ConfigurationError, match=r'method.reference_nll = .* kind "hidden"; allowed: "nll"'):
        run_config(
            validate(Config, wrong | {"output": {"directory": str(tmp_path / "run2"), "report": False}}), progress=False
        )
    used = config | {"method": {"name": "lm_kd"}, "teacher": {"offline": str(folder / "teacher_nll")}}
    with pytest.raises(ConfigurationError, match='for method "miniplm"'):
        run_config(
            validate(Config, used | {"output": {"directory": str(tmp_path / "run3"), "report": False}}), progress=False
        )


def test_instructions_that_were_written_otherwise_are_not_compared(tmp_path: Path) -> None:
    config = language_config(tmp_path, instruct=True)
    for name, template in (("teacher", "Q: {prompt} {input}\nA: "), ("reference", "{prompt} {input} = ")):
        config["task"]["prompt_template"] = template
        teach(validate(Config, config), TeachOptions("nll", tmp_path / f"{name}_nll"), progress=False)
    texts = load_splits(validate(Config, config).task).train
    method = MiniPLM(teacher_nll=str(tmp_path / "teacher_nll"), reference_nll=str(tmp_path / "reference_nll"))
    with pytest.raises(DataError, match="prompt_template"):
        method.choose_rows(scores_of(texts))


def test_the_choice() -> None:
    rows = np.array([3, 4, 7, 9, 12])
    teacher = RowScores(rows, np.array([1.0, 2.0, 1.0, 3.0, 2.0]), ("t", 8, "rows"))
    reference = RowScores(rows, np.array([2.0, 2.0, 2.0, 3.5, 5.0]), ("t", 8, "rows"))
    choice = difference_sampling(teacher, reference, 0.4)
    assert choice.scores.tolist() == [1.0, 0.0, 1.0, 0.5, 3.0]
    assert rows[choice.kept].tolist() == [3, 12], "of equal scores the earlier row, in the order of the corpus"
    assert rows[difference_sampling(teacher, reference, 0.01).kept].tolist() == [12]
    assert difference_sampling(teacher, reference, 1.0).kept.all()
    with pytest.raises(DataError, match="another tokenizer or max_length"):
        difference_sampling(teacher, reference._replace(read_by=("t", 16, "rows")), 0.5)
    method = MiniPLM(teacher_nll="a", reference_nll="b")
    assert method.ratio == 0.5 and not method.needs_teacher
    asked: list[str] = []

    def scores(folder: str, field: str) -> RowScores:
        asked.append(f"{field}={folder}")
        return teacher if folder == "a" else reference

    assert method.choose_rows(scores).kept.sum() == 2
    assert asked == ["method.teacher_nll=a", "method.reference_nll=b"]
