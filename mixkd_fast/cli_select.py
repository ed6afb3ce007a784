"""`mixkd-fast select`: write the training rows that MiniPLM chooses, with their scores, and show which those are."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from mixkd_fast.compare import format_table
from mixkd_fast.configuration import Config, load_config
from mixkd_fast.data.loading import load_splits
from mixkd_fast.errors import ConfigurationError, MixKDError
from mixkd_fast.methods import MiniPLM
from mixkd_fast.methods.base import RowChoice
from mixkd_fast.offline_preparation import scores_of

_SNIPPET = 60
_FORMATS = (".jsonl", ".parquet")


def select(config: Config, output: Path) -> tuple[Dataset, RowChoice]:
    """Write the chosen rows as JSONL or Parquet: the uniform columns, `row` and `score`, in the corpus's order.

    Returns: all rows that have a score, and the choice among them.
    Raises: ConfigurationError for another method or kind of file; DataError for stores that do not fit the rows.
    """
    if not isinstance(config.method, MiniPLM):
        raise ConfigurationError(f'method.name is "{config.method.name}"; allowed for select: "miniplm"')
    if output.suffix not in _FORMATS:
        raise ConfigurationError(f"--output is {str(output)!r}; allowed: a name that ends in {' or '.join(_FORMATS)}")
    rows = load_splits(config.task).train
    choice = config.method.choose_rows(scores_of(rows))
    rows = rows.select(np.flatnonzero(np.isin(np.asarray(rows["row"]), choice.rows)))
    table: pa.Table = rows.with_format("arrow")[:]
    chosen = table.append_column("score", pa.array(choice.scores)).filter(pa.array(choice.kept))
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".parquet":
        pq.write_table(chosen, output)
    else:
        Dataset(chosen).to_json(output, lines=True, force_ascii=False, double_precision=15)
    return rows, choice


def table_of(rows: Dataset, choice: RowChoice, count: int) -> tuple[list[str], list[list[object]]]:
    """Header and rows: of the highest scores, those just above and below the cut, and the lowest."""
    order = np.argsort(-choice.scores, kind="stable")
    num_kept = int(choice.kept.sum())
    groups = (order[:count], order[max(0, num_kept - count) : num_kept + count], order[-count:])
    shown = dict.fromkeys(int(place) for group in groups for place in group)
    lines: list[list[object]] = []
    for place in shown:
        kept = "kept" if choice.kept[place] else "dropped"
        lines.append([_snippet(rows[place]), f"{choice.scores[place]:+.3f}", str(choice.rows[place]), kept])
    return ["text", "score", "row", ""], lines


def _snippet(row: dict[str, object]) -> str:
    text = row["text"] if "text" in row else f"{row['prompt']} -> {row['response']}"
    words = " ".join(str(text).split())
    return words if len(words) <= _SNIPPET else f"{words[: _SNIPPET - 3]}..."


def main(argv: Sequence[str] | None = None) -> int:
    """Run from command-line arguments. Returns 1 for an error."""
    parser = argparse.ArgumentParser(prog="mixkd-fast select", description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="configuration with method miniplm")
    parser.add_argument("--output", required=True, metavar="FILE", help="name.jsonl or name.parquet")
    parser.add_argument("--examples", type=int, default=5, help="rows in each part of the table (5)")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="a.b.c=VALUE")
    options = parser.parse_args(argv)
    try:
        rows, choice = select(load_config(options.config, options.overrides), Path(options.output))
    except (MixKDError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(format_table(*table_of(rows, choice, max(1, options.examples))))
    kept, dropped = choice.scores[choice.kept], choice.scores[~choice.kept]
    means = f"mean score {kept.mean():+.3f}" + (f" against {dropped.mean():+.3f} of the others" if len(dropped) else "")
    print(f"{len(kept):,} of {len(choice.scores):,} scored rows kept, {means}: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
