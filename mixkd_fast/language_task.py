"""The fields of a task section that belong to causal language modelling, and what they may be combined with."""

from typing import Annotated, Any

from pydantic import Field

from mixkd_fast.section import Section

LANGUAGE_METRICS = ("perplexity", "nll", "token_accuracy", "rouge_l")
LOWER_IS_BETTER = frozenset({"perplexity", "nll"})
"""Of the metrics that may pick the best checkpoint."""
_CLASSIFICATION_FIELDS = (
    "text_pair_column",
    "label_column",
    "soft_label_columns",
    "label_names",
    "extra_train_files",
    "partition",
)


class Sampling(Section):
    """How text is generated."""

    max_new_tokens: Annotated[int, Field(gt=0)] = 128
    """Longest answer in tokens; shorter where the model has no positions for it."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the most probable token each time; above 0 tokens are drawn."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Draw from the most probable tokens only, so many of them; 0 from all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the most probable tokens that have this much probability together."""


class LanguageTask(Section):
    """Fields of `task` for kind "causal_lm"."""

    prompt_column: str | None = None
    """causal_lm: column of the instruction; null finds "instruction" or "prompt" beside a response. Not with
    text_column."""
    input_column: str | None = None
    """causal_lm: column of what the instruction is about, which a row may leave empty; null takes "input" where the
    usual columns are found."""
    response_column: str | None = None
    """causal_lm: column of the answer, the only part that is learnt; null finds "output", "response" or
    "completion"."""
    prompt_template: str | None = None
    """causal_lm: text around the instruction, with {prompt} and, for rows that have one, {input}; null takes a
    template of headings."""
    prompt_template_without_input: str | None = None
    """causal_lm: the same for rows without an input; null takes prompt_template with nothing for {input}."""
    chat_template: bool = False
    """causal_lm: write instruction and answer by the tokenizer's own chat template instead."""
    generation_rows: Annotated[int, Field(ge=0)] = 8
    """causal_lm: first rows of every evaluation split of instructions that student and teacher answer (ROUGE-L and
    the samples of the report); 0 generates nothing."""
    generation: Sampling = Sampling()
    """causal_lm: how these answers are generated."""


def vocabulary_size(tokenizer: Any) -> int:
    """Rows a word-embedding table needs for every id of a tokenizer; ids may have gaps."""
    return int(max(tokenizer.get_vocab().values())) + 1


def check_language_fields(section: Any) -> None:
    """Refuse fields of one kind of task in another. Raises: ValueError that names the field."""
    # By value: a configuration that is printed whole, with every default, must stay right.
    own = [name for name, field in LanguageTask.model_fields.items() if getattr(section, name) != field.default]
    if section.kind != "causal_lm":
        if own:
            raise ValueError(f'{own[0]}: belongs to kind "causal_lm", and kind is {section.kind or "null"}')
        return
    for name in _CLASSIFICATION_FIELDS:
        if getattr(section, name) not in (None, []):
            raise ValueError(
                f'{name}: belongs to a classification or regression, and kind is "causal_lm"; leave it out'
            )
    columns = [name for name in ("prompt_column", "input_column", "response_column") if getattr(section, name)]
    if section.text_column is not None and columns:
        raise ValueError(
            f"text_column ({section.text_column!r}) is plain text, and {columns[0]} ({getattr(section, columns[0])!r}) "
            "instructions: give one kind of columns"
        )
    if bool(section.prompt_column) != bool(section.response_column):
        raise ValueError("prompt_column and response_column belong together; give both or neither")
    if section.input_column and not section.prompt_column:
        raise ValueError("input_column needs prompt_column and response_column beside it")
    _check_templates(section)
    for metric in section.metrics or []:
        if metric not in LANGUAGE_METRICS:
            allowed = ", ".join(f'"{name}"' for name in LANGUAGE_METRICS)
            raise ValueError(f'metrics holds "{metric}"; allowed for kind "causal_lm": {allowed}')
    if "rouge_l" in (section.metrics or []) and section.generation_rows == 0:
        raise ValueError('metrics holds "rouge_l", which needs generation_rows above 0')


def _check_templates(section: Any) -> None:
    for name in ("prompt_template", "prompt_template_without_input"):
        template = getattr(section, name)
        if template is None:
            continue
        if section.chat_template:
            raise ValueError(f"{name} and chat_template exclude each other: give one of them")
        if "{prompt}" not in template:
            raise ValueError(f"{name} has no {{prompt}}, the place of the instruction")
