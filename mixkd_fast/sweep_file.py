"""The typed sweep file: one strict JSON in, one frozen `Sweep` out."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mixkd_fast.configuration import PositiveInt, Text, validate
from mixkd_fast.methods import AnyMethod
from mixkd_fast.partition import Alpha, Strategy
from mixkd_fast.section import Section
from mixkd_fast.strict_json import apply_overrides, read_object

Transfer = Literal["none", "initial", "teacher"]
Bounds = Annotated[list[float], Field(min_length=2, max_length=2)]
Values = Annotated[list[Any], Field(min_length=1)]
_KINDS = ("uniform", "log_uniform", "integer", "choice")


class Distribution(Section):
    """What a random search draws a field from; exactly one of these."""

    uniform: Bounds | None = None
    """[low, high]: any number between them is equally likely."""
    log_uniform: Bounds | None = None
    """[low, high], both positive: the logarithm is uniform."""
    integer: Annotated[list[int], Field(min_length=2, max_length=2)] | None = None
    """[low, high]: whole numbers, both ends included."""
    choice: Values | None = None
    """One of these values; the same as giving the list itself."""

    @model_validator(mode="after")
    def _consistent(self) -> "Distribution":
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of {', '.join(_KINDS)} is needed; given: {', '.join(given) or 'none'}")
        bounds = self.uniform or self.log_uniform or self.integer
        if bounds is not None and not bounds[0] < bounds[1]:
            raise ValueError(f"{given[0]} is {bounds}; allowed: [low, high] with low < high")
        if self.log_uniform is not None and self.log_uniform[0] <= 0:
            raise ValueError(f"log_uniform is {self.log_uniform}; allowed: positive bounds")
        return self


class PartitionStudy(Section):
    """Every trial as a chain of students, one per shard of the training rows, under every strategy and transfer."""

    strategies: Annotated[list[Strategy], Field(min_length=1)]
    """How the rows are divided; see task.partition."""
    parts: Annotated[int, Field(ge=2)]
    """Shards, and so students in a chain."""
    alpha: Alpha = 0.5
    """Concentration of the Dirichlet draws of label_skew and quantity_skew."""
    seed: int = 0
    """Seed of the division, the same in all trials."""
    transfer: Annotated[list[Transfer], Field(min_length=1)] = Field(default=["none"])
    """What student k+1 takes from student k: nothing; its weights to start from; or its answers, as its teacher."""
    method: AnyMethod | None = None
    """Method of the students that have another student as teacher; null takes the configuration's."""


class Sweep(Section):
    """A base configuration and what is varied in it."""

    schema_: Annotated[str | None, Field(alias="$schema")] = None
    """Path of the JSON Schema, for editors."""
    config: Text | dict[str, Any]
    """The base configuration: the path of its file, or the object itself."""
    changes: dict[str, Any] = Field(default={})
    """Dotted field -> value: what all trials change in the base configuration."""
    search: Literal["grid", "random"] = "grid"
    """Every combination of the values, or `trials` draws."""
    trials: PositiveInt | None = None
    """Number of draws of a random search."""
    seed: int = 0
    """Seed of a random search's draws. More trials later begin with the same ones."""
    fields: dict[str, Values | Distribution] = Field(default={})
    """Dotted field of the configuration -> its values (whole sections too), or for a random search a distribution."""
    coupled: list[Annotated[list[dict[str, Any]], Field(min_length=1)]] = Field(default=[])
    """Fields that change together: each group is a list of objects {dotted field: value}, one of which is taken."""
    seeds: Annotated[list[int], Field(min_length=1)] | None = None
    """Values of training.seed that every trial is averaged over; null takes the configuration's own."""
    metric: Text | None = None
    """What ranks the trials: "accuracy", or "validation/accuracy"; null takes the task's first, on its first split."""
    partition: PartitionStudy | None = None
    """Compare divisions of the training rows, and what students of one shard hand on to the next."""
    output: Text = "runs/sweep"
    """Folder of the sweep: trials/, sweep.json, sweep.md, sweep.html."""
    ranks: PositiveInt | None = None
    """null runs the trials in this process; a number starts each by the deepspeed launcher with that many ranks."""
    keep_checkpoints: bool = False
    """Keep the checkpoints of finished runs; their students and figures stay in any case."""

    @model_validator(mode="after")
    def _consistent(self) -> "Sweep":
        if (self.trials is None) == (self.search == "random"):
            raise ValueError(
                "trials: is missing: how many draws does the random search make?"
                if self.search == "random"
                else f'trials is {self.trials}, and search is "grid", which runs every combination: leave it out'
            )
        drawn = [name for name, values in self.fields.items() if isinstance(values, Distribution)]
        if drawn and self.search == "grid":
            raise ValueError(f'fields.{drawn[0]}: a distribution needs search "random"; a grid needs a list of values')
        if not (self.fields or self.coupled or self.partition or len(self.seeds or []) > 1):
            raise ValueError("fields, coupled and partition are empty and there is one seed: nothing is varied")
        if self.seeds is not None and len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds is {self.seeds}: each may be given once")
        if self.partition is not None:
            for name in ("strategies", "transfer"):
                values = getattr(self.partition, name)
                if len(set(values)) < len(values):
                    raise ValueError(f"partition.{name} is {values}: each may be given once")
        for group in self.coupled:
            if any(option.keys() != group[0].keys() or not option for option in group):
                raise ValueError(f"coupled: all objects of a group set the same fields; one has {list(group[0])}")
        self._check_names()
        return self

    def _check_names(self) -> None:
        seen: list[str] = []
        for name in [*self.fields, *(name for group in self.coupled for name in group[0])]:
            if not re.fullmatch(r"\w+(\.\w+)*", name):
                raise ValueError(f"fields.{name}: allowed: a dotted name such as training.learning_rate")
            if name.partition(".")[0] in ("output", "$schema"):
                raise ValueError(f"fields.{name}: every trial has its own folder under output; it cannot be swept")
            if name == "training.seed":
                raise ValueError("fields.training.seed: give seeds; trials are averaged over them")
            if self.partition is not None and f"{name}.".startswith("task.partition."):
                raise ValueError(f"fields.{name}: the partition study sets it")
            for before in seen:
                if f"{before}.".startswith(f"{name}."):
                    raise ValueError(f"{name} is varied together with {before}, which it would overwrite")
            seen.append(name)


def load_sweep(path: str | Path) -> Sweep:
    """Read and validate a sweep file. Raises: ConfigurationError that lists every problem."""
    return validate(Sweep, read_object(path, "--config"))


def base_content(sweep: Sweep, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The base configuration as plain values, with the sweep's changes and then the overrides in it.

    Raises: ConfigurationError if its file cannot be read, or a changed section is none.
    """
    content = read_object(sweep.config, "config") if isinstance(sweep.config, str) else sweep.config
    return apply_overrides(content, [*as_overrides(sweep.changes), *overrides])


def as_overrides(fields: Mapping[str, Any]) -> list[str]:
    """Dotted field -> value, as `apply_overrides` takes them."""
    return [f"{name}={json.dumps(value)}" for name, value in fields.items()]
