"""The CPU kernel of relation_kl: error against fp64, instruction sets, threads, the op itself."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import require
from relation_cases import FLOORS, STUDENT, check_against_fp64, grad_output_of, loss_and_gradients, make_relation
from torch import Tensor

from mixkd_fast.losses import relation_kl
from mixkd_fast.ops import relation_schema

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = (1, 2, 3, 17, 64, 129)


@pytest.fixture(autouse=True)
def the_kernel_is_there() -> None:
    require("cpu")


@pytest.mark.parametrize("dtype", list(FLOORS), ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_error_against_fp64(dtype: torch.dtype, length: int) -> None:
    for width in (8, 32, 33, 64):
        for heads in (1, 12):
            check_against_fp64(make_relation(dtype, 3, heads, length, width, seed=width), "cpu")


@pytest.mark.parametrize("dtype", list(FLOORS), ids=str)
def test_unequal_widths_and_rows_of_one_token(dtype: torch.dtype) -> None:
    arguments = make_relation(dtype, rows=4, heads=3, length=40, width=24, teacher_width=70)
    arguments["student_mask"][:] = 0
    arguments["student_mask"][1:, 17] = 1
    arguments["student_mask"][2, 3:30:2] = 1
    check_against_fp64(arguments, "cpu")


@pytest.mark.parametrize("dtype", list(FLOORS), ids=str)
def test_scores_of_ten_thousand(dtype: torch.dtype) -> None:
    """Softmaxes of one key each: nothing overflows, and where they agree the divergence is 0."""
    arguments = make_relation(dtype, length=20, width=16, scale=100.0)
    check_against_fp64(arguments, "cpu")
    arguments |= {f"teacher_{name}": arguments[f"student_{name}"].detach() for name in ("first", "second")}
    assert (relation_kl(**arguments, backend="cpu") == 0).all()


def test_fp16_keeps_small_gradients() -> None:
    """Student and teacher nearly alike: what is stored in half precision is not yet divided by h sqrt(d)."""
    arguments = make_relation(torch.float16, rows=2, heads=12, length=30, width=64)
    for name in ("first", "second"):
        value = arguments[f"student_{name}"].detach()
        arguments[f"teacher_{name}"] = (value.float() * (1 + 1e-3)).to(torch.float16)
    check_against_fp64(arguments, "cpu")


@pytest.mark.parametrize("name", ["default", "avx2", "avx512"])
def test_every_instruction_set(name: str) -> None:
    program = (
        "import sys; sys.path[:0] = ['tests']\n"
        "import torch\n"
        "from relation_cases import check_against_fp64, make_relation\n"
        "for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):\n"
        "    for length, width in ((1, 5), (13, 33), (70, 8)):\n"
        "        check_against_fp64(make_relation(dtype, 3, 2, length, width), 'cpu')\n"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": name, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_number_of_threads_changes_nothing() -> None:
    arguments = make_relation(torch.float32, rows=5, heads=3, length=50, width=16)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            loss = relation_kl(**arguments, backend="cpu")
            found.append(loss_and_gradients(loss, arguments, grad_output_of(5)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def op_arguments(dtype: torch.dtype = torch.float32) -> list[Any]:
    """Of the op itself."""
    arguments = make_relation(dtype, rows=2, heads=2, length=5, width=3)
    tensors = [value for name, value in arguments.items() if name != "student_mask"]
    return [*tensors, arguments["student_mask"] != 0, relation_schema.FIRST | relation_schema.SECOND]


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.mixkd_fast.relation_kl.default, op_arguments())


def test_the_ops_own_autograd_in_double() -> None:
    first, second, *rest = op_arguments(torch.float64)
    leaves = [first.detach().clone().requires_grad_(), second.detach().clone().requires_grad_()]
    op = torch.ops.mixkd_fast.relation_kl
    assert torch.autograd.gradcheck(lambda a, b: op(a, b, *rest)[0], leaves)
    loss, grad_first, grad_second = op(*leaves, *rest)
    assert loss.requires_grad and not (grad_first.requires_grad or grad_second.requires_grad)


def test_a_second_derivative_and_forward_mode_are_refused_not_wrong() -> None:
    arguments = make_relation(torch.float32)
    first = arguments["student_first"]
    (gradient,) = torch.autograd.grad(relation_kl(**arguments, backend="cpu").square().sum(), first, create_graph=True)
    with pytest.raises(RuntimeError, match="relation_kl is differentiable once; backend='reference'"):
        torch.autograd.grad(gradient.square().sum(), first)
    rest = arguments | {name: arguments[name].detach() for name in STUDENT}

    def forward_mode(backend: str) -> Tensor:
        derivative: Tensor = torch.func.jvp(
            lambda x: relation_kl(**(rest | {"student_first": x}), backend=backend),
            (first.detach(),),
            (first.detach(),),
        )[1]
        return derivative

    assert forward_mode("reference").norm() > 0
    with pytest.raises(RuntimeError, match="relation_kl has no forward-mode derivative; backend='reference' has"):
        forward_mode("cpu")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(2, 2, 5), "student_first must be"),
        (1, torch.zeros(2, 2, 5, 4), "student_second has a wrong shape"),
        (1, torch.zeros(2, 2, 5, 3).half(), "student_second must have student_first's dtype"),
        (2, torch.zeros(2, 1, 5, 3), "teacher_first must have the rows|teacher_second has a wrong shape"),
        (3, torch.zeros(2, 2, 5, 3).int(), "teacher_second must be float32"),
        (4, torch.ones(2, 4, dtype=torch.bool), "keep must be contiguous bool"),
        (4, torch.ones(2, 5), "keep must be contiguous bool"),
    ],
)
def test_a_direct_call_reads_no_foreign_memory(place: int, value: Tensor, message: str) -> None:
    arguments = [x.detach() if isinstance(x, Tensor) else x for x in op_arguments()]
    arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.mixkd_fast.relation_kl(*arguments)
