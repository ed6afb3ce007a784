"""The typed configuration of a run: one strict JSON file in, one frozen `Config` out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from mixkd_fast.config_errors import explain
from mixkd_fast.errors import ConfigurationError
from mixkd_fast.language_task import LanguageTask, check_language_fields
from mixkd_fast.lora import Lora
from mixkd_fast.methods import AnyMethod, MixKD
from mixkd_fast.methods.stored_teacher import check_offline
from mixkd_fast.partition import Partition
from mixkd_fast.plan_section import PlannedModels
from mixkd_fast.section import Section
from mixkd_fast.strict_json import apply_overrides, read_object
from mixkd_fast.teacher_section import Offload as Offload
from mixkd_fast.teacher_section import PositiveInt as PositiveInt
from mixkd_fast.teacher_section import Precision as Precision
from mixkd_fast.teacher_section import Teacher as Teacher
from mixkd_fast.teacher_section import Text as Text

_EXTRA_OPTIONS = ("extra_labels", "extra_min_confidence", "extra_agreement", "extra_max_rows")


def _only_one(section: Section, first: str, second: str) -> None:
    one, two = getattr(section, first), getattr(section, second)
    if one is not None and two is not None:
        raise ValueError(f"{first} ({_brief(one)}) and {second} ({_brief(two)}) exclude each other: give one of them")


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


class Task(LanguageTask):
    """What is learned: a known task by name, a hub data set, or the user's own files."""

    name: str = "custom"
    """mnli, qqp, qnli, sst2, mrpc, rte, cola, stsb, demo; or any other name with `hub` or `train_files`."""
    hub: str | None = None
    """Hub data set, such as "nyu-mll/glue"; null takes the known task's own."""
    hub_config: str | None = None
    """Configuration of the hub data set, such as "mnli"."""
    revision: str | None = None
    """Revision of the hub data set."""
    train_files: list[str] | None = None
    """Local training files (csv, tsv, jsonl, json, parquet; txt for causal_lm); they replace the hub data set."""
    streaming: bool = False
    """Read and tokenise train_files (parquet, jsonl; patterns such as "corpus/*.parquet") as training goes on, each
    rank its own part: for corpora larger than memory. Needs label_names where the task does not know them."""
    streaming_window: PositiveInt = 8192
    """Streaming: rows of a micro-batch's part that are shuffled together, in memory."""
    evaluation_files: dict[str, list[str]] | None = None
    """Split name -> local files. The first split is the one that picks the best checkpoint."""
    extra_train_files: list[str] = Field(default=[])
    """More training rows of the same columns (back-translation or other augmentation), appended whole."""
    extra_labels: Literal["file", "teacher"] = "file"
    """Who labels the extra rows: their files, or the teacher, whose probabilities become soft labels."""
    extra_min_confidence: Annotated[float, Field(ge=0, le=1)] | None = None
    """Drop extra rows for which the teacher's largest probability is below this; null keeps them."""
    extra_agreement: bool = False
    """Drop extra rows for which the teacher's most probable class is not the file's label."""
    extra_max_rows: PositiveInt | None = None
    """Use at most this many of the extra rows that pass, drawn by subset_seed; null uses all."""
    text_column: str | None = None
    """Column of the first text, or of the plain text of a causal_lm; null takes the known task's."""
    text_pair_column: str | None = None
    """Column of the second text; null for single sentences (or the known task's)."""
    label_column: str | None = None
    """Column of the label; null takes the known task's, else "label"."""
    soft_label_columns: list[str] | None = None
    """Columns with one probability per class, in label order; rows that lack them use their hard label."""
    kind: Literal["classification", "regression", "causal_lm"] | None = None
    """null takes the known task's, else classification; causal_lm is language modelling, of plain text (packed) or of
    answers to instructions."""
    label_names: list[str] | None = None
    """Class names in label order; needed when labels are text and the file does not carry them."""
    train_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the training rows to use (stratified by label, seeded); extra files are not cut."""
    train_rows: PositiveInt | None = None
    """Number of training rows to use (stratified by label, seeded); not together with train_fraction."""
    evaluation_rows: PositiveInt | None = None
    """First rows of every evaluation split to use; null uses all."""
    subset_seed: int = 0
    """Seed of the draw of train_fraction or train_rows."""
    partition: Partition | None = None
    """Train on one shard of these rows (after train_fraction or train_rows); extra files belong to every shard."""
    max_length: Annotated[int, Field(gt=2)] = 128
    """Longest sequence in tokens; longer rows are truncated and counted. Plain text of a causal_lm is cut into blocks
    of this length."""
    metrics: list[str] | None = None
    """accuracy, f1, matthews, pearson, spearman; of a causal_lm perplexity, nll, token_accuracy, rouge_l. The first
    picks the best checkpoint. null takes the known task's."""
    cache_dir: str | None = None
    """Where tokenised rows are kept; null means ~/.cache/mixkd_fast (or $XDG_CACHE_HOME/mixkd_fast)."""

    @model_validator(mode="after")
    def _consistent(self) -> "Task":
        _only_one(self, "train_fraction", "train_rows")
        check_language_fields(self)
        chosen = {name: getattr(self, name) for name in _EXTRA_OPTIONS if name in self.model_fields_set}
        if not self.extra_train_files and any(value not in (None, False, "file") for value in chosen.values()):
            raise ValueError(f"{', '.join(chosen)}: needs extra_train_files, whose rows are meant")
        if self.label_names is not None and self.soft_label_columns is not None:
            names, columns = len(self.label_names), len(self.soft_label_columns)
            if names != columns:
                raise ValueError(
                    f"label_names has {names} entries and soft_label_columns {columns}: one column per label"
                )
        return self

    @property
    def asks_teacher_about_extra_rows(self) -> bool:
        """Whether the extra rows are labelled or judged by the teacher."""
        return self.extra_labels == "teacher" or self.extra_min_confidence is not None or self.extra_agreement


class Student(Section):
    """The small model that learns. Without a teacher (method finetune) it is the model that is trained."""

    model: Text | None = None
    """Hub name or local folder to start from; null starts from the teacher."""
    revision: str | None = None
    """Revision on the hub."""
    config: dict[str, Any] | None = None
    """A transformers configuration with "model_type" for a student of random weights; not together with `model`."""
    num_layers: PositiveInt | None = None
    """Keep the first layers only; not together with `layers`."""
    layers: list[Annotated[int, Field(ge=0)]] | None = None
    """Which layers to copy, 0-based, in this order."""
    tokenizer: str | None = None
    """Hub name or local folder; null takes the tokenizer of `model`, else the teacher's."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Replaces every dropout probability of the student; null keeps the model's own."""
    attention: str | None = None
    """Attention implementation of transformers; null lets it choose."""
    lora: Lora | None = None
    """Train adapters beside frozen weights (causal_lm); null trains all weights."""
    trust_remote_code: bool = False
    """Run model code from the hub repository."""

    @model_validator(mode="after")
    def _consistent(self) -> "Student":
        _only_one(self, "model", "config")
        _only_one(self, "num_layers", "layers")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError('config needs "model_type", the family of transformers, such as "bert"')
        for field in ("num_layers", "layers"):
            if self.config is not None and getattr(self, field) is not None:
                raise ValueError(f"{field} copies layers, and config starts from random weights: only one may be given")
        made_here = [name for name in ("config", "num_layers", "layers") if getattr(self, name) is not None]
        if self.lora is not None and made_here and not self.lora.merge:
            raise ValueError(
                f"lora saves adapters for a model that is somewhere, and {made_here[0]} makes a new one; set "
                "lora.merge to true to save it whole"
            )
        return self


DEFAULT_EPOCHS = 3.0


class Training(Section):
    """Steps, batches, precision, optimizer, evaluation and saving."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training rows; 3 when `steps` is not given either."""
    steps: PositiveInt | None = None
    """Optimizer steps; not together with `epochs`."""
    batch_size: PositiveInt = 32
    """Rows per optimizer step over all ranks and accumulated micro-batches."""
    micro_batch_size: PositiveInt | None = None
    """Rows per rank per forward; null takes batch_size / ranks. batch_size must be a multiple of it times the ranks."""
    batching: Literal["random", "length"] = "random"
    """Batches of rows drawn at random, or of rows that are equally long (far less padding; seeded, new every epoch)."""
    window: PositiveInt = 8192
    """Batching "length": rows that are sorted by length together; larger pads less and is less random."""
    tokens_per_micro_batch: PositiveInt | None = None
    """Batching "length": limit of clean rows x their padded width per rank and forward, beside micro_batch_size; a step
    then has micro-batches of all lengths."""
    evaluation_batch_size: PositiveInt = 64
    """Rows per rank per forward in evaluation."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    """Peak learning rate of AdamW."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay; not applied to biases and normalisation weights."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = Field(
        default=[0.9, 0.999]
    )
    """AdamW's coefficients of the running averages."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's denominator term."""
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the steps over which the learning rate rises from 0."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warm-up."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are clipped to this global norm; 0 turns clipping off."""
    precision: Precision = "fp32"
    """Arithmetic of the student (and of the teacher, unless it says otherwise)."""
    fused_encoder: bool = True
    """Compute BERT-like models by a forward that leaves out what the classifier does not see; others are unaffected."""
    unpadded: bool = False
    """Leave padding out of the fused layers on a GPU (bf16 or fp16; the student's attention dropout must be 0)."""
    compile: Literal["off", "dynamic", "shapes"] = "off"
    """torch.compile of the fused layers: once for all shapes, or once per padded width with CUDA graphs on a GPU."""
    prefetch: Annotated[int, Field(ge=0, le=64)] = 2
    """Steps whose batches are made ahead in the background."""
    gradient_checkpointing: bool = False
    """Recompute the student's activations in the backward pass to save memory."""
    seed: int = 0
    """Seed of initial weights, row order, partners, lambda and dropout."""
    evaluate_every: PositiveInt | None = None
    """Steps between evaluations; null evaluates once per epoch. The end is always evaluated."""
    log_every: PositiveInt = 1
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: PositiveInt | None = None
    """Steps between checkpoints; null writes one per evaluation."""
    keep_checkpoints: PositiveInt = 2
    """How many checkpoints stay on disk."""
    early_stopping: PositiveInt | None = None
    """Stop after this many evaluations without a better metric."""
    keep_best: bool = True
    """The returned and saved student is the one of the best evaluation, not of the last step."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What a NaN or infinite loss or gradient does: stop the run, or skip the step and count it."""
    threads: PositiveInt | None = None
    """CPU threads of each rank; null shares the cores among the ranks of the machine."""
    rank_timeout_s: PositiveInt | None = 30
    """Several ranks: after this silence of a machine its ranks count as gone and the others stop; null never stops."""

    @model_validator(mode="after")
    def _consistent(self) -> "Training":
        _only_one(self, "epochs", "steps")
        if self.tokens_per_micro_batch is not None and self.batching != "length":
            raise ValueError(f'tokens_per_micro_batch needs batching "length", and batching is "{self.batching}"')
        return self


class Output(Section):
    """Where the run's folder is and what goes into it."""

    directory: Text = "runs/run"
    """Folder of the run: metrics.jsonl, checkpoints, report.html, the student."""
    overwrite: bool = False
    """Start anew in a folder that holds an earlier run (which is deleted)."""
    report: bool = True
    """Write report.html at the end."""


class Config(Section):
    """One run, whole."""

    schema_: Annotated[str | None, Field(alias="$schema")] = None
    """Path of the JSON Schema, for editors."""
    task: Task
    teacher: Teacher | None = None
    student: Student = Student()
    method: AnyMethod = MixKD()
    training: Training = Training()
    output: Output = Output()
    deepspeed: dict[str, Any] | str = Field(default={})
    """DeepSpeed's own configuration, inline or the path of a JSON file; it reaches DeepSpeed untouched."""
    plan: PlannedModels = PlannedModels()

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.method.needs_teacher and self.teacher is None:
            raise ValueError(
                f'teacher: is missing, and method "{self.method.name}" imitates one; add a teacher section '
                'with a model, or use method "finetune"'
            )
        if self.teacher is not None and self.teacher.offline is not None:
            check_offline(self.teacher.offline, self.teacher.model is not None, self.method, self.task.kind)
        if self.teacher is not None and self.teacher.stream and self.training.compile == "shapes":
            raise ValueError(
                'teacher: stream true and training.compile "shapes" exclude each other, because CUDA graphs of two '
                'streams would share memory; leave one out, or use compile "dynamic"'
            )
        if self.task.asks_teacher_about_extra_rows and (self.teacher is None or self.teacher.model is None):
            raise ValueError(
                'teacher: is missing, and the task has it label or judge the extra rows (extra_labels "teacher", '
                "extra_min_confidence, extra_agreement); add a teacher section with a model"
            )
        if self.training.early_stopping is not None and not self.method.trains_classifier:
            raise ValueError(
                f"training: early_stopping {self.training.early_stopping} counts evaluations, and they say nothing "
                f'where method "{self.method.name}", as it is set, trains no classifier; leave it out'
            )
        no_teacher = self.teacher is None or self.teacher.model is None
        if no_teacher and self.student.model is None and self.student.config is None:
            raise ValueError(
                "student: has neither model nor config, and there is no teacher to take layers from; give student.model"
            )
        return self


AnySection = TypeVar("AnySection", bound=Section)


def validate(kind: type[AnySection], fields: Mapping[str, Any], name: str = "") -> AnySection:
    """A section from plain values. Args: name = its dotted name, for messages.

    Raises: ConfigurationError with one line per problem.
    """
    try:
        return kind.model_validate(dict(fields))
    except ValidationError as error:
        raise explain(error, kind, name) from error


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read, override and validate a configuration file. Relative paths in it are relative to the current folder.

    Args: overrides = texts "section.field=value", applied before validation.
    Raises: ConfigurationError that lists every problem.
    """
    return validate(Config, apply_overrides(read_object(path, "--config"), overrides))


@dataclass(frozen=True)
class BatchArithmetic:
    """How the rows of one optimizer step are cut: batch_size = micro_batch_size * accumulation * ranks."""

    batch_size: int
    micro_batch_size: int
    accumulation: int
    ranks: int


def batch_arithmetic(training: Training, ranks: int) -> BatchArithmetic:
    """Derive the micro-batch and the accumulation once.

    Raises: ConfigurationError that names the numbers and the nearest batch sizes that divide.
    """
    size, micro = training.batch_size, training.micro_batch_size
    unit = ranks * (micro or 1)
    if size % unit:
        nearest = " or ".join(str(n) for n in (size // unit * unit, (size // unit + 1) * unit) if n > 0)
        per_rank = f" x training.micro_batch_size {micro}" if micro else ""
        raise ConfigurationError(
            f"training.batch_size = {size}: is not a multiple of {ranks} {'rank' if ranks == 1 else 'ranks'}{per_rank} "
            f"= {unit}; nearest: {nearest}"
        )
    micro = micro or size // ranks
    return BatchArithmetic(size, micro, size // (micro * ranks), ranks)
