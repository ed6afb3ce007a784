"""`distill`: the whole engine as one call. The command line is this call with a JSON file in front."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from datasets import Dataset

from mixkd_fast import distributed
from mixkd_fast.configuration import Config, Output, Student, Task, Teacher, Training, validate
from mixkd_fast.distillation_module import DistillationModule
from mixkd_fast.engine import Engine, start_distributed
from mixkd_fast.host_memory import give_back_freed_memory, keep_freed_memory
from mixkd_fast.method_setting import setting_of
from mixkd_fast.methods import AnyMethod, FineTune, Method
from mixkd_fast.model_preparation import Loaded
from mixkd_fast.preparation import prepare, print_start
from mixkd_fast.run import Run
from mixkd_fast.run_folder import RunFolder
from mixkd_fast.saving import load_model
from mixkd_fast.summary import finish
from mixkd_fast.watching import watched_ranks


@dataclass(frozen=True)
class Result:
    """What a run leaves behind."""

    student: Any
    """The trained transformers model (the best evaluation's, unless training.keep_best is false), on the CPU."""
    tokenizer: Any
    """Its tokenizer."""
    metrics: dict[str, dict[str, float]]
    """Evaluation split -> metric -> value of that student."""
    directory: Path
    """The run's folder: student/, report.html, metrics.jsonl, summary.json, checkpoints/."""
    summary: dict[str, Any]
    """Everything in summary.json."""


def distill(
    *,
    task: Task | Mapping[str, Any] | str | None = None,
    teacher: Teacher | Mapping[str, Any] | str | torch.nn.Module | None = None,
    student: Student | Mapping[str, Any] | str | torch.nn.Module | None = None,
    train: Dataset | None = None,
    evaluation: Dataset | Mapping[str, Dataset] | None = None,
    method: Method | Mapping[str, Any] | None = None,
    training: Training | Mapping[str, Any] | None = None,
    output: Output | Mapping[str, Any] | str | None = None,
    deepspeed: Mapping[str, Any] | str | None = None,
    plan: Mapping[str, Any] | None = None,
    tokenizer: Any | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Result:
    """Train a student to imitate a teacher and save it; on one process, or on all that a launcher has started.

    Args:
        task: task section, or the name of a known task; may be left out when `train` and `evaluation` are given and
            their columns have usual names (sentence or text, premise + hypothesis, ..., and label).
        teacher: hub name or folder, a loaded transformers model, or a teacher section (whose "model" may
            be a loaded model too: `{"model": model, "zero_stage": 3}`).
        student: hub name or folder, a loaded model (trained in place), or a student section; None starts from the
            teacher's layers.
        train, evaluation: `datasets.Dataset` objects (evaluation also split name -> Dataset) instead of the task's.
        method: `MixKD(...)`, `KD(...)`, `FineTune(...)`, or a mapping with "name"; MixKD() by default.
        training, output, deepspeed: sections of the configuration; `output` may be just the folder.
        plan: section of the configuration that `mixkd-fast plan` reads; a run does not.
        tokenizer: for loaded models whose `name_or_path` does not lead to one.
        resume: go on from the newest checkpoint in the output folder.
        progress: show a progress bar on rank 0.

    Returns: a `Result`.
    Raises: ConfigurationError, DataError, ModelError for bad input, each naming the field; NonFiniteError,
    CheckpointError, Interrupted while running.
    """
    loaded_teacher = teacher.get("model") if isinstance(teacher, Mapping) else teacher
    loaded = Loaded(
        loaded_teacher if isinstance(loaded_teacher, torch.nn.Module) else None,
        student if isinstance(student, torch.nn.Module) else None,
        tokenizer,
        train,
        dict(evaluation) if isinstance(evaluation, Mapping) else evaluation,
    )
    # A method of the caller's own is not among those a JSON can name, so it joins after validation.
    own_method = isinstance(method, Method) and not isinstance(method, get_args(get_args(AnyMethod)[0]))
    fields = {
        "task": {"name": task} if isinstance(task, str) else task,
        "teacher": _model_fields(teacher),
        "student": _model_fields(student),
        "method": FineTune() if own_method else method,
        "training": training,
        "output": {"directory": output} if isinstance(output, str) else output,
        "deepspeed": dict(deepspeed) if isinstance(deepspeed, Mapping) else deepspeed,
        "plan": plan,
    }
    config = validate(Config, {"task": {}} | {name: value for name, value in fields.items() if value is not None})
    if own_method:
        config = config.model_copy(update={"method": method})
    return run_config(config, loaded, resume, progress)


def run_config(config: Config, loaded: Loaded | None = None, resume: bool = False, progress: bool = True) -> Result:
    """`distill` for a validated configuration."""
    loaded = loaded or Loaded()
    device = distributed.choose_device()
    start_distributed(device)
    distributed.share_cores(config.training.threads)
    keeps_memory = device.type == "cpu" and (config.teacher is None or config.teacher.zero_stage == 0)
    if keeps_memory:
        keep_freed_memory()
    checkpoints = f"{config.output.directory}/checkpoints"
    what_next = f"run the same command with --resume to go on from the last checkpoint in {checkpoints}"
    try:
        with watched_ranks(config.training.rank_timeout_s, what_next), RunFolder(config, resume) as folder:
            return _run(config, loaded, folder, device, resume, progress)
    finally:
        if keeps_memory:
            give_back_freed_memory()


def _run(
    config: Config, loaded: Loaded, folder: RunFolder, device: torch.device, resume: bool, progress: bool
) -> Result:
    started = time.time()
    parts = prepare(config, loaded, device)
    setting = setting_of(config, loaded, parts, device)
    config.method.check(setting)
    extras = config.method.build(setting)
    module = DistillationModule(parts.student, parts.teacher, extras, config.method)
    with Engine(module, config.training, parts.deepspeed_config, device, parts.train.source_rows) as engine:
        run = Run(config, folder, parts, engine)
        if resume:
            run.resume()
        print_start(config, parts, engine, run.arithmetic, run.steps)
        run.train(progress)
        summary = finish(run, time.time() - started)
    model, saved_tokenizer = load_model(folder.path / "student", parts.spec.kind == "causal_lm")
    return Result(model, saved_tokenizer, summary["metrics"], folder.path, summary)


def _model_fields(value: Any) -> Any:
    """A model argument as the fields of its section, a loaded model described by its class."""
    if isinstance(value, torch.nn.Module):
        return {"model": f"(loaded {type(value).__name__})"}
    if isinstance(value, Mapping) and isinstance(value.get("model"), torch.nn.Module):
        return {**value, **_model_fields(value["model"])}
    return {"model": value} if isinstance(value, str) else value
