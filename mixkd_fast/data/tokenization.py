"""Rows to token numbers, once: flat arrays kept in a cache folder named by what they were made from."""

import hashlib
import json
import os
import warnings
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray

from mixkd_fast.data import array_store
from mixkd_fast.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 1
_CHUNK_ROWS = 4096


@dataclass(frozen=True)
class TokenRows:
    """Tokenised rows without padding; row i has tokens[offsets[i]:offsets[i + 1]], special tokens included."""

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    token_types: NDArray[np.uint8] | None
    """None if the tokenizer makes none."""
    labels: NDArray[np.int64] | NDArray[np.float32]
    """[rows]: int64 class numbers, float32 for a regression, 0 for a causal language model (its tokens are labels)."""
    soft_labels: NDArray[np.float32] | None
    """[rows, C]"""
    source_rows: NDArray[np.int64]
    """[rows]: number in the data before a subset was drawn, for error messages."""
    max_length: int
    num_truncated: int
    content_hash: str
    """sha256 over texts, labels, row numbers, tokenizer and max_length."""
    prompt_lengths: NDArray[np.int64] | None = None
    """[rows]: the first tokens of a causal language model's row, which are not learnt; None for other kinds."""
    num_dropped: int = 0
    """Rows that were left out, because their prompt leaves no room for an answer."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every row."""
        return np.diff(self.offsets)

    @cached_property
    def num_targets(self) -> NDArray[np.int64]:
        """Tokens of every row that a causal language model learns to predict; see `next_tokens`."""
        assert self.prompt_lengths is not None
        return self.lengths - np.maximum(self.prompt_lengths, 1)

    @property
    def mean_length(self) -> float:
        """Tokens of a row on average."""
        return float(self.lengths.mean())

    @property
    def truncated_share(self) -> float:
        """Share of the rows that were longer than max_length."""
        return self.num_truncated / len(self)

    def row(self, index: int) -> NDArray[np.int32]:
        """The tokens of a row."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/mixkd_fast, or ~/.cache/mixkd_fast."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixkd_fast"


def tokenize_rows(
    rows: Dataset,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    cache_dir: Path | None,
    show_progress: bool = False,
) -> TokenRows:
    """Tokenise the rows of `load_splits`, or open what an earlier call with the same content has left.

    Pairs are cut at the longer text first. A cache that cannot be written costs one warning and nothing else; a
    damaged entry is made anew.
    Args: max_length, in tokens, special tokens included; cache_dir, None keeps everything in memory.
    Raises: ConfigurationError if max_length leaves no room for text; DataError for a row without any token.
    """
    table: pa.Table = rows.with_format("arrow")[:]
    pairs = "text_pair" in table.column_names
    num_special = tokenizer.num_special_tokens_to_add(pair=pairs)
    if max_length <= num_special + pairs:
        raise ConfigurationError(
            f"task.max_length is {max_length}, but {num_special} special tokens belong to every row; "
            f"allowed: at least {num_special + pairs + 1}"
        )
    fixed = _fixed_arrays(table)
    key = _content_hash(table, fixed, tokenizer, max_length)
    arrays = meta = None
    if cache_dir is not None:
        arrays, meta = array_store.load(cache_dir / key) or (None, None)
    if arrays is None or meta is None:
        arrays, num_truncated = _tokenize(table, tokenizer, max_length, show_progress)
        arrays |= fixed
        meta = {"num_truncated": num_truncated}
        if cache_dir is not None:
            arrays = store(cache_dir, key, arrays, meta)
    return TokenRows(
        tokens=arrays["tokens"],
        offsets=arrays["offsets"],
        token_types=arrays.get("token_types"),
        labels=arrays["labels"],
        soft_labels=arrays.get("soft_labels"),
        source_rows=arrays["source_rows"],
        max_length=max_length,
        num_truncated=int(meta["num_truncated"]),
        content_hash=key,
    )


def store(cache_dir: Path, key: str, arrays: dict[str, NDArray[Any]], meta: dict[str, int]) -> dict[str, NDArray[Any]]:
    """Keep the arrays and return them as memory maps, or as they are if the cache cannot be written."""
    try:
        array_store.save(cache_dir / key, arrays, meta)
        stored = array_store.load(cache_dir / key)
    except OSError as error:
        warnings.warn(
            f"task.cache_dir {cache_dir} cannot be written ({error}): tokenised rows are kept in memory and will be "
            "made again by the next run",
            stacklevel=3,
        )
        return arrays
    return arrays if stored is None else stored[0]


def _fixed_arrays(table: pa.Table) -> dict[str, NDArray[Any]]:
    """What is stored beside the tokens."""
    arrays = {"labels": table["label"].to_numpy(), "source_rows": table["row"].to_numpy()}
    if "soft_labels" in table.column_names:
        column = table["soft_labels"].combine_chunks()
        flat = pc.list_flatten(column).to_numpy(zero_copy_only=False)
        arrays["soft_labels"] = flat.astype(np.float32).reshape(len(table), -1)
    return arrays


def _tokenize(
    table: pa.Table, tokenizer: "PreTrainedTokenizerBase", max_length: int, show_progress: bool
) -> tuple[dict[str, NDArray[Any]], int]:
    pairs = "text_pair" in table.column_names
    with_types = "token_type_ids" in tokenizer.model_input_names
    parts: list[NDArray[np.int32]] = []
    type_parts: list[NDArray[np.uint8]] = []
    lengths: list[NDArray[np.int64]] = []
    num_truncated = 0
    for start in _steps(len(table), show_progress):
        chunk = table.slice(start, _CHUNK_ROWS)
        texts = chunk["text"].to_pylist()
        text_pairs = chunk["text_pair"].to_pylist() if pairs else None
        encoded = tokenizer(
            texts,
            text_pairs,
            truncation="longest_first",
            max_length=max_length,
            return_attention_mask=False,
            return_token_type_ids=with_types,
            verbose=False,
        )
        ids = encoded["input_ids"]
        chunk_lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        parts.append(_flat(ids, chunk_lengths, np.dtype(np.int32)))
        if with_types:
            type_parts.append(_flat(encoded["token_type_ids"], chunk_lengths, np.dtype(np.uint8)))
        lengths.append(chunk_lengths)
        # Only a row of full length can have been cut; without truncation it shows its own length.
        full = np.flatnonzero(chunk_lengths >= max_length)
        if full.size:
            whole = tokenizer(
                [texts[row] for row in full],
                [text_pairs[row] for row in full] if text_pairs is not None else None,
                truncation=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
            num_truncated += sum(len(tokens) > max_length for tokens in whole["input_ids"])
    all_lengths = np.concatenate(lengths)
    if not all_lengths.all():
        row = int(np.argmin(all_lengths))
        raise DataError(
            f"row {table['row'][row].as_py()} (counted from 0) gives no token: "
            f"text {table['text'][row].as_py()!r}; at least one is needed"
        )
    offsets = np.concatenate([[0], np.cumsum(all_lengths)]).astype(np.int64)
    arrays: dict[str, NDArray[Any]] = {"tokens": np.concatenate(parts), "offsets": offsets}
    if with_types:
        arrays["token_types"] = np.concatenate(type_parts)
    return arrays, num_truncated


def _flat(rows: list[list[int]], lengths: NDArray[np.int64], dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.fromiter(chain.from_iterable(rows), dtype=dtype, count=int(lengths.sum()))


def _steps(num_rows: int, show_progress: bool) -> Any:
    from tqdm import trange

    # The bar appears only where there is something to wait for.
    return trange(0, num_rows, _CHUNK_ROWS, desc="tokenizing", disable=not show_progress, delay=2, leave=False)


def _content_hash(
    table: pa.Table, fixed: dict[str, NDArray[Any]], tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> str:
    digest = hashlib.sha256(f"{FORMAT_VERSION} {max_length} {fingerprint(tokenizer)}".encode())
    for name in ("text", "text_pair"):
        if name in table.column_names:
            digest.update(f"\n{name} {len(table)} ".encode())
            for buffer in string_buffers(table[name]):
                digest.update(buffer)
    for name, array in fixed.items():
        digest.update(f"\n{name} {array.dtype.str} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def string_buffers(column: pa.ChunkedArray) -> tuple[memoryview, memoryview]:
    """Row ends and characters, whatever chunks or slices the column consists of."""
    values = pc.cast(column, pa.large_string()).combine_chunks()
    values = values if isinstance(values, pa.Array) else pa.concat_arrays(values.chunks)
    _, ends, characters = values.buffers()
    offsets = np.frombuffer(ends, dtype=np.int64)[values.offset : values.offset + len(values) + 1]
    text = memoryview(characters or b"")[offsets[0] : offsets[-1]]
    return (offsets - offsets[0]).data, text


def fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """sha256 over everything that decides about the tokens of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        # What the last call asked for, not what the tokenizer is.
        state.pop("truncation", None)
        state.pop("padding", None)
    else:
        state = sorted(tokenizer.get_vocab().items())
    parts = [
        type(tokenizer).__name__,
        state,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        tokenizer.truncation_side,
        sorted(tokenizer.model_input_names),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
