"""Which training rows should learn from the teacher: gradients of the student's last layer, row by row.

Legend of shape suffixes: N training rows, B rows of a batch, C classes, H width of the classifier's input plus one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mixkd_fast.errors import ModelError
from mixkd_fast.methods.base import Setting
from mixkd_fast.methods.rows import evaluating, label_distribution

if TYPE_CHECKING:
    from mixkd_fast.data.batching import Batch


def gradient_dots(
    setting: Setting, temperature: float, target: Callable[[Batch, Tensor], Tensor]
) -> NDArray[np.float32]:
    """Per row: the gradient of its distillation loss times the mean gradient of all rows' labels: [N]. Collective.

    score_n = <grad tau^2 KL(t_n || softmax(z_n / tau)), 1/N sum_m grad CE(z_m, y_m)> with respect to weight and bias
    of the student's last linear layer z = V h + b, as the student is now, without dropout. The gradients are
    tau (softmax(z_n / tau) - t_n) h_n^T and (softmax(z_m) - y_m) h_m^T, h with a 1 appended. By first order, a step on
    a row of positive score lowers the loss of the labels. A surrogate for influence functions: no Hessian, last layer
    only. Two forwards of the student over all rows, one of the teacher.

    Args: target = (batch, teacher's logits [B, C]) -> t [B, C].
    Raises: ModelError if the student's last layer is not found.
    """
    student, teacher = setting.student, setting.teacher
    assert teacher is not None
    with evaluating(student), classifier_inputs(student.model, setting.num_labels) as inputs:
        width = inputs.layer.in_features + 1
        total_CH = torch.zeros(setting.num_labels, width, dtype=torch.float64, device=setting.device)

        def add_labels(batch: Batch) -> Tensor:
            logits, h_BH = inputs.of(student.read(batch).logits)
            gap_BC = logits.softmax(-1) - label_distribution(batch, logits.shape[-1])
            gap_BC = gap_BC * batch.valid.to(gap_BC.device)[:, None]
            total_CH.add_(gap_BC.double().T @ h_BH.double())
            return gap_BC

        def score(batch: Batch) -> Tensor:
            teacher_logits = teacher.clean(batch).logits
            logits, h_BH = inputs.of(student.read(batch).logits)
            gap_BC = temperature * ((logits / temperature).softmax(-1) - target(batch, teacher_logits))
            return ((gap_BC.double() @ mean_CH) * h_BH).sum(-1, keepdim=True)

        setting.collect(add_labels)
        mean_CH = setting.sum_over_ranks(total_CH) / len(setting.rows)
        return setting.collect(score)[:, 0]


def best_rows(scores: NDArray[np.float32], share: float) -> Tensor:
    """1 for the rows of the highest scores, `share` of all and at least one, else 0: [N, 1] fp32.

    Equal scores: the earlier row.
    """
    count = max(1, round(share * len(scores)))
    chosen = torch.zeros(len(scores), 1)
    chosen[torch.from_numpy(np.argsort(-scores, kind="stable")[:count].copy())] = 1.0
    return chosen


class ClassifierInputs:
    """What reached the last linear layer in the latest forward, and what it made of it."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self._latest: tuple[Tensor, Tensor] | None = None

    def keep(self, _: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        """The layer's hook."""
        self._latest = arguments[0], output

    def of(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The logits [B, C] of the latest forward and the layer's input [B, H], a 1 appended, both fp32.

        Raises: ModelError if the layer did not make these logits.
        """
        if self._latest is None or not torch.equal(self._latest[1], logits):
            raise ModelError(
                "method.select_share: the student's logits are not what its last linear layer gives; allowed: 1"
            )
        hidden = self._latest[0].float()
        return logits.float(), torch.cat([hidden, torch.ones_like(hidden[:, :1])], dim=1)


@contextmanager
def classifier_inputs(model: nn.Module, num_labels: int) -> Iterator[ClassifierInputs]:
    """Within it, forwards of the model leave the input of its last linear layer with one output per label.

    Raises: ModelError if there is none.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == num_labels]
    if not layers:
        raise ModelError(
            f"method.select_share: {type(model).__name__} has no linear layer with {num_labels} outputs; allowed: 1"
        )
    inputs = ClassifierInputs(layers[-1])
    handle = layers[-1].register_forward_hook(inputs.keep)
    try:
        yield inputs
    finally:
        handle.remove()
