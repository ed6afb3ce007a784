"""One arm of `python -m benchmarks train_step`, in a process of its own: python -m benchmarks.train_arms ARM JOB OUT

Every arm trains the same student for the same epochs of the same rows with the same loss: MixKD with KD, SM and TMKD
weighted 1. Models and data are made by `train_step.py`; the job file says where they are.

- textbook: transformers and plain PyTorch; rows padded to the longest allowed, clean and mixed rows in separate
  forwards, fp32 on the CPU (bf16 autocast on a GPU), eager losses.
- tuned: batches of rows of like length padded to their longest, bf16 autocast and teacher, fused AdamW, SDPA.
  tuned_compiled: the same with torch.compile of both models; tuned_reusing: in a process that keeps freed memory (CPU).
- mixkd_fast: `distill` as its users call it.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from mixkd_fast.data.tokenization import TokenRows, tokenize_rows

TEMPERATURE = 2.0
Padded = tuple[Tensor, Tensor, Tensor]


def main() -> None:
    arm, job_file, output = sys.argv[1:]
    job = json.loads(Path(job_file).read_text())
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    result = ours(job) if arm == "mixkd_fast" else Loop(job, arm).run()
    result["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if job["device"] == "cuda":
        result["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    Path(output).write_text(json.dumps(result))


def load_rows(job: dict[str, Any]) -> TokenRows:
    """The training rows as every arm reads them."""
    from datasets import Dataset

    lines = [json.loads(line) for line in Path(job["train"]).read_text().splitlines()]
    table = Dataset.from_dict(
        {"text": [line["sentence"] for line in lines], "label": [line["label"] for line in lines],
         "row": list(range(len(lines)))}
    )  # fmt: skip
    return tokenize_rows(table, AutoTokenizer.from_pretrained(job["teacher"]), job["max_length"], None)


def load_models(job: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """Teacher, frozen, and a student of its first layers, in fp32."""
    teacher = AutoModelForSequenceClassification.from_pretrained(job["teacher"], attn_implementation="sdpa").eval()
    student = AutoModelForSequenceClassification.from_pretrained(job["student"], attn_implementation="sdpa").train()
    return teacher.requires_grad_(False).to(job["device"]), student.to(job["device"])


def pad(rows: TokenRows, row_ids: np.ndarray[Any, Any], width: int, device: str) -> Padded:
    """Token ids, attention mask and labels of some rows."""
    ids = torch.zeros((len(row_ids), width), dtype=torch.int64)
    for place, row in enumerate(row_ids):
        tokens = rows.row(int(row))
        ids[place, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
    lengths = torch.from_numpy(rows.lengths[row_ids])
    mask = (torch.arange(width) < lengths[:, None]).to(torch.int64)
    labels = torch.from_numpy(rows.labels[row_ids])
    return ids.to(device), mask.to(device), labels.to(device)


def mixkd_loss(teacher: nn.Module, student: nn.Module, batch: Padded, partner: Tensor, lam: Tensor) -> Tensor:
    """CE + tau^2 KL on clean rows, the same on mixed rows with mixed labels; four forwards, as one would write it."""
    ids, mask, labels = batch
    weight = lam[:, None, None]

    def mixed(model: Any) -> Tensor:
        words = model.get_input_embeddings()(ids)
        embedded = (weight * words + (1 - weight) * words[partner]).to(words.dtype)
        logits: Tensor = model(inputs_embeds=embedded, attention_mask=mask | mask[partner]).logits
        return logits.float()

    with torch.no_grad():
        teacher_clean = teacher(input_ids=ids, attention_mask=mask).logits.float()
        teacher_mixed = mixed(teacher)
    clean = student(input_ids=ids, attention_mask=mask).logits.float()
    blended = mixed(student)
    loss = F.cross_entropy(clean, labels) + _kl(clean, teacher_clean) + _kl(blended, teacher_mixed)
    own = F.cross_entropy(blended, labels, reduction="none")
    other = F.cross_entropy(blended, labels[partner], reduction="none")
    return loss + (lam * own + (1 - lam) * other).mean()


def _kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    student_log, teacher_log = (F.log_softmax(z / TEMPERATURE, -1) for z in (student_logits, teacher_logits))
    return TEMPERATURE**2 * F.kl_div(student_log, teacher_log, log_target=True, reduction="batchmean")


class Loop:
    """A training loop in plain PyTorch."""

    def __init__(self, job: dict[str, Any], arm: str) -> None:
        self.job, self.arm, self.device = job, arm, job["device"]
        self.rows = load_rows(job)
        self.teacher, self.student = load_models(job)
        if arm != "textbook":
            self.teacher = self.teacher.bfloat16()
        if arm == "tuned_compiled":
            self.teacher, self.student = (torch.compile(model, dynamic=True) for model in (self.teacher, self.student))
        self.half = arm != "textbook" or self.device == "cuda"
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-5, fused=arm != "textbook")
        self.rng = np.random.default_rng(0)

    def run(self) -> dict[str, Any]:
        """Train; the time of every epoch, without what came before the first timed step."""
        for number, batch in enumerate(self._epoch()):
            if number >= self.job["warmup_steps"]:
                break
            self._step(batch)
        limit = self.job["textbook_steps"] if self.arm == "textbook" else None
        epochs = []
        for _ in range(1 if limit else self.job["epochs"]):
            started, rows, tokens = self._now(), 0, 0
            for number, row_ids in enumerate(self._epoch()):
                if number == limit:
                    break
                self._step(row_ids)
                rows, tokens = rows + len(row_ids), tokens + int(self.rows.lengths[row_ids].sum())
            epochs.append({"seconds": self._now() - started, "rows": rows, "tokens": tokens})
        return {"epochs": epochs, "store_seconds": 0.0}

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _epoch(self) -> Iterator[np.ndarray[Any, Any]]:
        """Row numbers of every batch: random, or of like length within pools of 50 batches, as group_by_length does."""
        size = self.job["batch_size"]
        order = self.rng.permutation(len(self.rows))
        if self.arm != "textbook":
            pools = [order[start : start + 50 * size] for start in range(0, len(order), 50 * size)]
            order = np.concatenate([pool[np.argsort(-self.rows.lengths[pool], kind="stable")] for pool in pools])
        batches = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
        yield from (batches[number] for number in self.rng.permutation(len(batches)))

    def _step(self, row_ids: np.ndarray[Any, Any]) -> None:
        width = self.job["max_length"]
        if self.arm != "textbook":
            width = -(-int(self.rows.lengths[row_ids].max()) // 8) * 8
        batch = pad(self.rows, row_ids, width, self.device)
        partner = torch.randperm(len(row_ids), device=self.device)
        lam = torch.distributions.Beta(0.4, 0.4).sample((len(row_ids),)).to(self.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.half):
            loss = mixkd_loss(self.teacher, self.student, batch, partner, lam)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()


def ours(job: dict[str, Any]) -> dict[str, Any]:
    """`distill` on the same files; with job["profile"] a few steps under the profiler instead."""
    from mixkd_fast import MixKD, distill

    folder = Path(job["work"]) / f"run-{time.time_ns()}"
    steps = {"steps": job["profile"]} if job.get("profile") else {"epochs": job["epochs"]}

    def run() -> Any:
        return distill(
            task={
                "train_files": [job["train"]],
                "evaluation_files": {"validation": [job["validation"]]},
                "max_length": job["max_length"],
                "cache_dir": str(folder / "cache"),
                # Two epochs of few rows under the profiler: without a second one no logits would be kept.
                "train_rows": min(job["rows"], job["profile"] * job["batch_size"] // 2) if job.get("profile") else None,
            },
            # A new store: building it is part of what is measured.
            teacher={"model": job["teacher"], "store_dir": str(folder / "store")},
            student={"model": job["student"]},
            method=MixKD(kd_weight=1.0, temperature=TEMPERATURE),
            training={
                **steps,
                "batch_size": job["batch_size"],
                "learning_rate": 1e-5,
                "precision": "bf16",
                "batching": "length",
                "keep_best": False,
                "log_every": 16,
                "threads": job["threads"],
                **job.get("training", {}),
            },
            output={"directory": str(folder / "run"), "report": False},
            progress=False,
        )

    if job.get("profile"):
        return {"parts_ms": _profiled(run, job["profile"], job["device"])}
    summary = run().summary
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {"epochs": _epochs(lines, summary, job), "store_seconds": summary["teacher"]["kept_logits"]["seconds"]}


def _epochs(lines: list[dict[str, Any]], summary: dict[str, Any], job: dict[str, Any]) -> list[dict[str, Any]]:
    """Seconds of each epoch, from the log's rates; their sum is what the run says it took."""
    count, training = job["epochs"], summary["training"]
    seconds, rows, before = [0.0] * count, [training["steps"] * training["batch_size"] / count] * count, 0
    tokens_per_row = training["tokens_per_s"] * training["seconds"] / sum(rows)
    lines = [line for line in lines if line["kind"] == "train"]
    for line in lines:
        steps, before = line["step"] - before, line["step"]
        seconds[min(count - 1, int(line["epoch"] - 1e-9))] += steps * line["step_ms"] / 1e3
    scale = training["seconds"] / sum(seconds)
    if not all(seconds):
        # Epochs shorter than the distance of the log's lines.
        seconds, scale = [training["seconds"] / count] * count, 1.0
    elif job["device"] == "cuda":
        # As in the other arms, the first steps are not counted: models are compiled in them.
        seconds[0] -= lines[0]["step"] * lines[0]["step_ms"] / 1e3
        rows[0] -= lines[0]["step"] * training["batch_size"]
    return [
        {"seconds": value * scale, "rows": number, "tokens": number * tokens_per_row}
        for value, number in zip(seconds, rows, strict=True)
    ]


def _profiled(run: Callable[[], object], steps: int, device: str) -> dict[str, float]:
    """Median milliseconds of the parts of a step over the later half of the steps."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as profiler:
        run()
    events = profiler.events()
    spans: dict[str, list[tuple[float, float]]] = {}
    for event in events:
        if event.name.startswith("mixkd_fast::") and event.name.count("::") == 1:
            spans.setdefault(event.name.removeprefix("mixkd_fast::"), []).append(
                (event.time_range.start, event.time_range.end)
            )
    forwards = sorted(spans["forward"])[-(steps // 2) - 1 :]
    parts = {}
    for name in ("forward", "teacher", "backward", "optimizer"):
        later = [end - start for start, end in spans[name] if start >= forwards[0][0] and start < forwards[-1][0]]
        parts[name] = float(np.median(later)) / 1e3
    period = float(np.median(np.diff([start for start, _ in forwards]))) / 1e3
    result = {
        "teacher": parts["teacher"],
        "student forward and losses": parts["forward"] - parts["teacher"],
        "backward": parts["backward"],
        "clipping and AdamW": parts["optimizer"],
        "everything else": max(0.0, period - parts["forward"] - parts["backward"] - parts["optimizer"]),
    }
    if device == "cuda":
        kernels = sorted(
            (event.time_range.start, event.time_range.end)
            for event in events
            if event.device_type == torch.autograd.DeviceType.CUDA and event.time_range.start >= forwards[0][0]
        )
        result["device idle share"] = _idle_share(kernels)
    return result


def _idle_share(intervals: list[tuple[float, float]]) -> float:
    """Share of the span that no interval covers."""
    busy, reached = 0.0, intervals[0][0]
    for start, end in intervals:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1 - busy / (reached - intervals[0][0])


if __name__ == "__main__":
    main()
