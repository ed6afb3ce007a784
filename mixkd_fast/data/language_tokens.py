"""Rows of a causal language model to token numbers: plain text packed into blocks, instructions one row each.

Kept in the cache folder as `tokenization` keeps those of classifiers, and opened as memory maps.
"""

import hashlib
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray

from mixkd_fast.data import array_store
from mixkd_fast.data.prompts import PromptStyle
from mixkd_fast.data.tokenization import TokenRows, fingerprint, store, string_buffers
from mixkd_fast.errors import DataError

_FORMAT = 1
_CHUNK_ROWS = 1024
_SHORTEST = 2
"""Tokens of a row that has something to predict."""


def tokenize_language_rows(
    rows: Dataset,
    tokenizer: Any,
    max_length: int,
    cache_dir: Path | None,
    style: PromptStyle,
    packed: bool = True,
    one_for_one: bool = False,
) -> TokenRows:
    """Tokenise the rows of a causal_lm task, or open what an earlier call with the same content has left.

    Plain text is packed: every document (with the tokenizer's beginning-of-text token, if it sets one) is followed by
    the end-of-text token, all are joined, and the stream is cut into blocks of max_length. What is left at the end is
    a shorter last block; a block of a single token is dropped. `source_rows` names the document that a block begins in.

    An instruction is a row of its own: prompt, response, end of text. What is longer than max_length is cut at the end
    and counted; a row whose prompt leaves no room for one token of its response is left out and counted.

    With one_for_one, for streams, nothing is packed or left out: a document is a row of its own, cut at max_length and
    counted; a row whose prompt leaves no room keeps its prompt alone, without a target, and is counted as dropped.

    Args: rows of `language_columns`; cache_dir None keeps everything in memory; packed = False makes a
    row of every document instead, cut at max_length, but for those without two tokens.
    Raises: DataError for a tokenizer without an end-of-text token, or when no row is left.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            f'the tokenizer "{tokenizer.name_or_path}" has no end-of-text token (eos_token), which a causal language '
            "model's rows end with; set one and save the tokenizer anew"
        )
    table: pa.Table = rows.with_format("arrow")[:]
    is_text = "text" in table.column_names
    how = ("" if packed else "rows") if is_text else style.key(tokenizer)
    key = _content_hash(table, tokenizer, max_length, how + (" one for one" if one_for_one else ""))
    arrays = meta = None
    if cache_dir is not None:
        arrays, meta = array_store.load(cache_dir / key) or (None, None)
    if arrays is None or meta is None:
        if not is_text:
            arrays, meta = _instructions(table, tokenizer, max_length, style, one_for_one)
        elif packed and not one_for_one:
            arrays, meta = _packed(table, tokenizer, max_length)
        else:
            arrays, meta = _documents(table, tokenizer, max_length, one_for_one)
        if cache_dir is not None:
            arrays = store(cache_dir, key, arrays, meta)
    return TokenRows(
        tokens=arrays["tokens"],
        offsets=arrays["offsets"],
        token_types=None,
        labels=np.zeros(len(arrays["offsets"]) - 1, dtype=np.int64),
        soft_labels=None,
        source_rows=arrays["source_rows"],
        max_length=max_length,
        num_truncated=int(meta["num_truncated"]),
        content_hash=key,
        prompt_lengths=arrays["prompt_lengths"],
        num_dropped=int(meta["num_dropped"]),
    )


def _packed(table: pa.Table, tokenizer: Any, max_length: int) -> tuple[dict[str, NDArray[Any]], dict[str, int]]:
    start, end = _begin(tokenizer), [tokenizer.eos_token_id]
    parts: list[NDArray[np.int32]] = []
    lengths: list[int] = []
    for first in range(0, len(table), _CHUNK_ROWS):
        encoded = _ids(tokenizer, table["text"].slice(first, _CHUNK_ROWS).to_pylist())
        documents = [start + ids + end for ids in encoded]
        lengths += map(len, documents)
        parts.append(np.fromiter(chain.from_iterable(documents), dtype=np.int32))
    tokens = np.concatenate(parts)
    cuts = np.arange(0, len(tokens), max_length, dtype=np.int64)
    if len(tokens) - cuts[-1] < _SHORTEST and len(cuts) > 1:
        tokens, cuts = tokens[: cuts[-1]], cuts[:-1]
    document_of = np.searchsorted(np.cumsum(lengths), cuts, side="right")
    arrays: dict[str, NDArray[Any]] = {
        "tokens": tokens,
        "offsets": np.append(cuts, len(tokens)).astype(np.int64),
        "source_rows": table["row"].to_numpy()[document_of],
        "prompt_lengths": np.zeros(len(cuts), dtype=np.int64),
    }
    return arrays, {"num_truncated": 0, "num_dropped": 0}


def _documents(
    table: pa.Table, tokenizer: Any, max_length: int, keep_all: bool
) -> tuple[dict[str, NDArray[Any]], dict[str, int]]:
    start, end = _begin(tokenizer), [tokenizer.eos_token_id]
    parts: list[list[int]] = []
    num_truncated = 0
    for first in range(0, len(table), _CHUNK_ROWS):
        for ids in _ids(tokenizer, table["text"].slice(first, _CHUNK_ROWS).to_pylist()):
            whole = start + ids + end
            num_truncated += len(whole) > max_length
            parts.append(whole[:max_length])
    kept = [row for row, part in enumerate(parts) if keep_all or len(part) >= _SHORTEST]
    arrays = _rows_of([parts[row] for row in kept], [0] * len(kept))
    arrays["source_rows"] = table["row"].to_numpy()[np.array(kept, dtype=np.int64)]
    return arrays, {"num_truncated": num_truncated, "num_dropped": len(parts) - len(kept)}


def _instructions(
    table: pa.Table, tokenizer: Any, max_length: int, style: PromptStyle, one_for_one: bool
) -> tuple[dict[str, NDArray[Any]], dict[str, int]]:
    # A chat template writes its own special tokens.
    start, end = [] if style.chat else _begin(tokenizer), tokenizer.eos_token_id
    parts: list[list[int]] = []
    prompt_lengths: list[int] = []
    kept: list[int] = []
    num_truncated = num_dropped = 0
    for first in range(0, len(table), _CHUNK_ROWS):
        chunk = table.slice(first, _CHUNK_ROWS)
        columns = (chunk[name].to_pylist() for name in ("prompt", "input", "response"))
        texts = [style.pair(tokenizer, *row) for row in zip(*columns, strict=True)]
        prompts = _ids(tokenizer, [prompt for prompt, _ in texts])
        responses = _ids(tokenizer, [response for _, response in texts])
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True), start=first):
            answer = response[: response.index(end)] if end in response else response
            num_prompt = len(start) + len(prompt)
            if num_prompt == 0 or num_prompt >= max_length:
                num_dropped += 1
                if not one_for_one:
                    continue
                parts.append([*start, *prompt, end][:max_length])
                prompt_lengths.append(len(parts[-1]))
            else:
                whole = [*start, *prompt, *answer, end]
                num_truncated += len(whole) > max_length
                parts.append(whole[:max_length])
                prompt_lengths.append(num_prompt)
            kept.append(row)
    if not kept:
        raise DataError(
            f"task.max_length is {max_length}, and the prompt of every one of the {len(table)} rows alone is as long; "
            "raise task.max_length"
        )
    arrays = _rows_of(parts, prompt_lengths) | {"source_rows": table["row"].to_numpy()[np.array(kept)]}
    return arrays, {"num_truncated": num_truncated, "num_dropped": num_dropped}


def _rows_of(parts: list[list[int]], prompt_lengths: list[int]) -> dict[str, NDArray[Any]]:
    lengths = np.array([len(part) for part in parts], dtype=np.int64)
    return {
        "tokens": np.fromiter(chain.from_iterable(parts), dtype=np.int32, count=int(lengths.sum())),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "prompt_lengths": np.array(prompt_lengths, dtype=np.int64),
    }


def _begin(tokenizer: Any) -> list[int]:
    """The beginning-of-text token, if the tokenizer puts one before a text by itself."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    encoded = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _content_hash(table: pa.Table, tokenizer: Any, max_length: int, style: str) -> str:
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    digest = hashlib.sha256(f"causal_lm {_FORMAT} {max_length} {special} {fingerprint(tokenizer)} {style}".encode())
    for name in ("text", "prompt", "input", "response"):
        if name in table.column_names:
            digest.update(f"\n{name} {len(table)} ".encode())
            for buffer in string_buffers(table[name]):
                digest.update(buffer)
    digest.update(np.ascontiguousarray(table["row"].to_numpy()).data)
    return digest.hexdigest()
