"""The columns of a causal language model's rows: documents, or instructions and their answers.

Uniform rows have `row` (number in the source) and either `text`, or `prompt`, `input` ("" where a row has none) and
`response`.
"""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mixkd_fast.data.sources import Source, is_blank, texts_of
from mixkd_fast.data.tasks import TaskSpec, quoted
from mixkd_fast.errors import DataError

_USUAL_PROMPTS = ("instruction", "prompt")
_USUAL_RESPONSES = ("output", "response", "completion")
_USUAL_INPUT = "input"
_USUAL_TEXT = "text"


def detect(spec: TaskSpec, source: Source) -> TaskSpec:
    """Fill in the columns of a task that names none. Raises: DataError where they cannot be told."""
    if spec.text_column is not None or spec.prompt_column is not None:
        return spec
    columns = source.rows.column_names
    prompts = [name for name in _USUAL_PROMPTS if name in columns]
    responses = [name for name in _USUAL_RESPONSES if name in columns]
    if _USUAL_TEXT in columns:
        if prompts and responses:
            raise DataError(
                f'{source.where} has a column "{_USUAL_TEXT}" and {quoted([*prompts, *responses])} as well. Set '
                f'task.text_column = "{_USUAL_TEXT}" to learn all of that text, or task.prompt_column and '
                "task.response_column to learn answers to instructions"
            )
        return replace(spec, text_column=_USUAL_TEXT)
    if len(prompts) == 1 and len(responses) == 1:
        about = _USUAL_INPUT if _USUAL_INPUT in columns else None
        return replace(spec, prompt_column=prompts[0], input_column=about, response_column=responses[0])
    raise DataError(
        f'{source.where} has neither a column "text" nor one usual pair of instruction and answer; it has: '
        f"{quoted(columns)}. Set task.text_column for plain text, or task.prompt_column and task.response_column"
    )


def normalise(spec: TaskSpec, source: Source, streamed: bool = False) -> pa.Table:
    """The uniform columns of one source.

    Documents without a visible character are left out. With streamed, for a part of a corpus, they are not, and an
    input column that this part lacks is "" in it.
    Raises: DataError for a missing column, a value that is no text, an instruction or answer that is empty, or a source
    of nothing but empty documents.
    """
    rows = pa.array(np.arange(len(source.rows), dtype=np.int64))
    if spec.prompt_column is None:
        assert spec.text_column is not None
        texts = texts_of(source, spec.text_column, "text_column")
        table = pa.table({"text": texts, "row": rows})
        if streamed:
            return table
        table = table.filter(pa.array(~is_blank(texts)))
        if len(table) == 0:
            raise DataError(f'{source.where}, column "{spec.text_column}": every text is empty; one at least is needed')
        return table
    assert spec.response_column is not None
    columns = {"prompt": _filled(source, spec.prompt_column, "prompt_column")}
    has_input = spec.input_column in source.rows.column_names or not streamed
    columns["input"] = _optional(source, spec.input_column if has_input else None)
    columns["response"] = _filled(source, spec.response_column, "response_column")
    return pa.table(columns | {"row": rows})


def _filled(source: Source, column: str, field: str) -> pa.Array:
    texts = texts_of(source, column, field)
    blank = is_blank(texts)
    if blank.any():
        raise DataError(
            f'{source.where}, row {int(np.argmax(blank))} (counted from 0), column "{column}": is empty '
            f"(task.{field}); {int(blank.sum())} such rows: remove them"
        )
    return texts


def _optional(source: Source, column: str | None) -> pa.Array:
    """The texts of the input column, "" where a row holds nothing or there is no such column."""
    nothing = pa.array([""] * len(source.rows), pa.large_string())
    if column is None:
        return nothing
    source.require(column, "input_column")
    values = source.column(column)
    if values.null_count == len(values):
        return nothing
    if values.null_count and (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        return pc.fill_null(pc.cast(values, pa.large_string()), "")
    return texts_of(source, column, "input_column")
