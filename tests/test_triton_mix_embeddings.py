"""mix_embeddings by Triton, on a GPU where there is one, else interpreted; all Triton kernels as machine code."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_mix_embeddings import (
    PARTS,
    STORED,
    in_double,
    make_batch,
    outputs_and_gradients,
    tables_of,
    true_embeddings,
)
from torch import Tensor, nn

from mixkd_fast.mix import mix_embeddings
from mixkd_fast.ops import backends

pytest.importorskip("triton", reason="triton is not installed")
# numpy's, where the interpreter computes with infinities.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def triton_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter the backend is of use to tests only, so the table calls it missing without a GPU."""
    entry = backends.TABLE["mix_embeddings", "triton"]
    monkeypatch.setitem(backends.TABLE, ("mix_embeddings", "triton"), entry._replace(missing=lambda: ""))
    monkeypatch.setattr(backends, "_resolved", {})


def on_device(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments on the test's device; tables stay leaves."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().to(DEVICE).requires_grad_(value.requires_grad)
        return value.to(DEVICE) if isinstance(value, nn.Module) else value

    return {name: move(value) for name, value in arguments.items()}


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, *(pytest.param(half, marks=pytest.mark.slow) for half in (torch.bfloat16, torch.float16))],
    ids=str,
)
@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: "-".join(sorted(parts)) or "words")
def test_values_and_gradients_against_the_definition(parts: set[str], dtype: torch.dtype) -> None:
    # Triton's interpreter cuts bf16 off instead of rounding it.
    allowed = STORED[dtype] * (2 if dtype == torch.bfloat16 else 1)
    for rows, mixed, length, width in ((5, 5, 7, 12), (1, 1, 1, 1), (3, 6, 2, 65), (6, 4, 17, 7), (40, 40, 4, 33)):
        if "norm" in parts and width == 1:
            continue  # LayerNorm of one number is its bias
        arguments = make_batch(parts, dtype, rows, mixed, length, width)
        moved = on_device(arguments)
        output = mix_embeddings(**moved, backend="triton")
        generator = torch.Generator().manual_seed(1)
        grad_output = (torch.randn(output.shape, generator=generator) * 2.5).to(dtype)
        actual = outputs_and_gradients(moved, output, grad_output.to(DEVICE))
        exact = in_double(arguments)
        expected = outputs_and_gradients(exact, true_embeddings(exact), grad_output.double())
        for name, value in expected.items():
            error = (actual[name].cpu() - value).norm() / value.norm().clamp(min=1e-30)
            assert error <= allowed, f"{name} of {rows}x{mixed}x{length}x{width}: {error}"


def test_long_runs_of_one_word_across_many_chunks() -> None:
    """Words of one entry, of a whole chunk, of some chunks, of most entries."""
    counts = [1, 63, 64, 65, 1, 300, 2, 128, 900]
    ids = torch.cat([torch.full((count,), word) for word, count in enumerate(counts)])
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))][None].to(DEVICE)
    weight = torch.zeros(12, 5, device=DEVICE, requires_grad=True)
    output = mix_embeddings(ids, weight, torch.zeros(1, dtype=torch.long, device=DEVICE), 1.0, backend="triton")
    grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    (gradient,) = torch.autograd.grad(output, weight, grad_output)
    expected = torch.zeros(12, 5, dtype=torch.float64, device=DEVICE)
    expected.index_add_(0, ids[0], grad_output[0].double())
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-5)


def test_an_index_out_of_range_makes_its_tokens_nan() -> None:
    arguments = on_device(make_batch({"place", "type", "norm"}, torch.float32))
    arguments["lam"] = 0.5
    arguments["partner"][:] = torch.arange(5).roll(1)
    arguments["input_ids"][2, 3] = 99
    arguments["token_type_ids"][4, 0] = -1
    output = mix_embeddings(**arguments, backend="triton")
    bad = torch.zeros(5, 7, dtype=torch.bool)
    bad[[2, 3], 3] = True
    bad[[4, 0], 0] = True
    assert (output.isnan().all(-1).cpu() == bad).all() and (output.isnan().any(-1).cpu() == bad).all()
    arguments["partner"][1] = 77
    assert mix_embeddings(**arguments, backend="triton")[1].isnan().all()


def test_what_has_weight_0_is_not_looked_at_and_new_memory_may_hold_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    arguments = on_device(make_batch({"padding", "type", "norm"}, torch.float32))
    arguments["padding_mask"][:] = False
    arguments["padding_mask"][3, 5] = True
    arguments["input_ids"].clamp_(max=20)
    arguments["input_ids"][3, 5] = 22
    with torch.no_grad():
        arguments["weight"][22] = float("nan")
    torch.use_deterministic_algorithms(True)
    try:
        output = mix_embeddings(**arguments, backend="triton")
        gradients = torch.autograd.grad(output.square().sum(), list(tables_of(arguments).values()))
    finally:
        torch.use_deterministic_algorithms(False)
    assert output.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.slow
def test_every_triton_kernel_compiles_to_machine_code(tmp_path: Path) -> None:
    """For sm_80 and sm_90, by Triton's own compiler and ptxas: the interpreter accepts more than they do."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    worker = ROOT / "tests" / "workers" / "compile_triton.py"
    result = subprocess.run(
        [sys.executable, str(worker)], env=environment, capture_output=True, text=True, timeout=1000
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.startswith("compiled ")
