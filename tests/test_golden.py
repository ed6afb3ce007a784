"""A loss curve of 20 small CPU steps that must not move unless somebody means it to.

After a deliberate change: python tests/test_golden.py
"""

import json
import tempfile
from pathlib import Path

import pytest
from toy import losses, toy_config

GOLDEN = Path(__file__).parent / "vectors" / "golden_losses.json"


def _curve(folder: Path) -> list[float]:
    from mixkd_fast import distill

    training = {"steps": 20, "evaluate_every": 20, "batch_size": 16, "micro_batch_size": 8}
    distill(**toy_config(folder, training=training), progress=False)
    return losses(folder / "run")


def test_losses_follow_the_golden_curve(tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    assert len(golden) == 20 and max(golden) - min(golden) > 0.1
    assert _curve(tmp_path) == pytest.approx(golden, rel=2e-4)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(json.dumps(_curve(Path(folder))) + "\n")
