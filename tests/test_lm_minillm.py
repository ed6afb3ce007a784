"""MiniLLM: its gradient against all answers written out, its sampler, and runs of the real program."""

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from toy import losses, must_run_ranks, records
from toy_lm import (
    FAMILIES,
    batch_of,
    byte_batch,
    byte_rows,
    gradient_of,
    language_config,
    random_rows,
    rows_of,
    run,
    sentences,
    setting_of,
    tiny_lm,
)

from mixkd_fast.causal_lm import CausalLM
from mixkd_fast.data.next_tokens import IGNORED
from mixkd_fast.errors import DataError
from mixkd_fast.frozen_teacher import FrozenTeacher
from mixkd_fast.language_task import Sampling
from mixkd_fast.methods import MiniLLM, Moment
from mixkd_fast.methods.mixed_sampling import MixedSampler

MOMENT = Moment(0, 1, 0.0)
PROMPT, END, LONGEST = [1, 2], 3, 3
"""A vocabulary of four tokens, of which one ends an answer of at most three."""
PLAIN = {"length_normalization": False, "clip": 0.0, "lm_weight": 0.0}


def student_lm(vocab_size: int = 4, seed: int = 1, scale: float = 1.0) -> CausalLM:
    # GPT-2 computes in fp64 throughout; others have a normalisation in fp32.
    lm = CausalLM(tiny_lm("gpt2", vocab_size, seed=seed)).double()
    with torch.no_grad():  # far enough from uniform for rewards to differ
        lm.head().weight.mul_(scale)
    return lm


def teacher_lm(vocab_size: int = 4, scale: float = 1.0) -> FrozenTeacher:
    return FrozenTeacher(student_lm(vocab_size, 2, scale).requires_grad_(False), lambda: "")


def all_answers(prefix: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    """Every answer there is: those that end, and those that are cut."""
    if len(prefix) == LONGEST or (prefix and prefix[-1] == END):
        return [prefix]
    return [answer for token in range(4) for answer in all_answers((*prefix, token))]


def token_logs(model: Any, answer: tuple[int, ...]) -> Tensor:
    """log softmax of every token of an answer, from the model's own logits: [T]."""
    ids = torch.tensor([[*PROMPT, *answer]])
    logs = model(input_ids=ids).logits[0].log_softmax(-1)
    return logs[len(PROMPT) - 1 : -1].gather(1, torch.tensor(answer)[:, None])[:, 0]


@pytest.mark.parametrize(
    "options",
    [{"teacher_share": 0.0}, {"teacher_share": 0.3, "importance": "sequence"}],
    ids=["student's own", "mixed, exact weights"],
)
def test_expected_gradient_is_that_of_the_kl_of_answers(options: dict[str, Any]) -> None:
    """Over all 40 answers: E_{p~}[gradient of the terms] = gradient of sum_y q(y) log q(y) / p(y)."""
    student, teacher = student_lm(scale=4.0), teacher_lm(scale=4.0)
    method, share = MiniLLM(**PLAIN | options), options["teacher_share"]
    answers = all_answers()
    assert len(answers) == 40
    expected = torch.zeros((), dtype=torch.float64)
    drawn = [torch.zeros_like(parameter) for parameter in student.parameters()]
    total = 0.0
    for answer in answers:
        log_q, log_p = token_logs(student.model, answer), token_logs(teacher.model, answer)
        expected = expected + log_q.sum().exp() * (log_q.sum() - log_p.sum())
        probability = float((share * log_p.exp() + (1 - share) * log_q.exp()).prod().detach())
        total += probability
        batch = batch_of(rows_of([([*PROMPT, *answer], len(PROMPT))]))
        terms = method.terms(batch, student, teacher, None, MOMENT)
        assert list(terms) == ["pg", "single_step"] and batch.mean_targets == len(answer)
        for mine, one in zip(drawn, gradient_of(sum(terms.values()).sum() * len(answer), student), strict=True):
            mine += probability * one
    assert total == pytest.approx(1.0)
    truth = gradient_of(expected, student)
    assert max(float(one.abs().max()) for one in truth) > 0.05, "a gradient to be compared with"
    for mine, one in zip(drawn, truth, strict=True):
        torch.testing.assert_close(mine, one, rtol=1e-7, atol=1e-10)


def test_the_policy_gradient_alone_is_the_score_function_estimate() -> None:
    """pg, per answer: -sum_t (r_{t+1} + ... + r_T) gradient of log q(y_t)."""
    student, teacher = student_lm(scale=4.0), teacher_lm(scale=4.0)
    answer = (0, 2, 1)
    batch = batch_of(rows_of([([*PROMPT, *answer], len(PROMPT))]))
    pg = MiniLLM(teacher_share=0.0, **PLAIN).terms(batch, student, teacher, None, MOMENT)["pg"]
    log_q, log_p = token_logs(student.model, answer), token_logs(teacher.model, answer)
    reward = (log_p - log_q).detach()
    estimate = -((reward[1] + reward[2]) * log_q[0] + reward[2] * log_q[1])
    for mine, one in zip(gradient_of(pg.sum() * 3, student), gradient_of(estimate, student), strict=True):
        torch.testing.assert_close(mine, one, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_terms_by_the_book(normalized: bool, clip: float) -> None:
    """Rows of random tokens, token by token in loops: values and gradients, clipping, lengths, token means."""
    student, teacher, batch = student_lm(96), teacher_lm(96), batch_of(random_rows())
    share = 0.2
    method = MiniLLM(teacher_share=share, clip=clip, length_normalization=normalized, lm_weight=0.0)
    terms = method.terms(batch, student, teacher, None, MOMENT)
    q, p = student.logits(batch).log_softmax(-1), teacher.head().logits(teacher.hidden(batch)).log_softmax(-1)
    assert batch.mean_targets is not None
    pg, single, clipped = [], [], 0
    for row in range(8):
        places = [t for t in range(q.shape[1]) if batch.labels[row, t] != IGNORED]
        tokens = [int(batch.labels[row, t]) for t in places]
        own = torch.stack([q[row, t, y] for t, y in zip(places, tokens, strict=True)])
        their = torch.stack([p[row, t, y] for t, y in zip(places, tokens, strict=True)])
        reward = (their - own).detach()
        pg_row, single_row = torch.zeros(()), torch.zeros(())
        for t in range(len(places)):
            sampler = (share * their[t].exp() + (1 - share) * own[t].exp()).detach()
            rho, future = own[t].exp() / sampler, reward[t + 1 :].sum()
            if normalized and t + 1 < len(places):
                future = future / (len(places) - t - 1)
            best = rho * future
            bound = rho.detach().clamp(1 - clip, 1 + clip) * future
            if clip and bool(best.detach() > bound):
                best, clipped = bound, clipped + 1
            pg_row = pg_row - best
            student_t, teacher_t = q[row, places[t]], p[row, places[t]]
            single_row = single_row + rho.detach() * (student_t.exp() * (student_t - teacher_t)).sum()
        pg.append(pg_row / batch.mean_targets)
        single.append(single_row / batch.mean_targets)
    assert (clipped > 0) == (clip > 0)
    for name, book in (("pg", torch.stack(pg)), ("single_step", torch.stack(single))):
        torch.testing.assert_close(terms[name], book)
        found, expected = gradient_of(terms[name].sum(), student), gradient_of(book.sum(), student)
        for mine, one in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, one, rtol=1e-6, atol=1e-9)


def test_student_and_teacher_alike_have_nothing_to_learn() -> None:
    student, batch = student_lm(96), batch_of(random_rows())
    teacher = FrozenTeacher(student_lm(96).requires_grad_(False), lambda: "")
    terms = MiniLLM(lm_weight=0.0).terms(batch, student, teacher, None, MOMENT)
    for term in terms.values():
        torch.testing.assert_close(term, torch.zeros_like(term), rtol=0, atol=1e-9)
    for gradient in gradient_of(sum(terms.values()).sum(), student):
        assert float(gradient.abs().max()) < 1e-8


@pytest.mark.parametrize("pieces", [2, 8])
def test_accumulation_equals_one_big_batch(pieces: int) -> None:
    """Answers and text cut into micro-batches, each with the means of the whole step."""
    student, teacher, rows, text = student_lm(96), teacher_lm(96), random_rows(), random_rows(seed=4)
    method = MiniLLM(lm_weight=0.7)

    def gradients(pieces: int) -> tuple[float, list[Tensor]]:
        total, sums = 0.0, [torch.zeros_like(parameter) for parameter in student.parameters()]
        whole = [batch_of(rows), batch_of(text)]
        for numbers in torch.arange(8).chunk(pieces):
            batch, companion = (batch_of(part_of(of, numbers.tolist())) for of in (rows, text))
            batch.companion = companion
            batch.mean_targets, companion.mean_targets = (one.mean_targets for one in whole)
            terms = method.terms(batch, student, teacher, None, MOMENT)
            assert list(terms) == ["pg", "single_step", "lm"]
            loss = sum(terms.values()).sum() / 8
            total += float(loss.detach())
            for mine, one in zip(sums, gradient_of(loss, student), strict=True):
                mine += one
        return total, sums

    one, expected = gradients(1)
    many, found = gradients(pieces)
    assert many == pytest.approx(one, rel=1e-9)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-10)


def part_of(rows: Any, numbers: list[int]) -> Any:
    return rows_of([(rows.row(number).tolist(), int(rows.prompt_lengths[number])) for number in numbers])


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_with_a_cache_are_the_whole_forward(family: str) -> None:
    """Prompts of unlike length, padded on the left, then token by token."""
    lm = CausalLM(tiny_lm(family, 96, seed=1))
    prompts, further = [[7, 8, 9, 10, 11], [3, 4]], [[21, 22, 23], [31, 32, 33]]
    ids = torch.tensor([prompt if len(prompt) == 5 else [0, 0, 0, *prompt] for prompt in prompts])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
    new, cache = ids, None
    for step in range(4):
        logits, cache = lm.next_logits(new, mask, cache)
        for row in range(2):
            whole = torch.tensor([prompts[row] + further[row][:step]])
            with torch.no_grad():
                torch.testing.assert_close(logits[row], lm.model(input_ids=whole).logits[0, -1], rtol=1e-4, atol=1e-4)
        if step < 3:
            new = torch.tensor([[tokens[step]] for tokens in further])
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_answers_are_drawn_from_the_mixture(share: float) -> None:
    """How often every answer of up to two tokens comes, against the product of a p + (1 - a) q."""
    student, teacher, count = student_lm(scale=4.0), teacher_lm(scale=4.0), 20000
    prompts, mask = torch.tensor([[0, *PROMPT]]).repeat(count, 1), torch.tensor([[0, 1, 1]]).repeat(count, 1)
    options, ends = Sampling(max_new_tokens=2), torch.tensor([END])
    drawn = MixedSampler(student, teacher, share).generate(prompts, mask, options, 11, ends, 0)
    again = MixedSampler(student, teacher, share).generate(prompts, mask, options, 11, ends, 0)
    assert torch.equal(drawn, again)
    expected = {}
    with torch.no_grad():
        for answer in [(END, 0), *itertools.product(range(3), range(4))]:
            seen = answer[:1] if answer[0] == END else answer
            p, q = token_logs(teacher.model, seen).exp(), token_logs(student.model, seen).exp()
            expected[answer] = float((share * p + (1 - share) * q).prod())
    assert sum(expected.values()) == pytest.approx(1.0)
    for answer, probability in expected.items():
        found = float((drawn == torch.tensor(answer)).all(1).double().mean())
        assert found == pytest.approx(probability, abs=4.5 * (probability * (1 - probability) / count) ** 0.5)


def test_ranks_whose_prompts_leave_unlike_room_go_on_together(tmp_path: Path) -> None:
    """Partitioned models want every rank in every forward, also one that has no position left."""
    must_run_ranks(2, str(tmp_path), script="tests/workers/unequal_rooms.py", timeout=200)
    for rank, room in ((0, 2), (1, 9)):
        for way, (partitioned, whole) in json.loads((tmp_path / f"{rank}.json").read_text()).items():
            assert partitioned == whole, way
            assert [len(row) for row in whole] == [room] * 2


def test_a_batch_becomes_answers_with_text_beside_them() -> None:
    rows = byte_rows()
    student, teacher = student_lm(258), teacher_lm(264)
    method = MiniLLM.model_validate({"generation": {"max_new_tokens": 6}})
    extras = method.build(setting_of(rows))
    given = byte_batch(rows)
    batch = method.prepare_batch(given, student, teacher, extras, MOMENT)
    assert batch.companion is given and int(batch.input_ids.max()) < 258
    assert rows.prompt_lengths is not None
    for row, length in enumerate(rows.prompt_lengths.tolist()):
        assert batch.input_ids[row, :length].tolist() == rows.row(row)[:length].tolist()
        assert 1 <= int((batch.labels[row] != IGNORED).sum()) <= 6
    again = method.prepare_batch(byte_batch(rows), student, teacher, extras, MOMENT)
    assert torch.equal(again.input_ids, batch.input_ids)
    later = method.prepare_batch(byte_batch(rows), student, teacher, extras, Moment(1, 2, 0.0))
    assert later.input_ids.shape != batch.input_ids.shape or not torch.equal(later.input_ids, batch.input_ids)
    batch.mean_targets = 5.0
    for term in method.terms(batch, student, teacher, extras, MOMENT).values():
        assert term.shape == (8,) and bool(torch.isfinite(term).all())
    assert not any(parameter.grad is not None for parameter in teacher.model.parameters())


def test_options_that_would_make_the_weights_wrong_are_refused() -> None:
    for generation in ({"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.9}):
        with pytest.raises(ValidationError, match=rf"generation\.{next(iter(generation))} is"):
            MiniLLM.model_validate({"generation": generation})
    with pytest.raises(ValidationError, match=r'clip is 0\.2; allowed with importance "sequence": 0'):
        MiniLLM(importance="sequence")
    with pytest.raises(ValidationError, match="lm_weight is 0"):
        MiniLLM(pretraining_files=["book.txt"], lm_weight=0.0)


def mini_config(folder: Path, output: str = "run", **method: Any) -> dict[str, Any]:
    method = {"name": "minillm", "generation": {"max_new_tokens": 8}, **method}
    config = language_config(folder, output, instruct=True, method=method)
    config["task"]["generation_rows"] = 0
    return config


def test_twenty_steps_bring_the_student_to_the_teacher(tmp_path: Path) -> None:
    """The exact part of KL(q || p) on the mixture's answers falls."""
    config = mini_config(tmp_path, lm_weight=0.0)
    config["training"] |= {"steps": 20, "evaluate_every": 20, "batch_size": 16, "micro_batch_size": 8}
    run(config)
    course = [line["terms"]["single_step"] for line in records(tmp_path / "run")]
    assert len(course) == 20 and sum(course[-4:]) < 0.7 * sum(course[:4])
    assert set(records(tmp_path / "run")[0]["terms"]) == {"pg", "single_step"}


def test_a_resumed_run_is_bit_identical(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(" ".join(sentences(80)))
    files = {"pretraining_files": [str(tmp_path / "book.txt")]}
    for output in ("whole", "part"):
        run(mini_config(tmp_path, output, **files))
    kept = sorted(folder for folder in (tmp_path / "part" / "checkpoints").iterdir() if folder.is_dir())
    for newer in kept[1:]:
        shutil.rmtree(newer)
    assert "step-00000004" in kept[0].name
    run(mini_config(tmp_path, "part", **files), resume=True)
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    assert set(records(tmp_path / "part")[0]["terms"]) == {"pg", "single_step", "lm"}


def test_a_missing_text_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"method\.pretraining_files"):
        run(mini_config(tmp_path, pretraining_files=[str(tmp_path / "none.txt")]))


def test_half_precision_and_checkpointed_activations(tmp_path: Path) -> None:
    config = mini_config(tmp_path)
    config["training"] |= {"steps": 2, "evaluate_every": 2, "precision": "bf16", "gradient_checkpointing": True}
    assert run(config).metrics["validation"]["perplexity"] < 1e4
    assert len(losses(tmp_path / "run")) == 2 and all(math.isfinite(loss) for loss in losses(tmp_path / "run"))
