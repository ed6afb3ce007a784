"""Rows that a model writes: what stands in them, their labels, their draws; GKD's term and its choice of rows."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from toy_lm import byte_batch, byte_rows, rows_of, setting_of, tiny_lm
from transformers import PreTrainedTokenizerFast

from mixkd_fast.causal_lm import CausalLM
from mixkd_fast.data.batching import Batch
from mixkd_fast.data.next_tokens import IGNORED
from mixkd_fast.frozen_teacher import FrozenTeacher
from mixkd_fast.methods import GKD, DistiLLM, DistiLLM2, Moment
from mixkd_fast.methods.student_rows import STUDENT, Writer

GREEDY = {"temperature": 0.0, "max_new_tokens": 6}
EOS, PAD = 256, 257


def student_lm(**given: Any) -> CausalLM:
    return CausalLM(tiny_lm("llama", seed=1, **given)).double()


def teacher_lm(vocab_size: int = 258) -> FrozenTeacher:
    model = CausalLM(tiny_lm("gpt2", vocab_size, seed=2)).double().eval()
    return FrozenTeacher(model.requires_grad_(False), lambda: "")


def gkd(**options: Any) -> GKD:
    return GKD.model_validate({"generation": GREEDY, **options})


def counted(batch: Batch) -> Batch:
    """As the engine counts a step of one micro-batch."""
    batch.mean_targets = float((batch.labels != IGNORED).sum()) / batch.num_rows
    return batch


def written(rows: Any, student: CausalLM, step: int = 0, chosen: list[int] | None = None, **options: Any) -> Batch:
    writer = Writer(setting_of(rows), gkd(**options))
    return counted(writer.write(byte_batch(rows, chosen), student.generate, STUDENT, step))


def greedy(student: CausalLM, prompt: list[int], most: int) -> list[int]:
    """Token by token, without cache, padding or batch."""
    ids = list(prompt)
    for _ in range(most):
        with torch.no_grad():
            ids.append(int(student.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == EOS:
            break
    return ids[len(prompt) :]


def divergence(p: Tensor, q: Tensor, beta: float) -> Tensor:
    """Generalised JSD by probabilities, as the paper writes it."""
    m = beta * p + (1 - beta) * q
    return (beta * p * (p.log() - m.log()) + (1 - beta) * q * (q.log() - m.log())).sum(-1)


def probabilities(model: Any, batch: Batch, tau: float = 1.0) -> Tensor:
    """softmax(z / tau) at the positions with a target, by the models' own forward: [targets, C]."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return (logits[batch.labels != IGNORED] / tau).softmax(-1)


def test_rows_are_prompts_with_the_students_answers() -> None:
    rows, student = byte_rows(), student_lm()
    batch = written(rows, student)
    assert rows.prompt_lengths is not None and len(set(rows.prompt_lengths.tolist())) > 1
    for row in range(8):
        prompt = rows.row(row)[: rows.prompt_lengths[row]].tolist()
        whole = prompt + greedy(student, prompt, 6)
        length = len(whole)
        assert batch.input_ids[row].tolist() == whole + [PAD] * (batch.input_ids.shape[1] - length)
        assert batch.attention_mask[row].tolist() == [1] * length + [0] * (batch.input_ids.shape[1] - length)
        labels = [IGNORED] * batch.input_ids.shape[1]
        for place in range(len(prompt), length):
            labels[place - 1] = whole[place]
        assert batch.labels[row].tolist() == labels
        assert batch.row_lengths is not None and int(batch.row_lengths[row]) == length
        assert batch.prompt_lengths is not None and int(batch.prompt_lengths[row]) == len(prompt)
    assert batch.num_tokens == int(batch.attention_mask.sum()) and batch.num_rows == 8
    assert batch.input_ids.shape[1] % 8 == 0 and batch.row_ids.tolist() == list(range(8))


def test_nothing_of_the_old_batch_stays() -> None:
    rows, student = byte_rows(), student_lm()
    old = byte_batch(rows)
    old.teacher_logits, old.soft_labels = torch.zeros(8, 3), torch.zeros(8, 3)
    old = replace(old, partner=torch.arange(8), lam=torch.ones(8), mean_mixed_tokens=3.0, mixed_lengths=torch.ones(8))
    new = Writer(setting_of(rows), gkd()).write(old, student.generate, STUDENT, 0)
    kept = {"input_ids", "attention_mask", "labels", "row_ids", "num_rows", "num_tokens", "row_lengths"}
    assert {field.name for field in fields(new) if getattr(new, field.name) is not None} == kept | {"prompt_lengths"}


def test_rows_end_at_max_length_and_each_by_itself() -> None:
    """A long prompt does not shorten the answers of its neighbours."""
    student = student_lm()
    texts = [([1, 2, EOS], 2), ([*range(1, 15), EOS], 14), ([*range(1, 16), EOS], 15)]
    rows = rows_of(texts, 16)
    batch = written(rows, student, generation={"temperature": 0.0, "max_new_tokens": 9})
    assert batch.row_lengths is not None and batch.row_lengths.tolist() == [11, 16, 16]
    assert batch.input_ids.shape == (3, 16)
    assert batch.input_ids[0, :11].tolist() == [1, 2, *greedy(student, [1, 2], 9)]
    assert (batch.labels != IGNORED).sum(1).tolist() == [9, 2, 1]


def test_plain_text_is_continued_from_a_share_of_the_block() -> None:
    rows, student = byte_rows(prompts=False), student_lm()
    batch = written(rows, student, prompt_share=0.3)
    expected = [max(1, int(0.3 * length)) for length in rows.lengths]
    assert batch.prompt_lengths is not None and batch.prompt_lengths.tolist() == expected
    prompt = rows.row(0)[: expected[0]].tolist()
    whole = prompt + greedy(student, prompt, 6)
    assert batch.input_ids[0, : len(whole)].tolist() == whole
    assert int((batch.labels[0] != IGNORED).sum()) == len(whole) - len(prompt)


def test_a_row_like_one_of_the_data_set_costs_the_same() -> None:
    """The labels of generated and of data-set text are shifted alike: the loss is the same, bit for bit."""
    rows, student, teacher, method = byte_rows(), student_lm(), teacher_lm(), gkd()
    ours = byte_batch(rows)
    assert rows.prompt_lengths is not None
    answers = [rows.row(row)[rows.prompt_lengths[row] :].tolist() for row in range(8)]
    width = max(map(len, answers))
    generated = torch.tensor([answer + [PAD] * (width - len(answer)) for answer in answers])
    kept = torch.tensor([[1] * len(answer) + [0] * (width - len(answer)) for answer in answers])
    theirs = counted(Writer(setting_of(rows), method).joined(ours, generated, kept))
    for name in ("input_ids", "attention_mask", "labels", "row_lengths", "prompt_lengths", "row_ids"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert theirs.mean_targets == ours.mean_targets and theirs.num_tokens == ours.num_tokens
    terms = [method.terms(batch, student, teacher, None, Moment(0, 1, 0.0))["kd"] for batch in (ours, theirs)]
    assert torch.equal(*terms)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_the_term_is_the_papers_divergence_on_the_students_rows(beta: float) -> None:
    rows, student, teacher = byte_rows(), student_lm(), teacher_lm()
    method = gkd(jsd_beta=beta, temperature=2.0, lam_student=1.0, generation={"temperature": 1.3, "max_new_tokens": 9})
    extras = method.build(setting_of(rows))
    batch = counted(method.prepare_batch(byte_batch(rows), student, teacher, extras, Moment(3, 9, 0.0)))
    assert not torch.equal(batch.input_ids[:, :8], byte_batch(rows).input_ids[:, :8])
    loss = sum(method.terms(batch, student.train(), teacher, extras, Moment(3, 9, 0.0)).values()).sum() / 8
    p, q = probabilities(teacher.model, batch, 2.0), probabilities(student.model, batch, 2.0)
    expected = 4.0 * divergence(p.detach(), q, beta).mean()
    torch.testing.assert_close(loss, expected)
    ours = torch.autograd.grad(loss, list(student.parameters()))
    for mine, other in zip(ours, torch.autograd.grad(expected, list(student.parameters())), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-10)
    assert all(parameter.grad is None for parameter in teacher.model.parameters())


def test_a_step_is_the_students_with_this_probability() -> None:
    """One draw per step: the same for all micro-batches and ranks, another for another seed."""
    rows, student = byte_rows(4), student_lm()
    method = gkd(lam_student=0.3, generation={"temperature": 0.0, "max_new_tokens": 1})

    def chosen(seed: int, steps: int, some: list[int]) -> list[bool]:
        extras, batch = method.build(setting_of(rows, seed=seed)), byte_batch(rows, some)
        moments = [Moment(step, steps, 0.0) for step in range(steps)]
        return [method.prepare_batch(batch, student, None, extras, moment) is not batch for moment in moments]

    first = chosen(5, 200, [0])
    assert 0.2 < sum(first) / 200 < 0.4
    assert chosen(5, 40, [1, 2]) == first[:40] != chosen(6, 40, [0])


def test_the_ends_of_the_probability() -> None:
    rows, student = byte_rows(4), student_lm()
    for share, expected in ((0.0, False), (1.0, True)):
        method = gkd(lam_student=share)
        extras, batch = method.build(setting_of(rows)), byte_batch(rows)
        found = [method.prepare_batch(batch, student, None, extras, Moment(s, 9, 0.0)) is not batch for s in range(9)]
        assert found == [expected] * 9


def test_draws_belong_to_seed_step_and_micro_batch() -> None:
    """Not to the rank that makes them, nor to what was drawn before; nor do they move torch's generator."""
    rows, student, drawn = byte_rows(), student_lm(), {"generation": {"max_new_tokens": 12}}
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = written(rows, student, 4, [2, 3], **drawn)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    again = written(rows, student, 4, [2, 3], **drawn)
    assert torch.equal(first.input_ids, again.input_ids)
    for step, some in ((5, [2, 3]), (4, [3, 2])):
        other = written(rows, student, step, some, **drawn)
        assert not torch.equal(first.input_ids, other.input_ids if some == [2, 3] else other.input_ids.flip(0))


def test_drawing_is_at_temperature_one_unless_told() -> None:
    for method in (GKD, DistiLLM, DistiLLM2):
        assert method().generation.temperature == 1.0
        assert method.model_validate({"generation": {"max_new_tokens": 7}}).generation.temperature == 1.0


def test_sampling_options_reach_the_model() -> None:
    rows, student = byte_rows(), student_lm()
    greedily = written(rows, student)
    for options in ({"top_k": 1}, {"top_p": 1e-6}):
        batch = written(rows, student, generation={"temperature": 1.0, "max_new_tokens": 6, **options})
        assert torch.equal(batch.input_ids, greedily.input_ids)
    assert not torch.equal(written(rows, student, generation={"max_new_tokens": 6}).input_ids, greedily.input_ids)


def test_an_answer_may_be_empty() -> None:
    """End of text at once is one target; a row without any token costs nothing, and a batch of them neither."""
    rows, teacher, method = byte_rows(), teacher_lm(), gkd()
    student = CausalLM(tiny_lm("phi", seed=1)).double()
    student.model.get_output_embeddings().bias.data[EOS] = 1e3
    batch = written(rows, student)
    assert (batch.labels != IGNORED).sum(1).tolist() == [1] * 8 and set(batch.labels.unique().tolist()) == {
        IGNORED,
        EOS,
    }
    assert bool(torch.isfinite(method.terms(batch, student, teacher, None, Moment(0, 1, 0.0))["kd"]).all())
    writer, kept = Writer(setting_of(rows), method), torch.zeros(8, 3, dtype=torch.int64)
    kept[0] = 1
    some = counted(writer.joined(byte_batch(rows), torch.full((8, 3), 7), kept))
    term = method.terms(some, student_lm(), teacher, None, Moment(0, 1, 0.0))["kd"].detach()
    assert float(term[0]) > 0 and term[1:].tolist() == [0.0] * 7
    none = counted(writer.joined(byte_batch(rows), torch.full((8, 3), 7), torch.zeros_like(kept)))
    trained = student_lm()
    term = method.terms(none, trained, teacher, None, Moment(0, 1, 0.0))["kd"]
    term.sum().backward()
    assert term.tolist() == [0.0] * 8
    assert all(p.grad is None or float(p.grad.abs().sum()) == 0 for p in trained.parameters())


def test_padded_classes_are_never_written() -> None:
    """The student's vocabulary is padded further than the teacher's, which knows no such token."""
    rows, teacher, method = byte_rows(), teacher_lm(), gkd()
    student = CausalLM(tiny_lm("phi", 272, seed=1)).double()
    student.model.get_output_embeddings().bias.data[258:] = 1e3
    batch = written(rows, student, generation={"max_new_tokens": 9})
    assert int(batch.input_ids.max()) <= PAD
    assert bool(torch.isfinite(method.terms(batch, student, teacher, None, Moment(0, 1, 0.0))["kd"]).all())


@pytest.mark.parametrize("method", [gkd(lam_student=1.0), DistiLLM2.model_validate({"generation": GREEDY})])
def test_writing_trains_nothing_and_leaves_modes_alone(method: Any) -> None:
    rows, student, teacher = byte_rows(), student_lm(attention_dropout=0.5).train(), teacher_lm()
    extras = method.build(setting_of(rows))
    batches = [method.prepare_batch(byte_batch(rows), student, teacher, extras, Moment(0, 2, 0.0)) for _ in range(2)]
    assert student.model.training and student.training and not teacher.model.training
    first, second = (batch.companion or batch for batch in batches)
    assert torch.equal(first.input_ids, second.input_ids), "no dropout while it writes"
    assert all(parameter.grad is None for parameter in student.parameters())
    tensors = [value for value in vars(first).values() if isinstance(value, Tensor)]
    assert not list(extras.parameters()) and not any(tensor.requires_grad for tensor in tensors)


@pytest.mark.parametrize("limit", [16, 64])
@pytest.mark.parametrize("others", [True, False])
def test_a_prompt_that_fills_max_length_is_not_answered(limit: int, others: bool) -> None:
    """As a stream of instructions has them; whether the model has positions for more or not."""
    texts = [(list(range(16)), 16), ([1, 2, 3, EOS], 2)]
    rows = rows_of(texts if others else texts[:1] * 2, 16)
    batch = written(rows, student_lm(max_position_embeddings=limit))
    assert batch.input_ids.shape[1] <= 16 and batch.row_lengths is not None and int(batch.row_lengths.max()) <= 16
    assert [bool(row.any()) for row in batch.labels != IGNORED] == [False, others]
    method = gkd()
    term = method.terms(batch, student_lm(), teacher_lm(), None, Moment(0, 1, 0.0))["kd"].detach()
    assert [bool(value > 0) for value in term] == [False, others]


def test_every_token_of_a_vocabulary_with_gaps_can_be_written() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = {piece: number for number, piece in enumerate(alphabet)} | {"<eos>": 300, "<pad>": 301}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(pieces, [])), eos_token="<eos>", pad_token="<pad>"
    )
    assert len(tokenizer) < 300
    rows, student = byte_rows(), CausalLM(tiny_lm("phi", 304, seed=1)).double()
    student.model.get_output_embeddings().bias.data[300] = 1e3
    writer = Writer(replace(setting_of(rows), tokenizer=tokenizer), gkd())
    batch = writer.write(byte_batch(rows), student.generate, STUDENT, 0)
    assert batch.labels[batch.labels != IGNORED].tolist() == [300] * 8, "each ends at once"
