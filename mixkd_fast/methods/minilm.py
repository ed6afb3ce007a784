"""MiniLM-v2 (Wang et al. 2021, arXiv 2012.15828): relations among the tokens in one layer are imitated too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn

from mixkd_fast.encoder_readings import layer_number
from mixkd_fast.methods.base import Moment, Setting
from mixkd_fast.methods.kd import Weight
from mixkd_fast.methods.last_layer import LastLayer, check_relation_heads, last_number, relation_distance
from mixkd_fast.methods.layers import LayerComparison

if TYPE_CHECKING:
    from mixkd_fast.data.batching import Batch
    from mixkd_fast.models import Encoder


class MiniLM(LayerComparison):
    """MixKD's objective + relation_weight * R of the student's last layer and one of the teacher's.

    R = sum over V in (queries, keys, values) of the mean over relation heads and tokens of
    KL(softmax(V_T V_T^T / sqrt(d_T)) || softmax(V_S V_S^T / sqrt(d_S))), on the clean rows. Widths and numbers of heads
    may differ, for both are cut anew into `relation_heads`.
    """

    name: Literal["minilm"] = "minilm"
    """Discriminator of the method section."""
    relation_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the relations."""
    relation_heads: Annotated[int, Field(gt=0)] | None = None
    """Heads into which both models' queries, keys and values are cut anew; null takes the student's own number. It
    must divide both widths; the paper takes more than the models have (48 of 768)."""
    teacher_layer: int = -1
    """0-based number of the teacher's layer (-1 is the last; the paper takes the 21st of 24, and the last of 12)."""
    kd_weight: Weight = 0.0
    """Weight of the distance to the teacher on the clean rows."""

    def check(self, setting: Setting) -> None:
        """Raises: ModelError for a layer that does not exist, and for heads into which the models cannot be cut."""
        assert setting.teacher is not None
        student, teacher = setting.student.config, setting.teacher.model.config
        layer_number(self.teacher_layer, teacher.num_hidden_layers, "method.teacher_layer")
        check_relation_heads(self.relation_heads, student, teacher)

    def terms(
        self, batch: Batch, student: Encoder, teacher: Any | None, extras: nn.Module | None, moment: Moment
    ) -> dict[str, Tensor]:
        assert batch.mean_tokens is not None and teacher is not None
        theirs = layer_number(self.teacher_layer, last_number(teacher) + 1, "method.teacher_layer")
        layers = [last_number(student)], [theirs]
        terms, own_reading, their_reading = self.objective_and_readings(batch, student, teacher, layers)
        own, target = LastLayer.of(own_reading), LastLayer.of(their_reading, theirs)
        heads = self.relation_heads or student.config.num_attention_heads
        distance = relation_distance(own, target, heads)
        return {**terms, "relations": self.relation_weight * distance / batch.mean_tokens}
