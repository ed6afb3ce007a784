"""One of two gloo ranks that hold a slice of the vocabulary each: `linear_ranks.py FOLDER RANK`.

Compares linear_kd_loss over the group with the single-process reference, in fp64; rank 0 prints what it found as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import SETTINGS
from linear_cases import gradients_of, in_double, make_heads

from mixkd_fast.losses import linear_kd_loss, vocabulary_slice

NUM_RANKS = 2
WIDTHS = ((37, 37), (30, 41), (41, 30), (2, 9), (1, 1))


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'start'}", rank=rank, world_size=NUM_RANKS)
    largest, cases = 0.0, 0
    for setting in SETTINGS:
        if setting["divergence"] == "adaptive_kl":
            continue
        for index, widths in enumerate(WIDTHS):
            for reduction in ("mean", "none"):
                options = {"temperature": 2.0, "ce_weight": 0.4, "reduction": reduction, **setting}
                options |= {"student_softcap": 6.0} if index == 0 else {}
                largest = max(largest, difference(widths, rank, options, logit_free=index == 1))
                cases += 1
    refuse_slices_apart(rank)
    single = dist.new_group([0])
    if rank == 0:
        arguments = in_double(make_heads())
        torch.testing.assert_close(
            linear_kd_loss(**arguments, process_group=single), linear_kd_loss(**arguments, backend="reference")
        )
        print(json.dumps({"largest": largest, "cases": cases}))
    dist.destroy_process_group()


def sliced(arguments: dict[str, Any], widths: tuple[int, int], rank: int) -> dict[str, Any]:
    """What the rank holds: new leaves of its classes, the rest as it is."""
    own = dict(arguments)
    for side, pair in (("student", widths), ("teacher", widths[::-1])):
        part = vocabulary_slice(*pair, rank, NUM_RANKS)
        for name in (f"{side}_weight", f"{side}_bias"):
            own[name] = arguments[name].detach()[part].clone().requires_grad_(side == "student")
    own["student_hidden"] = arguments["student_hidden"].detach().clone().requires_grad_()
    return own


def difference(widths: tuple[int, int], rank: int, options: dict[str, Any], logit_free: bool) -> float:
    """The largest deviation of anything from the whole."""
    whole = in_double(make_heads((11,), *widths))
    own = sliced(whole, widths, rank)
    expected = linear_kd_loss(**whole, **options, backend="reference", return_parts=True)
    limits: dict[str, Any] = {"max_logits_mib": 0.02, "logit_free": logit_free, "process_group": dist.group.WORLD}
    found = linear_kd_loss(**own, **options, **limits, return_parts=True)
    pairs = list(zip(found, expected, strict=True))
    weights = torch.full_like(found.loss, -1.5)
    gradients, true = gradients_of(found.loss, own, weights), gradients_of(expected.loss, whole, weights)
    part = vocabulary_slice(*widths, rank, NUM_RANKS)
    for name, gradient in gradients.items():
        pairs.append((gradient, true[name] if name == "student_hidden" else true[name][part]))
    return max(float((a - b).detach().abs().max()) if a.numel() else 0.0 for a, b in pairs)


def refuse_slices_apart(rank: int) -> None:
    """Cut in halves each, heads of unequal width do not begin with the same classes."""
    arguments = in_double(make_heads((3,), 10, 14))
    for side, half in (("student", 5), ("teacher", 7)):
        for name in ("weight", "bias"):
            arguments[f"{side}_{name}"] = arguments[f"{side}_{name}"].detach()[rank * half : (rank + 1) * half]
    try:
        linear_kd_loss(**arguments, process_group=dist.group.WORLD)
    except ValueError as error:
        assert "the ranks' classes of student and teacher are [[5, 7], [5, 7]]" in str(error), error
        return
    raise AssertionError("slices that do not fit together were accepted")


if __name__ == "__main__":
    main()
