"""kd_loss(inplace=True): the gradient takes the memory of the logits, and is the same gradient."""

from typing import Any

import pytest
import torch
from cases import SETTINGS, gradient_of, make_logits, setting_id
from conftest import interpreted_triton, require
from test_kd_loss_kernels import op_arguments
from torch import Tensor

from mixkd_fast.losses import TopK, kd_loss
from mixkd_fast.ops import backends
from mixkd_fast.ops.schema import IN_PLACE_OVERLOADS

# numpy's, where the interpreter computes with infinities.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


@pytest.fixture(params=["cpu", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels; Triton's in its interpreter."""
    name: str = request.param
    if name == "triton":
        interpreted_triton("kd_loss", monkeypatch)
        monkeypatch.setattr(backends, "_resolved", {})
    else:
        require(name)
    return name


def results(student: Tensor, teacher: Any, inplace: bool, backend: str, **options: Any) -> tuple[Tensor, Tensor, bool]:
    """(loss, gradient for grad_output -2.5, whether the logits' memory became the gradient)."""
    logits = student * 1.0
    before = logits.detach().clone()
    loss = kd_loss(logits, teacher, inplace=inplace, backend=backend, **options)
    overwritten = not torch.equal(logits.detach(), before)
    return loss.detach(), gradient_of(loss, student, torch.full_like(loss, -2.5)), overwritten


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("setting", SETTINGS, ids=setting_id)
def test_the_same_loss_and_gradient(backend: str, setting: dict[str, Any], dtype: torch.dtype) -> None:
    """Every width that has a loop of its own, equal and unequal vocabularies, hard labels at both temperatures."""
    widths = [(3, 3), (60, 57), (700, 704), (5000, 5000)]
    temperatures = (1.0, 2.0)
    if backend == "triton":
        # The interpreter takes seconds for a row that is split over programs.
        split = dtype == torch.float32 and setting["divergence"] in ("forward_kl", "jsd", "mse")
        widths = [(3, 3), (60, 57)] + [(4200, 4200)] * split
        temperatures = (2.0,)
    for classes, teacher_classes in widths:
        for temperature in temperatures:
            student, _ = make_logits((5, classes), 2.0, 0, dtype)
            _, teacher = make_logits((5, teacher_classes), 2.0, 1, dtype)
            options: dict[str, Any] = {
                "labels": torch.tensor([0, 2, -100, 1, 2]),
                "partner_labels": torch.tensor([2, 2, 0, 0, 1]),
                "lam": torch.tensor([0.0, 1.0, 0.3, 0.5, 0.8]),
                "row_weights": torch.tensor([1.0, 2.0, 1.0, 0.0, 0.5]),
            }
            options |= {"temperature": temperature, "ce_weight": 0.7, **setting}
            plain = results(student, teacher, False, backend, **options)
            reused = results(student, teacher, True, backend, **options)
            assert reused[2] and not plain[2]
            torch.testing.assert_close(reused[:2], plain[:2], rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-7)


@pytest.mark.parametrize("tail_mass", [True, False])
def test_a_top_k_teacher(backend: str, tail_mass: bool) -> None:
    """On the CPU in place, elsewhere beside the logits; right in both."""
    student, teacher = make_logits((5, 300), 2.0, 0, torch.float32)
    top = TopK.from_logits(teacher, 7, tail_mass=tail_mass)
    labels = torch.tensor([0, 2, -100, 1, 2])
    plain, reused = (results(student, top, flag, backend, labels=labels, ce_weight=0.5) for flag in (False, True))
    torch.testing.assert_close(reused[:2], plain[:2])


def test_leaves_and_strided_logits_are_not_overwritten(backend: str) -> None:
    student, teacher = make_logits((6, 50), 1.0, 0, torch.float32)
    before = student.detach().clone()
    kd_loss(student, teacher, inplace=True, backend=backend).backward()
    assert torch.equal(student.detach(), before)
    wide = (student * 1.0).repeat(1, 2)
    kept = wide.detach().clone()
    kd_loss(wide[:, ::2], teacher, inplace=True, backend=backend)
    assert torch.equal(wide.detach(), kept)
    for view in (student.view(-1, 50), student[1:], student.view(2, 3, 50)[1]):
        kd_loss(view, teacher[: len(view)], inplace=True, backend=backend).backward()
        assert torch.equal(student.detach(), before)


def test_a_retained_graph_stays_right(backend: str) -> None:
    student, teacher = make_logits((6, 5), 1.0, 0, torch.float32)
    expected = gradient_of(kd_loss(student, teacher, backend=backend), student)
    loss = kd_loss(student * 1.0, teacher, inplace=True, backend=backend)
    for factor in (1.0, -3.0, 1.0):
        torch.testing.assert_close(gradient_of(loss, student, torch.tensor(factor)), factor * expected)


def test_whoever_needs_the_logits_is_told(backend: str) -> None:
    """tanh saved its output, which is not there any more."""
    student, teacher = make_logits((6, 5), 1.0, 0, torch.float32)
    loss = kd_loss(torch.tanh(student), teacher, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_opcheck() -> None:
    require("cpu")
    *arguments, _, raise_invalid = op_arguments()
    arguments[0] = arguments[0].detach()
    torch.library.opcheck(IN_PLACE_OVERLOADS["kd_loss"], (*arguments, raise_invalid))


def test_a_direct_call_with_gaps_is_refused() -> None:
    require("cpu")
    *arguments, _, raise_invalid = op_arguments()
    arguments[0] = arguments[0].detach().repeat(1, 2)[:, :5]
    with pytest.raises(RuntimeError, match="student_logits must be contiguous to be overwritten"):
        IN_PLACE_OVERLOADS["kd_loss"](*arguments, raise_invalid)
