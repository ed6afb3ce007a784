"""One arm of `python -m benchmarks train_step`, in a process of its own: python -m benchmarks.train_arms ARM JOB OUT

Every arm trains the same student for the same epochs of the same rows with the same loss: MixKD with KD, SM and TMKD
weighted 1. Models and data are made by `train_step.py`; the job file says where they are.

- textbook: transformers and plain PyTorch; rows padded to the longest allowed, clean and mixed rows in separate
  forwards, fp32 on the CPU (bf16 autocast on a GPU), eager losses.
- tuned: batches of rows of like length padded to their longest, bf16 autocast and teacher, fused AdamW, SDPA; on a GPU
  batches are made by a DataLoader's workers, in pinned memory, and copied while the GPU computes. tuned_compiled: the
  same with torch.compile of both models; tuned_reusing: in a process that keeps freed memory (CPU).
- mixkd_fast: `distill` as its users call it.

"agreement" in the place of an arm compares their losses and gradients: see `train_agreement.py`.
"""

import itertools
import json
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.train_profile import PLAIN_STEP, idle_share, parts_of_a_step, profiled
from mixkd_fast.data.tokenization import TokenRows, tokenize_rows

TEMPERATURE = 2.0
Padded = tuple[Tensor, Tensor, Tensor]


def main() -> None:
    arm, job_file, output = sys.argv[1:]
    job = json.loads(Path(job_file).read_text())
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    if arm == "agreement":
        from benchmarks.train_agreement import agreement

        Path(output).write_text(json.dumps(agreement(job)))
        return
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


def pad(rows: TokenRows, row_ids: np.ndarray[Any, Any], width: int) -> Padded:
    """Token ids, attention mask and labels of some rows, on the host."""
    ids = torch.zeros((len(row_ids), width), dtype=torch.int64)
    for place, row in enumerate(row_ids):
        tokens = rows.row(int(row))
        ids[place, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
    lengths = torch.from_numpy(rows.lengths[row_ids])
    mask = (torch.arange(width) < lengths[:, None]).to(torch.int64)
    return ids, mask, torch.from_numpy(rows.labels[row_ids])


def own_width(rows: TokenRows, row_ids: np.ndarray[Any, Any]) -> int:
    """Tokens of the longest of some rows, rounded up to a multiple of 8."""
    return -(-int(rows.lengths[row_ids].max()) // 8) * 8


def half(job: dict[str, Any], arm: str) -> bool:
    """Whether a plain arm runs under bf16 autocast: all but the textbook's on a CPU."""
    return arm != "textbook" or bool(job["device"] == "cuda")


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


class Step(NamedTuple):
    """One batch of the plain arms."""

    row_ids: Tensor
    """int64 [B], on the host like everything until `Loop` copies the rest."""
    ids: Tensor
    mask: Tensor
    labels: Tensor
    partner: Tensor
    lam: Tensor


class RowNumbers:
    """Row numbers of the batches of one epoch after the other: at random, or of like length within pools of 50
    batches, as `group_by_length` does."""

    def __init__(self, lengths: np.ndarray[Any, Any], size: int, by_length: bool) -> None:
        self._lengths, self._size, self._by_length = lengths, size, by_length
        self._rng = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self._lengths) // self._size

    def __iter__(self) -> Iterator[np.ndarray[Any, Any]]:
        size, order = self._size, self._rng.permutation(len(self._lengths))
        if self._by_length:
            pools = [order[start : start + 50 * size] for start in range(0, len(order), 50 * size)]
            order = np.concatenate([pool[np.argsort(-self._lengths[pool], kind="stable")] for pool in pools])
        batches = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
        yield from (batches[number] for number in self._rng.permutation(len(batches)))


class Collate:
    """Pads rows, to the longest allowed (width) or to their own longest, and draws who is mixed with whom."""

    def __init__(self, rows: TokenRows, width: int | None) -> None:
        self._rows, self._width = rows, width

    def __call__(self, row_ids: Sequence[int]) -> Step:
        numbers = np.asarray(row_ids)
        width = self._width or own_width(self._rows, numbers)
        lam = torch.distributions.Beta(0.4, 0.4).sample((len(numbers),))
        return Step(torch.from_numpy(numbers), *pad(self._rows, numbers, width), torch.randperm(len(numbers)), lam)


class Loop:
    """A training loop in plain PyTorch."""

    def __init__(self, job: dict[str, Any], arm: str) -> None:
        self.job, self.arm, self.device = job, arm, job["device"]
        textbook = arm == "textbook"
        self.rows = load_rows(job)
        self.teacher, self.student = load_models(job)
        if not textbook:
            self.teacher = self.teacher.bfloat16()
        if arm == "tuned_compiled":
            self.teacher, self.student = (torch.compile(model, dynamic=True) for model in (self.teacher, self.student))
        self.half = half(job, arm)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-5, fused=not textbook)
        self.numbers = RowNumbers(self.rows.lengths, job["batch_size"], by_length=not textbook)
        self.collate = Collate(self.rows, job["max_length"] if textbook else None)
        self.loader = None
        if job["workers"] and not textbook:
            numbers: Any = self.numbers
            dataset: Any = range(len(self.rows))
            self.loader = DataLoader(
                dataset,
                batch_sampler=numbers,
                collate_fn=self.collate,
                num_workers=job["workers"],
                prefetch_factor=4,
                persistent_workers=True,
                pin_memory=self.device == "cuda",
            )

    def run(self) -> dict[str, Any]:
        """Train; the time of every epoch, without what came before the first timed step."""
        self._steps(self.job["warmup_steps"])
        if "profile" in self.job:
            steps = self.job["profile"] // 2
            events = profiled(lambda: self._steps(steps + 1), self.device)
            return {"idle_share": idle_share(events, PLAIN_STEP, steps)}
        limit = self.job["textbook_steps"] if self.arm == "textbook" else None
        epochs = []
        for _ in range(1 if limit else self.job["epochs"]):
            started = self._now()
            rows, tokens = self._steps(limit)
            epochs.append({"seconds": self._now() - started, "rows": rows, "tokens": tokens})
        return {"epochs": epochs, "store_seconds": 0.0}

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _steps(self, limit: int | None) -> tuple[int, int]:
        """Train on the batches of an epoch, or on so many batches. Returns their rows and tokens."""
        rows = tokens = 0
        for step in itertools.islice(self._batches(endless=limit is not None), limit):
            with record_function(PLAIN_STEP):
                self._step(step)
            rows, tokens = rows + len(step.row_ids), tokens + int(self.rows.lengths[step.row_ids.numpy()].sum())
        return rows, tokens

    def _batches(self, endless: bool) -> Iterator[Step]:
        while True:
            yield from self.loader if self.loader is not None else map(self.collate, self.numbers)
            if not endless:
                return

    def _step(self, step: Step) -> None:
        ids, mask, labels, partner, lam = (t.to(self.device, non_blocking=self.loader is not None) for t in step[1:])
        with torch.autocast(self.device, torch.bfloat16, enabled=self.half):
            loss = mixkd_loss(self.teacher, self.student, (ids, mask, labels), partner, lam)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()


def fields(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What `distill` is given: the sections of its configuration."""
    steps = {"epochs": job["epochs"]}
    rows = None
    if "profile" in job:
        # Nothing but steps among those that are looked at: evaluation and checkpoint come after the last one.
        steps = {"steps": job["profile"], "evaluate_every": job["profile"]}
        # Two epochs of few rows: without a second one no logits would be kept.
        rows = min(job["rows"], job["profile"] * job["batch_size"] // 2)
    return {
        "task": {
            "train_files": [job["train"]],
            "evaluation_files": {"validation": [job["validation"]]},
            "max_length": job["max_length"],
            "cache_dir": str(folder / "cache"),
            "train_rows": rows,
        },
        # A new store: building it is part of what is measured.
        "teacher": {"model": job["teacher"], "store_dir": str(folder / "store")},
        "student": {"model": job["student"]},
        "method": {"name": "mixkd", "kd_weight": 1.0, "temperature": TEMPERATURE},
        "training": {
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
        "output": {"directory": str(folder / "run"), "report": False},
    }


def ours(job: dict[str, Any]) -> dict[str, Any]:
    """`distill` on the same files; with job["profile"] a few steps under the profiler instead."""
    from mixkd_fast import distill

    folder = Path(job["work"]) / f"run-{time.time_ns()}"
    sections = fields(job, folder)
    if "profile" in job:
        events = profiled(lambda: distill(**sections, progress=False), job["device"])
        steps = job["profile"] // 2
        result: dict[str, Any] = {"parts_ms": parts_of_a_step(events, steps)}
        if job["device"] == "cuda":
            result["idle_share"] = idle_share(events, "mixkd_fast::forward", steps)
        return result
    summary = distill(**sections, progress=False).summary
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


if __name__ == "__main__":
    main()
