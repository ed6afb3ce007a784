"""The whole step on a GPU: between two reports the host waits for nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from toy import losses, save_toy_teacher, toy_config

from mixkd_fast import distill
from mixkd_fast.run import Run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
_WARM_UP = 4
"""Steps in which tensors of the optimizer and the like are made for the first time."""


@pytest.fixture
def quiet_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Turns every wait for the device into an error in steps that report nothing; the list says which those were."""
    steps: list[int] = []
    one_step = Run._one_step

    def watched(run: Run, *arguments: Any) -> None:
        done = run.state.step + 1
        reports = done % run.config.training.log_every == 0 or run._is_stop_point(done)
        if reports or done <= _WARM_UP:
            return one_step(run, *arguments)
        torch.cuda.set_sync_debug_mode("error")
        try:
            one_step(run, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        steps.append(done)

    monkeypatch.setattr(Run, "_one_step", watched)
    return steps


@pytest.mark.parametrize("store", [True, False])
@pytest.mark.parametrize(
    "training", [{}, {"unpadded": True}, {"micro_batch_size": 4}], ids=["padded", "unpadded", "accumulated"]
)
def test_no_step_waits_for_the_device(
    tmp_path: Path, quiet_steps: list[int], training: dict[str, Any], store: bool
) -> None:
    # 64 wide: heads of 32, as attention kernels want.
    save_toy_teacher(tmp_path / "teacher", hidden_size=64, intermediate_size=128)
    config = toy_config(
        tmp_path,
        teacher={"store": store, "store_dir": str(tmp_path / "store")},
        training={
            "steps": 36,
            "batch_size": 8,
            "micro_batch_size": None,
            "precision": "bf16",
            "batching": "length",
            "log_every": 12,
            "evaluate_every": 36,
            **training,
        },
        output={"report": False},
    )
    distill(**config, progress=False)
    assert quiet_steps == [step for step in range(_WARM_UP + 1, 37) if step % 12]
    assert len(losses(tmp_path / "run")) == 3


def test_a_step_that_waits_is_seen(tmp_path: Path, quiet_steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    from mixkd_fast.engine import Engine

    update = Engine._update

    def reading(engine: Engine) -> Any:
        norm, applied = update(engine)
        assert norm is not None and float(norm) >= 0
        return norm, applied

    monkeypatch.setattr(Engine, "_update", reading)
    with pytest.raises(RuntimeError, match="synchroniz"):
        distill(**toy_config(tmp_path, training={"precision": "bf16", "log_every": 12}), progress=False)
