"""Language models whose output layers ZeRO-3 partitions: every gradient is that of plain autograd on one process.

Nothing persists (`stage3_param_persistence_threshold` 0), so the student's head really is in parts, and it is tied in
one half of the runs. One step of SGD at learning rate 1 shows the gradients as differences of weights.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from toy import losses, must_run_ranks
from toy_lm import byte_tokenizer, language_task, save_lm, sentences
from transformers import AutoModelForCausalLM

ROWS, WIDTH = 8, 48
WORKER = "tests/workers/distill_runs.py"
# Student's stage, teacher's stage, where the teacher's parameters rest, whether the student's embeddings are tied.
RUNS = [
    (0, 3, None, True),
    (1, 3, "cpu", False),
    (2, 3, "cpu", True),
    (3, 0, None, True),
    (3, 3, "cpu", True),
    (3, 3, None, False),
]
IDS = [f"student{s}-teacher{t}-{o}-{'tied' if tied else 'untied'}" for s, t, o, tied in RUNS]


def fields_of(folder: Path, name: str, student: int, teacher: int, offload: str | None, tied: bool) -> dict[str, Any]:
    """One step over all rows on any number of ranks."""
    return {
        "task": {
            **language_task(folder),
            "train_files": [str(folder / "rows.jsonl")],
            "evaluation_files": {"validation": [str(folder / "one.jsonl")]},
        },
        "teacher": {
            "model": str(folder / "teacher"),
            "zero_stage": teacher,
            "offload": {"device": offload} if offload else None,
        },
        "student": {"model": str(folder / ("tied" if tied else "untied"))},
        "method": {"name": "lm_kd", "kd_weight": 0.7, "temperature": 1.5},
        "training": {
            "steps": 1,
            "batch_size": ROWS,
            "micro_batch_size": 2,
            "learning_rate": 1.0,
            "warmup": 0.0,
            "schedule": "constant",
            "max_grad_norm": 0.0,
            "weight_decay": 0.0,
            "keep_best": False,
            "threads": 1,
        },
        "deepspeed": {
            "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
            "zero_optimization": {"stage": student, "stage3_param_persistence_threshold": 0},
        },
        "output": {"directory": str(folder / name), "report": False},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero3")
    save_lm(folder / "teacher", seed=3, hidden_size=48)
    save_lm(folder / "tied", seed=4, tie_word_embeddings=True)
    save_lm(folder / "untied", seed=5)
    # Each text with its end is a whole block.
    texts = [f"{text} {'so it is' * 6}"[: WIDTH - 1] for text in sentences(ROWS, 7)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    # One row for two ranks: in the evaluation one of them is idle, and its teacher must be asked all the same.
    (folder / "one.jsonl").write_text(json.dumps({"text": "the cat sat."}) + "\n")
    runs = [fields_of(folder, name, *run) for name, run in zip(IDS, RUNS, strict=True)]
    (folder / "runs.json").write_text(json.dumps(runs))
    must_run_ranks(2, str(folder / "runs.json"), script=WORKER)
    return folder


def truth(folder: Path, student_folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients in fp64 from whole logits, by PyTorch alone."""
    texts = [json.loads(line)["text"] for line in (folder / "rows.jsonl").read_text().splitlines()]
    blocks = [[*byte_tokenizer()(text)["input_ids"], 256] for text in texts]
    student = AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float64)
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float64)
    assert [len(block) for block in blocks] == [WIDTH] * ROWS
    total, count = torch.zeros((), dtype=torch.float64), 0
    for block in blocks:
        ids = torch.tensor([block])
        student_logits, labels = student(input_ids=ids).logits[0, :-1], ids[0, 1:]
        with torch.no_grad():
            teacher_logits = teacher(input_ids=ids).logits[0, :-1]
        log_q, log_p = F.log_softmax(student_logits / 1.5, -1), F.log_softmax(teacher_logits / 1.5, -1)
        kd = (log_p.exp() * (log_p - log_q)).sum()
        total = total + 0.3 * F.cross_entropy(student_logits, labels, reduction="sum") + 0.7 * 1.5**2 * kd
        count += len(labels)
    (total / count).backward()
    return float(total.detach() / count), {name: p.grad for name, p in student.named_parameters()}


@pytest.mark.parametrize(("name", "run"), zip(IDS, RUNS, strict=True), ids=IDS)
def test_gradients_are_those_of_plain_autograd(folder: Path, name: str, run: tuple[Any, ...]) -> None:
    student = folder / ("tied" if run[3] else "untied")
    loss, gradients = truth(folder, student)
    assert losses(folder / name) == pytest.approx([loss], rel=1e-5)
    before, after = load_file(student / "model.safetensors"), load_file(folder / name / "student" / "model.safetensors")
    assert ("lm_head.weight" in gradients) != run[3]
    for key, gradient in gradients.items():
        found = (before[key] - after[key]).double()
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found, gradient, atol=2e-6, rtol=2e-4, msg=lambda text, key=key: f"{key}: {text}")
