"""Intermediate layer distillation of the last layer with consistency regularisation (Ko et al. 2023, arXiv 2302.01530).

Relations in the place of attention maps are those of MiniLM-v2 (Wang et al. 2021, arXiv 2012.15828).
Legend of shape suffixes: B clean rows of the micro-batch, R rows with partners, M mixed rows, O any rows.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mixkd_fast.errors import ConfigurationError, ModelError
from mixkd_fast.methods.base import Moment, Setting, per_clean_row
from mixkd_fast.methods.kd import Weight
from mixkd_fast.methods.last_layer import (
    LastLayer,
    check_relation_heads,
    hidden_distance,
    last_number,
    map_distance,
    relation_distance,
)
from mixkd_fast.methods.layers import new_projection, read_rows
from mixkd_fast.methods.mixkd import MixedRowDistillation
from mixkd_fast.methods.moving_average import MovingAverage, is_partitioned
from mixkd_fast.mixing import Mixing

if TYPE_CHECKING:
    from mixkd_fast.data.batching import Batch
    from mixkd_fast.models import Encoder

Share = Annotated[float, Field(ge=0, le=1)]


class CRILD(MixedRowDistillation):
    """First the last layer, then the logits.

    ILD, the steps before ild_share of the run: attention_weight * A + hidden_weight * H + R, of the last layers.
    A = KL of the teacher's attention from the student's, mean over heads and tokens. H = (W h_S - h_T)^2, mean over
    width and tokens, W trained. R = w(t) * [lam * l(x', sg x_i) + (1 - lam) * l(x', sg x_j)] on mixed rows x' of
    (i, j, lam), with l = attention_weight * A + hidden_weight * H between states of the student itself, over the
    tokens of x_i (x_j) and divided by the positions that mixed rows keep; w(t) rises linearly from 0 in the first of
    these steps to consistency_weight in the last one. KD, the other steps: MixKD's objective, with kd_weight alone by
    default.
    """

    name: Literal["cr_ild"] = "cr_ild"
    """Discriminator of the method section."""
    ild_share: Share = 0.5
    """Share of the steps that distil the last layer; 1 is a run of ILD alone (which may be on another task than the
    teacher's: its classifier is not trained), 0 one of KD alone."""
    attention: Literal["maps", "relations", "none"] = "maps"
    """maps: softmax(QK^T); relations: softmax of QQ^T, KK^T and VV^T added, which need no equal number of heads."""
    relation_heads: Annotated[int, Field(gt=0)] | None = None
    """Heads into which both models' queries, keys and values are cut anew for "relations"; null takes the student's
    own number. It must divide both widths."""
    attention_weight: Weight = 1.0
    """Weight of the attention in the ILD steps."""
    hidden_weight: Weight = 1.0
    """Weight of the hidden states in the ILD steps."""
    consistency_weight: Weight = 0.1
    """Weight of the consistency at the end of the ILD steps; 0 mixes no rows for it."""
    consistency_target: Literal["self", "ema"] = "self"
    """What mixed rows are compared with: the student's own states, or a moving average of it (not with ZeRO-3)."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the moving average per step."""
    alpha: Annotated[float, Field(gt=0)] = 1.0
    """Parameter of lam ~ Beta(alpha, alpha)."""
    larger_first: bool = True
    """Take max(lam, 1 - lam), so that a row is never the smaller part of its own mixed row."""
    mle_weight: Weight = 0.0
    """Weight of the supervised loss in the KD steps."""

    @model_validator(mode="after")
    def _trains_something(self) -> CRILD:
        if self.ild_share > 0 and not self._compares_attention and not self.hidden_weight:
            raise ValueError(
                f'attention = "{self.attention}", attention_weight = {self.attention_weight} and hidden_weight = 0 '
                "leave nothing to train in the ILD steps; at least one of both must count"
            )
        if self.relation_heads is not None and self.attention != "relations":
            raise ValueError(f'relation_heads needs attention "relations", and attention is "{self.attention}"')
        if self.ild_share < 1 and not (self.needs_clean_student or self.needs_mixed_student):
            raise ValueError(
                "mle_weight, kd_weight, sm_weight, tmkd_weight are all 0: nothing would be trained in the KD steps; "
                "at least one must be positive, or ild_share 1"
            )
        if self.ild_share == 1 and self.needs_mixed_student:
            raise ValueError(
                f"sm_weight = {self.sm_weight} and tmkd_weight = {self.tmkd_weight} are terms of the KD steps, and "
                "ild_share = 1 leaves none; both must be 0, or ild_share below 1"
            )
        return self

    @property
    def trains_classifier(self) -> bool:
        return self.ild_share < 1

    @property
    def without_effect(self) -> list[str]:
        unused: list[str] = []
        if not self.ild_share:
            names = ["attention", "relation_heads", "attention_weight", "hidden_weight", "consistency_weight"]
            unused = self.unless_default([*names, "consistency_target", "ema_decay"], "ild_share 0 has no ILD steps")
        elif not self._is_consistent:
            unused = self.unless_default(["consistency_target", "ema_decay"], "consistency_weight is 0")
        elif self.consistency_target == "self":
            unused = self.unless_default(["ema_decay"], "no moving average is compared with")
        if self.ild_share == 1:
            names = ["mle_weight", "kd_weight", "temperature", "distance"]
            unused += self.unless_default(names, "ild_share 1 has no KD steps")
        return [*super().without_effect, *unused]

    @property
    def reads_teacher(self) -> bool:
        return self.ild_share > 0

    @property
    def needs_clean_teacher(self) -> bool:
        return self.kd_weight > 0 and self.ild_share < 1

    def mixing(self) -> Mixing | None:
        return self if self._is_consistent or self.needs_mixed_student else None

    @property
    def _is_consistent(self) -> bool:
        return self.consistency_weight > 0 and self.ild_share > 0

    @property
    def _compares_attention(self) -> bool:
        return self.attention != "none" and self.attention_weight > 0

    def build(self, setting: Setting) -> nn.Module | None:
        """Raises: ModelError for models whose attention cannot be compared as `attention` says."""
        if self.ild_share == 0:
            return None
        assert setting.teacher is not None
        student, teacher = setting.student.config, setting.teacher.model.config
        if self._compares_attention:
            self._check_heads(student, teacher)
        generator = torch.Generator().manual_seed(setting.seed)
        projection = new_projection(student.hidden_size, teacher.hidden_size, generator) if self.hidden_weight else None
        follows = self._is_consistent and self.consistency_target == "ema"
        extras = Extras(projection, MovingAverage(setting.student, self.ema_decay) if follows else None)
        return extras.to(setting.device)

    def _check_heads(self, student: Any, teacher: Any) -> None:
        heads = student.num_attention_heads, teacher.num_attention_heads
        if self.attention == "maps" and heads[0] != heads[1]:
            raise ModelError(
                f'method.attention = "maps": the student has {heads[0]} heads and the teacher {heads[1]}, and their '
                'maps cannot be compared; allowed: "relations", or a student with as many heads'
            )
        if self.attention == "relations":
            check_relation_heads(self.relation_heads, student, teacher)

    def terms(
        self, batch: Batch, student: Encoder, teacher: Any | None, extras: nn.Module | None, moment: Moment
    ) -> dict[str, Tensor]:
        if moment.step >= self._ild_steps(moment):
            return super().terms(batch, student, teacher, extras, moment)
        assert teacher is not None and batch.mean_tokens is not None
        theirs = self._last_layer(teacher, batch)
        mixing = self if self._is_consistent else None
        own_reading, mixed_reading = read_rows(student, batch, mixing, self._read_layers(student))
        own = LastLayer.of(own_reading)
        terms = {}
        if self._compares_attention:
            distance = self._attention_distance(own, theirs)
            terms["attention"] = self.attention_weight * distance / batch.mean_tokens
        if self.hidden_weight:
            assert isinstance(extras, Extras) and extras.projection is not None
            projected = own._replace(hidden=extras.projection(own.hidden))
            terms["hidden"] = self.hidden_weight * hidden_distance(projected, theirs) / batch.mean_tokens
        if mixed_reading is not None:
            targets = self._targets(batch, own.detached(), student, extras)
            distance = self._consistency(batch, LastLayer.of(mixed_reading), targets)
            terms["consistency"] = self._ramp(moment) * distance
        return terms

    @property
    def follows_steps(self) -> bool:
        return self._is_consistent and self.consistency_target == "ema"

    def after_step(self, student: Encoder, extras: nn.Module | None, moment: Moment) -> None:
        if isinstance(extras, Extras) and extras.average is not None and moment.step < self._ild_steps(moment):
            extras.average.follow(student)

    def _ild_steps(self, moment: Moment) -> int:
        return math.floor(self.ild_share * moment.total_steps + 0.5)

    def _ramp(self, moment: Moment) -> float:
        """w(t)"""
        return self.consistency_weight * moment.step / max(1, self._ild_steps(moment) - 1)

    def _read_layers(self, model: Any) -> list[int]:
        """The layer whose projections are read."""
        return [last_number(model)] if self._compares_attention else []

    def _last_layer(self, model: Any, batch: Batch) -> LastLayer:
        """A model's last layer on the clean rows."""
        return LastLayer.of(model.read(batch, layers=self._read_layers(model)))

    def _attention_distance(self, own: LastLayer, target: LastLayer) -> Tensor:
        """A as a sum over tokens: [O]."""
        if self.attention == "maps":
            return map_distance(own, target)
        assert own.query is not None
        return relation_distance(own, target, self.relation_heads or own.query.shape[1])

    @torch.no_grad()
    def _targets(self, batch: Batch, own: LastLayer, student: Encoder, extras: nn.Module | None) -> LastLayer:
        """What mixed rows are compared with: the last layer on all R rows. `own` = the student's on the clean ones."""
        num_rows, num_all = batch.num_rows, len(batch.input_ids)
        if self.consistency_target == "ema":
            assert isinstance(extras, Extras) and extras.average is not None
            if is_partitioned(student):
                raise ConfigurationError(
                    'method.consistency_target = "ema" needs the student\'s weights whole on every rank, and '
                    'deepspeed.zero_optimization.stage is 3; allowed: a stage of 0 to 2, or "self"'
                )
            return self._last_layer(extras.average.encoder, _as_clean_rows(batch, slice(0, num_all)))
        if num_all > num_rows:
            further = slice(num_rows, num_all)
        elif is_partitioned(student):
            # Other ranks may have partners to read, and gathering the weights for that takes all ranks.
            further = slice(0, 1)
        else:
            return own
        # After the forward that gives gradients: a weight that autocast casts without them would stay in its cache.
        return own.joined(self._last_layer(student, _as_clean_rows(batch, further)))

    def _consistency(self, batch: Batch, mixed: LastLayer, targets: LastLayer) -> Tensor:
        """R / w(t): [B]."""
        assert batch.partner is not None and batch.lam is not None and batch.mean_mixed_tokens is not None
        own_rows = torch.arange(len(batch.partner), device=batch.partner.device) % batch.num_rows
        total = torch.zeros_like(batch.lam)
        for weight, rows in ((batch.lam, own_rows), (1 - batch.lam, batch.partner)):
            target = targets.rows(rows)
            if self._compares_attention:
                total = total + weight * self.attention_weight * self._attention_distance(mixed, target)
            if self.hidden_weight:
                total = total + weight * self.hidden_weight * hidden_distance(mixed, target)
        return per_clean_row(total, batch) / batch.mean_mixed_tokens


class Extras(nn.Module):
    """What is trained and checkpointed beside the student."""

    def __init__(self, projection: nn.Linear | None, average: MovingAverage | None) -> None:
        super().__init__()
        self.projection, self.average = projection, average


def _as_clean_rows(batch: Batch, rows: slice) -> Batch:
    """Some of the R rows of a batch, to be read as clean ones."""
    types, ids = batch.token_type_ids, batch.input_ids[rows]
    return replace(
        batch,
        input_ids=ids,
        attention_mask=batch.attention_mask[rows],
        token_type_ids=None if types is None else types[rows],
        num_rows=len(ids),
    )
