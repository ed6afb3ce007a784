"""mix_embeddings on input that is legal but rare, and on input that must be refused."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import require
from test_mix_embeddings import make_batch
from torch import Tensor, nn

from mixkd_fast.mix import mix_embeddings, mixed_attention_mask
from mixkd_fast.ops import MixInputs, backends


@pytest.fixture(params=["reference", "cpu", "triton"])
def every_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every backend that runs on the CPU, Triton's in its interpreter."""
    name: str = request.param
    if name == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
        if torch.cuda.is_available():
            pytest.skip("Triton compiles here: tests/test_triton_mix_embeddings.py runs it on the GPU")
        entry = backends.TABLE["mix_embeddings", "triton"]
        monkeypatch.setitem(backends.TABLE, ("mix_embeddings", "triton"), entry._replace(missing=lambda: ""))
    else:
        require(name)
    monkeypatch.setattr(backends, "_resolved", {})
    yield name


def test_a_strided_layer_norm(every_backend: str) -> None:
    arguments = make_batch({"norm"}, torch.float32)
    norm = arguments["layer_norm"]
    expected = mix_embeddings(**arguments, backend="reference")
    for name in ("weight", "bias"):
        strided = torch.empty(24)
        strided[::2] = getattr(norm, name).detach()
        setattr(norm, name, nn.Parameter(strided[::2]))
    torch.testing.assert_close(mix_embeddings(**arguments, backend=every_backend), expected)


@pytest.mark.parametrize("name", ["input_ids", "partner", "token_type_ids", "position_ids"])
def test_indices_must_be_integers(name: str) -> None:
    arguments = make_batch({"place", "place_ids", "type"}, torch.float32)
    with pytest.raises(ValueError, match=f"{name} is torch.float32; allowed: an integer dtype"):
        mix_embeddings(**(arguments | {name: arguments[name].float()}))


@pytest.mark.parametrize("name", ["input_ids", "partner", "lam", "token_type_ids", "position_weight", "layer_norm"])
def test_tensors_on_another_device_are_refused(name: str) -> None:
    arguments = make_batch({"place", "type", "norm"}, torch.float32)
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(ValueError, match=rf"{name}(\.weight)? is on meta; allowed: cpu, the device of weight"):
        mix_embeddings(**arguments)


def test_a_second_derivative_and_forward_mode_are_refused_not_wrong(every_backend: str) -> None:
    arguments = make_batch({"place", "norm"}, torch.float32)
    weight: Tensor = arguments["weight"]
    output = mix_embeddings(**arguments, backend=every_backend)
    (gradient,) = torch.autograd.grad(output.square().sum(), weight, create_graph=True)

    def forward_mode() -> Tensor:
        given = arguments | {"weight": weight.detach()}
        derivative: Tensor = torch.func.jvp(
            lambda x: mix_embeddings(**(given | {"weight": x}), backend=every_backend), (given["weight"],), (weight,)
        )[1]
        return derivative

    if every_backend == "reference":
        assert torch.autograd.grad(gradient.square().sum(), weight)[0].norm() > 0
        assert forward_mode().norm() > 0
        return
    with pytest.raises(RuntimeError, match="mix_embeddings is differentiable once; backend='reference'"):
        torch.autograd.grad(gradient.square().sum(), weight)
    with pytest.raises(RuntimeError, match="mix_embeddings has no forward-mode derivative; backend='reference' has"):
        forward_mode()


def test_a_mask_of_mixed_rows_that_do_not_go_round() -> None:
    """Mixed row m belongs to clean row m % B, also if M is no multiple of B."""
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    partner, lam = torch.tensor([0, 1, 1]), torch.full((3,), 1.0)
    assert mixed_attention_mask(mask, partner, lam, 2).tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 0]]


def op_arguments(arguments: dict[str, Any]) -> list[Any]:
    """Of the op itself, detached."""
    backends.load("mix_embeddings", "triton")  # registers the ops
    norm = arguments.pop("layer_norm", None)
    norms = (None, None, 1e-5, False) if norm is None else (norm.weight, norm.bias, norm.eps, True)
    names = MixInputs._fields[: MixInputs._fields.index("norm_weight")]
    given = (*(arguments.get(name) for name in names), *norms, arguments["num_rows"], arguments["include_clean"])
    return [value.detach() if isinstance(value, Tensor) else value for value in given]


def test_a_direct_call_reads_no_foreign_memory() -> None:
    require("cpu")
    given = op_arguments(make_batch({"norm"}, torch.float32))
    output, mean, rstd = torch.ops.mixkd_fast.mix_embeddings(*given)
    backward = torch.ops.mixkd_fast.mix_embeddings_backward
    with pytest.raises(RuntimeError, match="mean must be contiguous"):
        backward(output, *given, mean[:1].expand(len(mean)), rstd, 31, False)
    given[MixInputs._fields.index("norm_weight")] = torch.ones(12, dtype=torch.int8)
    with pytest.raises(RuntimeError, match="LayerNorm must be float32"):
        torch.ops.mixkd_fast.mix_embeddings(*given)


def test_opcheck_of_the_gpu_backward() -> None:
    """Its results must be tensors of their own: two views of one memory break torch.compile."""
    pytest.importorskip("triton", reason="triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("in the interpreter only")
    given = op_arguments(make_batch({"place", "type", "norm"}, torch.float32, width=5))
    output, mean, rstd = torch.ops.mixkd_fast.mix_embeddings_triton(*given)
    arguments = (output, *given, mean, rstd, 31, False)
    torch.library.opcheck(torch.ops.mixkd_fast.mix_embeddings_backward_triton.default, arguments)


def test_triton_refuses_double_precision_and_reads_no_empty_table(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("in the interpreter only")
    for table, size in (("weight", 12), ("position_weight", 12), ("token_type_weight", 12)):
        arguments = make_batch({"place", "place_ids", "type"}, torch.float32)
        arguments["lam"][:] = 0.5
        arguments[table] = torch.empty(0, size)
        given = op_arguments(arguments)
        assert torch.ops.mixkd_fast.mix_embeddings_triton(*given)[0].isnan().all()
    given = op_arguments(make_batch(set(), torch.float64))
    with pytest.raises(ValueError, match=r"weight is torch.float64; allowed with backend 'triton': float32"):
        torch.ops.mixkd_fast.mix_embeddings_triton(*given)


def test_a_partner_that_is_not_there_counts_for_nobody() -> None:
    """Where values are not read its tokens are NaN, and their gradient ends up nowhere."""
    pytest.importorskip("triton", reason="triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("in the interpreter only")
    arguments = make_batch(set(), torch.float32)
    arguments["lam"][:] = 0.5
    arguments["partner"][1] = 99
    given = op_arguments(arguments)
    output, mean, rstd = torch.ops.mixkd_fast.mix_embeddings_triton(*given)
    assert output[1].isnan().all() and output[[0, 2]].isfinite().all()
    gradients = torch.ops.mixkd_fast.mix_embeddings_backward_triton(
        torch.ones_like(output), *given, mean, rstd, 1, False
    )
    tokens = (output.shape[0] - 1) * output.shape[1]
    assert gradients[0].sum().item() == pytest.approx(tokens * output.shape[2])
