"""The mix_embeddings cases: by every backend, and by eager and compiled PyTorch as users write it."""

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import BERT_WORDS, MixCase, MixInputs, describe, mix_inputs
from benchmarks.timing import Arm, Budget, measure
from mixkd_fast.mix import mix_embeddings
from mixkd_fast.ops import backends

TESTS = ("test_*mix_embeddings*.py", "test_mix_edges.py")
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Relative L2 error of the output and of each gradient."""

Mix = Callable[[MixInputs], Tensor]


def run(cases: list[MixCase], device: torch.device, budget: Budget, compiled: bool) -> list[dict[str, Any]]:
    """Check and time every case; compiled=False leaves torch.compile out. Raises: WrongResult."""
    results = []
    for case in cases:
        print(case.name, file=sys.stderr, flush=True)
        torch.compiler.reset()
        inputs = mix_inputs(case, device)
        num_bytes = floor_bytes(case)
        source = torch.zeros(num_bytes // 2, dtype=torch.int8, device=device)
        entries = measure(
            _arms(case, inputs, device, compiled),
            copy=source.clone,
            copy_bytes=num_bytes,
            floor_bytes=num_bytes,
            truth=truth(case, inputs),
            dtype=case.dtype,
            tolerances=TOLERANCES,
            device=device,
            budget=budget,
        )
        span = "forward+backward" if case.backward else "forward"
        results.append({"op": "mix_embeddings", "case": describe(case), "span": span, "arms": entries})
    return results


def floor_bytes(case: MixCase) -> int:
    """Forward: read two rows, write one. Backward: read the output's gradient, write the gradient of every word."""
    backward = case.output_bytes + BERT_WORDS * case.width * case.dtype.itemsize
    return 3 * case.output_bytes + (backward if case.backward else 0)


def truth(case: MixCase, inputs: MixInputs) -> dict[str, Tensor]:
    """The reference in fp64 from the same inputs: the output [B, L, H] and each weight's gradient."""

    def exact(tensor: Tensor) -> Tensor:
        return tensor.detach().double().requires_grad_(tensor.requires_grad)

    norm = nn.LayerNorm(case.width, eps=inputs.layer_norm.eps, device=inputs.weight.device, dtype=torch.float64)
    norm.requires_grad_(case.backward)
    doubled = MixInputs(
        input_ids=inputs.input_ids,
        weight=exact(inputs.weight),
        partner=inputs.partner,
        lam=inputs.lam,
        position_weight=exact(inputs.position_weight),
        token_type_ids=inputs.token_type_ids,
        token_type_weight=exact(inputs.token_type_weight),
        layer_norm=norm,
        grad_output=inputs.grad_output.double(),
    )
    outputs = _call(case, _project(case, "reference"), doubled)()
    names = ["output", *(f"gradient of {name}" for name in _weights(case, doubled))] if case.backward else ["output"]
    return dict(zip(names, outputs, strict=True))


def _arms(case: MixCase, inputs: MixInputs, device: torch.device, compiled: bool) -> list[Arm]:
    hand_written = _eager_full if case.full else _eager_words
    arms = [Arm("eager", "eager", _call(case, hand_written, inputs))]
    if compiled:
        arms.append(Arm("compiled eager", "compile", _call(case, torch.compile(hand_written, dynamic=False), inputs)))
    else:
        arms.append(Arm("compiled eager", "compile", None, missing="left out by --quick"))
    for row in backends.available("mix_embeddings"):
        if row.available and row.backend in backends.preferred(device):
            arms.append(Arm(row.backend, "project", _call(case, _project(case, row.backend), inputs)))
        else:
            arms.append(Arm(row.backend, "project", None, missing=row.reason or f"not for {device.type}"))
    return arms


def _project(case: MixCase, backend: str) -> Mix:
    def mix(inputs: MixInputs) -> Tensor:
        extras: dict[str, Any] = {}
        if case.full:
            extras = {
                "position_weight": inputs.position_weight,
                "token_type_ids": inputs.token_type_ids,
                "token_type_weight": inputs.token_type_weight,
                "layer_norm": inputs.layer_norm,
            }
        return mix_embeddings(inputs.input_ids, inputs.weight, inputs.partner, inputs.lam, **extras, backend=backend)

    return mix


def _eager_words(inputs: MixInputs) -> Tensor:
    first = F.embedding(inputs.input_ids, inputs.weight)
    second = F.embedding(inputs.input_ids[inputs.partner], inputs.weight)
    return torch.lerp(second, first, inputs.lam.to(first.dtype)[:, None, None])


def _eager_full(inputs: MixInputs) -> Tensor:
    first = F.embedding(inputs.input_ids, inputs.weight)
    first = first + F.embedding(inputs.token_type_ids, inputs.token_type_weight)
    second = F.embedding(inputs.input_ids[inputs.partner], inputs.weight)
    second = second + F.embedding(inputs.token_type_ids[inputs.partner], inputs.token_type_weight)
    mixed = torch.lerp(second, first, inputs.lam.to(first.dtype)[:, None, None])
    return inputs.layer_norm(mixed + inputs.position_weight[: mixed.shape[1]])


def _weights(case: MixCase, inputs: MixInputs) -> dict[str, Tensor]:
    weights = {"word weight": inputs.weight}
    if case.full:
        weights |= {"position weight": inputs.position_weight, "token type weight": inputs.token_type_weight}
        weights |= {"LayerNorm weight": inputs.layer_norm.weight, "LayerNorm bias": inputs.layer_norm.bias}
    return weights


def _call(case: MixCase, mix: Mix, inputs: MixInputs) -> Callable[[], tuple[Tensor, ...]]:
    weights = list(_weights(case, inputs).values())

    def call() -> tuple[Tensor, ...]:
        output = mix(inputs)
        if not case.backward:
            return (output,)
        return output.detach(), *torch.autograd.grad(output, weights, inputs.grad_output)

    return call
