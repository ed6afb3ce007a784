"""The plan's states of causal language models, with and without adapters, against what DeepSpeed really holds.

Named so that it runs right after the encoders' file: both count the tensors of this process.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_accounted_memory import _alive_bytes
from toy_lm import language_config, save_lm

from mixkd_fast import FineTune, distill
from mixkd_fast.configuration import Config, validate
from mixkd_fast.planning.lengths import row_lengths
from mixkd_fast.planning.memory import Placement, student_states
from mixkd_fast.planning.models import planned_student
from mixkd_fast.planning.workload import workload


@pytest.mark.parametrize(
    ("stage", "precision", "lora"),
    [
        (0, "fp32", None),
        (3, "bf16", {"r": 8}),
        pytest.param(2, "bf16", None, marks=pytest.mark.slow),
        pytest.param(0, "bf16", {"r": 8}, marks=pytest.mark.slow),
    ],
)
def test_states_are_what_a_real_update_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: Any, precision: str, lora: dict[str, Any] | None
) -> None:
    """Every tensor alive after an optimizer's update, but for buckets: weights, gradients and states."""
    save_lm(tmp_path / "base", hidden_size=256, num_hidden_layers=3, intermediate_size=768)
    most, update = 0, torch.optim.AdamW.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal most
        result = update(self, *args, **kwargs)
        most = max(most, _alive_bytes(largest_bytes=64 * 2**20))
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    zero = {"stage": stage}
    before = _alive_bytes(largest_bytes=64 * 2**20)
    fields = language_config(
        tmp_path,
        student={"num_layers": None, "model": str(tmp_path / "base"), "lora": lora},
        training={"steps": 2, "precision": precision},
        deepspeed={"zero_optimization": zero},
    )
    del fields["teacher"], fields["method"]
    distill(**fields, method=FineTune(), progress=False)
    config = validate(Config, {**fields, "method": {"name": "finetune"}})
    student, work = planned_student(config), workload(config, row_lengths(config), 1)
    states = student_states(student, Placement(stage, "none", None), work, zero, is_gpu=False)
    held = states.weights_bytes + states.gradients_update_bytes + states.optimizer_bytes
    assert most - before == pytest.approx(held, rel=0.15 if lora else 0.05)
