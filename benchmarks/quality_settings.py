"""What the quality benchmark runs: arms, settings with their budgets, and which arms are compared."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mixkd_fast.configuration import Config, validate
from mixkd_fast.errors import ConfigurationError
from mixkd_fast.methods import Method


@dataclass(frozen=True)
class Arm:
    """A way to train the student."""

    title: str
    method: dict[str, Any]
    """The method section, as a JSON would have it."""
    passes: int = 1
    """How many times the setting's epochs it trains."""
    mixes: bool = False
    """Whether mixed rows double its forwards: then its fair control is KD with doubled steps."""


_WEIGHTS = {"mle_weight": 1.0, "kd_weight": 0.0, "sm_weight": 0.0, "tmkd_weight": 0.0}

ARMS = {
    "ft": Arm("FT", {"name": "finetune"}),
    "kd": Arm("KD", {"name": "kd"}),
    "kd_2x": Arm("KD, twice the steps", {"name": "kd"}, passes=2),
    "kd_sm": Arm("KD+SM", {"name": "mixkd", **_WEIGHTS, "kd_weight": 1.0, "sm_weight": 1.0}, mixes=True),
    "tmkd": Arm("TMKD", {"name": "mixkd", **_WEIGHTS, "tmkd_weight": 1.0}, mixes=True),
    "sm_tmkd": Arm("SM+TMKD", {"name": "mixkd", **_WEIGHTS, "sm_weight": 1.0, "tmkd_weight": 1.0}, mixes=True),
    # The other terms are KD's, so that the difference from KD is what the layers give.
    "pkd": Arm("PKD", {"name": "pkd", "mle_weight": 1.0, "kd_weight": 1.0, "temperature": 2.0}),
    # Its consistency term needs mixed rows too, in its first half.
    "cr_ild": Arm("CR-ILD", {"name": "cr_ild"}, mixes=True),
    "cr_ild_mixkd": Arm("CR-ILD+MixKD", {"name": "cr_ild", "sm_weight": 1.0, "tmkd_weight": 1.0}, mixes=True),
    "cckd": Arm("CCKD", {"name": "cckd"}),
    "label_revision": Arm("label revision", {"name": "label_revision"}),
}

CLAIM = ("sm_tmkd", "kd")
"""The published claim: MixKD over KD, most where rows are few."""


@dataclass(frozen=True)
class Setting:
    """A task, its training rows and the budget that every arm gets."""

    title: str
    task: str
    """Folder of the data: FOLDER/task/train.parquet and FOLDER/task/SPLIT.parquet."""
    max_length: int
    mean_tokens: float
    """Tokens of a row after the cut, measured on 2,000 training rows; for estimates of the time only."""
    rows: int
    """Training rows in the file, or in the subset; for estimates of the time only."""
    epochs: float
    teacher_epochs: float
    seeds: int
    """Seeds unless --seeds says otherwise."""
    fraction: float | None = None
    """Share of the training rows, drawn anew by every seed."""
    splits: tuple[str, ...] = ("validation",)
    start: str | None = None
    """Setting whose models this one's start from: its teacher from that teacher, its students from the student that KD
    trained there with seed 0. None takes the pretrained encoder and its first layers."""
    batch_size: int = 32
    learning_rate: float = 1e-4
    teacher_learning_rate: float = 1e-4


# RTE and MRPC are too small to teach the encoder to compare two sentences: a teacher of RTE stayed at 55 %, students of
# MRPC below the larger class, at learning rates from 1e-4 to 6e-4. As is common, MNLI comes first there.
SETTINGS = {
    "sst2_1pct": Setting("SST-2, 1 %", "sst2", 64, 13.0, 673, 10, 1, 5, fraction=0.01),
    "rte": Setting("RTE", "rte", 128, 66.2, 2490, 2, 5, 5, start="mnli"),
    "mrpc": Setting("MRPC", "mrpc", 96, 53.6, 3668, 1.5, 4, 5, start="mnli"),
    "sst2_10pct": Setting("SST-2, 10 %", "sst2", 64, 13.0, 6735, 3, 1, 5, 0.1, batch_size=64, learning_rate=2e-4),
    "sst2": Setting("SST-2", "sst2", 64, 13.0, 67349, 1, 1, 1, batch_size=128, learning_rate=2e-4),
    "ag_news": Setting(
        "AG News, 10,706 rows", "ag_news", 64, 50.2, 10706, 1, 2, 1, None, ("test",), batch_size=64, learning_rate=2e-4
    ),
    "qnli": Setting("QNLI, 11,803 rows", "qnli", 96, 48.8, 11803, 2, 4, 1, batch_size=64, learning_rate=2e-4),
    "mnli": Setting(
        "MNLI, 26,413 rows",
        "mnli",
        64,
        38.5,
        26413,
        1,
        2,
        1,
        splits=("validation_matched", "validation_mismatched"),
        batch_size=64,
        learning_rate=2e-4,
    ),
}
TEACHER_BATCH_SIZE = 32


def pairs(arms: Iterable[str]) -> list[tuple[str, str]]:
    """The comparisons that matter among some arms: each with KD and with FT; those that mix with KD's doubled steps."""
    chosen = [name for name in ARMS if name in set(arms)]
    found: list[tuple[str, str]] = []
    for control in ("kd", "ft", "kd_2x"):
        for name in chosen:
            wanted = ARMS[name].mixes if control == "kd_2x" else name not in ("ft", control)
            if wanted and control in chosen:
                found.append((name, control))
    return found


def method_of(arm: str) -> Method:
    """The arm's method, checked as a JSON's method section is.

    Raises: ConfigurationError that names the arm, where its method or an option does not exist.
    """
    fields = {"task": {}, "teacher": {"model": "teacher"}, "method": ARMS[arm].method}
    try:
        return validate(Config, fields).method
    except ConfigurationError as error:
        raise ConfigurationError(f"--arms {arm}: {json.dumps(ARMS[arm].method)} is no method here: {error}") from error


def exists(arm: str) -> bool:
    """Whether the arm's method and its options exist."""
    try:
        method_of(arm)
    except ConfigurationError:
        return False
    return True


def chosen(text: str, known: Iterable[str], option: str) -> list[str]:
    """Names from a comma-separated option, in the order given, each once.

    Raises: ConfigurationError for an unknown name.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    allowed = list(known)
    for name in names:
        if name not in allowed:
            raise ConfigurationError(f"{option} {name}: is not one of {', '.join(allowed)}")
    if not names:
        raise ConfigurationError(f"{option} {text!r}: at least one of {', '.join(allowed)} is needed")
    return names


def seed_numbers(text: str) -> list[int]:
    """Seeds from "3", "0-4" or "0,2,5-7".

    Raises: ConfigurationError for anything else.
    """
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise ConfigurationError(f'--seeds {text!r}: must be numbers and ranges such as "0-4" or "0,2,5-7"')
        numbers += range(int(first), int(last or first) + 1)
    return list(dict.fromkeys(numbers))
