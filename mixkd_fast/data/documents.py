"""Rows of text as they are scored one by one: documents that are not packed, and the hash of texts alone."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from mixkd_fast.data.language_tokens import tokenize_language_rows
from mixkd_fast.data.prompts import PromptStyle
from mixkd_fast.data.tokenization import TokenRows, string_buffers

_TEXT_COLUMNS = ("text", "prompt", "input", "response")


def corpus_hash(rows: Dataset) -> str:
    """sha256 over the texts and row numbers of a causal_lm task's rows, whatever tokenizer will read them."""
    table: pa.Table = rows.with_format("arrow")[:]
    digest = hashlib.sha256(b"mixkd_fast corpus 1")
    for name in _TEXT_COLUMNS:
        if name in table.column_names:
            digest.update(f"\n{name} {len(table)} ".encode())
            for buffer in string_buffers(table[name]):
                digest.update(buffer)
    digest.update(np.ascontiguousarray(table["row"].to_numpy()).data)
    return digest.hexdigest()


def tokenize_documents(
    rows: Dataset, tokenizer: Any, max_length: int, cache_dir: Path | None, style: PromptStyle
) -> TokenRows:
    """Tokenise rows so that each is one sequence: a document is not packed with others, an instruction is as ever.

    A document is the tokenizer's beginning-of-text token, if it sets one, its tokens, and the end-of-text token; what
    is longer than max_length is cut at the end and counted. Its first token is not predicted.
    Raises: DataError as `tokenize_language_rows`.
    """
    return tokenize_language_rows(rows, tokenizer, max_length, cache_dir, style, packed=False)
