"""DPKD: its loss and gradient against eager fp64, its rows, and runs of the real program."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import losses, records
from toy_lm import (
    batch_of,
    byte_batch,
    byte_rows,
    gradient_of,
    language_config,
    random_rows,
    rows_of,
    run,
    setting_of,
    tiny_lm,
)

from mixkd_fast.causal_lm import CausalLM
from mixkd_fast.data.batching import Batch
from mixkd_fast.data.next_tokens import IGNORED
from mixkd_fast.frozen_teacher import FrozenTeacher
from mixkd_fast.methods import DPKD, DistiLLM2, Moment

MOMENT = Moment(0, 1, 0.0)


def student_lm(vocab_size: int = 96, seed: int = 1) -> CausalLM:
    return CausalLM(tiny_lm("gpt2", vocab_size, seed=seed)).double()


def teacher_lm(vocab_size: int = 96, seed: int = 2) -> FrozenTeacher:
    return FrozenTeacher(student_lm(vocab_size, seed).requires_grad_(False), lambda: "")


def pair(better: int = 0, worse: int = 7) -> Batch:
    """Rows of y_T with as many rows of y_S."""
    batch = batch_of(random_rows(seed=better))
    batch.companion = batch_of(random_rows(seed=worse))
    return batch


def log_ratio(batch: Batch, student: CausalLM, teacher: FrozenTeacher, row: int, normalized: bool) -> Tensor:
    """log q(y) / p(y) of a row, token by token from the models' own logits."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    ids = batch.input_ids[row : row + 1, : int(batch.attention_mask[row].sum())]
    q = student.model(input_ids=ids).logits[0].log_softmax(-1)
    p = teacher.model(input_ids=ids).logits[0].log_softmax(-1)
    for t, label in enumerate(batch.labels[row, : ids.shape[1]].tolist()):
        if label != IGNORED:
            total, count = total + q[t, label] - p[t, label], count + 1
    return total / count if normalized else total


@pytest.mark.parametrize("normalized", [True, False])
def test_loss_and_gradient_by_the_book(normalized: bool) -> None:
    student, teacher, batch = student_lm(), teacher_lm(), pair()
    method = DPKD(beta=0.4, length_normalization=normalized)
    assert batch.companion is not None
    terms = method.terms(batch, student, teacher, None, MOMENT)
    assert list(terms) == ["dpkd"]
    expected = []
    for row in range(8):
        gap = log_ratio(batch, student, teacher, row, normalized)
        gap = gap - log_ratio(batch.companion, student, teacher, row, normalized)
        expected.append(-torch.log(torch.sigmoid(0.4 * gap)))
    book = torch.stack(expected)
    assert float(book.detach().std()) > 0.05, "rows that differ in weight"
    torch.testing.assert_close(terms["dpkd"], book)
    found = gradient_of(terms["dpkd"].sum() / 8, student)
    for mine, one in zip(found, gradient_of(book.mean(), student), strict=True):
        torch.testing.assert_close(mine, one, rtol=1e-6, atol=1e-10)
    assert all(parameter.grad is None for parameter in teacher.model.parameters())


def test_a_student_like_its_teacher_has_no_preference() -> None:
    student, batch = student_lm(), pair()
    terms = DPKD(beta=2.0).terms(batch, student, teacher_lm(seed=1), None, MOMENT)
    torch.testing.assert_close(terms["dpkd"], torch.full((8,), math.log(2.0), dtype=torch.float64))


def test_the_same_answers_teach_nothing() -> None:
    student, batch = student_lm(), pair(0, 0)
    term = DPKD(beta=2.0).terms(batch, student, teacher_lm(), None, MOMENT)["dpkd"]
    torch.testing.assert_close(term, torch.full((8,), math.log(2.0), dtype=torch.float64))
    assert max(float(one.abs().max()) for one in gradient_of(term.sum(), student)) < 1e-9


def test_the_same_answers_to_a_share_of_a_text_teach_nothing() -> None:
    """Of plain text y_T and y_S both begin where the student goes on."""
    rows, student = byte_rows(prompts=False), student_lm(258)
    rests = [rows.row(row)[int(length * 0.5) :].tolist() for row, length in enumerate(rows.lengths)]
    longest = max(map(len, rests))
    copying = SimpleNamespace(
        generate=lambda *_: torch.tensor([rest + [257] * (longest - len(rest)) for rest in rests])
    )
    for method in (DPKD(beta=2.0), DistiLLM2()):
        extras = method.build(setting_of(rows))
        batch = method.prepare_batch(byte_batch(rows), copying, teacher_lm(258), extras, MOMENT)
        assert batch.companion is not None
        for name in ("input_ids", "labels", "prompt_lengths"):
            assert torch.equal(getattr(batch, name), getattr(batch.companion, name)), name
        assert (batch.labels != IGNORED).sum(1).tolist() == [len(rest) for rest in rests]
        if isinstance(method, DPKD):
            batch.mean_targets = 5.0
            term = method.terms(batch, student, teacher_lm(258), extras, MOMENT)["dpkd"]
            torch.testing.assert_close(term, torch.full((8,), math.log(2.0), dtype=torch.float64))


def test_far_apart_answers_stay_finite() -> None:
    student, teacher, batch = student_lm(), teacher_lm(), pair()
    term = DPKD(beta=1e4).terms(batch, student, teacher, None, MOMENT)["dpkd"]
    assert bool(torch.isfinite(term).all()) and float(term.detach().max()) > 100
    assert all(bool(torch.isfinite(one).all()) for one in gradient_of(term.sum(), student))


def test_the_labels_term_is_the_token_mean() -> None:
    student, teacher, batch = student_lm(), teacher_lm(), pair()
    term = DPKD(lm_weight=0.5).terms(batch, student, teacher, None, MOMENT)["lm"]
    kept = batch.labels != IGNORED
    logs = student.logits(batch)[kept].log_softmax(-1)
    expected = -0.5 * logs.gather(1, batch.labels[kept][:, None]).mean()
    torch.testing.assert_close(term.sum() / 8, expected)


def test_padded_vocabularies_are_left_out() -> None:
    """A wider teacher whose further classes are likely changes nothing; a token it lacks is not scored."""
    student, batch = student_lm(), pair()
    wide = student_lm(104, 2)
    narrow = student_lm(96, 2)
    narrow.model.load_state_dict(
        {name: value[:96] if value.shape[:1] == (104,) else value for name, value in wide.model.state_dict().items()}
    )
    first, second = (
        DPKD().terms(batch, student, FrozenTeacher(lm.requires_grad_(False), lambda: ""), None, MOMENT)["dpkd"]
        for lm in (wide, narrow)
    )
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("pieces", [2, 8])
def test_accumulation_equals_one_big_batch(pieces: int) -> None:
    student, teacher, method = student_lm(), teacher_lm(), DPKD(lm_weight=0.3)
    rows, worse = random_rows(), random_rows(seed=7)

    def part_of(of: Any, numbers: list[int]) -> Batch:
        return batch_of(rows_of([(of.row(n).tolist(), int(of.prompt_lengths[n])) for n in numbers]))

    def gradients(pieces: int) -> tuple[float, list[Tensor]]:
        total, sums = 0.0, [torch.zeros_like(parameter) for parameter in student.parameters()]
        for numbers in torch.arange(8).chunk(pieces):
            batch = part_of(rows, numbers.tolist())
            batch.companion = part_of(worse, numbers.tolist())
            batch.mean_targets = batch_of(rows).mean_targets
            loss = sum(method.terms(batch, student, teacher, None, MOMENT).values()).sum() / 8
            total += float(loss.detach())
            for mine, one in zip(sums, gradient_of(loss, student), strict=True):
                mine += one
        return total, sums

    one, expected = gradients(1)
    many, found = gradients(pieces)
    assert many == pytest.approx(one, rel=1e-9)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-10)


def test_both_answers_belong_to_the_same_prompts() -> None:
    rows = byte_rows()
    student, teacher = student_lm(258), teacher_lm(258)
    for answers in ("dataset", "generated"):
        method = DPKD.model_validate({"teacher_answers": answers, "generation": {"max_new_tokens": 6}})
        extras = method.build(setting_of(rows))
        batch = method.prepare_batch(byte_batch(rows), student, teacher, extras, MOMENT)
        assert batch.companion is not None and rows.prompt_lengths is not None
        for row, length in enumerate(rows.prompt_lengths.tolist()):
            for one in (batch, batch.companion):
                assert one.input_ids[row, :length].tolist() == rows.row(row)[:length].tolist()
        assert torch.equal(batch.input_ids, byte_batch(rows).input_ids) == (answers == "dataset")
        batch.mean_targets = 5.0
        assert bool(torch.isfinite(method.terms(batch, student, teacher, extras, MOMENT)["dpkd"]).all())


def test_a_students_answer_serves_for_some_steps() -> None:
    """Until it is old enough; others of the micro-batch are written meanwhile. A checkpoint brings all of them."""
    rows, teacher = byte_rows(), teacher_lm(258)
    method = DPKD.model_validate({"write_every": 3, "generation": {"max_new_tokens": 6, "temperature": 0.0}})
    first = method.build(setting_of(rows))

    def written(extras: Any, step: int, seed: int, chosen: list[int]) -> dict[int, list[int]]:
        batch = method.prepare_batch(
            byte_batch(rows, chosen), student_lm(258, seed), teacher, extras, Moment(step, 9, 0.0)
        ).companion
        assert batch is not None
        return {row: batch.labels[place][batch.labels[place] != IGNORED].tolist() for place, row in enumerate(chosen)}

    early = written(first, 0, 1, [2, 3])
    assert written(first, 2, 8, [2, 3]) == early
    later = written(first, 2, 8, [3, 4])
    assert later[3] == early[3] and later[4] == written(method.build(setting_of(rows)), 2, 8, [4])[4]
    second = method.build(setting_of(rows))
    second.set_extra_state(first.get_extra_state())
    for extras in (first, second):
        last = written(extras, 3, 9, [3, 4])
        assert last[4] == later[4] and last[3] != early[3]
        assert sorted(extras.written) == [3, 4], "what is too old to be used again goes"
    each = method.model_copy(update={"write_every": 1}).build(setting_of(rows))
    assert written(each, 0, 1, [2, 3]) == early


def dpkd_config(folder: Path, output: str = "run", **method: Any) -> dict[str, Any]:
    method = {"name": "dpkd", "generation": {"max_new_tokens": 8}, **method}
    config = language_config(folder, output, instruct=True, method=method)
    config["task"]["generation_rows"] = 0
    return config


def test_twenty_steps_lower_the_loss(tmp_path: Path) -> None:
    config = dpkd_config(tmp_path, length_normalization=True, beta=1.0)
    config["training"] |= {"steps": 20, "evaluate_every": 20, "batch_size": 16, "micro_batch_size": 8}
    run(config)
    course = losses(tmp_path / "run")
    assert len(course) == 20 and sum(course[-4:]) < 0.8 * sum(course[:4])


@pytest.mark.parametrize(("answers", "every"), [("dataset", 1), ("generated", 5)])
def test_a_resumed_run_is_bit_identical(tmp_path: Path, answers: str, every: int) -> None:
    def config(output: str) -> dict[str, Any]:
        found = dpkd_config(tmp_path, output, teacher_answers=answers, write_every=every)
        found["training"] |= {"batch_size": 32, "micro_batch_size": 8}  # every row in every second step
        return found

    for output in ("whole", "part"):
        run(config(output))
    kept = sorted(folder for folder in (tmp_path / "part" / "checkpoints").iterdir() if folder.is_dir())
    for newer in kept[1:]:
        shutil.rmtree(newer)
    assert "step-00000004" in kept[0].name
    run(config("part"), resume=True)
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    assert set(records(tmp_path / "part")[0]["terms"]) == {"dpkd"}


def test_half_precision_and_checkpointed_activations(tmp_path: Path) -> None:
    config = dpkd_config(tmp_path)
    config["training"] |= {"steps": 2, "evaluate_every": 2, "precision": "bf16", "gradient_checkpointing": True}
    assert run(config).metrics["validation"]["perplexity"] < 1e4
    assert len(losses(tmp_path / "run")) == 2 and all(math.isfinite(loss) for loss in losses(tmp_path / "run"))
