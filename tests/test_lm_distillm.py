"""DistiLLM's schedule, replay buffer and term by the letter; DistiLLM-2's two terms and the teacher's answers."""

from typing import Any

import pytest
import torch
from test_lm_onpolicy import EOS, GREEDY, PAD, counted, greedy, probabilities, student_lm, teacher_lm
from toy_lm import byte_batch, byte_rows, setting_of

from mixkd_fast.data.next_tokens import IGNORED
from mixkd_fast.methods import DistiLLM, DistiLLM2, Moment
from mixkd_fast.methods.replay import WrittenRow, branch_of
from mixkd_fast.methods.student_rows import BRANCH, generator


def distillm(**options: Any) -> DistiLLM:
    return DistiLLM.model_validate({"generation": GREEDY, **options})


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p * (p.log() - q.log())).sum(-1)


def gradients(loss: torch.Tensor, student: Any) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(student.parameters())))


@pytest.mark.parametrize(
    ("r", "phi", "done", "room", "branch"),
    [
        (0.0, 0.0, 0.0, True, "dataset"),  # phi = 0: never, whatever is drawn
        (0.29, 0.3, 0.0, False, "generate"),
        (0.3, 0.3, 0.0, True, "dataset"),  # r < phi is strict
        (0.14, 0.3, 0.5, False, "generate"),  # below phi (1 - t / T) = 0.15
        (0.16, 0.3, 0.5, False, "replay"),
        (0.16, 0.3, 0.5, True, "generate"),  # the buffer is below capacity
        (0.99, 1.0, 1.0, False, "replay"),
    ],
)
def test_the_choice_by_the_letter(r: float, phi: float, done: float, room: bool, branch: str) -> None:
    assert branch_of(r, phi, done, room) == branch


def test_phi_by_the_letter() -> None:
    """phi rises, and the loss compared with moves, only where L_val >= L_prev + 0.1."""
    buffer = distillm().build(setting_of(byte_rows()))
    course = [(2.0, 0.0), (2.09, 0.0), (2.1, 0.1), (2.15, 0.1), (1.0, 0.1), (2.19, 0.1), (2.2, 0.2), (2.31, 0.3)]
    method = distillm()
    for loss, phi in course:
        method.after_evaluation({"first": {"perplexity": 9.0, "nll": loss}, "second": {"nll": 99.0}}, buffer)
        assert buffer.phi == pytest.approx(phi)
    for step in range(20):
        method.after_evaluation({"first": {"nll": 3.0 + step}}, buffer)
    assert buffer.phi == 1.0


def test_steps_follow_their_draws() -> None:
    """r is a function of (seed, step): the branches of a course are those of an independent count."""
    rows, student, method = byte_rows(4), student_lm(), distillm(replay_capacity=8, phi_step=0.25)
    buffer = method.build(setting_of(rows, seed=11))
    found, expected, phi, stored = [], [], 0.0, 0
    for step in range(32):
        batch, oldest = byte_batch(rows), list(buffer.rows)
        new = method.prepare_batch(batch, student, None, buffer, Moment(step, 32, 0.0))
        moved = len(oldest) != len(buffer.rows) or any(a is not b for a, b in zip(oldest, buffer.rows, strict=True))
        found.append("dataset" if new is batch else "generate" if moved else "replay")
        r = float(generator(11, BRANCH, step).random())
        if r < phi * (1 - step / 32) or (r < phi and stored < 8):
            expected.append("generate")
            stored = min(8, stored + 4)
        else:
            expected.append("replay" if r < phi else "dataset")
        if step % 4 == 3:  # an evaluation that is worse than all before
            method.after_evaluation({"validation": {"nll": float(step)}}, buffer)
            phi = min(1.0, phi + 0.25 * (step > 3))
    assert found == expected and set(found) == {"dataset", "generate", "replay"}
    assert len(buffer.rows) == 8


def test_one_choice_per_step() -> None:
    """The first micro-batch fills the buffer; the others of its step write all the same."""
    rows, student, method = byte_rows(8), student_lm(), distillm(replay_capacity=2)
    buffer = method.build(setting_of(rows))
    buffer.phi = 1.0
    moment = Moment(99, 100, 0.0)  # phi (1 - t / T) = 0.01: only the room in the buffer makes it write
    assert float(generator(5, BRANCH, 99).random()) > 0.01
    parts = [byte_batch(rows, some) for some in ([0, 1], [2, 3], [4, 5])]
    new = [method.prepare_batch(part, student, None, buffer, moment) for part in parts]
    assert all(b.row_ids.tolist() == part.row_ids.tolist() for b, part in zip(new, parts, strict=True))
    assert [row.row_id for row in buffer.rows] == [4, 5], "the newest stay"
    after = method.prepare_batch(parts[0], student, None, buffer, Moment(99, 100, 0.0))
    assert after.row_ids.tolist() == [0, 1]
    assert buffer.branch(Moment(98, 100, 0.0)) == "replay"


def test_the_buffer_takes_the_rows_of_all_ranks() -> None:
    rows, student, method = byte_rows(8), student_lm(), distillm(replay_capacity=3)
    other = WrittenRow(torch.tensor([7, 8, EOS], dtype=torch.int32), 1, 6)
    buffer = method.build(setting_of(rows, gather=lambda here: [here, [other]]))
    buffer.phi = 1.0
    method.prepare_batch(byte_batch(rows, [0, 1]), student, None, buffer, Moment(0, 9, 0.0))
    assert [row.row_id for row in buffer.rows] == [0, 1, 6]


def test_replayed_rows_are_those_that_were_written() -> None:
    """Tokens, prompts and labels; whichever rows come together now."""
    rows, student, method = byte_rows(8), student_lm(), distillm(replay_capacity=8)
    buffer = method.build(setting_of(rows))
    buffer.phi = 1.0
    written = method.prepare_batch(byte_batch(rows), student, None, buffer, Moment(0, 100, 0.0))
    batch = byte_batch(rows, [5, 6, 7])
    replayed = buffer.replayed(batch, Moment(50, 100, 0.0))
    assert replayed.num_rows == 3 and len(set(replayed.row_ids.tolist())) == 3
    assert replayed.row_lengths is not None and replayed.prompt_lengths is not None
    for place, row in enumerate(replayed.row_ids.tolist()):
        length = int(replayed.row_lengths[place])
        for name in ("input_ids", "labels", "attention_mask"):
            assert torch.equal(getattr(replayed, name)[place, :length], getattr(written, name)[row, :length]), name
        assert set(replayed.input_ids[place, length:].tolist()) <= {PAD}
        assert set(replayed.labels[place, length - 1 :].tolist()) == {IGNORED}
        assert written.prompt_lengths is not None
        assert int(replayed.prompt_lengths[place]) == int(written.prompt_lengths[row])
    again = buffer.replayed(batch, Moment(50, 100, 0.0))
    assert torch.equal(again.row_ids, replayed.row_ids)
    orders = {tuple(buffer.replayed(batch, Moment(step, 100, 0.0)).row_ids.tolist()) for step in range(9)}
    assert len(orders) > 3, "another step draws others"
    assert len(buffer.replayed(byte_batch(byte_rows(20)), Moment(1, 9, 0.0)).row_ids) == 20, "more than there are"


def test_the_state_survives() -> None:
    rows, student, method = byte_rows(8), student_lm(), distillm(replay_capacity=6)
    first, second = (method.build(setting_of(rows)) for _ in range(2))
    second.load_state_dict(first.state_dict())
    assert second.phi == 0.0 and second.previous_loss is None and not second.rows
    first.phi, first.previous_loss = 0.1 + 0.2, 2.0 / 3.0
    method.prepare_batch(byte_batch(rows), student, None, first, Moment(0, 9, 0.0))
    first.push(byte_batch(rows))
    second.bfloat16().load_state_dict(first.bfloat16().state_dict())
    assert (second.phi, second.previous_loss) == (0.1 + 0.2, 2.0 / 3.0)
    assert len(second.rows) == len(first.rows) == second.rows.maxlen == 6
    for mine, theirs in zip(first.rows, second.rows, strict=True):
        assert torch.equal(mine.tokens, theirs.tokens) and mine[1:] == theirs[1:]


@pytest.mark.parametrize("name", ["skew_forward_kl", "skew_reverse_kl"])
@pytest.mark.parametrize("ce_weight", [0.0, 0.7])
def test_the_term_of_distillm(name: str, ce_weight: float) -> None:
    """On the student's rows, and the labels of the data set's rows beside them."""
    rows, student, teacher = byte_rows(), student_lm(), teacher_lm()
    method = distillm(divergence=name, skew_alpha=0.2, temperature=2.0, ce_weight=ce_weight)
    buffer, moment = method.build(setting_of(rows)), Moment(0, 9, 0.0)
    buffer.phi = 1.0
    batch = counted(method.prepare_batch(byte_batch(rows), student, teacher, buffer, moment))
    assert (batch.companion is not None) == (ce_weight > 0)
    terms = method.terms(batch, student, teacher, buffer, moment)
    assert list(terms) == (["ce", "kd"] if ce_weight else ["kd"])
    p, q = probabilities(teacher.model, batch, 2.0).detach(), probabilities(student.model, batch, 2.0)
    expected = 4 * (kl(p, 0.2 * p + 0.8 * q) if name == "skew_forward_kl" else kl(q, 0.8 * p + 0.2 * q)).mean()
    if ce_weight:
        texts = byte_batch(rows)
        right = probabilities(student.model, texts).gather(1, texts.labels[texts.labels != IGNORED][:, None])
        expected = expected - ce_weight * right.log().mean()
    loss = sum(terms.values()).sum() / 8
    torch.testing.assert_close(loss, expected)
    for mine, other in zip(gradients(loss, student), gradients(expected, student), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize(("step", "beta"), [(0, 1.0), (20, 1.2), (50, 1.5), (99, 1.5)])
@pytest.mark.parametrize("detached", [True, False])
def test_the_terms_of_distillm2(step: int, beta: float, detached: bool) -> None:
    rows, student, teacher = byte_rows(), student_lm(), teacher_lm()
    method = DistiLLM2.model_validate({"generation": GREEDY, "detach_mixture": detached})
    extras, moment = method.build(setting_of(rows)), Moment(step, 100, 0.0)
    batch = method.prepare_batch(byte_batch(rows), student, teacher, extras, moment)
    assert batch.companion is not None and torch.equal(batch.input_ids, byte_batch(rows).input_ids)
    counted(batch), counted(batch.companion)
    terms = method.terms(batch, student, teacher, extras, moment)
    assert list(terms) == ["forward", "reverse"]
    p, q = probabilities(teacher.model, batch).detach(), probabilities(student.model, batch)
    forward = (2 - beta) * kl(p, 0.1 * p + 0.9 * q).mean()
    p, q = probabilities(teacher.model, batch.companion).detach(), probabilities(student.model, batch.companion)
    reverse = beta * kl(q, 0.9 * p + 0.1 * (q.detach() if detached else q)).mean()
    torch.testing.assert_close(terms["forward"].sum() / 8, forward)
    torch.testing.assert_close(terms["reverse"].sum() / 8, reverse)
    loss = sum(terms.values()).sum() / 8
    for mine, other in zip(gradients(loss, student), gradients(forward + reverse, student), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-10)


def test_the_teacher_answers_every_row_once() -> None:
    rows, student, teacher, calls = byte_rows(), student_lm(), teacher_lm(), []
    method = DistiLLM2.model_validate({"generation": GREEDY, "teacher_answers": "generated"})
    extras = method.build(setting_of(rows))

    class Counting:
        def generate(self, *arguments: Any) -> torch.Tensor:
            calls.append(len(arguments[0]))
            return teacher.generate(*arguments)

    for step in range(3):
        batch = method.prepare_batch(byte_batch(rows, [6, 1]), student, Counting(), extras, Moment(step, 9, 0.0))
        assert rows.prompt_lengths is not None
        for place, row in enumerate((6, 1)):
            prompt = rows.row(row)[: rows.prompt_lengths[row]].tolist()
            whole = prompt + greedy(teacher._teacher, prompt, 6)
            assert batch.input_ids[place, : len(whole)].tolist() == whole
            assert int((batch.labels[place] != IGNORED).sum()) == len(whole) - len(prompt)
        assert batch.companion is not None and not torch.equal(batch.input_ids, batch.companion.input_ids)
    assert sum(calls) == 8, "each row once"
    resumed = method.build(setting_of(rows))
    resumed.load_state_dict(extras.state_dict())
    assert torch.equal(resumed.answered(byte_batch(rows)).input_ids, extras.answered(byte_batch(rows)).input_ids)


def test_student_and_teacher_alike_have_nothing_to_learn() -> None:
    from mixkd_fast.frozen_teacher import FrozenTeacher

    rows, student = byte_rows(), student_lm()
    teacher = FrozenTeacher(student_lm().eval().requires_grad_(False), lambda: "")
    for method in (distillm(divergence="skew_forward_kl"), DistiLLM2.model_validate({"generation": GREEDY})):
        extras: Any = method.build(setting_of(rows))
        extras.phi = 1.0
        batch = counted(method.prepare_batch(byte_batch(rows), student, teacher, extras, Moment(0, 9, 0.0)))
        if batch.companion is not None:
            counted(batch.companion)
        for term in method.terms(batch, student, teacher, extras, Moment(0, 9, 0.0)).values():
            torch.testing.assert_close(term, torch.zeros_like(term), rtol=0, atol=1e-9)
