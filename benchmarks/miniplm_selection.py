"""What MiniPLM's selection keeps of real text: python -m benchmarks.miniplm_selection --data FOLDER

FOLDER holds lm/{c4_sample_train,wikipedia_sample_train,tiny_shakespeare_train}.parquet (column text). A teacher and a
smaller reference learn half of the C4 and Wikipedia documents. Both then score, with `mixkd-fast teach --kind nll`'s
code, passages that neither has seen: of the other half, of a play (another domain), of the other half with its words
in random order, and random letters. `mixkd-fast select` keeps the half with the highest
score = NLL_reference - NLL_teacher. The table says how much of every kind is kept: what the teacher has learnt and
the reference has not should be, what neither can predict should not.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset

from benchmarks.lm_quality import STUDENT, TEACHER, train_tokenizer
from benchmarks.quality_runs import commit
from mixkd_fast import distill
from mixkd_fast.cli_select import select, table_of
from mixkd_fast.configuration import Config, validate
from mixkd_fast.data.loading import load_splits
from mixkd_fast.methods.base import RowChoice
from mixkd_fast.offline_preparation import scores_of
from mixkd_fast.teaching import TeachOptions, teach
from mixkd_fast.version import __version__

CORPORA = "c4_sample", "wikipedia_sample", "tiny_shakespeare"
MAX_LENGTH = 128
WORDS = 40
"""Of a passage."""
VALIDATION = 100
"""Passages that watch the training."""
KINDS = {
    "held_out": "C4 and Wikipedia, held out",
    "play": "a play: real text of another domain",
    "shuffled": "held out, words in random order",
    "letters": "random letters",
}
MODELS: dict[str, tuple[dict[str, int], float]] = {"teacher": (TEACHER, 1.0), "reference": (STUDENT, 0.3)}
"""Shape, and the share of --steps it is trained for."""


def main() -> int:
    """Train, score, select, and write miniplm_selection.json and .md to --output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=2000, help="of the teacher; the reference takes 30 %% of them")
    parser.add_argument("--rows", type=int, default=800, help="passages of each kind")
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--work", type=Path, default=Path("runs/miniplm_selection"))
    parser.add_argument("--output", type=Path, default=Path("runs/miniplm_selection"))
    options = parser.parse_args()
    wanted = [options.data / f"lm/{name}_train.parquet" for name in CORPORA]
    for path in wanted:
        if not path.is_file():
            print(f"error: --data {options.data}: has no {path.relative_to(options.data)}", file=sys.stderr)
            return 2
    options.work.mkdir(parents=True, exist_ok=True)
    kinds = write_texts(options.work, *wanted, rows=options.rows)
    train_tokenizer(options.work / "tokenizer", pq.read_table(options.work / "train.parquet")["text"].to_pylist())
    for name in MODELS:
        train_and_score(name, options)
    rows, choice = select(config_of(options, method=miniplm(options.work)), options.work / "selected.parquet")
    report = describe(options, kinds, rows, choice)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "miniplm_selection.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.output / "miniplm_selection.md").write_text(markdown(report))
    print(markdown(report))
    return 0


def write_texts(work: Path, c4: Path, wikipedia: Path, play: Path, rows: int) -> list[str]:
    """train.parquet and validation.parquet for the models, pool.parquet to choose from; returns the pool's kinds."""
    rng = random.Random(0)
    documents = [text for path in (c4, wikipedia) for text in pq.read_table(path)["text"].to_pylist()]
    passages = [list(passages_of(text)) for text in documents]
    rng.shuffle(passages)
    # Whole documents on either side, so that no text is on both.
    learnt = [passage for document in passages[::2] for passage in document]
    unseen = [passage for document in passages[1::2] for passage in document]
    rng.shuffle(unseen)
    speeches = " ".join(pq.read_table(play)["text"].to_pylist())
    other = list(passages_of(speeches))
    rng.shuffle(other)
    validation, unseen = unseen[:VALIDATION], unseen[VALIDATION:]
    if len(unseen) < 2 * rows or len(other) < rows:
        raise SystemExit(f"--rows {rows}: allowed up to {min(len(unseen) // 2, len(other))}, the text that is there")
    pool = [("held_out", text) for text in unseen[:rows]]
    pool += [("play", text) for text in other[:rows]]
    pool += [("shuffled", " ".join(rng.sample(words, len(words)))) for words in map(str.split, unseen[rows : 2 * rows])]
    pool += [("letters", letters(rng)) for _ in range(rows)]
    rng.shuffle(pool)
    for name, texts in {"train": learnt, "validation": validation, "pool": [text for _, text in pool]}.items():
        pq.write_table(pa.table({"text": texts}), work / f"{name}.parquet")
    return [kind for kind, _ in pool]


def passages_of(text: str) -> Iterator[str]:
    """Pieces of WORDS words; what is left at the end is dropped."""
    words = text.split()
    for start in range(0, len(words) - WORDS + 1, WORDS):
        yield " ".join(words[start : start + WORDS])


def letters(rng: random.Random) -> str:
    """Words of random letters, of English words' lengths."""
    return " ".join("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 9))) for _ in range(WORDS))


def config_of(options: argparse.Namespace, file: str = "pool", **sections: Any) -> Config:
    """A configuration over one of the files; the student's tokenizer is that of all models here."""
    task = {
        "name": "passages",
        "kind": "causal_lm",
        "text_column": "text",
        "train_files": [str(options.work / f"{file}.parquet")],
        "evaluation_files": {"validation": [str(options.work / "validation.parquet")]},
        "max_length": MAX_LENGTH,
        "cache_dir": str(options.work / "cache"),
        "metrics": ["perplexity"],
    }
    student = {"config": llama(STUDENT), "tokenizer": str(options.work / "tokenizer")}
    fixed = {"task": task, "student": student, "method": {"name": "finetune"}, "training": {"threads": options.threads}}
    return validate(Config, {**fixed, **sections})


def llama(shape: dict[str, int]) -> dict[str, Any]:
    """A model's configuration."""
    return {"model_type": "llama", "max_position_embeddings": MAX_LENGTH, "tie_word_embeddings": True, **shape}


def miniplm(work: Path) -> dict[str, str]:
    """The method section."""
    return {"name": "miniplm", **{f"{name}_nll": str(work / f"{name}_nll") for name in MODELS}}


def train_and_score(name: str, options: argparse.Namespace) -> None:
    """Train a model on the texts it may see; then score every passage of the pool. Both are kept once made."""
    shape, share = MODELS[name]
    folder = options.work / name
    if not (folder / "summary.json").is_file():
        config = config_of(options, "train").model_dump(exclude_unset=True)
        steps = max(1, round(options.steps * share))
        training = {"steps": steps, "batch_size": 16, "learning_rate": 2e-3, "weight_decay": 0.1, "warmup": 0.05}
        training |= {"schedule": "cosine", "precision": options.precision, "batching": "length", "log_every": 50}
        training["threads"] = options.threads
        distill(
            task=config["task"],
            student={**config["student"], "config": llama(shape)},
            method={"name": "finetune"},
            training=training,
            output={"directory": str(folder), "report": False, "overwrite": True},
            progress=False,
        )
    scored = config_of(options, teacher={"model": str(folder / "student")})
    teach(scored, TeachOptions("nll", options.work / f"{name}_nll"), progress=False)


def describe(options: argparse.Namespace, kinds: list[str], rows: Dataset, choice: RowChoice) -> dict[str, Any]:
    """The report: how much of every kind is kept, and examples."""
    kind_of = np.asarray(kinds)[choice.rows]
    read = scores_of(load_splits(config_of(options).task).train)
    nll = {name: read(str(options.work / f"{name}_nll"), name).mean_nll for name in MODELS}
    table = []
    for kind, title in KINDS.items():
        is_kind = kind_of == kind
        table.append(
            {
                "kind": kind,
                "title": title,
                "rows": int(is_kind.sum()),
                "kept_percent": 100 * float(choice.kept[is_kind].mean()),
                "score": float(choice.scores[is_kind].mean()),
                **{f"{name}_nll": float(values[is_kind].mean()) for name, values in nll.items()},
            }
        )
    header, examples = table_of(rows, choice, 3)
    return {
        "commit": commit(),
        "versions": {"mixkd_fast": __version__, "torch": torch.__version__},
        "steps": {name: max(1, round(options.steps * share)) for name, (_, share) in MODELS.items()},
        "kept": {
            "selected": _means(nll, choice, choice.kept),
            "dropped": _means(nll, choice, ~choice.kept),
        },
        "kinds": table,
        "examples": [dict(zip([name or "choice" for name in header], line, strict=True)) for line in examples],
    }


def _means(nll: dict[str, Any], choice: RowChoice, which: Any) -> dict[str, float]:
    means = {f"{name}_nll": float(values[which].mean()) for name, values in nll.items()}
    return {"rows": int(which.sum()), "score": float(choice.scores[which].mean()), **means}


def markdown(report: dict[str, Any]) -> str:
    """The report as one page."""
    steps = report["steps"]
    lines = ["# What MiniPLM keeps of real text", ""]
    lines += [
        f"`python -m benchmarks.miniplm_selection --data FOLDER --steps {steps['teacher']}`, commit {report['commit']}",
        "",
        f"Teacher: {_shape(TEACHER)}, {steps['teacher']:,} steps; reference: {_shape(STUDENT)}, {steps['reference']:,} "
        "steps, same text. Half of the passages is kept: those of the highest NLL(reference) - NLL(teacher), nats a "
        "token.",
        "",
        "| passages | rows | kept | mean score | NLL of the teacher | of the reference |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in report["kinds"]:
        lines.append(f"| {row['title']} | {row['rows']:,} | {row['kept_percent']:.0f} % | {_numbers(row)} |")
    for name, row in report["kept"].items():
        lines.append(f"| all {name} | {row['rows']:,} | | {_numbers(row)} |")
    lines += ["", "The highest, those about the cut, and the lowest:", "", "| text | score | |", "| --- | ---: | --- |"]
    for line in report["examples"]:
        text = str(line["text"]).replace("|", "\\|")
        lines.append(f"| {text} | {line['score']} | {line['choice']} |")
    return "\n".join([*lines, ""])


def _shape(model: dict[str, int]) -> str:
    return f"Llama, {model['num_hidden_layers']} layers x {model['hidden_size']}"


def _numbers(row: dict[str, Any]) -> str:
    return " | ".join([f"{row['score']:+.3f}", f"{row['teacher_nll']:.3f}", f"{row['reference_nll']:.3f}"])


if __name__ == "__main__":
    sys.exit(main())
