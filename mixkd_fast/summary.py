"""The end of a run: the saved student, its model card, summary.json and report.html."""

import importlib.metadata
import platform
import shutil
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mixkd_fast import distributed
from mixkd_fast.checkpoint import replace_folder, write_on_rank_zero
from mixkd_fast.facts import device_name, used_backends
from mixkd_fast.model_card import write_model_card
from mixkd_fast.models import count_parameters, describe_model
from mixkd_fast.report import write_report
from mixkd_fast.run import Run, peak_memory_mib
from mixkd_fast.run_folder import write_json
from mixkd_fast.version import __version__

_PACKAGES = ("torch", "transformers", "datasets", "deepspeed", "numpy")


def finish(run: Run, seconds: float) -> dict[str, Any]:
    """Save the student that the configuration asks for and write what a person reads. Collective.

    Returns: the content of summary.json, on every rank.
    """
    config, folder, state = run.config, run.folder.path, run.state
    peaks = distributed.gather_objects(peak_memory_mib(run.engine.device))
    keep_best = run.keeps_best and state.best is not None
    further = {f"student_{number + 1}": run.evaluate_further(number) for number in range(1, run.engine.num_students)}
    metrics = state.best["metrics"] if keep_best and state.best is not None else state.metrics
    texts = state.best["texts"] if keep_best and state.best is not None else state.texts
    summary = {
        "version": __version__,
        "task": run.parts.spec.name,
        "kind": run.parts.spec.kind,
        "method": config.method.name,
        "teacher": _teacher_summary(run),
        "student": {**describe_model(run.parts.student.model), "parameters": run.parts.num_student_parameters},
        "data": run.parts.data_summary(),
        "training": {
            "steps": state.step,
            "epochs": run.stream.epoch(state.step),
            "seconds": state.training_seconds,
            "total_seconds": seconds,
            "samples_per_s": state.samples / state.training_seconds if state.training_seconds else None,
            "tokens_per_s": state.tokens / state.training_seconds if state.training_seconds else None,
            "batch_size": run.arithmetic.batch_size,
            "micro_batch_size": run.arithmetic.micro_batch_size,
            "accumulation": run.arithmetic.accumulation,
            "ranks": run.ranks,
            "device": device_name(run.engine.device),
            "precision": config.training.precision,
            "zero_stage": run.engine.zero_stage,
            "teacher_zero_stage": config.teacher.zero_stage if config.teacher else None,
            "peak_memory_mib": max(peaks),
            "skipped_steps": state.skipped_steps,
            "stopped_early": state.stopped_early,
        },
        "inference": {
            "samples_per_s": state.evaluation_rows_per_s,
            "teacher_samples_per_s": run.teacher_rows_per_s,
        },
        "best": None if state.best is None else {k: state.best[k] for k in ("step", "split", "metric", "value")},
        "metrics": metrics,
        **({"further_students": further} if further else {}),
        **({"samples": {split: run.answers[split].samples(rows) for split, rows in texts.items()}} if texts else {}),
        "backends": used_backends(run.engine.device, run.plan.language),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES}
        | {"python": platform.python_version()},
        "started": run.started.isoformat(timespec="seconds"),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if not keep_best:
        run.save_student(folder / "student")
    for number, name in enumerate(further, start=1):
        run.save_student(folder / name, number)

    def write() -> None:
        if keep_best and state.best is not None:
            best = run.best_folder(state.best["step"])
            replace_folder(folder / "student", lambda aside: _copy(best, aside))
        write_model_card(
            folder / "student", summary, config.model_dump(mode="json", by_alias=True, serialize_as_any=True)
        )
        write_json(folder / "summary.json", summary)
        if config.output.report:
            write_report(folder)

    write_on_rank_zero(folder, write)
    _print_end(run, summary)
    return summary


def _teacher_summary(run: Run) -> dict[str, Any] | None:
    if run.parts.teacher is None or run.config.teacher is None:
        return None
    teacher = run.parts.teacher
    known: dict[str, Any] = {"model": run.config.teacher.model, "metrics": run.teacher_metrics}
    if teacher.offline is not None:
        known |= {"model": known["model"] or teacher.offline.origin.teacher, "offline": teacher.offline.facts()}
    if not teacher.has_model:
        return known
    return {
        **known,
        "parameters": count_parameters(teacher.model),
        "kept_logits": teacher.kept,
        **describe_model(teacher.model),
    }


def _copy(source: Path, target: Path) -> None:
    for path in source.iterdir():
        shutil.copy2(path, target / path.name)


def _print_end(run: Run, summary: dict[str, Any]) -> None:
    folder, config = run.folder.path, run.config
    which = ""
    if run.keeps_best and summary["best"]:
        which = f" of step {summary['best']['step']} (best {summary['best']['metric']})"
    for split, values in summary["metrics"].items():
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        distributed.say(f"student{which} on {split}: {shown}")
    for name, values in summary.get("further_students", {}).items():
        shown = "  ".join(f"{split} {next(iter(metrics.values())):.4f}" for split, metrics in values.items())
        distributed.say(f"{name}: {shown}; {folder / name}")
    distributed.say(f"student: {folder / 'student'}")
    if config.output.report:
        distributed.say(f"report:  {folder / 'report.html'}")
