"""kd_loss's CUDA kernels on a GPU: every path, divergence and dtype against fp64, and what only a GPU shows.

Paths: narrow (to 1,024 classes), wide (one block per row), split (a row over blocks, from about 33,000 classes of
16 bits on), clusters (sm_90 and later, 4,096 classes and more), top-k. Needs one GPU; run on sm_80 and on sm_90.
"""

from typing import Any

import pytest
import torch
from cases import SETTINGS, gradient_of, relative_error, setting_id
from torch import Tensor

from mixkd_fast.losses import kd_loss
from mixkd_fast.ops import TopK, backends


def reason_to_skip() -> str | None:
    """Why the kernels cannot run here."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    rows = {row.backend: row for row in backends.available("kd_loss")}
    if "cuda" not in rows:
        return "no backend 'cuda' of kd_loss"
    return None if rows["cuda"].available else rows["cuda"].reason


pytestmark = pytest.mark.skipif(reason_to_skip() is not None, reason=str(reason_to_skip()))

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 6e-4}
# Narrow with 1, 8 and 32 lanes; wide; clusters of 1, 4 and 8 blocks, aligned or not; split.
SHAPES = [
    (1, 1),
    (5, 2),
    (70, 3),
    (33, 4),
    (9, 17),
    (40, 33),
    (5, 257),
    (6, 1000),
    (7, 1024),
    (7, 1025),
    (5, 4095),
    (70, 4096),
    (3, 30522),
    (40, 32000),
    (3, 50257),
    (37, 128256),
    (2, 131073),
    (3, 400001),
]


def make(shape: tuple[int, ...], scale: float, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, device="cuda")).to(dtype)


def poison() -> None:
    """Leaves NaN in the memory that the next call is likely to be given."""
    for size in (1 << 12, 1 << 20, 1 << 26):
        torch.full((size,), float("nan"), device="cuda")


def run(student: Tensor, teacher: Any, *, backend: str, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, kd, ce, gradient) with a grad_output that is not 1."""
    # The same memory: a copy would start at a 16-byte boundary.
    student = student.detach().requires_grad_()
    poison()
    parts = kd_loss(student, teacher, return_parts=True, backend=backend, **options)
    grad_output = torch.full_like(parts.loss, 0.5)
    return parts.loss.detach(), parts.kd, parts.ce, gradient_of(parts.loss, student, grad_output)


def widen(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors in `dtype`."""
    if isinstance(value, TopK):
        return value._replace(logprobs=value.logprobs.to(dtype))
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def check(student: Tensor, teacher: Any, **options: Any) -> None:
    actual = run(student, teacher, backend="cuda", **options)
    truths = {}
    for dtype in (torch.float64, torch.float32):
        wide = {name: widen(value, dtype) for name, value in options.items()}
        truths[dtype] = run(widen(student, dtype), widen(teacher, dtype), backend="reference", **wide)
    for name, mine, true, eager in zip(
        ("loss", "kd", "ce", "gradient"), actual, truths[torch.float64], truths[torch.float32], strict=True
    ):
        finite = true.isfinite()
        if name != "gradient":
            assert torch.equal(mine.double().nan_to_num(posinf=1e300)[~finite], true.nan_to_num(posinf=1e300)[~finite])
        allowed = TOLERANCE[student.dtype] if name == "gradient" else 2e-5
        if float(true[finite].norm()) > 1e-6:
            error = relative_error(mine[finite], true[finite])
            # A small gradient is also rounded to the coarse denormals of fp16.
            stored = true.to(mine.dtype) if name == "gradient" else true
            allowed += 2 * relative_error(eager[finite], true[finite]) + relative_error(stored[finite], true[finite])
            assert error <= allowed, (name, error)
        else:
            assert float(mine[finite].double().norm()) < 1e-5, name


def labels_of(student: Tensor, seed: int) -> dict[str, Tensor]:
    rows, classes = student.shape
    generator = torch.Generator(device="cuda").manual_seed(seed)
    first, second = (torch.randint(classes, (rows,), generator=generator, device="cuda") for _ in range(2))
    lam = torch.rand(rows, generator=generator, device="cuda")
    lam[0] = 1.0
    weights = 0.5 + torch.rand(rows, generator=generator, device="cuda")
    if rows > 2:
        first[1], weights[2] = -100, 0.0
    return {"labels": first, "partner_labels": second, "lam": lam, "row_weights": weights}


@pytest.mark.parametrize("setting", SETTINGS, ids=setting_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_path(shape: tuple[int, int], dtype: torch.dtype, setting: dict[str, Any]) -> None:
    student, teacher = make(shape, 2.0, 0, dtype), make(shape, 2.0, 1, dtype)
    check(student, teacher, temperature=2.0, kd_weight=0.7, **setting)
    check(student, teacher, ce_weight=0.5, **labels_of(student, 2), **setting)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(70, 3), (9, 300), (20, 5000), (20, 40001), (20000, 3), (3000, 200)], ids=str)
def test_reductions_dropped_rows_and_normalizer(shape: tuple[int, int], reduction: str) -> None:
    student, teacher = make(shape, 1.0, 3, torch.float32), make(shape, 1.0, 4, torch.float32)
    options = labels_of(student, 5)
    student[1] = float("nan")
    check(student, teacher, ce_weight=1.0, reduction=reduction, **options)
    check(student, teacher, ce_weight=0.0, reduction=reduction, **options)
    if reduction == "mean":
        check(student, teacher, ce_weight=1.0, normalizer=torch.tensor(37.0, device="cuda"), **options)
    everything = torch.full_like(options["labels"], -100)
    loss, kd, ce, gradient = run(student, teacher, backend="cuda", labels=everything, reduction=reduction)
    assert not loss.any() and not kd.any() and not ce.any() and not gradient.any()


@pytest.mark.parametrize("kept", [[0], [39], [0, 39], list(range(0, 40, 3))], ids=str)
@pytest.mark.parametrize("classes", [8192, 128256, 50257])
def test_dropped_rows_in_the_pipeline(classes: int, kept: list[int]) -> None:
    """Few rows of many are loaded, far more rows than clusters."""
    rows = 400
    student, teacher = (make((rows, classes), 1.0, seed, torch.bfloat16) for seed in (6, 7))
    weights = torch.zeros(rows, device="cuda")
    for block in range(0, rows, 40):
        weights[[block + row for row in kept]] = 1.5
    check(student, teacher, row_weights=weights)


@pytest.mark.parametrize(
    "classes, teacher_classes", [(3, 5), (300, 200), (5000, 5008), (151936, 152064), (40000, 33001)]
)
def test_unequal_widths_mixed_dtypes_and_strides(classes: int, teacher_classes: int) -> None:
    for student_dtype, teacher_dtype in [
        (torch.bfloat16,) * 2,
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float32),
    ]:
        student = make((6, classes + 5), 2.0, 8, student_dtype)[:, 2 : 2 + classes]
        teacher = make((6, teacher_classes + 3), 2.0, 9, teacher_dtype)[:, 1 : 1 + teacher_classes]
        for setting in ({"divergence": "forward_kl"}, {"divergence": "jsd"}, {"divergence": "mse"}):
            check(student, teacher, temperature=2.0, ce_weight=0.5, **labels_of(student, 10), **setting)


@pytest.mark.parametrize("shift", [0, 1, 3, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_start_anywhere(shift: int, dtype: torch.dtype) -> None:
    classes = 32001
    pair = [
        make((5 * classes + 8,), 2.0, seed, dtype)[shift : shift + 5 * classes].view(5, classes) for seed in (11, 12)
    ]
    check(*pair, temperature=2.0)
    check(*pair, divergence="jsd", ce_weight=0.5, **labels_of(pair[0], 13))


@pytest.mark.parametrize("shift", [0, 1, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_first_and_last_row_next_to_poison(shift: int, dtype: torch.dtype) -> None:
    """What lies before the first row and after the last is not the tensor's; all rows may also be one."""
    for classes, rows in [(4099, 1), (4099, 2), (32003, 5), (128257, 3)]:
        pair = []
        for seed in (31, 32):
            memory = torch.full((rows * classes + 64,), float("nan"), dtype=dtype, device="cuda")
            pair.append(memory[16 + shift : 16 + shift + rows * classes].view(rows, classes))
            pair[-1].copy_(make((rows, classes), 2.0, seed, dtype))
        check(*pair, temperature=2.0)
        check(*pair, divergence="jsd")
        check(pair[0][:1].expand(rows, classes), pair[1][:1].expand(rows, classes))


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s["divergence"] != "mse"], ids=setting_id)
@pytest.mark.parametrize("tail_mass", [True, False])
def test_top_k(setting: dict[str, Any], tail_mass: bool) -> None:
    for classes, k in [(5, 2), (5, 5), (300, 20), (40001, 64)]:
        student, teacher = make((6, classes), 2.0, 14, torch.bfloat16), make((6, classes), 2.0, 15, torch.float32)
        top = TopK.from_logits(teacher, k, temperature=2.0)._replace(tail_mass=tail_mass)
        check(student, top, temperature=2.0, ce_weight=0.5, **labels_of(student, 16), **setting)


@pytest.mark.parametrize("classes", [5, 700, 3000, 40001, 128256])
def test_hard_numbers(classes: int) -> None:
    for setting in SETTINGS:
        student, teacher = make((8, classes), 30.0, 17, torch.float32), make((8, classes), 30.0, 18, torch.float32)
        student[0] = teacher[0]
        student[1] += 5000.0
        teacher[2] = -torch.inf
        teacher[2, classes // 2] = 1.0
        student[3, ::2] = teacher[3, ::2] = -torch.inf
        student[4, 0] = float("nan")
        teacher[5, classes - 1] = float("nan")
        student[6] = teacher[6] = 0.0
        if setting["divergence"] in ("reverse_kl", "skew_reverse_kl", "jsd", "tvd", "forward_kl"):
            teacher[2, classes // 2] = 40.0
        else:
            teacher[2] = student[2]
        loss, _, _, gradient = run(student, teacher, backend="cuda", reduction="none", **setting)
        assert loss[[4, 5]].isnan().all()
        assert gradient[[0, 1, 3, 6, 7]].isfinite().all(), setting
        kept = torch.tensor([0, 1, 3, 6, 7], device="cuda")
        check(student[kept], teacher[kept], reduction="none", **setting)


def test_invalid_labels_poison_their_row_only() -> None:
    for classes in (3, 300, 5000, 128256):
        student, teacher = make((4, classes), 1.0, 19, torch.float32), make((4, classes), 1.0, 20, torch.float32)
        labels = torch.tensor([0, classes, -7, 1], device="cuda")
        loss, _, _, gradient = run(student, teacher, backend="cuda", labels=labels, ce_weight=1.0, reduction="none")
        assert loss.isnan().tolist() == [False, True, True, False]
        assert gradient.isnan().all(-1).tolist() == [False, True, True, False]
        assert gradient[[0, 3]].isfinite().all()


def test_no_rows_and_no_gradient() -> None:
    for classes in (3, 5000):
        empty = torch.empty((0, classes), device="cuda")
        assert float(kd_loss(empty, empty, reduction="mean", backend="cuda")) == 0.0
        assert float(kd_loss(empty, empty, reduction="sum", backend="cuda")) == 0.0
        assert kd_loss(empty, empty, reduction="none", backend="cuda").shape == (0,)
    for classes in (3, 5000, 50257, 128256):
        student, teacher = make((9, classes), 1.0, 21, torch.bfloat16), make((9, classes), 1.0, 22, torch.bfloat16)
        for setting in SETTINGS:
            loss = kd_loss(student, teacher, backend="cuda", **setting)
            again = run(student, teacher, backend="cuda", **setting)[0]
            assert relative_error(loss, again) < 1e-6


def test_runs_agree_bit_by_bit() -> None:
    """A moving result would be a race."""
    for classes in (3, 1000, 5000, 32000, 50257, 128256, 300000):
        student, teacher = make((300, classes), 2.0, 23, torch.bfloat16), make((300, classes), 2.0, 24, torch.bfloat16)
        for setting in ({"divergence": "forward_kl"}, {"divergence": "jsd"}):
            first = run(student, teacher, backend="cuda", **setting)
            for _ in range(5):
                again = run(student, teacher, backend="cuda", **setting)
                assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), (classes, setting)


def test_more_than_2_to_the_31_logits() -> None:
    rows, classes = 70000, 32768
    if torch.cuda.mem_get_info()[0] < 20 * (1 << 30):
        pytest.skip("needs 20 GiB of free GPU memory")
    student, teacher = (torch.zeros((rows, classes), dtype=torch.bfloat16, device="cuda") for _ in range(2))
    student[-1], teacher[-1] = make((2, classes), 2.0, 25, torch.bfloat16)
    student.requires_grad_()
    loss = kd_loss(student, teacher, reduction="sum", backend="cuda")
    gradient = gradient_of(loss, student)
    tail = student[-1:].detach(), teacher[-1:]
    true = run(tail[0].double(), tail[1].double(), backend="reference", reduction="sum")
    assert relative_error(loss, true[0]) < 2e-3
    assert relative_error(gradient[-1:], 2 * true[3]) < 4e-3
    assert float(gradient[:-1].abs().max()) < 1e-6


@pytest.mark.parametrize("classes", [3, 5000, 40001, 128256])
def test_capture_in_a_graph_and_another_stream(classes: int) -> None:
    student, teacher = make((16, classes), 1.0, 26, torch.bfloat16), make((16, classes), 1.0, 27, torch.bfloat16)
    labels = torch.zeros(16, dtype=torch.long, device="cuda")
    student.requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        loss = kd_loss(student, teacher, labels, ce_weight=1.0, backend="cuda")
        return loss, torch.autograd.grad(loss, student)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        student.copy_(make((16, classes), 1.0, 28, torch.bfloat16))
    for _ in range(3):
        graph.replay()
    for mine, true in zip(captured, step(), strict=True):
        assert torch.equal(mine, true)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (300, 17), (5, 1000), (9, 5003), (3, 128256)], ids=str)
def test_scaling_a_saved_gradient(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gradient = make(shape, 1.0, 29, dtype)
    one = torch.ones((), device="cuda")
    by_row = torch.linspace(-2.0, 3.0, shape[0], device="cuda")
    by_row[0] = 1.0
    for factor in (one, 0.3 * one, 0.0 * one, by_row, one.expand(shape[0])):
        wide = factor if factor.dim() == 0 else factor[:, None]
        expected = (gradient.float() * wide).to(dtype)
        poison()
        assert torch.equal(torch.ops.mixkd_fast.scaled_gradient(gradient, factor), expected)
        in_place = gradient.clone()
        torch.ops.mixkd_fast.scale_gradient_(in_place, factor)
        assert torch.equal(in_place, expected)


@pytest.mark.parametrize("classes", [3, 5000, 128256])
def test_a_retained_graph_stays_right(classes: int) -> None:
    student, teacher = make((6, classes), 1.0, 30, torch.float32), make((6, classes), 1.0, 31, torch.float32)
    student.requires_grad_()
    loss = kd_loss(student, teacher, reduction="sum", backend="cuda")
    factors = [1.0, 3.0, 0.0, float("inf"), 0.5]
    held = [gradient_of(loss, student, torch.full_like(loss, factor)) for factor in factors]
    # The last one may reuse the saved gradient; those before stay what they were.
    held += torch.autograd.grad(loss, student, torch.full_like(loss, 2.0))
    for factor, mine in zip([*factors, 2.0], held, strict=True):
        assert torch.equal(mine.nan_to_num(), (held[0] * factor).nan_to_num()), factor
    student.grad = None
    loss = kd_loss(student, teacher, reduction="sum", backend="cuda")
    for number in range(1, 4):
        loss.backward(retain_graph=number < 3)
        assert relative_error(student.grad, number * held[0]) < 1e-6


def test_double_precision_is_refused_by_name() -> None:
    logits = torch.zeros((2, 3), dtype=torch.float64, device="cuda")
    with pytest.raises(RuntimeError, match="student_logits must be float32, bfloat16 or float16"):
        torch.ops.mixkd_fast.kd_loss(
            logits, logits, *[None] * 6, 0, 1.0, 0.5, 0.1, 0.2, 0.7, False, 1.0, 0.0, True, -100, 0, True, False
        )
