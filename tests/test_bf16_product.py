"""Products of bf16 matrices with fp32 sums on the CPU, against fp64: shapes, layouts, rounding, both units."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mixkd_fast.ops import bf16_product

ROOT = Path(__file__).resolve().parent.parent
# Tiles of 16 x 32, blocks of 256 and 512 in depth: below, at and above their edges.
SHAPES = [
    (1, 1, 1),
    (1, 5, 3),
    (16, 32, 16),
    (17, 33, 15),
    (33, 64, 48),
    (5, 513, 300),
    (257, 1030, 40),
    (300, 100, 600),
    (3, 2048, 33),
]


@pytest.fixture(autouse=True)
def the_processor_has_it() -> None:
    if not bf16_product.is_available():
        pytest.skip("this processor does not multiply bf16, or the library of the CPU is not built")


def made(rows: int, columns: int, transposed: bool, seed: int) -> Tensor:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return values.T.contiguous().T if transposed else values


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("right_transposed", [False, True])
@pytest.mark.parametrize("left_transposed", [False, True])
def test_products_and_sums(shape: tuple[int, int, int], left_transposed: bool, right_transposed: bool) -> None:
    rows, depth, columns = shape
    left, right = made(rows, depth, left_transposed, 0), made(depth, columns, right_transposed, 1)
    expected = left.double() @ right.double()
    # What rounding in fp32 may amount to, whatever the order of the sum.
    allowed = 1e-6 * (left.double().abs() @ right.double().abs())
    wide = torch.full((rows, columns + 7), 3.0)
    out = wide[:, :columns]
    bf16_product.multiply(left, right, 0.5, out)
    assert ((out - 0.5 * expected).abs() <= allowed).all()
    bf16_product.multiply(left, right, -2.0, out, add=True)
    assert ((out + 1.5 * expected).abs() <= 3 * allowed).all()
    assert (wide[:, columns:] == 3).all()
    rounded = torch.full((rows, columns + 1), 3.0, dtype=torch.bfloat16)
    bf16_product.multiply(left, right, 1.0, rounded[:, :columns])
    assert ((rounded[:, :columns] - expected).abs() <= allowed + expected.abs() / 256).all()
    assert (rounded[:, columns:] == 3).all()


def test_nothing_to_sum_is_zero_and_nothing_to_write_is_nothing() -> None:
    out = torch.ones(3, 5)
    bf16_product.multiply(made(3, 0, False, 0), made(0, 5, False, 0), 1.0, out)
    assert (out == 0).all()
    bf16_product.multiply(made(0, 4, False, 0), made(4, 5, False, 0), 1.0, torch.empty(0, 5))


def test_nan_and_infinity_stay_in_their_row() -> None:
    left, right = made(40, 70, False, 0), made(70, 50, True, 1)
    left[7, 69], left[20, 3] = float("nan"), float("inf")
    out = torch.empty(40, 50)
    bf16_product.multiply(left, right, 1.0, out)
    finite = out.isfinite().all(1)
    assert finite.logical_not().nonzero().flatten().tolist() == [7, 20]
    assert out[7].isnan().all() and out[20].isinf().all()


def test_matrices_with_gaps_are_taken_too() -> None:
    left, right = made(10, 80, False, 0)[:, ::2], made(80, 30, True, 1)[::2]
    out = torch.empty(10, 30)
    bf16_product.multiply(left, right, 1.0, out)
    torch.testing.assert_close(out.double(), left.double() @ right.double(), rtol=1e-5, atol=1e-5)


def test_the_number_of_threads_changes_nothing() -> None:
    left, right = made(130, 1200, False, 0), made(1200, 400, False, 1)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(torch.empty(130, 400))
            bf16_product.multiply(left, right, 1.0, results[-1])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_what_does_not_fit_is_refused() -> None:
    left, right, out = made(3, 4, False, 0), made(4, 5, False, 0), torch.empty(3, 5)
    product = torch.ops.mixkd_fast.bf16_product_
    for wrong, words in (
        ((out, left.float(), right), "left must be a bfloat16 matrix"),
        ((out, left, right[:3]), "right must have as many rows as left has columns"),
        ((out.T, left, right), r"out must be \[3, 5\]"),
        ((torch.empty(5, 3).T, left, right), "out must have its columns next to each other"),
        ((out.half(), left, right), "out must be float32 or bfloat16"),
    ):
        with pytest.raises(RuntimeError, match=words):
            product(*wrong, 1.0, False)
    with pytest.raises(RuntimeError, match="sums are kept in float32"):
        product(out.bfloat16(), left, right, 1.0, True)


def test_the_answer_does_not_depend_on_who_asks_first() -> None:
    code = (
        "import torch\n"
        "from torch._subclasses.fake_tensor import FakeTensorMode\n"
        "from mixkd_fast.ops import bf16_product\n"
        "with torch.device('meta'), FakeTensorMode():\n"
        "    assert bf16_product.is_available()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("most", "available"), [("AVX512_CORE_BF16", True), ("AVX2", False)])
def test_processors_with_less(most: str, available: bool) -> None:
    """The same tests as on a processor without AMX; and one without any of it takes another way."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": most}
    if available:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not less", __file__]
    else:
        command = [sys.executable, "-c", "from mixkd_fast.ops import bf16_product as p; assert not p.is_available()"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not available or ("passed" in done.stdout and "skipped" not in done.stdout)
