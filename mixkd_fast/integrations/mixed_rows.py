"""Partners and lam of a trainer's rows, drawn for the whole accumulated batch of all processes at once.

A partner may stand in another micro-batch, or in another process: its tokens then travel with the row. So the mixed
rows do not depend on how the batch is cut, and a micro-batch of one row is mixed with something else than itself.
Legend of shape suffixes: N rows of the whole batch, B of a micro-batch, k mixed rows per row, M = B * k, R = B + M,
L positions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor

from mixkd_fast.data.batching import Batch
from mixkd_fast.mix import first_rows
from mixkd_fast.mixing import Mixing, draw_lam

KEY = "mixed_rows"
"""Where a micro-batch carries its `MixedRows`."""
# One stream of random numbers per purpose.
_PARTNERS, _LAM = 1, 2


@dataclass(frozen=True)
class Fill:
    """How token columns are brought to one length."""

    token_id: int
    side: Literal["right", "left"]

    def widen(self, column: Tensor, name: str, width: int) -> Tensor:
        """[rows, L] -> [rows, width]"""
        missing = width - column.shape[1]
        padding = (0, missing) if self.side == "right" else (missing, 0)
        return F.pad(column, padding, value=self.token_id if name == "input_ids" else 0)


@dataclass(frozen=True)
class MixedRows:
    """The partners of a micro-batch. No Mapping: a trainer would round lam to its half precision."""

    columns: dict[str, Tensor]
    """input_ids, attention_mask, labels, and token_type_ids if there are any, of the partners: [M, ...]."""
    lam: Tensor
    """float32 [M]: weight of row m % B."""

    def batch(self, inputs: Mapping[str, Any], fill: Fill) -> Batch:
        """The micro-batch as an `Encoder` takes it: its rows, then their partners."""
        own = _token_columns(inputs)
        width = max(own["input_ids"].shape[1], self.columns["input_ids"].shape[1])
        columns = {
            name: torch.cat([fill.widen(column, name, width) for column in (own[name], self.columns[name])])
            for name in own
        }
        num_rows, num_mixed = len(inputs["labels"]), len(self.lam)
        device = self.lam.device
        return Batch(
            input_ids=columns["input_ids"],
            attention_mask=columns["attention_mask"],
            token_type_ids=columns.get("token_type_ids"),
            labels=torch.cat([inputs["labels"], self.columns["labels"]]),
            soft_labels=None,
            row_ids=torch.arange(num_rows + num_mixed),
            partner=torch.arange(num_rows, num_rows + num_mixed, device=device),
            lam=self.lam,
            num_rows=num_rows,
            num_tokens=num_rows * width,
        )

    def labels(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Labels of the first and of the second rows: int64 [M] each."""
        return first_rows(inputs["labels"], len(self.lam), len(inputs["labels"])), self.columns["labels"]


def draw_mixed_rows(
    batches: Sequence[Mapping[str, Any]], mixing: Mixing, seed: int, step: int, fill: Fill, accelerator: Any
) -> list[MixedRows]:
    """The partners of each micro-batch of an optimizer step. Collective.

    Partners are a random permutation of all rows per mixed row of a row; everything random follows from (seed, step).
    Rows are numbered micro-batch by micro-batch, within one process by process: as a single process would read them.
    """
    columns = [{**_token_columns(batch), "labels": batch["labels"]} for batch in batches]
    sizes = [len(batch["labels"]) for batch in batches]
    width = max(column["input_ids"].shape[1] for column in columns)
    shares = [(sizes, width)]
    if accelerator.num_processes > 1:
        shares = gather_object(shares)
    width = max(wide for _, wide in shares)
    rows = max(sum(sizes) for sizes, _ in shares)
    table = {}
    for name in columns[0]:
        column = torch.cat(
            [fill.widen(part[name], name, width) if name != "labels" else part[name] for part in columns]
        )
        if accelerator.num_processes > 1:
            missing = rows - len(column)
            # Processes must gather alike; these rows are never read.
            column = torch.cat([column, column[:1].expand(missing, *column.shape[1:])])
            column = accelerator.gather(column)
        table[name] = column
    # Row numbers of the table, in the order of the batch; first row of each micro-batch of this process.
    order: list[int] = []
    starts = []
    for micro_batch in range(max(len(sizes) for sizes, _ in shares)):
        for process, (others, _) in enumerate(shares):
            if micro_batch >= len(others):
                continue
            if process == accelerator.process_index:
                starts.append(len(order))
            first = process * rows + sum(others[:micro_batch])
            order.extend(range(first, first + others[micro_batch]))
    num_rows = len(order)
    rng = np.random.default_rng((seed, step, _PARTNERS))
    partner_kN = np.stack([rng.permutation(num_rows) for _ in range(mixing.mixed_rows)])
    lam_kN = draw_lam(mixing, mixing.mixed_rows * num_rows, np.random.default_rng((seed, step, _LAM)))
    lam_kN = lam_kN.reshape(mixing.mixed_rows, num_rows)
    device = table["input_ids"].device
    result = []
    for start, size in zip(starts, sizes, strict=True):
        share = slice(start, start + size)
        partner = torch.from_numpy(np.asarray(order)[partner_kN[:, share].reshape(-1)]).to(device)
        lam = torch.from_numpy(lam_kN[:, share].reshape(-1)).to(device)
        result.append(MixedRows({name: column[partner] for name, column in table.items()}, lam))
    return result


def _token_columns(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}
    if inputs.get("token_type_ids") is not None:
        columns["token_type_ids"] = inputs["token_type_ids"]
    return columns
