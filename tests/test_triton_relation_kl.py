"""relation_kl by Triton, on a GPU where there is one, else interpreted: error against fp64, block edges, memory.

tests/test_relation_kl.py has its other properties, tests/test_triton_mix_embeddings.py compiles it to machine code.
"""

import math
from typing import Any

import pytest
import torch
from relation_cases import (
    FLOORS,
    STUDENT,
    check_against_fp64,
    grad_output_of,
    in_double,
    loss_and_gradients,
    make_relation,
)
from torch import Tensor

from mixkd_fast.losses import relation_kl
from mixkd_fast.ops import backends, relation_schema

pytest.importorskip("triton", reason="triton is not installed")
# numpy's, where the interpreter computes with infinities.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter computes them all in fp32.
DTYPES = [
    pytest.param(dtype, marks=[] if DEVICE == "cuda" or dtype == torch.float32 else [pytest.mark.slow])
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
]


@pytest.fixture(autouse=True)
def triton_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter the backend is of use to tests only, so the table calls it missing without a GPU."""
    entry = backends.TABLE["relation_kl", "triton"]
    monkeypatch.setitem(backends.TABLE, ("relation_kl", "triton"), entry._replace(missing=lambda: ""))
    monkeypatch.setattr(backends, "_resolved", {})


def on_device(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments on the test's device, strides kept; the student's tensors stay leaves."""
    return {name: value.detach().to(DEVICE).requires_grad_(value.requires_grad) for name, value in arguments.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 2, 3, 17, 64, 129])
def test_error_against_fp64(dtype: torch.dtype, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        # Triton's interpreter cuts bf16 off instead of rounding it.
        monkeypatch.setitem(FLOORS, dtype, 2 * FLOORS[dtype])
    for width, heads in ((8, 1), (32, 12 if length < 64 else 2), (33, 2), (64, 1)):
        arguments = on_device(make_relation(dtype, 2, heads, length, width, seed=width))
        check_against_fp64(arguments, "triton", in_double(arguments))


@pytest.mark.parametrize("dtype", [DTYPES[0], DTYPES[2]], ids=str)
def test_widths_in_pieces_tokens_here_and_there_and_huge_scores(dtype: torch.dtype) -> None:
    for scale in (1.0, 100.0):
        arguments = make_relation(dtype, rows=3, heads=2, length=150, width=70, teacher_width=130, scale=scale / 5)
        arguments["student_mask"][:] = 0
        arguments["student_mask"][1, 97] = 1
        arguments["student_mask"][2, 10:140:3] = 1
        arguments = on_device(arguments)
        check_against_fp64(arguments, "triton", in_double(arguments))


def test_masks_of_both_strides_and_nan_in_the_padding() -> None:
    """As tests/test_relation_kl.py has them for the CPU: of each the one that kernels can get wrong when compiled."""
    arguments = make_relation(torch.float32, rows=3, heads=2, length=20, width=5)
    arguments["teacher_mask"] = arguments["student_mask"].clone()
    arguments["teacher_mask"][0, ::3] = 0
    missing = (arguments["student_mask"] * arguments["teacher_mask"] == 0)[:, None, :, None]
    clean = on_device(arguments)
    poisoned = {}
    for name, value in arguments.items():
        if value.is_floating_point():
            spread = torch.full((*value.shape[:-1], 10), math.nan)
            spread[..., ::2] = value.detach().masked_fill(missing, math.nan)
            value = spread.to(DEVICE)[..., ::2].requires_grad_(value.requires_grad)
        poisoned[name] = value.to(DEVICE)
    found = loss_and_gradients(relation_kl(**poisoned, backend="triton"), poisoned, grad_output_of(3).to(DEVICE))
    double = in_double(clean)
    wanted = loss_and_gradients(relation_kl(**double, backend="reference"), double, grad_output_of(3).to(DEVICE))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].double(), value.double(), rtol=1e-4, atol=1e-5, msg=name)


def test_nothing_where_student_and_teacher_agree_also_under_autocast() -> None:
    arguments = make_relation(torch.bfloat16, length=11)
    for name in ("first", "second"):
        arguments[f"teacher_{name}"] = arguments[f"student_{name}"].detach().clone()
    arguments = on_device(arguments)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = relation_kl(**arguments, backend="triton")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-5)
    for gradient in torch.autograd.grad(loss.sum(), [arguments[name] for name in STUDENT]):
        assert gradient.dtype == torch.bfloat16 and gradient.abs().max() < 1e-5


def op_arguments() -> list[Any]:
    """Of the op itself."""
    backends.load("relation_kl", "triton")  # registers the ops
    arguments = on_device(make_relation(torch.float32, rows=2, heads=2, length=5, width=3))
    tensors = [value for name, value in arguments.items() if name != "student_mask"]
    return [*tensors, arguments["student_mask"] != 0]


def test_opcheck_forward_and_backward() -> None:
    arguments = op_arguments()
    torch.library.opcheck(torch.ops.mixkd_fast.relation_kl_triton.default, arguments)
    plain = [value.detach() for value in arguments]
    loss, statistics = torch.ops.mixkd_fast.relation_kl_triton(*plain)
    given = (torch.ones_like(loss), *plain, statistics, relation_schema.FIRST | relation_schema.SECOND)
    torch.library.opcheck(torch.ops.mixkd_fast.relation_kl_backward_triton.default, given)


def test_a_second_derivative_and_forward_mode_are_refused_not_wrong() -> None:
    arguments = on_device(make_relation(torch.float32))
    first = arguments["student_first"]
    loss = relation_kl(**arguments, backend="triton")
    (gradient,) = torch.autograd.grad(loss.square().sum(), first, create_graph=True)
    with pytest.raises(RuntimeError, match="relation_kl is differentiable once; backend='reference'"):
        torch.autograd.grad(gradient.square().sum(), first)
    rest = arguments | {name: arguments[name].detach() for name in STUDENT}

    def forward_mode() -> Tensor:
        derivative: Tensor = torch.func.jvp(
            lambda x: relation_kl(**(rest | {"student_first": x}), backend="triton"),
            (first.detach(),),
            (first.detach(),),
        )[1]
        return derivative

    with pytest.raises(RuntimeError, match="relation_kl has no forward-mode derivative; backend='reference' has"):
        forward_mode()


def test_what_is_kept_for_the_backward_is_four_numbers_a_query() -> None:
    arguments = on_device(make_relation(torch.float32, rows=2, heads=3, length=40, width=4))
    given = {arguments[name].untyped_storage().data_ptr() for name in arguments}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = relation_kl(**arguments, backend="triton")
    mask_bytes = 2 * 40
    assert sum(kept.values()) == 4 * 2 * 3 * 40 * 4 + mask_bytes
    loss.backward(grad_output_of(2).to(DEVICE))
    assert all(arguments[name].grad.norm() > 0 for name in STUDENT)
