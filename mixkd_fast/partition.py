"""The section that cuts a task's training rows into shards; `data.shards` does it."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mixkd_fast.section import Section

Strategy = Literal["iid", "label_skew", "quantity_skew"]
Alpha = Annotated[float, Field(ge=1e-3, le=1e6)]


class Partition(Section):
    """Train on one shard of the training rows: part `part` of `parts`. Every row belongs to exactly one shard."""

    strategy: Strategy
    """iid: shards of equal size; label_skew: each label is dealt out by its own Dirichlet draw over the shards;
    quantity_skew: the shards' sizes are a Dirichlet draw."""
    parts: Annotated[int, Field(ge=1)]
    """Number of shards; no shard is empty."""
    part: Annotated[int, Field(ge=0)]
    """The shard to train on, counted from 0."""
    alpha: Alpha = 0.5
    """Concentration of the Dirichlet draws: small is very uneven, large nearly even. Unused by iid."""
    seed: int = 0
    """Seed of the division; all parts of a division share it."""

    @model_validator(mode="after")
    def _consistent(self) -> "Partition":
        if self.part >= self.parts:
            raise ValueError(f"part is {self.part}, and there are {self.parts} parts; allowed: 0..{self.parts - 1}")
        return self
