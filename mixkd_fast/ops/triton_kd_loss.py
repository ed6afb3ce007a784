"""`mixkd_fast::kd_loss` by Triton: options to constants, the choice of kernel, launches, reductions.

Runs on any GPU that Triton knows, and on the CPU in Triton's interpreter (TRITON_INTERPRET=1). Nothing here waits for
the device. Legend of shape suffixes: N rows, C student classes, S classes that both sides have, K kept classes.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, get_args

import torch
import triton
from torch import Tensor

from mixkd_fast.ops import DivergenceName, RowOptions, TopK
from mixkd_fast.ops import triton_kd_narrow as narrow
from mixkd_fast.ops import triton_kd_top_k as top_k
from mixkd_fast.ops import triton_kd_wide as wide
from mixkd_fast.ops import triton_math as codes
from mixkd_fast.ops.fused import divisor_of

NAMES: tuple[DivergenceName, ...] = get_args(DivergenceName)
NARROW_CLASSES = 512
"""Rows up to this width are held in registers, several per program."""
TILE = 4096
"""Classes per program of a wide row: 16 KiB of fp32 per side over 8 warps, 64 registers a thread."""
PIPELINE_BYTES = 16 * 2**20
"""Logits between two readings of the same row: a part of the L2 cache of any GPU since A100 (40 MB)."""
LARGEST_GRID = 2**31 - 1
LARGEST_TOP = 2047
"""Kept classes of a TopK teacher: they lie in registers, and each tile of the row is compared with all of them."""


class Constants(NamedTuple):
    """What the kernels are told of a call's options."""

    divergence: int
    detach_mixture: bool
    ab_limits: int
    cross_entropy: int
    inverse_temperature: float
    kd_factor: float
    kd_grad_factor: float
    ce_weight: float
    beta: float
    log_weight_p: float
    log_weight_q: float
    ab_alpha: float
    ab_beta: float


def effective_divergence(name: DivergenceName, beta: float, alpha: float) -> int:
    """The limits of two-sided formulas at their ends are other divergences."""
    if name == "jsd" and beta in (0, 1):
        return int(codes.REVERSE_KL if beta else codes.FORWARD_KL)
    if name == "skew_forward_kl" and alpha == 0:
        return int(codes.FORWARD_KL)
    if name == "skew_reverse_kl" and alpha == 0:
        return int(codes.REVERSE_KL)
    return NAMES.index(name)


def constants_of(options: RowOptions, has_teacher: bool, has_labels: bool, same_width: bool) -> Constants:
    """The numbers of a call, with logarithms and powers of the options taken once."""
    tau, a, b = options.temperature, options.ab_alpha, options.ab_beta
    none = int(codes.NO_DIVERGENCE)
    divergence = effective_divergence(options.divergence, options.beta, options.alpha) if has_teacher else none
    is_mse = divergence == int(codes.MSE)
    log_weights = {
        "jsd": (options.beta, 1 - options.beta),
        "skew_forward_kl": (options.alpha, 1 - options.alpha),
        "skew_reverse_kl": (1 - options.alpha, options.alpha),
    }.get(options.divergence, (1.0, 1.0))
    # Of an end that is another divergence, no mixture is taken.
    log_p, log_q = (math.log(weight) if weight > 0 else 0.0 for weight in log_weights)
    cross_entropy = codes.NO_CROSS_ENTROPY
    if has_labels and options.ce_weight != 0:
        shares = tau == 1 and same_width and divergence != none and not is_mse
        cross_entropy = codes.SHARED_SOFTMAX if shares else codes.OWN_SOFTMAX
    limits = (a == 0) * codes.A_IS_ZERO | (b == 0) * codes.B_IS_ZERO | (a + b == 0) * codes.SUM_IS_ZERO
    limits |= (abs(a) < abs(b)) * codes.EXCHANGED
    return Constants(
        divergence,
        options.detach_mixture,
        limits if options.divergence == "alpha_beta" else 0,
        int(cross_entropy),
        1.0 / tau,
        options.kd_weight * (1.0 if is_mse else tau * tau),
        options.kd_weight * (1.0 if is_mse else tau),
        options.ce_weight,
        options.beta,
        log_p,
        log_q,
        a,
        b,
    )


def kd_loss(student_logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, kd, ce, grad_logits), see `mixkd_fast.ops.schema`; a class number out of range makes its row NaN."""
    *options, need_grad, _ = arguments
    shape = student_logits.shape if need_grad else (0,)
    gradient = student_logits.new_empty(shape)
    return *_loss_and_gradient(gradient if need_grad else None, student_logits, *options), gradient


def kd_loss_(student_logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, kd, ce); the gradient overwrites the logits."""
    teacher_indices, kd_weight = arguments[1], arguments[14]
    if not student_logits.is_contiguous():
        raise ValueError("student_logits must be contiguous to be overwritten")
    if teacher_indices is not None and kd_weight != 0:
        # A row is read class by class while its gradient is being written.
        raise ValueError("with teacher_indices student_logits cannot be overwritten")
    return _loss_and_gradient(student_logits, student_logits, *arguments[:-1])


def _loss_and_gradient(
    gradient: Tensor | None,
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    teacher_indices: Tensor | None,
    labels: Tensor | None,
    partner_labels: Tensor | None,
    lam: Tensor | None,
    row_weights: Tensor | None,
    normalizer: Tensor | None,
    divergence: int,
    temperature: float,
    beta: float,
    alpha: float,
    ab_alpha: float,
    ab_beta: float,
    detach_mixture: bool,
    kd_weight: float,
    ce_weight: float,
    tail_mass: bool,
    ignore_index: int,
    reduction: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, kd, ce); fills `gradient`, which may be student_logits itself."""
    options = RowOptions(
        temperature=temperature,
        divergence=NAMES[divergence],
        beta=beta,
        alpha=alpha,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        ab_alpha=ab_alpha,
        ab_beta=ab_beta,
        detach_mixture=detach_mixture,
    )
    if kd_weight == 0:
        teacher_logits = teacher_indices = None
    divisor = None
    if reduction == 0:
        divisor = divisor_of(student_logits, labels, partner_labels, row_weights, normalizer, ignore_index)
    label_logits = None
    if gradient is student_logits and labels is not None and ce_weight != 0:
        label_logits = _label_logits(student_logits, labels, partner_labels)
    rows = RowTensors(
        student_logits,
        teacher_logits,
        labels,
        partner_labels,
        lam,
        row_weights,
        divisor,
        ignore_index,
        label_logits,
    )
    if teacher_indices is not None and teacher_logits is not None:
        kd, ce = _top_k(rows, TopK(teacher_indices, teacher_logits, tail_mass), options, gradient)
    elif student_logits.shape[0] == 0:
        kd = ce = student_logits.new_zeros(0, dtype=torch.float32)
    elif student_logits.shape[1] <= NARROW_CLASSES:
        kd, ce = _narrow(rows, options, gradient, reduction == 2)
    else:
        kd, ce = _wide(rows, options, gradient)
    if reduction != 2:
        kd, ce = kd.sum(), ce.sum()
    return kd + ce, kd, ce


def _label_logits(student_logits: Tensor, labels: Tensor, partner_labels: Tensor | None) -> Tensor:
    """Logits at both labels [2, N] in fp32; those of a label out of range are of no matter."""
    both = torch.stack([labels, labels if partner_labels is None else partner_labels], dim=1)
    return student_logits.gather(1, both.clamp(0, student_logits.shape[1] - 1)).T.float().contiguous()


class RowTensors(NamedTuple):
    """The tensors of a call, as the op got them; divisor: one element that multiplies nothing if None.

    label_logits: the student's logits at both labels [2, N], where the gradient overwrites them; else None.
    """

    student_logits: Tensor
    teacher_logits: Tensor | None
    labels: Tensor | None
    partner_labels: Tensor | None
    lam: Tensor | None
    row_weights: Tensor | None
    divisor: Tensor | None
    ignore_index: int
    label_logits: Tensor | None = None

    def num_shared(self) -> int:
        """Classes that student and teacher both have."""
        width = self.student_logits.shape[1]
        return width if self.teacher_logits is None else min(width, self.teacher_logits.shape[1])

    def constants(self, options: RowOptions) -> Constants:
        """The numbers of this call."""
        has_labels, same_width = self.labels is not None, self.num_shared() == self.student_logits.shape[1]
        return constants_of(options, self.teacher_logits is not None, has_labels, same_width)


def _narrow(rows: RowTensors, options: RowOptions, gradient: Tensor | None, by_row: bool) -> tuple[Tensor, Tensor]:
    """(kd, ce): by row, or one sum per program."""
    student, teacher = rows.student_logits, rows.teacher_logits
    constants = rows.constants(options)
    num_rows, num_classes = student.shape
    classes = max(2, triton.next_power_of_2(num_classes))
    # About 2048 numbers a program: 4 warps, 16 numbers a thread and side.
    rows_at_once = max(1, min(triton.next_power_of_2(num_rows), 2048 // classes))
    programs = triton.cdiv(num_rows, rows_at_once)
    size = num_rows if by_row else programs
    kd, ce, loss = (student.new_empty(size, dtype=torch.float32) for _ in range(3))
    with _device(student):
        narrow.kd_loss_narrow_kernel[(programs,)](
            student,
            student if teacher is None else teacher,
            rows.labels,
            rows.partner_labels,
            rows.lam,
            rows.row_weights,
            rows.divisor,
            rows.label_logits,
            student if gradient is None else gradient,
            loss,
            kd,
            ce,
            num_rows,
            num_classes,
            rows.num_shared(),
            student.stride(0),
            0 if teacher is None else teacher.stride(0),
            rows.ignore_index,
            *constants[4:],
            DIVERGENCE=constants.divergence,
            DETACH_MIXTURE=constants.detach_mixture,
            AB_LIMITS=constants.ab_limits,
            CROSS_ENTROPY=constants.cross_entropy,
            OUTPUT=int(narrow.ROWS_THEMSELVES if by_row else narrow.PARTIAL_SUMS),
            DIVISOR=int(narrow.NO_DIVISOR if rows.divisor is None else narrow.GIVEN_DIVISOR),
            NEED_GRAD=gradient is not None,
            ROWS=rows_at_once,
            CLASSES=classes,
        )
    return kd, ce


def _wide(rows: RowTensors, options: RowOptions, gradient: Tensor | None) -> tuple[Tensor, Tensor]:
    """(kd, ce) by row."""
    student, teacher = rows.student_logits, rows.teacher_logits
    constants = rows.constants(options)
    num_rows, num_classes = student.shape
    num_splits = triton.cdiv(num_classes, TILE)
    bytes_per_item = TILE * (student.element_size() + (0 if teacher is None else teacher.element_size()))
    # At least a row: its last program must have started when the first one asks for its statistics.
    lag = max(num_splits, PIPELINE_BYTES // bytes_per_item // 4)
    has_middle = constants.divergence not in (codes.NO_DIVERGENCE, codes.MSE, codes.FORWARD_KL)
    programs = num_rows * num_splits + lag * (2 if has_middle else 1)
    if programs > LARGEST_GRID:
        raise ValueError(f"student_logits has {programs} tiles of {TILE} classes; allowed: up to {LARGEST_GRID}")
    progress = torch.zeros(1 + 2 * num_rows, dtype=torch.int32, device=student.device)
    statistics = student.new_empty((wide.NUM_STATISTICS, num_rows, num_splits), dtype=torch.float32)
    kd = student.new_empty((num_rows, num_splits), dtype=torch.float32)
    ce = student.new_empty(num_rows, dtype=torch.float32)
    shares = None
    strides = student.stride(0), 0 if teacher is None else teacher.stride(0)
    with _device(student):
        if constants.divergence == codes.ADAPTIVE_KL:
            shares = student.new_empty((2, num_rows), dtype=torch.float32)
            wide.adaptive_shares_kernel[(num_rows,)](
                student,
                teacher,
                rows.labels,
                rows.partner_labels,
                rows.row_weights,
                shares,
                num_rows,
                num_classes,
                rows.num_shared(),
                *strides,
                rows.ignore_index,
                constants.inverse_temperature,
                TILE=TILE,
                num_warps=8,
            )
        wide.kd_loss_wide_kernel[(programs,)](
            student,
            student if teacher is None else teacher,
            rows.labels,
            rows.partner_labels,
            rows.lam,
            rows.row_weights,
            rows.divisor,
            rows.label_logits,
            shares,
            progress,
            statistics,
            student if gradient is None else gradient,
            kd,
            ce,
            num_rows,
            num_splits,
            lag,
            num_classes,
            rows.num_shared(),
            *strides,
            rows.ignore_index,
            *constants[4:],
            DIVERGENCE=constants.divergence,
            DETACH_MIXTURE=constants.detach_mixture,
            AB_LIMITS=constants.ab_limits,
            CROSS_ENTROPY=constants.cross_entropy,
            NEED_GRAD=gradient is not None,
            TILE=TILE,
            SPLITS=triton.next_power_of_2(num_splits),
            num_warps=8,
        )
    return kd.sum(-1), ce


def _top_k(rows: RowTensors, teacher: TopK, options: RowOptions, gradient: Tensor | None) -> tuple[Tensor, Tensor]:
    """(kd, ce) by row of a teacher of K classes."""
    student = rows.student_logits
    num_rows, num_classes = student.shape
    num_top = teacher.indices.shape[1]
    has_tail = teacher.tail_mass and num_top < num_classes
    constants = rows._replace(teacher_logits=student).constants(options)
    own_softmax = constants.cross_entropy != codes.NO_CROSS_ENTROPY
    if num_top > LARGEST_TOP:
        raise ValueError(f"teacher has {num_top} classes per row; allowed: up to {LARGEST_TOP} with backend 'triton'")
    lanes = triton.next_power_of_2(num_top + 1)
    kd, ce = (student.new_empty(num_rows, dtype=torch.float32) for _ in range(2))
    if num_rows == 0:
        return kd, ce
    with _device(student):
        top_k.kd_loss_top_k_kernel[(num_rows,)](
            student,
            teacher.logprobs,
            teacher.indices,
            rows.labels,
            rows.partner_labels,
            rows.lam,
            rows.row_weights,
            rows.divisor,
            student if gradient is None else gradient,
            kd,
            ce,
            num_rows,
            num_classes,
            num_top,
            student.stride(0),
            rows.ignore_index,
            *constants[4:],
            DIVERGENCE=constants.divergence,
            DETACH_MIXTURE=constants.detach_mixture,
            AB_LIMITS=constants.ab_limits,
            CROSS_ENTROPY=int(codes.OWN_SOFTMAX if own_softmax else codes.NO_CROSS_ENTROPY),
            HAS_TAIL=has_tail,
            NEED_GRAD=gradient is not None,
            # A tile is compared with every lane: 16,384 comparisons in registers, 65,536 at most.
            TILE=max(32, min(2048, 16384 // lanes)),
            LANES=lanes,
            num_warps=4 if lanes <= 512 else 8,
        )
    return kd, ce


def _device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
