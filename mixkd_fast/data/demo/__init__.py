"""The embedded demo task: natural-language inference in plain English, generated from a grammar with semantics.

Labels are computed from formal meanings (see `semantics`). The words are in `lexicon`, the sentences in `quantified`,
`propositions` and `times`, the sampling and the splits in `grammar`. The rows need the standard library only;
`demo_dataset` needs datasets, `train_demo_tokenizer` needs transformers.
"""

from typing import TYPE_CHECKING, Any

from mixkd_fast.data.demo.grammar import NUM_ROWS, Split, generate
from mixkd_fast.data.demo.semantics import LABEL_NAMES
from mixkd_fast.data.demo.tokenizer import train_demo_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["LABEL_NAMES", "NUM_ROWS", "demo_dataset", "demo_rows", "train_demo_tokenizer"]


def demo_rows(split: Split, seed: int = 0) -> dict[str, list[Any]]:
    """The rows of a split, column by column, the same for a seed on every platform and Python version.

    Args: split "train" or "validation"; seed of the generator.
    Returns: premise and hypothesis (str), label (int: 0 entailment, 1 neutral, 2 contradiction), phenomenon (str: the
    rule of meaning that the row was made to exercise). NUM_ROWS[split] rows, all labels equally frequent.
    Raises: ValueError for an unknown split.
    """
    if split not in NUM_ROWS:
        raise ValueError(f"split is {split!r}; the demo task has {sorted(NUM_ROWS)}")
    pairs = generate(seed)[split]
    columns = ("premise", "hypothesis", "label", "phenomenon")
    return {column: [getattr(pair, column) for pair in pairs] for column in columns}


def demo_dataset(split: Split, seed: int = 0) -> "Dataset":
    """`demo_rows` as a `datasets.Dataset` whose label column is a ClassLabel."""
    from datasets import ClassLabel, Dataset, Features, Value

    text = Value("string")
    features = {"premise": text, "hypothesis": text, "label": ClassLabel(names=list(LABEL_NAMES)), "phenomenon": text}
    return Dataset.from_dict(demo_rows(split, seed), features=Features(features))
