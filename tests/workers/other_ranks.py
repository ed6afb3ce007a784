"""Runs (or resumes) configurations one after the other, with modules that are easily lost on the way.

Arguments: folder with CASE.json, "start" or "resume", the cases.
"""

import json
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mixkd_fast import distill
from mixkd_fast.methods import Method, Moment, Setting
from mixkd_fast.methods.base import supervised_loss


class Extras(nn.Module):
    """A projection, the same weight under a second name, a frozen one; a buffer and an extra state that grow."""

    steps: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = nn.Linear(width, width)
        self.tied = nn.Linear(width, width, bias=False)
        self.tied.weight = self.projection.weight
        # Another value than a new process would draw: only the checkpoint has it.
        self.frozen = nn.Parameter(torch.randn(3, width), requires_grad=False)
        self.register_buffer("steps", torch.zeros(()))
        self.pushes: list[float] = []

    def get_extra_state(self) -> dict[str, Any]:
        """Neither a tensor nor a number."""
        return {"pushes": self.pushes, "nothing": None}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.pushes = list(state["pushes"])


class Probe(Method):
    """Cross entropy, and a pull on the modules above that depends on all of them."""

    name: Literal["probe"] = "probe"
    """Not among the methods of a JSON file."""

    def build(self, setting: Setting) -> Extras:
        torch.manual_seed(setting.seed)
        extras = Extras(setting.num_labels)
        if "resume" in sys.argv:
            extras.frozen.data.zero_()
        return extras

    def terms(
        self, batch: Any, student: Any, teacher: Any, extras: nn.Module | None, moment: Moment
    ) -> dict[str, Tensor]:
        assert isinstance(extras, Extras)
        logits = student.clean(batch).logits.float()
        inputs = logits.to(extras.frozen.dtype)
        moved = extras.tied(extras.projection(inputs)).float() - extras.frozen.float().mean(0) * (1 + extras.steps)
        moved = moved + sum(extras.pushes)
        return {"mle": supervised_loss(logits, batch), "pull": moved.square().mean(-1)}

    def after_step(self, student: Any, extras: nn.Module | None, moment: Moment) -> None:
        assert isinstance(extras, Extras)
        extras.steps += 1
        extras.pushes.append(0.25)


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    folder, mode, cases = Path(arguments[0]), arguments[1], arguments[2:]
    for case in cases:
        config = json.loads((folder / f"{case}.json").read_text())
        if config["method"] == "probe":
            config["method"] = Probe()
        distill(**config, resume=mode == "resume", progress=False)


if __name__ == "__main__":
    main()
