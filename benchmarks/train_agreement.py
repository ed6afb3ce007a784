"""Do the arms of `python -m benchmarks train_step` compute the same? Losses and gradients of identical batches.

Every arm is set up as it is timed (precisions, padding, teacher store, compiled or unpadded layers), but without
dropout, which differs from arm to arm; the truth is the textbook arm's arithmetic in fp32.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.train_arms import fields, half, load_models, mixkd_loss, own_width, pad
from mixkd_fast.configuration import Config, batch_arithmetic, validate
from mixkd_fast.data.batching import Batch, micro_batches
from mixkd_fast.deepspeed_config import autocasts
from mixkd_fast.distillation_module import DistillationModule
from mixkd_fast.evaluation import EvaluationPlan
from mixkd_fast.methods import Moment
from mixkd_fast.model_preparation import Loaded
from mixkd_fast.preparation import Prepared, prepare
from mixkd_fast.schedule import stream_of

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
"""How far losses and gradient norms may be from the truth, relative, by the precision of the arm."""
_BATCHES = 3


@dataclass
class Found:
    """One arm's figures, batch by batch."""

    precision: str
    losses: list[float]
    norms: list[float]


def agreement(job: dict[str, Any]) -> dict[str, Any]:
    """Largest relative differences of loss and gradient norm of every arm.

    Returns: "compared": entries of arm, precision, loss, gradient_norm, tolerance; "batches"; "agrees".
    """
    folder = Path(job["work"]) / "agreement"
    found = {}
    batches: list[Batch] = []
    for precision in ("fp32", "bf16"):
        config, parts = _prepared(job, folder, precision)
        module = DistillationModule(parts.student.to(job["device"]), parts.teacher, None, config.method).eval()
        module.autocast = autocasts(config.training, parts.deepspeed_config)
        if not batches:
            batches = _batches(config, parts)
            found[f"mixkd_fast, {precision}, teacher asked"] = _measure(module, precision, _ours(module), batches)
        _keep_logits(config, parts, torch.device(job["device"]))
        stored = [_with_kept_logits(batch, parts) for batch in batches]
        found[f"mixkd_fast, {precision}, teacher's kept logits"] = _measure(module, precision, _ours(module), stored)
        rows = parts.train
        del module, parts
    truth, plain = _plain(job, rows, batches)
    return _compare(truth, found | plain)


def _prepared(job: dict[str, Any], folder: Path, precision: str) -> tuple[Config, Prepared]:
    """The parts of a run of `distill`: as it is timed in bf16, without torch.compile in fp32."""
    sections = fields(job, folder / precision)
    sections["task"]["train_rows"] = min(job["rows"], 4 * job["batch_size"])
    sections["training"]["precision"] = precision
    if precision == "fp32":
        sections["training"].pop("compile", None)
    config = validate(Config, sections)
    return config, prepare(config, Loaded(), torch.device(job["device"]))


def _batches(config: Config, parts: Prepared) -> list[Batch]:
    """The first batches of the run."""
    rows: Any = parts.train
    training, arithmetic = config.training, batch_arithmetic(config.training, 1)
    stream = stream_of(training, rows.lengths, arithmetic, config.method.mixing(), parts.padding.multiple)
    return [
        micro_batches(rows, stream.draw(step), 0, 1, arithmetic.micro_batch_size, parts.padding)[0]
        for step in range(_BATCHES)
    ]


def _keep_logits(config: Config, parts: Prepared, device: torch.device) -> None:
    rows: Any = parts.train
    assert parts.teacher is not None
    plan = EvaluationPlan(config.training.evaluation_batch_size, parts.padding, device, [])
    parts.teacher.keep_logits(config, rows, plan, parts.spec.num_labels, progress=False)


def _with_kept_logits(batch: Batch, parts: Prepared) -> Batch:
    batch = replace(batch)
    assert parts.teacher is not None
    parts.teacher.attach(batch)
    assert batch.teacher_logits is not None, "the store has every row"
    return batch


def _ours(module: DistillationModule) -> Callable[[Batch], Tensor]:
    def loss(batch: Batch) -> Tensor:
        terms, _ = module(batch.to(next(module.parameters()).device), Moment(0, _BATCHES, 0.0))
        return terms.mean(1).sum()

    return loss


def _plain(job: dict[str, Any], rows: Any, batches: list[Batch]) -> tuple[Found, dict[str, Found]]:
    """The truth, and the plain arms as they are timed."""
    teacher, student = load_models(job)
    student.eval()

    def measure(precision: str, padded_to: int | None, autocast: bool) -> Found:
        def loss(batch: Batch) -> Tensor:
            assert batch.partner is not None and batch.lam is not None
            numbers = batch.row_ids[: batch.num_rows].numpy()
            ids, mask, labels = pad(rows, numbers, padded_to or own_width(rows, numbers))
            partner, lam, ids, mask, labels = (
                tensor.to(job["device"]) for tensor in (batch.partner, batch.lam, ids, mask, labels)
            )
            with torch.autocast(job["device"], torch.bfloat16, enabled=autocast):
                return mixkd_loss(teacher, student, (ids, mask, labels), partner, lam)

        return _measure(student, precision, loss, batches)

    truth, found = measure("fp32", job["max_length"], False), {}
    if half(job, "textbook"):
        found["textbook, bf16"] = measure("bf16", job["max_length"], True)
    teacher = teacher.bfloat16()
    found["tuned, bf16"] = measure("bf16", None, half(job, "tuned"))
    return truth, found


def _measure(module: nn.Module, precision: str, loss: Callable[[Batch], Tensor], batches: list[Batch]) -> Found:
    found = Found(precision, [], [])
    for batch in batches:
        module.zero_grad()
        value = loss(batch)
        value.backward()
        norm = torch.nn.utils.get_total_norm(list(_gradients(module)))
        found.losses.append(float(value))
        found.norms.append(float(norm))
    return found


def _gradients(module: nn.Module) -> Iterator[Tensor]:
    return (p.grad for p in module.parameters() if p.grad is not None)


def _compare(truth: Found, arms: dict[str, Found]) -> dict[str, Any]:
    compared = []
    for name, arm in arms.items():
        differences = {
            "loss": _largest_difference(arm.losses, truth.losses),
            "gradient_norm": _largest_difference(arm.norms, truth.norms),
        }
        compared.append({"arm": name, **differences, "tolerance": TOLERANCE[arm.precision]})
    agrees = all(max(entry["loss"], entry["gradient_norm"]) <= entry["tolerance"] for entry in compared)
    return {"compared": compared, "batches": len(truth.losses), "agrees": agrees}


def _largest_difference(values: list[float], truth: list[float]) -> float:
    return max(abs(value - exact) / abs(exact) for value, exact in zip(values, truth, strict=True))
