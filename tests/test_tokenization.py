"""Tokenised rows: the same as the tokenizer's own, kept whole in a cache that survives kills, damage and rivals."""

import json
import multiprocessing
import os
import shutil
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mixkd_fast.data import array_store
from mixkd_fast.data.tokenization import TokenRows, default_cache_dir, tokenize_rows
from mixkd_fast.errors import ConfigurationError, DataError

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "mat", "quickly", "never", "every", "some", "two", "red"]


def make_tokenizer(token_types: bool = True, special: bool = True) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer of a few words, as BERT's (with token types) or as DistilBERT's (without)."""
    # Half of the words are whole tokens, the others fall into letters. (The tokenizers' trainer breaks ties at random.)
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *WORDS[::2],
        *letters,
        *(f"##{letter}" for letter in letters),
    ]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if special:
        pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
        backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", pair, [("[CLS]", 2), ("[SEP]", 3)])
    names = ["input_ids", *(["token_type_ids"] if token_types else []), "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=names,
    )


def make_rows(num_rows: int, pairs: bool = True, seed: int = 0, **more: Any) -> Dataset:
    """Rows as `load_splits` gives them, of 1 to 20 words."""
    rng = np.random.default_rng(seed)

    def sentence() -> str:
        return " ".join(rng.choice(WORDS, size=rng.integers(1, 21)))

    columns: dict[str, Any] = {"text": [sentence() for _ in range(num_rows)]}
    if pairs:
        columns["text_pair"] = [sentence() for _ in range(num_rows)]
    columns["label"] = rng.integers(0, 3, num_rows)
    columns["row"] = np.arange(num_rows) + 5
    return Dataset.from_dict(columns | more)


def same(first: TokenRows, second: TokenRows) -> None:
    assert (first.content_hash, first.num_truncated) == (second.content_hash, second.num_truncated)
    for name in ("tokens", "offsets", "token_types", "labels", "soft_labels", "source_rows"):
        one, other = getattr(first, name), getattr(second, name)
        assert (one is None) == (other is None), name
        if one is not None:
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("token_types", [True, False])
def test_rows_equal_the_tokenizers_own(pairs: bool, token_types: bool) -> None:
    rows, tokenizer = make_rows(50, pairs), make_tokenizer(token_types)
    max_length = 70 if pairs else 30
    made = tokenize_rows(rows, tokenizer, max_length, None)
    assert len(made) == 50
    assert made.tokens.dtype == np.int32
    assert (made.token_types is not None) == token_types
    num_truncated = 0
    for index, row in enumerate(rows):
        texts = (row["text"], row["text_pair"]) if pairs else (row["text"],)
        expected = tokenizer(*texts, truncation="longest_first", max_length=max_length)
        assert made.row(index).tolist() == expected["input_ids"]
        assert made.lengths[index] == len(expected["input_ids"])
        if token_types:
            here = slice(made.offsets[index], made.offsets[index + 1])
            assert made.token_types is not None
            assert made.token_types[here].tolist() == expected["token_type_ids"]
        num_truncated += len(tokenizer(*texts)["input_ids"]) > max_length
    assert 0 < num_truncated < 50
    assert (made.num_truncated, made.truncated_share) == (num_truncated, num_truncated / 50)
    assert made.labels.tolist() == rows["label"][:]
    assert made.source_rows.tolist() == list(range(5, 55))


def test_a_row_of_exactly_max_length_is_not_counted_as_cut() -> None:
    rows = Dataset.from_dict({"text": ["the cat", "cat the cat"], "label": [0, 1], "row": [0, 1]})
    made = tokenize_rows(rows, make_tokenizer(), 4, None)
    assert made.lengths.tolist() == [4, 4]
    assert made.num_truncated == 1


@pytest.mark.parametrize(
    "more", [{}, {"soft_labels": [[0.2, 0.3, 0.5]] * 30}, {"label": np.linspace(0, 5, 30, dtype=np.float32)}]
)
def test_cache_hit_equals_miss(tmp_path: Path, more: dict[str, Any]) -> None:
    rows = make_rows(30, **more)
    without = tokenize_rows(rows, make_tokenizer(), 16, None)
    miss = tokenize_rows(rows, make_tokenizer(), 16, tmp_path)
    hit = tokenize_rows(rows, make_tokenizer(), 16, tmp_path)
    same(without, miss)
    same(without, hit)
    assert [path.name for path in tmp_path.iterdir()] == [without.content_hash]
    assert isinstance(hit.tokens.base, np.memmap)
    if "soft_labels" in more:
        assert hit.soft_labels is not None
        np.testing.assert_array_equal(hit.soft_labels, np.float32(more["soft_labels"]))


def test_a_hit_does_not_tokenise(tmp_path: Path) -> None:
    rows = make_rows(30)
    made = tokenize_rows(rows, make_tokenizer(), 16, tmp_path)
    folder = tmp_path / made.content_hash
    arrays, meta = array_store.load(folder) or ({}, {})
    marked = {name: array.copy() for name, array in arrays.items()}
    marked["tokens"][0] = 77
    shutil.rmtree(folder)
    array_store.save(folder, marked, meta)
    assert tokenize_rows(rows, make_tokenizer(), 16, tmp_path).tokens[0] == 77


def test_the_hash_depends_on_content_and_on_nothing_else() -> None:
    def made(rows: Dataset, tokenizer: PreTrainedTokenizerFast | None = None, max_length: int = 16) -> str:
        return tokenize_rows(rows, tokenizer or make_tokenizer(), max_length, None).content_hash

    rows = make_rows(30)
    base = made(rows)
    # The same content through other chunks, and a tokenizer whose last call asked for something else.
    shuffled = Dataset.from_dict(make_rows(30).select(range(29, -1, -1))[:]).select(range(29, -1, -1))
    used = make_tokenizer()
    used("cat", truncation=True, max_length=7, padding="max_length")
    assert made(shuffled) == base
    assert made(rows, used) == base

    def changed(column: str, value: Any) -> Dataset:
        columns = dict(rows[:])
        columns[column] = [value, *columns[column][1:]]
        return Dataset.from_dict(columns)

    moved = dict(rows[:])
    moved["text"] = [moved["text"][0] + " cat", *moved["text"][1:]]
    larger = make_tokenizer()
    larger.add_tokens(["zebra"])
    others = [
        made(changed("text", "never")),
        made(changed("text_pair", "never")),
        made(changed("label", 1 - rows["label"][0])),
        made(changed("row", 99)),
        made(Dataset.from_dict(moved)),
        made(rows.remove_columns("text_pair")),
        made(rows, max_length=17),
        made(rows, larger),
        made(rows, make_tokenizer(token_types=False)),
    ]
    assert len({base, *others}) == 10


def test_moving_a_word_between_rows_changes_the_hash() -> None:
    def made(texts: list[str]) -> str:
        return tokenize_rows(
            Dataset.from_dict({"text": texts, "label": [0, 1], "row": [0, 1]}), make_tokenizer(), 9, None
        ).content_hash

    assert made(["cat dog", "sat"]) != made(["cat ", "dogsat"])


def flip_a_byte(folder: Path) -> None:
    content = bytearray((folder / "tokens.npy").read_bytes())
    content[-1] ^= 1
    (folder / "tokens.npy").write_bytes(content)


def cut_a_file(folder: Path) -> None:
    content = (folder / "offsets.npy").read_bytes()
    (folder / "offsets.npy").write_bytes(content[: len(content) // 2])


DAMAGES = {
    "flipped byte": flip_a_byte,
    "cut file": cut_a_file,
    "lost file": lambda folder: (folder / "labels.npy").unlink(),
    "lost manifest": lambda folder: (folder / "manifest.json").unlink(),
    "cut manifest": lambda folder: (folder / "manifest.json").write_text('{"meta": '),
    "other manifest": lambda folder: (folder / "manifest.json").write_text(json.dumps([1])),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_made_anew(tmp_path: Path, damage: str) -> None:
    rows = make_rows(30)
    first = tokenize_rows(rows, make_tokenizer(), 16, None)
    folder = tmp_path / first.content_hash
    tokenize_rows(rows, make_tokenizer(), 16, tmp_path)
    DAMAGES[damage](folder)
    assert array_store.load(folder) is None
    same(first, tokenize_rows(rows, make_tokenizer(), 16, tmp_path))
    assert array_store.load(folder) is not None
    assert [path.name for path in tmp_path.iterdir()] == [first.content_hash]


def test_the_rest_of_a_killed_process_does_no_harm_and_goes_away(tmp_path: Path) -> None:
    rows = make_rows(30)
    key = tokenize_rows(rows, make_tokenizer(), 16, None).content_hash
    old, recent = tmp_path / f".{key[:16]}.old", tmp_path / f".{key[:16]}.recent"
    for folder in (old, recent):
        folder.mkdir()
        (folder / "tokens.npy").write_bytes(b"half")
    os.utime(old, (time.time() - 90000,) * 2)
    made = tokenize_rows(rows, make_tokenizer(), 16, tmp_path)
    same(made, tokenize_rows(rows, make_tokenizer(), 16, tmp_path))
    assert not old.exists()
    # It may belong to a process that is still writing.
    assert recent.exists()


def _save_for_ever(folder: Path, started: Any) -> None:
    started.set()
    while True:
        array_store.save(folder / "entry", {"a": np.arange(200_000)}, {"n": 1})
        (folder / "entry").rename(folder / "gone")
        shutil.rmtree(folder / "gone")


def test_sigkill_leaves_an_entry_whole_or_absent(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    context = multiprocessing.get_context("fork")
    partial = 0
    for attempt in range(20):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        started = context.Event()
        process = context.Process(target=_save_for_ever, args=(folder, started))
        process.start()
        assert started.wait(60)
        time.sleep(float(rng.uniform(0, 0.03)))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        entry = folder / "entry"
        partial += any(path.name.startswith(".entry.") for path in folder.iterdir())
        stored = array_store.load(entry)
        assert (stored is not None) == entry.exists()
        # The next process writes it without minding what lies there.
        array_store.save(entry, {"a": np.arange(200_000)}, {"n": 1})
        again = array_store.load(entry)
        assert again is not None
        np.testing.assert_array_equal(again[0]["a"], np.arange(200_000))
    assert partial > 0, "no kill hit the writing; the test shows nothing"


def _tokenize_into(cache_dir: Path, start: Any) -> None:
    rows, tokenizer = make_rows(200), make_tokenizer()
    start.wait()
    made = tokenize_rows(rows, tokenizer, 16, cache_dir)
    same(made, tokenize_rows(rows, make_tokenizer(), 16, None))


def test_processes_at_once_leave_one_whole_entry(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Barrier(3)
    processes = [context.Process(target=_tokenize_into, args=(tmp_path, start)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    (entry,) = tmp_path.iterdir()
    assert array_store.load(entry) is not None


def test_an_unwritable_cache_costs_one_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    rows = make_rows(30)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        made = [tokenize_rows(rows, make_tokenizer(), 16, tmp_path / "file" / "cache") for _ in range(2)]
    (warning,) = [item for item in caught if "cache_dir" in str(item.message)]
    assert str(tmp_path / "file" / "cache") in str(warning.message)
    assert "kept in memory" in str(warning.message)
    same(made[0], tokenize_rows(rows, make_tokenizer(), 16, None))


@pytest.mark.parametrize(("pairs", "least"), [(True, 5), (False, 3)])
def test_max_length_must_leave_room_for_text(pairs: bool, least: int) -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(ConfigurationError, match=rf"task\.max_length is {least - 1}.*allowed: at least {least}"):
        tokenize_rows(make_rows(3, pairs), tokenizer, least - 1, None)
    assert tokenize_rows(make_rows(3, pairs), tokenizer, least, None).lengths.max() == least


def test_a_row_without_tokens_is_refused() -> None:
    rows = Dataset.from_dict({"text": ["cat", "\u0000"], "label": [0, 1], "row": [4, 8]})
    with pytest.raises(DataError, match=r"row 8 .* gives no token"):
        tokenize_rows(rows, make_tokenizer(special=False), 9, None)


def test_default_cache_dir_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "mixkd_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_cache_dir() == Path("/home/someone/.cache/mixkd_fast")
