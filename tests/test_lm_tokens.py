"""Rows of a causal language model: what each position predicts, packing, prompts, columns, fields of the other kind."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from toy_lm import byte_tokenizer, instructions, rows_of, tiny_lm

from mixkd_fast.configuration import Task, validate
from mixkd_fast.data.batching import EvaluationBatches, Padding, micro_batches
from mixkd_fast.data.language_tokens import tokenize_language_rows
from mixkd_fast.data.loading import load_splits
from mixkd_fast.data.next_tokens import (
    IGNORED,
    generated_mask,
    left_padded_prompts,
    next_token_labels,
    response_mask,
    with_answers,
)
from mixkd_fast.data.prompts import PromptStyle
from mixkd_fast.data.tokenization import TokenRows
from mixkd_fast.errors import ConfigurationError, DataError
from mixkd_fast.schedule import stream_of

STYLE = PromptStyle("Q {prompt} {input} A ", "Q {prompt} A ")


def tokens_of(rows: Dataset, max_length: int = 16, cache: Path | None = None, style: PromptStyle = STYLE) -> TokenRows:
    return tokenize_language_rows(rows, byte_tokenizer(), max_length, cache, style)


def text_rows(*texts: str) -> Dataset:
    return Dataset.from_dict({"text": list(texts), "row": list(range(len(texts)))})


def instruction_rows(*rows: tuple[str, str, str]) -> Dataset:
    columns = dict(zip(("prompt", "input", "response"), map(list, zip(*rows, strict=True)), strict=True))
    return Dataset.from_dict(columns | {"row": list(range(len(rows)))})


def task_of(**fields: Any) -> Task:
    return validate(Task, {"kind": "causal_lm", **fields}, "task")


def test_a_hand_written_shift() -> None:
    #                     prompt  | response  | padding
    ids = torch.tensor([[11, 12, 13, 14, 15, 0, 0], [21, 22, 23, 24, 25, 26, 27]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1] * 7])
    labels = next_token_labels(ids, response_mask(torch.tensor([2, 0]), mask), mask)
    assert labels.tolist() == [
        [IGNORED, 13, 14, 15, IGNORED, IGNORED, IGNORED],
        [22, 23, 24, 25, 26, 27, IGNORED],
    ]


def test_the_shift_is_that_of_transformers() -> None:
    """Their loss shifts labels itself; ours of the same unshifted rows must be the same mean."""
    model = tiny_lm("llama")
    batch = micro_batches(rows := rows_of([([5, 6, 7, 8, 9, 4], 3), ([1, 2, 3], 0)]), _draw(rows), 0, 1, 2, Padding(0))[
        0
    ]
    unshifted = torch.where(
        response_mask(batch.prompt_lengths, batch.attention_mask) == 1, batch.input_ids, torch.tensor(IGNORED)
    )
    theirs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=unshifted).loss
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    ours = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(ours, theirs)
    assert (batch.labels != IGNORED).sum() == rows.num_targets.sum() == 5


def _draw(rows: TokenRows) -> Any:
    from mixkd_fast.data.batching import Draw

    return Draw(np.arange(len(rows)), None, None)


def test_left_padding_is_not_learnt() -> None:
    ids, mask = torch.tensor([[0, 0, 7, 8, 9]]), torch.tensor([[0, 0, 1, 1, 1]])
    assert next_token_labels(ids, mask, mask).tolist() == [[IGNORED, IGNORED, 8, 9, IGNORED]]


def test_generated_rows_get_the_labels_of_data_set_rows() -> None:
    """Prompts on the left, answers behind them, joined and shifted: as if the answer had come from a file."""
    rows = rows_of([([5, 6, 7, 8, 9], 2), ([1, 2, 3, 4], 3)])
    batch = micro_batches(rows, _draw(rows), 0, 1, 2, Padding(0, "right", 1))[0]
    assert batch.prompt_lengths is not None
    prompts, prompt_mask = left_padded_prompts(batch.input_ids, batch.prompt_lengths, 0)
    assert prompts.tolist() == [[0, 5, 6], [1, 2, 3]] and prompt_mask.tolist() == [[0, 1, 1], [1, 1, 1]]
    generated = torch.tensor([[7, 8, 9], [4, 50, 0]])
    answer_mask = generated_mask(generated, torch.tensor([4]))
    assert answer_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    ids, mask, response = with_answers(prompts, prompt_mask, generated, answer_mask, 0)
    assert ids[:, :5].tolist() == batch.input_ids.tolist() and mask[:, 5:].sum() == 0
    assert next_token_labels(ids, response, mask)[:, :5].tolist() == batch.labels.tolist()


def test_packing_loses_and_adds_nothing() -> None:
    rows = tokens_of(text_rows("abcdefgh", "ij", "klmnopqrstuvwxyz"), max_length=10)
    tokenizer = byte_tokenizer()
    eos = tokenizer.eos_token_id
    assert rows.lengths.tolist() == [10, 10, 9]
    expected = [*tokenizer("abcdefgh").input_ids, eos, *tokenizer("ij").input_ids, eos]
    expected += [*tokenizer("klmnopqrstuvwxyz").input_ids, eos]
    assert rows.tokens.tolist() == expected
    assert rows.source_rows.tolist() == [0, 1, 2]  # the documents that blocks begin in
    assert rows.num_targets.tolist() == [9, 9, 8]


def test_a_last_block_of_one_token_is_dropped() -> None:
    assert tokens_of(text_rows("abcdefghij"), max_length=10).lengths.tolist() == [10]
    assert tokens_of(text_rows("abcdefghijk"), max_length=10).lengths.tolist() == [10, 2]


def test_instructions_are_one_row_each() -> None:
    rows = tokens_of(instruction_rows(("say", "", "hi"), ("say", "it", "x" * 40), ("p" * 40, "", "y")), max_length=24)
    tokenizer = byte_tokenizer()
    assert len(rows) == 2 and rows.num_dropped == 1 and rows.num_truncated == 1
    assert tokenizer.decode(rows.row(0)) == "Q say A hi<eos>"
    assert rows.prompt_lengths is not None and rows.prompt_lengths.tolist() == [len("Q say A "), len("Q say it A ")]
    assert rows.lengths.tolist() == [len("Q say A hi") + 1, 24]
    assert rows.source_rows.tolist() == [0, 1]


def test_no_room_for_any_answer_is_an_error() -> None:
    with pytest.raises(DataError, match=r"task\.max_length is 5"):
        tokens_of(instruction_rows(("say", "", "hi")), max_length=5)


def test_an_instruction_may_hold_placeholders() -> None:
    assert STYLE.pair(None, "a {input} b", "x", "y") == ("Q a {input} b x A ", "y")
    assert STYLE.pair(None, "a", " ", "y")[0] == "Q a A "


def test_a_chat_template_writes_both_sides() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}{{ '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    style = PromptStyle.of(task_of(train_files=["x"], chat_template=True))
    rows = tokenize_language_rows(instruction_rows(("say", "it", "hi")), tokenizer, 64, None, style)
    assert tokenizer.decode(rows.row(0)) == "[user]say\n\nit\n[assistant]hi<eos>"
    assert rows.prompt_lengths is not None
    assert tokenizer.decode(rows.row(0)[: rows.prompt_lengths[0]]) == "[user]say\n\nit\n[assistant]"
    with pytest.raises(ConfigurationError, match="no chat template"):
        tokens_of(instruction_rows(("say", "it", "hi")), style=style)


def test_the_cache_gives_back_what_was_made(tmp_path: Path) -> None:
    data = instruction_rows(("say", "", "hi"), ("tell", "me", "no"))
    first, second = (tokens_of(data, cache=tmp_path) for _ in range(2))
    for name in ("tokens", "offsets", "prompt_lengths", "source_rows"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    assert not second.tokens.flags.owndata  # a memory map
    other = tokens_of(data, cache=tmp_path, style=PromptStyle("{prompt}{input}", "{prompt}"))
    assert other.content_hash != first.content_hash


def test_a_tokenizer_needs_an_end_of_text() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="eos_token"):
        tokenize_language_rows(text_rows("a"), tokenizer, 8, None, STYLE)


def test_columns_are_found() -> None:
    plain = Dataset.from_dict({"text": ["a", " ", "b"]})
    splits = load_splits(task_of(), plain, plain)
    assert splits.spec.text_column == "text" and splits.train["text"] == ["a", "b"] and splits.train["row"] == [0, 2]
    rows = Dataset.from_list(instructions(6))
    splits = load_splits(task_of(train_rows=4, evaluation_rows=2), rows, rows)
    assert splits.spec.prompt_column == "instruction" and len(splits.train) == 4
    assert splits.evaluation["validation"].to_dict()["input"] == ["", rows["input"][1]]
    with pytest.raises(DataError, match=r"task.text_column for plain text, or task.prompt_column"):
        load_splits(task_of(), Dataset.from_dict({"a": ["x"]}), Dataset.from_dict({"a": ["x"]}))


def test_text_beside_instructions_is_not_guessed() -> None:
    """As in tatsu-lab/alpaca, whose text holds instruction and answer."""
    rows = Dataset.from_dict({"instruction": ["a"], "input": [""], "output": ["x"], "text": ["a x"]})
    with pytest.raises(DataError, match=r'Set task\.text_column = "text" .* or task\.prompt_column and task\.response'):
        load_splits(validate(Task, {"kind": "causal_lm"}, "task"), rows, rows)
    for given, columns in (
        ({"text_column": "text"}, ["text", "row"]),
        ({"prompt_column": "instruction", "response_column": "output"}, ["prompt", "input", "response", "row"]),
    ):
        splits = load_splits(validate(Task, {"kind": "causal_lm", **given}, "task"), rows, rows)
        assert splits.train.column_names == columns


def test_a_template_without_a_place_for_the_input_is_refused() -> None:
    style = PromptStyle.of(Task(kind="causal_lm", prompt_template="Q: {prompt}\nA: "))
    assert style.pair(None, "why?", " ", "so") == ("Q: why?\nA: ", "so")
    with pytest.raises(DataError, match=r"task\.prompt_template has no \{input\}, and the row .* 'why\?' has an input"):
        style.pair(None, "why?", "rain", "so")


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("one line\n\nand another\n")
    splits = load_splits(task_of(train_files=[str(path)], evaluation_files={"validation": [str(path)]}))
    assert splits.train["text"] == ["one line\n\nand another\n"]


def test_an_empty_answer_is_named() -> None:
    rows = Dataset.from_dict({"instruction": ["a", "b"], "output": ["x", " "]})
    with pytest.raises(DataError, match=r'row 1 .* column "output": is empty'):
        load_splits(task_of(), rows, rows)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "causal_lm", "label_column": "y"}, "task: label_column: belongs to a classification"),
        ({"kind": "causal_lm", "extra_train_files": ["x"]}, "extra_train_files: belongs to a classification"),
        ({"prompt_column": "p"}, 'prompt_column: belongs to kind "causal_lm", and kind is null'),
        ({"kind": "regression", "generation_rows": 3}, 'generation_rows: belongs to kind "causal_lm"'),
        ({"kind": "causal_lm", "prompt_column": "p"}, "prompt_column and response_column belong together"),
        ({"kind": "causal_lm", "text_column": "t", "prompt_column": "p"}, "give one kind of columns"),
        ({"kind": "causal_lm", "prompt_template": "no place"}, r"prompt_template has no \{prompt\}"),
        ({"kind": "causal_lm", "metrics": ["accuracy"]}, 'metrics holds "accuracy"; allowed for kind "causal_lm"'),
        ({"kind": "causal_lm", "metrics": ["rouge_l"], "generation_rows": 0}, "needs generation_rows above 0"),
    ],
)
def test_fields_of_the_other_kind_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        validate(Task, fields, "task")


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 8, "micro_batch_size": 4},
        {"batch_size": 8, "micro_batch_size": 2},
        {"batch_size": 8, "micro_batch_size": 2, "batching": "length"},
        {"batch_size": 8, "micro_batch_size": 4, "batching": "length", "tokens_per_micro_batch": 40},
    ],
)
def test_mean_targets_is_of_the_whole_step(options: dict[str, Any]) -> None:
    from toy_lm import random_rows

    from mixkd_fast.configuration import Training, batch_arithmetic

    rows, ranks = random_rows(24), 2
    training = Training(**options)
    arithmetic = batch_arithmetic(training, ranks)
    stream = stream_of(training, rows.lengths, arithmetic, None, 1)
    for step in range(3):
        draw = stream.draw(step)
        batches = [
            batch
            for rank in range(ranks)
            for batch in micro_batches(rows, draw, rank, ranks, arithmetic.micro_batch_size, Padding(0, "right", 1))
        ]
        targets = sum(int((batch.labels != IGNORED).sum()) for batch in batches)
        count = stream.rows_seen(step + 1) - stream.rows_seen(step)
        assert {batch.mean_targets for batch in batches} == {targets / count}


def test_evaluation_batches_carry_labels() -> None:
    rows = rows_of([([5, 6, 7], 2), ([1, 2, 3, 4], 0)])
    batch = next(iter(EvaluationBatches(rows, 2, 0, 1, Padding(0, "right", 1))))
    assert batch.row_ids.tolist() == [1, 0] and batch.mean_targets is None
    assert batch.labels.tolist() == [[2, 3, 4, IGNORED], [IGNORED, 7, IGNORED, IGNORED]]
