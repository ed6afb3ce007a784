"""What the methods that compare inner layers share: which layers belong together, and what is read of them.

Legend of shape suffixes: O rows of the forward, B clean rows of the micro-batch, L positions, H width, h heads,
d width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mixkd_fast.encoder_readings import Reading, layer_number
from mixkd_fast.errors import ModelError
from mixkd_fast.methods.mixkd import MixedRowDistillation
from mixkd_fast.mixing import Mixing

if TYPE_CHECKING:
    from mixkd_fast.data.batching import Batch
    from mixkd_fast.models import Encoder

Layers = Literal["skip", "last"] | Annotated[list[int], Field(min_length=1)]
Pairs = list[tuple[int, int]]


class LayerComparison(MixedRowDistillation):
    """MixKD's objective, and what the layers of both models compute for the clean rows: base of PKD, PKT and MiniLM."""

    @property
    def needs_clean_teacher(self) -> bool:
        # Its layers are read in every step, and its logits come with them: none need be kept.
        return False

    @property
    def reads_teacher(self) -> bool:
        return True

    @property
    def trains_classifier(self) -> bool:
        return self.needs_clean_student or self.needs_mixed_student

    def objective_and_readings(
        self,
        batch: Batch,
        student: Encoder,
        teacher: Any,
        projections: tuple[Sequence[int], Sequence[int]] = ((), ()),
    ) -> tuple[dict[str, Tensor], Reading, Reading]:
        """MixKD's terms; the student's and the teacher's readings of the clean rows.

        Args: projections = 0-based layers of the student and of the teacher whose queries, keys and values are read.
        """
        theirs, theirs_mixed = read_rows(teacher, batch, self if self.tmkd_weight else None, projections[1])
        own, own_mixed = read_rows(student, batch, self.mixing(), projections[0])
        terms = self.objective(
            batch,
            own.logits if self.needs_clean_student else None,
            None if own_mixed is None else own_mixed.logits,
            theirs.logits if self.kd_weight else None,
            None if theirs_mixed is None else theirs_mixed.logits,
        )
        return terms, own, theirs


def matched_layers(layers: Layers, num_student: int, num_teacher: int, include_last: bool) -> Pairs:
    """(student layer, teacher layer) of every pair, 0-based, from the lowest to the highest.

    Args: layers = the option `method.layers`: "skip" gives student layer s the teacher's last layer of the s-th block
    of num_teacher // num_student layers, "last" the last teacher layers in order, a list one teacher layer to each of
    the student's first layers; include_last = whether "skip" and "last" match the student's last layer too.
    Raises: ModelError naming method.layers where the models do not allow it.
    """
    if not isinstance(layers, str):
        if len(layers) > num_student:
            raise ModelError(
                f"method.layers = {layers}: names {len(layers)} teacher layers, one for each of the student's first "
                f"layers, and the student has {num_student}"
            )
        return [(number, layer_number(layer, num_teacher, "method.layers")) for number, layer in enumerate(layers)]
    if num_teacher < num_student:
        raise ModelError(
            f'method.layers = "{layers}": the student has {num_student} layers and the teacher {num_teacher}; '
            "give a list of teacher layers"
        )
    count = num_student if include_last else num_student - 1
    if count == 0:
        raise ModelError(
            f'method.layers = "{layers}": leaves the last layer out, and the student has no other; '
            "give a list of teacher layers, such as [-1]"
        )
    if layers == "skip":
        stride = num_teacher // num_student
        pairs = [(number, (number + 1) * stride - 1) for number in range(count)]
        # Where the numbers do not divide, the last layers still belong to each other.
        return [*pairs[:-1], (count - 1, num_teacher - 1)] if include_last else pairs
    return [(number, num_teacher - num_student + number) for number in range(count)]


def read_rows(
    model: Any, batch: Batch, mixing: Mixing | None, layers: Sequence[int] = ()
) -> tuple[Reading, Reading | None]:
    """What a model computes for the clean rows, and for the mixed ones if `mixing` is given, from one forward.

    Args: model = an `Encoder` or a `FrozenTeacher`; layers = 0-based numbers of those whose projections are read.
    """
    if mixing is None:
        return model.read(batch, layers=layers), None
    if mixing.padding == "zero" and batch.row_lengths is None:
        # As in `Encoder.both`: with padding on the left a clean row answers from a pad embedding.
        return model.read(batch, layers=layers), model.read(batch, mixing, layers=layers)
    everything = model.read(batch, mixing, layers=layers, include_clean=True)
    return everything.rows(slice(0, batch.num_rows)), everything.rows(slice(batch.num_rows, None))


def first_token(hidden: Tensor, mask: Tensor) -> Tensor:
    """The states of each row's first token ([CLS]), on whichever side padding is: [O, L, H] -> [O, H]."""
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    return hidden[rows, mask.ne(0).to(torch.int64).argmax(1)]


def mean_of_tokens(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean of each row's states over its own tokens: [O, L, H] -> [O, H]."""
    keep = mask.ne(0)[..., None]
    return torch.where(keep, in_full(hidden), 0).sum(1) / keep.sum(1)


def in_full(values: Tensor) -> Tensor:
    """At least fp32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def new_projection(from_width: int, to_width: int, generator: torch.Generator) -> nn.Linear:
    """A linear map without bias: the identity between equal widths, else a random one of orthonormal rows or columns.

    Args: generator = a CPU generator; the drawn weights depend on it alone.
    """
    projection = nn.Linear(from_width, to_width, bias=False)
    with torch.no_grad():
        if from_width == to_width:
            nn.init.eye_(projection.weight)
        else:
            nn.init.orthogonal_(projection.weight, generator=generator)
    return projection
