"""Known tasks, one table row each, and what a run's `task` section means once the row is merged in."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from mixkd_fast.configuration import Task
from mixkd_fast.errors import ConfigurationError, DataError
from mixkd_fast.language_task import LANGUAGE_METRICS
from mixkd_fast.partition import Partition

Kind = Literal["classification", "regression", "causal_lm"]

METRICS: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy", "f1", "matthews"),
    "regression": ("pearson", "spearman"),
    "causal_lm": LANGUAGE_METRICS,
}
_DEFAULT_METRICS = {
    "classification": ("accuracy",),
    "regression": ("pearson", "spearman"),
    "causal_lm": ("perplexity", "token_accuracy"),
}
GLUE = "nyu-mll/glue"


@dataclass(frozen=True)
class KnownTask:
    """A table row: where the data set is, what its columns mean and how it is scored."""

    text: str
    text_pair: str | None = None
    label_names: tuple[str, ...] | None = None
    kind: Kind = "classification"
    metrics: tuple[str, ...] = ("accuracy",)
    """The first picks the best checkpoint."""
    evaluation: tuple[str, ...] = ("validation",)
    hub: str | None = GLUE


_ENTAILS = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")

# The name is also the hub configuration. QQP and MRPC put accuracy before F1: published student figures are accuracies.
KNOWN_TASKS: dict[str, KnownTask] = {
    "mnli": KnownTask("premise", "hypothesis", _NLI, evaluation=("validation_matched", "validation_mismatched")),
    "qqp": KnownTask("question1", "question2", ("not_duplicate", "duplicate"), metrics=("accuracy", "f1")),
    "qnli": KnownTask("question", "sentence", _ENTAILS),
    "sst2": KnownTask("sentence", None, ("negative", "positive")),
    "mrpc": KnownTask("sentence1", "sentence2", ("not_equivalent", "equivalent"), metrics=("accuracy", "f1")),
    "rte": KnownTask("sentence1", "sentence2", _ENTAILS),
    "cola": KnownTask("sentence", None, ("unacceptable", "acceptable"), metrics=("matthews", "accuracy")),
    "stsb": KnownTask("sentence1", "sentence2", None, "regression", ("pearson", "spearman")),
    "demo": KnownTask("premise", "hypothesis", _NLI, hub=None),
}

# Column names from which the texts of an unknown task are recognised.
_USUAL_PAIRS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question", "sentence"),
    ("question1", "question2"),
)
_USUAL_SINGLES = ("sentence", "text")


@dataclass(frozen=True)
class TaskSpec:
    """A task with every default filled in. `text_column` and `label_names` may stay None until the data is open."""

    name: str
    kind: Kind
    text_column: str | None
    text_pair_column: str | None
    label_column: str
    soft_label_columns: tuple[str, ...] | None
    label_names: tuple[str, ...] | None
    metrics: tuple[str, ...]
    """The first picks the best checkpoint."""
    hub: str | None
    hub_config: str | None
    revision: str | None
    train_files: tuple[str, ...] | None
    evaluation_files: dict[str, tuple[str, ...]] | None
    extra_train_files: tuple[str, ...]
    reads_extra_labels: bool
    """False if the teacher labels the extra rows and nothing needs to be known about their files' labels."""
    evaluation_splits: tuple[str, ...] | None
    """Split names of the hub data set; None takes what it has."""
    train_fraction: float | None
    train_rows: int | None
    evaluation_rows: int | None
    subset_seed: int
    partition: Partition | None
    prompt_column: str | None = None
    """A causal language model learns instructions where this is set, else plain text."""
    input_column: str | None = None
    response_column: str | None = None

    @property
    def num_labels(self) -> int:
        """Width of the logits: classes, 1 for a regression, 0 for a causal language model (its vocabulary's affair)."""
        if self.kind != "classification":
            return 1 if self.kind == "regression" else 0
        assert self.label_names is not None, "label names are known once the data is open"
        return len(self.label_names)


def nearest(name: str, candidates: Iterable[str]) -> str:
    """' (nearest: "x")' for the candidate most like `name`, or '' if none is alike."""
    matches = difflib.get_close_matches(name.lower(), sorted(candidates), n=1, cutoff=0.5)
    return f' (nearest: "{matches[0]}")' if matches else ""


def quoted(names: Iterable[str]) -> str:
    """Names for an error message: "a", "b"."""
    return ", ".join(f'"{name}"' for name in names) or "none"


def resolve(task: Task, in_memory: bool = False) -> TaskSpec:
    """Merge a task's fields with its table row.

    Args: in_memory, the training rows are handed over as an object, so that neither hub nor files are needed.
    Raises: ConfigurationError for an unknown task without data and for fields that contradict each other.
    """
    known = KNOWN_TASKS.get(task.name)
    _check_source(task, known, in_memory)
    own_data = in_memory or task.train_files is not None or task.hub is not None
    kind: Kind = task.kind or (known.kind if known else "classification")
    if known and kind != known.kind and not own_data:
        raise ConfigurationError(
            f'task.kind is "{kind}", but task.name "{task.name}" is a {known.kind}: leave task.kind out, '
            "or give task.train_files or task.hub"
        )
    same_kind = known is not None and kind == known.kind
    metrics = tuple(task.metrics) if task.metrics is not None else None
    if metrics is None:
        metrics = known.metrics if known and same_kind else _DEFAULT_METRICS[kind]
    _check_labels(task, kind)
    _check_metrics(metrics, kind)
    text = task.text_column or (known.text if known else None)
    pair = task.text_pair_column or (known.text_pair if known else None)
    if pair is not None and (text is None or text == pair):
        raise ConfigurationError(
            f'task.text_pair_column is "{pair}" and task.text_column is '
            f"{'null' if text is None else quoted([text])}: two different columns are needed"
        )
    uses_hub = task.train_files is None and not in_memory
    hub = (task.hub or (known.hub if known else None)) if uses_hub else None
    default_config = task.name if known and task.hub is None else None
    names = task.label_names if task.label_names is not None else (known.label_names if known and same_kind else None)
    return TaskSpec(
        name=task.name,
        kind=kind,
        text_column=text,
        text_pair_column=pair,
        label_column=task.label_column or "label",
        soft_label_columns=tuple(task.soft_label_columns) if task.soft_label_columns is not None else None,
        label_names=tuple(names) if names is not None else None,
        metrics=metrics,
        hub=hub,
        hub_config=(task.hub_config or default_config) if hub else None,
        revision=task.revision if hub else None,
        train_files=tuple(task.train_files) if task.train_files is not None else None,
        evaluation_files=(
            {split: tuple(files) for split, files in task.evaluation_files.items()}
            if task.evaluation_files is not None
            else None
        ),
        extra_train_files=tuple(task.extra_train_files),
        reads_extra_labels=task.extra_labels == "file" or task.extra_agreement,
        evaluation_splits=known.evaluation if known and task.hub is None else None,
        train_fraction=task.train_fraction,
        train_rows=task.train_rows,
        evaluation_rows=task.evaluation_rows,
        subset_seed=task.subset_seed,
        partition=task.partition,
        prompt_column=task.prompt_column,
        input_column=task.input_column,
        response_column=task.response_column,
    )


def detect_columns(spec: TaskSpec, columns: list[str], where: str) -> TaskSpec:
    """Fill in the text columns of a task that names none, from the columns of its first file or data set.

    Raises: DataError when no usual name, or more than one possibility, is there.
    """
    if spec.text_column is not None:
        return spec
    found: list[tuple[str, str | None]] = [pair for pair in _USUAL_PAIRS if set(pair) <= set(columns)]
    taken = {name for pair in found for name in pair}
    found += [(name, None) for name in _USUAL_SINGLES if name in columns and name not in taken]
    if len(found) == 1:
        return replace(spec, text_column=found[0][0], text_pair_column=found[0][1])
    problem = "no usual text column" if not found else "more than one possible choice of text columns"
    raise DataError(
        f"{where} has {problem}; it has: {quoted(columns)}. Set task.text_column (and task.text_pair_column for pairs)"
    )


def _check_source(task: Task, known: KnownTask | None, in_memory: bool) -> None:
    has_files = task.train_files is not None
    if known is None and not (in_memory or has_files or task.hub):
        raise ConfigurationError(
            f'task.name is "{task.name}", which is not a known task{nearest(task.name, KNOWN_TASKS)}; '
            f"allowed: {quoted(KNOWN_TASKS)}, or any name together with task.hub or task.train_files"
        )
    if in_memory and (has_files or task.hub):
        field = "task.train_files" if has_files else "task.hub"
        raise ConfigurationError(f"training rows are passed as an object and {field} is set: only one may be given")
    if has_files and task.hub:
        raise ConfigurationError(f'task.hub is "{task.hub}" and task.train_files is set: only one may be given')
    uses_hub = not (in_memory or has_files) and (task.hub is not None or (known is not None and known.hub is not None))
    for field in ("hub_config", "revision"):
        if getattr(task, field) is not None and not uses_hub:
            raise ConfigurationError(
                f'task.{field} is "{getattr(task, field)}", but no hub data set is used: leave it out or set task.hub'
            )
    lists = {"train_files": task.train_files}
    lists |= {f'evaluation_files["{split}"]': files for split, files in (task.evaluation_files or {}).items()}
    for field, files in lists.items():
        if files is not None and not files:
            raise ConfigurationError(f"task.{field} is []: at least one file is needed")
    if task.evaluation_files is not None and not task.evaluation_files:
        raise ConfigurationError('task.evaluation_files is {}: name at least one split, as {"validation": ["dev.tsv"]}')


def _check_labels(task: Task, kind: Kind) -> None:
    if kind == "causal_lm":
        return  # the section itself refuses them
    if kind == "regression":
        for field in ("label_names", "soft_label_columns"):
            if getattr(task, field) is not None:
                raise ConfigurationError(f"task.{field} is set, but task.kind is regression: leave it out")
        if task.extra_min_confidence is not None or task.extra_agreement:
            field = "extra_agreement" if task.extra_agreement else "extra_min_confidence"
            raise ConfigurationError(
                f"task.{field} is {getattr(task, field)}, but a regression has no class probabilities to judge by: "
                'leave it out (extra_labels "teacher" and extra_max_rows work)'
            )
        return
    for field in ("label_names", "soft_label_columns"):
        values: list[str] | None = getattr(task, field)
        if values is not None and (len(values) < 2 or len(set(values)) < len(values)):
            raise ConfigurationError(f"task.{field} is {values}: two or more different names are needed")


def _check_metrics(metrics: tuple[str, ...], kind: Kind) -> None:
    if not metrics:
        raise ConfigurationError(f"task.metrics is []: allowed for a {kind} are {quoted(METRICS[kind])}")
    for metric in metrics:
        if metric not in METRICS[kind]:
            raise ConfigurationError(
                f'task.metrics holds "{metric}"{nearest(metric, METRICS[kind])}; '
                f"allowed for a {kind}: {quoted(METRICS[kind])}"
            )
