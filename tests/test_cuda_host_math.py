"""The row arithmetic of the CUDA kernels, run on the CPU: slices, alignment, tails, merged sums, head of adaptive_kl.

The CUDA sources are compiled by the host's C++ compiler; what needs a GPU is in test_cuda_kd_loss.py.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from cases import SETTINGS, relative_error, setting_id
from torch import Tensor

from mixkd_fast.losses import kd_loss
from mixkd_fast.ops import DivergenceName

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("g++") or shutil.which("c++")
DIVERGENCES = list(get_args(DivergenceName))
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# 16-bit outputs are rounded once, by at most half a unit in the last place.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
GUARD = 7.0

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler to build the host side of the CUDA sources")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """tests/cuda_host_math.cpp as a shared library."""
    built = tmp_path_factory.mktemp("cuda_host_math") / "row.so"
    command = [str(COMPILER), "-std=c++17", "-O1", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    subprocess.run(
        [*command, "-I", str(ROOT / "csrc"), str(ROOT / "tests" / "cuda_host_math.cpp"), "-o", str(built)], check=True
    )
    return ctypes.CDLL(str(built))


def at_offset(values: Tensor, offset: int) -> Tensor:
    """A copy of a row that starts `offset` elements after a 16-byte boundary, with other values around it."""
    whole = torch.full((values.numel() + 32,), GUARD, dtype=values.dtype)
    start = (-whole.data_ptr() % 16) // whole.element_size() + 8 + offset
    row = whole[start : start + values.numel()]
    row.copy_(values)
    return row


def play(
    library: ctypes.CDLL,
    student: Tensor,
    teacher: Tensor,
    setting: dict[str, Any],
    *,
    temperature: float = 1.0,
    offset: int = 0,
    size: int = 1,
    threads: int = 3,
    is_edge: bool = False,
    labels: tuple[int, int, float] | None = None,
) -> tuple[float, float, Tensor]:
    """(kd, ce, gradient) of one row [C]; what lies around the gradient is checked to be untouched.

    is_edge: the row is played as the first or last of its tensor, whose neighbours' bytes must not be read.
    """
    s, t = at_offset(student, offset), at_offset(teacher, offset)
    gradient = at_offset(torch.full_like(student, float("nan")), offset)
    names = ("beta", "alpha", "ab_alpha", "ab_beta", "detach_mixture")
    defaults = {"beta": 0.5, "alpha": 0.1, "ab_alpha": 0.2, "ab_beta": 0.7, "detach_mixture": False}
    options = (ctypes.c_float * 5)(*(float(setting.get(name, defaults[name])) for name in names))
    losses = (ctypes.c_float * 2)(float("nan"), float("nan"))
    first = second = lam = None
    if labels is not None:
        first, second = (ctypes.c_int64 * 1)(labels[0]), (ctypes.c_int64 * 1)(labels[1])
        lam = (ctypes.c_float * 1)(labels[2])
    library.kd_row(
        ctypes.c_void_p(s.data_ptr()),
        ctypes.c_void_p(t.data_ptr()),
        ctypes.c_void_p(gradient.data_ptr()),
        DTYPES[student.dtype],
        student.numel(),
        DIVERGENCES.index(setting["divergence"]),
        ctypes.c_float(temperature),
        options,
        first,
        second,
        lam,
        ctypes.c_float(0.0 if labels is None else 0.7),
        size,
        threads,
        int(is_edge),
        losses,
    )
    start = gradient.storage_offset()
    around = (
        torch.as_strided(gradient, (start,), (1,), 0),
        torch.as_strided(gradient, (32 - start,), (1,), start + student.numel()),
    )
    assert all(bool((part == GUARD).all()) for part in around)
    return losses[0], losses[1], gradient


def expected(
    student: Tensor,
    teacher: Tensor,
    setting: dict[str, Any],
    temperature: float,
    labels: tuple[int, int, float] | None,
    dtype: torch.dtype = torch.float64,
) -> tuple[float, float, Tensor]:
    """The same by the reference in `dtype`."""
    s = student.to(dtype)[None].requires_grad_()
    pair = {} if labels is None else {"labels": torch.tensor([labels[0]]), "partner_labels": torch.tensor([labels[1]])}
    parts = kd_loss(
        s,
        teacher.to(dtype)[None],
        **pair,
        lam=None if labels is None else labels[2],
        temperature=temperature,
        ce_weight=0.0 if labels is None else 0.7,
        return_parts=True,
        backend="reference",
        **setting,
    )
    (gradient,) = torch.autograd.grad(parts.loss, s)
    return float(parts.kd), float(parts.ce), gradient[0]


def check(library: ctypes.CDLL, student: Tensor, teacher: Tensor, setting: dict[str, Any], **how: Any) -> None:
    kd, ce, gradient = play(library, student, teacher, setting, **how)
    inputs = (student, teacher, setting, how.get("temperature", 1.0), how.get("labels"))
    true_kd, true_ce, true_gradient = expected(*inputs)
    assert kd == pytest.approx(true_kd, rel=2e-5, abs=1e-6)
    assert ce == pytest.approx(true_ce, rel=2e-5, abs=1e-6)
    if float(true_gradient.norm()) > 1e-6:
        # Where the gradient itself cancels, fp32 has its own error: twice that of eager PyTorch may be made.
        eager = relative_error(expected(*inputs, torch.float32)[2], true_gradient)
        assert relative_error(gradient, true_gradient) < TOLERANCE[student.dtype] + 2 * eager
    else:
        assert float(gradient.double().norm()) < 1e-5


@pytest.mark.parametrize("setting", SETTINGS, ids=setting_id)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_a_row_in_slices(library: ctypes.CDLL, setting: dict[str, Any], temperature: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for num_classes, offset, size, threads in [
        (1, 0, 1, 1),
        (3, 2, 1, 2),
        (17, 1, 2, 3),
        (257, 3, 8, 2),
        (1000, 0, 4, 5),
    ]:
        student, teacher = ((3 * torch.randn(num_classes, generator=generator)).to(dtype) for _ in range(2))
        labels = (0, num_classes - 1, 0.3)
        how = {"temperature": temperature, "offset": offset, "size": size, "threads": threads}
        check(library, student, teacher, setting, **how, labels=labels)


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_every_offset_and_cluster(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for num_classes in (1, 2, 7, 8, 9, 15, 16, 31, 64, 65):
        for offset in range(16 // dtype.itemsize):
            for size in (1, 2, 8):
                student, teacher = (torch.randn(num_classes, generator=generator).to(dtype) for _ in range(2))
                for is_edge in (False, True):
                    how = {"offset": offset, "size": size, "is_edge": is_edge}
                    check(library, student, teacher, {"divergence": "forward_kl"}, **how)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tvd"])
@pytest.mark.parametrize("scale, shift", [(30.0, 0.0), (1.0, 1000.0), (1.0, -5000.0), (0.0, 3.0)])
def test_far_apart_and_far_off(library: ctypes.CDLL, divergence: str, scale: float, shift: float) -> None:
    generator = torch.Generator().manual_seed(2)
    student, teacher = (scale * torch.randn(300, generator=generator) + shift for _ in range(2))
    check(library, student, teacher, {"divergence": divergence}, offset=1, size=4)


@pytest.mark.parametrize("setting", SETTINGS, ids=setting_id)
def test_classes_masked_on_both_sides(library: ctypes.CDLL, setting: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(100, generator=generator) for _ in range(2))
    student[:40] = teacher[:40] = -torch.inf
    student[97] = teacher[97] = -torch.inf
    check(library, student, teacher, setting, temperature=2.0, size=8)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_poison_reaches_the_loss(library: ctypes.CDLL, divergence: str, poison: float, side: str) -> None:
    rows = {"student": torch.linspace(-1, 1, 70), "teacher": torch.linspace(1, -2, 70)}
    rows[side][33] = poison
    kd, _, gradient = play(library, rows["student"], rows["teacher"], {"divergence": divergence}, size=4)
    assert kd != kd or divergence == "mse"
    assert not bool(gradient.isfinite().all())


def test_head_of_adaptive_kl(library: ctypes.CDLL) -> None:
    """Ties at the end of the head go to the lower class; one likely class is the head alone."""
    generator = torch.Generator().manual_seed(4)
    teachers = [
        torch.zeros(4),
        torch.zeros(301),
        torch.tensor([0.0, 1.0, 1.0, 1.0, 0.5, 1.0, 0.0, 1.0, 1.0]),
        torch.tensor([5.0, 0.0, 0.0, 0.0, 0.0]),
        torch.tensor([0.0, 0.02, 0.0]).log(),
        torch.cat([torch.full((9,), 2.0), torch.zeros(40), torch.full((9,), 2.0)]),
    ]
    for teacher in teachers:
        student = torch.randn(teacher.numel(), generator=generator)
        student[teacher == -torch.inf] = -torch.inf
        check(library, student, teacher, {"divergence": "adaptive_kl"}, size=2)
