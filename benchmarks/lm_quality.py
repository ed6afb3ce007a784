"""Does distillation help language models? Labels alone, KD, GKD and DistiLLM on real text, over several seeds.

    python -m benchmarks.lm_quality --data FOLDER [--settings shakespeare,instruct] [--arms ce,kd] [--seeds 0-2]

FOLDER holds Parquet files: lm/tiny_shakespeare_{train,validation,test}.parquet (column text) and
instruct/{short_tasks_train,self_instruct_seed_train,alpaca_demo_train,alpaca_long_train}.parquet and
instruct/{dolly_eval,self_instruct_user_eval}.parquet (columns instruction, input, output). A tokenizer and a teacher
are trained on the spot; every arm then trains the same small student, from random weights drawn by its seed, over the
same rows and steps; arms after CE begin with the student that CE made of that seed, and train as many steps again. Runs
are kept in the work folder: what is finished is not made again, and a run that was stopped goes on. Results:
lm_quality.json, lm_quality.md and lm_quality.svg in --output. `--report-only` renders what is there.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.lm_own_text import divergence_on_own_text
from benchmarks.lm_quality_report import collect, write
from benchmarks.quality_runs import commit
from benchmarks.quality_settings import chosen, seed_numbers
from mixkd_fast import distill
from mixkd_fast.configuration import Task, validate
from mixkd_fast.errors import ConfigurationError

VOCABULARY = 1024
TEACHER = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 704}
STUDENT = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 352}
LEARNING_RATE = 2e-3
LEARNING_RATE_AGAIN = 1e-3
"""Of students that begin trained."""


@dataclass(frozen=True)
class Arm:
    """A way to train the student."""

    title: str
    method: dict[str, Any]
    start: str | None = None
    """Arm whose student of the same seed it begins with; None draws random weights."""
    control: str = "ce"
    """Arm that it is compared with: labels alone, as many steps."""


_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "ce": ("CE (labels alone)", {"name": "finetune"}),
    "kd": ("KD", {"name": "lm_kd", "kd_weight": 0.5}),
    "gkd": ("GKD", {"name": "gkd"}),
    "distillm": ("DistiLLM", {"name": "distillm"}),
}
ARMS = {name: Arm(title, method) for name, (title, method) in _METHODS.items()} | {
    f"ce_{name}": Arm(f"CE, then {title}", method, start="ce", control="ce_ce")
    for name, (title, method) in _METHODS.items()
}


@dataclass(frozen=True)
class Setting:
    """A corpus, and the budget that the teacher and every arm get."""

    title: str
    train: tuple[str, ...]
    evaluation: dict[str, str]
    """Split -> file; the first picks the best checkpoint, the last is reported."""
    task: dict[str, Any]
    max_length: int
    teacher_steps: int = 1000
    student_steps: int = 400
    batch_size: int = 16
    answer_tokens: int = 48
    """Longest text that a student writes for its own training."""


SETTINGS = {
    "shakespeare": Setting(
        "Tiny Shakespeare, plain text",
        ("lm/tiny_shakespeare_train.parquet",),
        {"validation": "lm/tiny_shakespeare_validation.parquet", "test": "lm/tiny_shakespeare_test.parquet"},
        {"text_column": "text"},
        128,
    ),
    "instruct": Setting(
        "short instructions",
        tuple(
            f"instruct/{n}_train.parquet" for n in ("short_tasks", "self_instruct_seed", "alpaca_demo", "alpaca_long")
        ),
        {"validation": "instruct/dolly_eval.parquet", "test": "instruct/self_instruct_user_eval.parquet"},
        {"prompt_column": "instruction", "input_column": "input", "response_column": "output", "generation_rows": 0},
        256,
    ),
}


@dataclass(frozen=True)
class Options:
    """What all runs of a work folder share."""

    data: Path
    work: Path
    precision: str
    threads: int | None
    scale: float
    """All steps are multiplied by this; for a trial."""


def main() -> int:
    """Make the runs that are asked for, then write the report. Returns 1 if a run failed, 2 for a wrong argument."""
    arguments = _arguments()
    options = Options(
        arguments.data, Path(arguments.work), arguments.precision, arguments.threads, arguments.scale_steps
    )
    try:
        settings = chosen(arguments.settings, SETTINGS, "--settings")
        arms = chosen(arguments.arms, ARMS, "--arms")
        seeds = seed_numbers(arguments.seeds)
        for name in settings:
            _check_files(SETTINGS[name], options)
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not arguments.report_only:
        for name in settings:
            for arm, seed in [("teacher", 0)] + [(arm, seed) for seed in seeds for arm in arms]:
                start = None if arm == "teacher" else ARMS[arm].start
                for needed in (arm,) if start is None else (start, arm):
                    make(name, needed, seed, options)
    planned = [(name, arm, seed) for name in settings for arm in arms for seed in seeds]
    report = collect(
        {run: finished(folder_of(*run, options), describe(*run, options)) for run in planned},
        {name: SETTINGS[name].title for name in settings},
        {name: ARMS[name] for name in arms},
        commit(),
    )
    for path in write(report, Path(arguments.output)):
        print(path)
    if report["missing"]:
        print(f"{len(report['missing'])} runs are missing", file=sys.stderr)
    return 0


def make(setting_name: str, arm: str, seed: int, options: Options) -> dict[str, Any]:
    """A run's figures: those on disk if it was made as it is asked for now, else it is trained."""
    setting = SETTINGS[setting_name]
    folder = folder_of(setting_name, arm, seed, options)
    description = describe(setting_name, arm, seed, options)
    done = finished(folder, description)
    if done is not None:
        return _with_own_text(done, folder, setting, options)
    tokenizer = train_tokenizer(options.work / setting_name / "tokenizer", _texts(setting, options))
    steps = description["steps"]
    print(f"{setting_name} {arm} seed {seed}: {steps} steps", file=sys.stderr, flush=True)
    goes_on = _read(folder / "begun.json") == description and (folder / "checkpoints").is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "begun.json").write_text(json.dumps(description, indent=1) + "\n")
    started = time.perf_counter()
    result = distill(
        task=_task(setting, options),
        teacher=None if arm == "teacher" else {"model": str(_teacher(setting_name, options))},
        student=_student(setting_name, arm, seed, options, tokenizer),
        method=description["method"],
        training={
            "steps": steps,
            "batch_size": setting.batch_size,
            "learning_rate": LEARNING_RATE_AGAIN if "start" in description else LEARNING_RATE,
            "weight_decay": 0.1,
            "warmup": 0.05,
            "schedule": "cosine",
            "precision": options.precision,
            "batching": "length",
            "evaluate_every": max(1, steps // 4),
            "log_every": 10,
            "seed": seed,
            **({} if options.threads is None else {"threads": options.threads}),
        },
        # What was stopped goes on; what was begun otherwise starts anew.
        output={"directory": str(folder), "report": False, "overwrite": not goes_on},
        resume=goes_on,
        progress=False,
    )
    figures = {
        **description,
        "metrics": result.metrics,
        "teacher_metrics": (result.summary["teacher"] or {}).get("metrics"),
        "parameters": result.summary["student"]["parameters"],
        "seconds": time.perf_counter() - started,
        "commit": commit(),
    }
    (folder / "result.json").write_text(json.dumps(figures, indent=1) + "\n")
    return _with_own_text(figures, folder, setting, options)


def _with_own_text(figures: dict[str, Any], folder: Path, setting: Setting, options: Options) -> dict[str, Any]:
    """The figures of a student with its distance from the teacher on its own text, which is measured once."""
    if figures["arm"] == "teacher" or "own_text" in figures:
        return figures
    task = validate(Task, _task(setting, options))
    own_text = divergence_on_own_text(
        folder / "student", _teacher(figures["setting"], options), task, setting.answer_tokens
    )
    figures = {**figures, "own_text": own_text}
    (folder / "result.json").write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def _teacher(setting_name: str, options: Options) -> Path:
    """Folder of the teacher's weights."""
    return folder_of(setting_name, "teacher", 0, options) / "student"


def _student(setting_name: str, arm: str, seed: int, options: Options, tokenizer: str) -> dict[str, Any]:
    """The student section."""
    start = None if arm == "teacher" else ARMS[arm].start
    if start is not None:
        return {"model": str(folder_of(setting_name, start, seed, options) / "student")}
    shape = TEACHER if arm == "teacher" else STUDENT
    return {"config": _model(SETTINGS[setting_name], shape), "tokenizer": tokenizer}


def describe(setting_name: str, arm: str, seed: int, options: Options) -> dict[str, Any]:
    """All that decides a run's outcome."""
    setting = SETTINGS[setting_name]
    is_teacher = arm == "teacher"
    steps = max(1, round((setting.teacher_steps if is_teacher else setting.student_steps) * options.scale))
    chosen_arm = ARMS["ce" if is_teacher else arm]
    start = chosen_arm.start
    return {
        "setting": setting_name,
        "arm": arm,
        "seed": seed,
        "method": chosen_arm.method,
        "steps": steps,
        "batch_size": setting.batch_size,
        "max_length": setting.max_length,
        "train": list(setting.train),
        "evaluation": setting.evaluation,
        "vocabulary": VOCABULARY,
        "model": TEACHER if is_teacher else STUDENT,
        "precision": options.precision,
        **({} if start is None else _described_start(setting_name, start, seed, options)),
        **({} if is_teacher else {"teacher": describe(setting_name, "teacher", 0, options)}),
    }


def _described_start(setting_name: str, start: str, seed: int, options: Options) -> dict[str, Any]:
    return {"start": {"learning_rate": LEARNING_RATE_AGAIN, "run": describe(setting_name, start, seed, options)}}


def finished(folder: Path, description: dict[str, Any]) -> dict[str, Any] | None:
    """The figures of a run that was made as it is asked for now, or None."""
    kept = _read(folder / "result.json")
    if kept is None or any(kept.get(name) != value for name, value in description.items()):
        return None
    return kept


def folder_of(setting_name: str, arm: str, seed: int, options: Options) -> Path:
    """Where a run is kept."""
    return options.work / setting_name / (arm if arm == "teacher" else f"{arm}-{seed}")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content


def _task(setting: Setting, options: Options) -> dict[str, Any]:
    return {
        "name": "text",
        "kind": "causal_lm",
        "train_files": [str(options.data / file) for file in setting.train],
        "evaluation_files": {split: [str(options.data / file)] for split, file in setting.evaluation.items()},
        "max_length": setting.max_length,
        "cache_dir": str(options.work / "cache"),
        "metrics": ["perplexity"],
        **setting.task,
    }


def _model(setting: Setting, shape: dict[str, int]) -> dict[str, Any]:
    positions = setting.max_length + setting.answer_tokens
    return {"model_type": "llama", "max_position_embeddings": positions, "tie_word_embeddings": True, **shape}


def train_tokenizer(folder: Path, texts: Iterable[str]) -> str:
    """Folder of a byte-level BPE tokenizer that is trained on the texts, once."""
    if not (folder / "tokenizer.json").is_file():
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=["<eos>", "<pad>"], initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(texts, trainer)
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    return str(folder)


def _texts(setting: Setting, options: Options) -> Iterator[str]:
    for file in setting.train:
        table = pq.read_table(options.data / file)
        for column in table.column_names:
            yield from (text for text in table[column].to_pylist() if text)


def _check_files(setting: Setting, options: Options) -> None:
    for file in (*setting.train, *setting.evaluation.values()):
        if not (options.data / file).is_file():
            raise ConfigurationError(f"--data {options.data}: has no {file}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lm_quality", description="Distillation of language models."
    )
    parser.add_argument("--data", required=True, type=Path, help="folder with lm/ and instruct/ as Parquet")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="comma separated (default: all)")
    parser.add_argument("--arms", default=",".join(ARMS), help="comma separated (default: all)")
    parser.add_argument("--seeds", default="0-2", help='such as "0-2"')
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--scale-steps", type=float, default=1.0, help="multiply all steps, for a trial")
    parser.add_argument("--work", default="runs/lm_quality", help="folder of the runs")
    parser.add_argument("--output", default="runs/lm_quality", help="folder of the results")
    parser.add_argument("--report-only", action="store_true", help="write the report of what is finished")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
