"""Files of ordinary text that a method trains on beside the data set."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray

from mixkd_fast.configuration import Config
from mixkd_fast.data import language_columns
from mixkd_fast.data.batching import Batch, Draw, Padding, micro_batches
from mixkd_fast.data.language_tokens import tokenize_language_rows
from mixkd_fast.data.prompts import PromptStyle
from mixkd_fast.data.sources import read_files
from mixkd_fast.data.tokenization import TokenRows, default_cache_dir
from mixkd_fast.errors import DataError
from mixkd_fast.preparation import Prepared


@dataclass(frozen=True)
class TextRows:
    """Packed plain text, row by row."""

    rows: TokenRows
    padding: Padding

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, numbers: NDArray[np.int64]) -> Batch:
        """These rows as one training batch, on the CPU."""
        return micro_batches(self.rows, Draw(numbers, None, None), 0, 1, len(numbers), self.padding)[0]


def load_texts(config: Config, parts: Prepared, files: list[str], field: str) -> TextRows:
    """Files of plain text, packed with the run's tokenizer and max_length.

    Args: field = of the method section, for messages. Raises: DataError for a file that has no texts.
    """
    spec = replace(parts.spec, text_column="text", prompt_column=None, input_column=None, response_column=None)
    try:
        sources = read_files(tuple(files), field)
        for source in sources:
            source.require("text", field)
        table = pa.concat_tables([language_columns.normalise(spec, source) for source in sources])
    except DataError as error:
        # Readers of data know the fields of the task section only.
        raise DataError(str(error).replace(f"task.{field}", f"method.{field}")) from error
    cache = Path(config.task.cache_dir) if config.task.cache_dir else default_cache_dir()
    style = PromptStyle.of(config.task)
    rows = tokenize_language_rows(Dataset(table), parts.tokenizer, config.task.max_length, cache, style)
    return TextRows(rows, parts.padding)
