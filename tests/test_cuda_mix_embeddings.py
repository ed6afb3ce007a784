"""The CUDA kernels of mix_embeddings against fp64; need a GPU and the compiled library."""

from typing import Any

import pytest
import torch
from test_cuda_kd_loss import reason_to_skip
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

pytestmark = pytest.mark.skipif(reason_to_skip() is not None, reason=str(reason_to_skip()))


def on_gpu(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments on the GPU; tables stay leaves."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().cuda().requires_grad_(value.requires_grad)
        return value.cuda() if isinstance(value, nn.Module) else value

    return {name: move(value) for name, value in arguments.items()}


def run(arguments: dict[str, Any], grad_output: Tensor) -> dict[str, Tensor]:
    """Output and gradients of the CUDA backend."""
    return outputs_and_gradients(arguments, mix_embeddings(**arguments, backend="cuda"), grad_output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: "-".join(sorted(parts)) or "words")
def test_values_and_gradients_against_the_definition(parts: set[str], dtype: torch.dtype) -> None:
    for rows, mixed, length, width in ((5, 5, 7, 12), (1, 1, 1, 1), (3, 6, 2, 65), (40, 40, 4, 32), (3, 3, 3, 768)):
        if "norm" in parts and width == 1:
            continue  # LayerNorm of one number is its bias
        arguments = make_batch(parts, dtype, rows, mixed, length, width)
        exact = in_double(arguments)
        truth = true_embeddings(exact)
        grad_output = (torch.randn(truth.shape, generator=torch.Generator().manual_seed(1)) * 2.5).to(dtype)
        expected = outputs_and_gradients(exact, truth, grad_output.double())
        actual = run(on_gpu(arguments), grad_output.cuda())
        for name, value in expected.items():
            error = (actual[name].cpu() - value).norm() / value.norm().clamp(min=1e-30)
            assert error <= STORED[dtype], f"{name} of {rows}x{mixed}x{length}x{width}: {error}"


def test_layer_norm_in_fp32_with_tables_in_bf16() -> None:
    arguments = on_gpu(make_batch({"place", "norm"}, torch.bfloat16, 5, 5, 7, 64))
    arguments["layer_norm"] = arguments["layer_norm"].float()
    output = mix_embeddings(**arguments, backend="cuda")
    torch.testing.assert_close(output, mix_embeddings(**arguments, backend="reference"), rtol=1e-2, atol=1e-2)
    assert torch.autograd.grad(output.float().sum(), arguments["layer_norm"].weight)[0].dtype == torch.float32


def test_an_index_out_of_range_makes_its_tokens_nan() -> None:
    arguments = on_gpu(make_batch({"place", "type", "norm"}, torch.float32))
    arguments["lam"] = 0.5
    arguments["partner"][:] = torch.arange(5).roll(1)
    arguments["input_ids"][2, 3] = 99
    output = mix_embeddings(**arguments, backend="cuda")
    bad = torch.zeros(5, 7, dtype=torch.bool)
    bad[[2, 3], 3] = True
    assert (output.isnan().all(-1).cpu() == bad).all() and (output.isnan().any(-1).cpu() == bad).all()


def test_runs_agree_bit_by_bit_and_nothing_waits_for_the_device() -> None:
    arguments = on_gpu(make_batch(PARTS[-1], torch.bfloat16, 64, 64, 32, 128))
    grad_output = torch.ones_like(mix_embeddings(**arguments, backend="cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = [mix_embeddings(**arguments, backend="cuda") for _ in range(2)]
        results = [torch.autograd.grad(x, list(tables_of(arguments).values()), grad_output) for x in outputs]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_capture_in_a_graph() -> None:
    arguments = on_gpu(make_batch({"place", "type", "norm"}, torch.float32, 8, 8, 16, 64))
    tables = list(tables_of(arguments).values())

    def step() -> tuple[Tensor, ...]:
        output = mix_embeddings(**arguments, backend="cuda")
        return output, *torch.autograd.grad(output.square().sum(), tables)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        arguments["weight"].mul_(0.5)
    graph.replay()
    torch.testing.assert_close(captured, step(), rtol=0, atol=0)


def test_double_precision_is_refused_by_name() -> None:
    arguments = on_gpu(make_batch(set(), torch.float64))
    with pytest.raises(RuntimeError, match="weight must be float32, bfloat16 or float16"):
        mix_embeddings(**arguments, backend="cuda")
