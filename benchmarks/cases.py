"""What is timed: shapes, options and inputs. Legend: N rows, C classes, B clean rows, L positions, H width, V words.

Of relations: O rows, h heads, d width of a head.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixkd_fast.ops import DivergenceName

BERT_WORDS = 30522
# Llama 3, Llama 2, Qwen 2.5, GPT-2 and a vocabulary whose rows cannot be aligned to 16 bytes.
CUDA_VOCABULARIES = (128256, 32000, 151936, 50257, 131073)
WIDE_DIVERGENCES: tuple[DivergenceName, ...] = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "alpha_beta")
NARROW_SHAPES = ((64, 3), (4096, 3), (256, 1000))


@dataclass(frozen=True)
class KDCase:
    """kd_loss and its gradient. `mixed`: the whole MixKD loss, KD + both hard-label terms; otherwise KD alone."""

    rows: int
    classes: int
    dtype: torch.dtype
    divergence: DivergenceName = "forward_kl"
    mixed: bool = False

    @property
    def temperature(self) -> float:
        """2 for classifiers; 1 for vocabularies, where not every peer scales by temperature squared."""
        return 2.0 if self.mixed else 1.0

    @property
    def name(self) -> str:
        what = "MixKD loss" if self.mixed else self.divergence
        return f"{what} {self.rows}x{self.classes} {dtype_name(self.dtype)}"

    @property
    def tensor_bytes(self) -> int:
        """Of one [N, C] tensor."""
        return self.rows * self.classes * self.dtype.itemsize


@dataclass(frozen=True)
class MixCase:
    """mix_embeddings of BERT's embeddings: words alone, or `full`: with position, token type and LayerNorm."""

    rows: int
    length: int
    width: int
    dtype: torch.dtype
    full: bool
    backward: bool

    @property
    def name(self) -> str:
        what = "words+positions+types+LayerNorm" if self.full else "words"
        span = "forward+backward" if self.backward else "forward"
        return f"{what} {self.rows}x{self.length}x{self.width} {dtype_name(self.dtype)} {span}"

    @property
    def output_bytes(self) -> int:
        """Of the output [B, L, H]."""
        return self.rows * self.length * self.width * self.dtype.itemsize


@dataclass(frozen=True)
class RelationCase:
    """relation_kl and its gradients: student and teacher of one width."""

    rows: int
    heads: int
    length: int
    width: int
    dtype: torch.dtype
    shortest: int | None = None
    """Tokens of the first row; the others have evenly more up to `length`, and are padded. None pads no row."""

    @property
    def name(self) -> str:
        tokens = "" if self.shortest is None else f", {self.shortest} to {self.length} tokens"
        return f"{self.rows}x{self.heads}x{self.length}x{self.width} {dtype_name(self.dtype)}{tokens}"

    @property
    def tensor_bytes(self) -> int:
        """Of one [O, h, L, d] tensor."""
        return self.rows * self.heads * self.length * self.width * self.dtype.itemsize


@dataclass(frozen=True)
class LinearCase:
    """linear_kd_loss and its gradients by hidden states and weight; student and teacher alike in width and classes."""

    rows: int
    classes: int
    width: int
    dtype: torch.dtype
    divergence: DivergenceName = "forward_kl"

    @property
    def name(self) -> str:
        return f"{self.divergence} {self.rows}x{self.classes}, H {self.width}, {dtype_name(self.dtype)}"

    @property
    def flop(self) -> int:
        """Of the products: the teacher's logits, the student's, and two for its gradients."""
        return 8 * self.rows * self.classes * self.width

    @property
    def least_bytes(self) -> int:
        """Both sides' hidden states and weights read, the student's gradients written."""
        return 3 * (self.rows + self.classes) * self.width * self.dtype.itemsize


def dtype_name(dtype: torch.dtype) -> str:
    """fp32, bf16, fp16 or fp64."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}[dtype]


def describe(case: KDCase | MixCase | RelationCase | LinearCase) -> dict[str, Any]:
    """The case as JSON."""
    return {"name": case.name, **asdict(case), "dtype": dtype_name(case.dtype)}


def kd_cases(device: torch.device, quick: bool) -> list[KDCase]:
    """Vocabularies with every divergence, then whole MixKD losses of classifiers."""
    wide: list[KDCase] = []
    if quick:
        wide = [KDCase(32, 2048, torch.float32), KDCase(32, 2048, torch.float32, "jsd")]
        return [*wide, KDCase(64, 3, torch.float32, mixed=True)]
    if device.type == "cuda":
        wide = [KDCase(8192, c, torch.bfloat16, name) for c in CUDA_VOCABULARIES for name in WIDE_DIVERGENCES]
        narrow_dtypes = (torch.float32, torch.bfloat16)
    else:
        shapes = ((512, 32000), (512, BERT_WORDS), (128, 131072))
        dtypes = (torch.float32, torch.bfloat16)
        wide = [KDCase(n, c, dtype, name) for n, c in shapes for dtype in dtypes for name in WIDE_DIVERGENCES]
        narrow_dtypes = (torch.float32,)
    return wide + [KDCase(n, c, dtype, mixed=True) for n, c in NARROW_SHAPES for dtype in narrow_dtypes]


def mix_cases(device: torch.device, quick: bool) -> list[MixCase]:
    """BERT-base and MiniLM shapes; on a GPU also a batch that is large enough to fill it."""
    shapes = [(32, 64, 768), (32, 128, 768), (32, 128, 384)]
    dtypes = [torch.float32]
    if quick:
        shapes = [(4, 16, 64)]
    elif device.type == "cuda":
        shapes += [(512, 128, 768)]
        dtypes += [torch.bfloat16]
    return [
        MixCase(rows, length, width, dtype, full, backward)
        for rows, length, width in shapes
        for dtype in dtypes
        for full in (False, True)
        for backward in (False, True)
    ]


def relation_cases(device: torch.device, quick: bool) -> list[RelationCase]:
    """MiniLM's heads at MNLI's and at the usual greatest length, also with padding; on a GPU also long rows."""
    if quick:
        return [RelationCase(2, 3, 20, 8, torch.float32)]
    shapes: list[tuple[int, int, int, int, int | None]] = [(32, 12, 40, 32, None), (32, 12, 128, 32, None)]
    shapes.append((32, 12, 128, 32, 16))
    if device.type == "cuda":
        shapes.append((64, 12, 512, 64, None))
    dtypes = (torch.float32, torch.bfloat16)
    return [RelationCase(*shape, dtype, shortest) for *shape, shortest in shapes for dtype in dtypes]


def linear_cases(device: torch.device, quick: bool) -> list[LinearCase]:
    """Heads of Llama 3 on a GPU, of many and of few rows; on the CPU what two cores do in a second or two."""
    if quick:
        return [LinearCase(32, 2048, 64, torch.float32), LinearCase(32, 2048, 64, torch.float32, "jsd")]
    names: tuple[DivergenceName, ...] = ("forward_kl", "jsd")
    if device.type == "cuda":
        shapes = ((8192, 128256, 4096), (1024, 128256, 4096), (64, 128256, 4096))
        return [LinearCase(*shape, torch.bfloat16, name) for shape in shapes for name in names]
    shapes = ((256, 32000, 512), (16, 32000, 512))
    dtypes = (torch.float32, torch.bfloat16)
    return [LinearCase(*shape, dtype, name) for shape in shapes for dtype in dtypes for name in names]


def short_cases(cases: Sequence[Any]) -> list[Any]:
    """Of an op's cases those that its bars speak of most: the first vocabulary, the largest batch, bf16 where it is.

    Widest first.
    """
    first = cases[0]
    if isinstance(first, KDCase):
        narrow = [case for case in cases if case.mixed]
        return [case for case in cases if case.classes == first.classes and case.dtype == first.dtype] + narrow
    kept = [case for case in cases if case.dtype == cases[-1].dtype]
    if isinstance(first, MixCase):
        return [case for case in kept if case.output_bytes == max(other.output_bytes for other in kept)]
    if isinstance(first, LinearCase):
        return [case for case in kept if case.rows == first.rows or case.divergence == "forward_kl"]
    return kept[::-1]


@dataclass(frozen=True)
class KDInputs:
    """student_logits [N, C] requires gradient; the last three are None unless the case is mixed."""

    student_logits: Tensor
    teacher_logits: Tensor
    labels: Tensor | None = None
    partner_labels: Tensor | None = None
    lam: Tensor | None = None


@dataclass(frozen=True)
class MixInputs:
    """The arguments of mix_embeddings; weights require gradient in a case with backward."""

    input_ids: Tensor
    weight: Tensor
    partner: Tensor
    lam: Tensor
    position_weight: Tensor
    token_type_ids: Tensor
    token_type_weight: Tensor
    layer_norm: nn.LayerNorm
    grad_output: Tensor


@dataclass(frozen=True)
class LinearInputs:
    """Hidden states [N, H] and weights [C, H] of both sides; the student's require gradients."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor


@dataclass(frozen=True)
class RelationInputs:
    """(first, second) of student and teacher [O, h, L, d], views of [O, L, h d]; the student's require gradients.

    mask bool [O, L], all true; grad_output [O] in fp32.
    """

    student: tuple[Tensor, Tensor]
    teacher: tuple[Tensor, Tensor]
    mask: Tensor
    grad_output: Tensor


def kd_inputs(case: KDCase, device: torch.device) -> KDInputs:
    """Normal logits of standard deviation 2: a few classes hold most of the mass, as in trained models."""
    generator = torch.Generator(device).manual_seed(0)

    def logits() -> Tensor:
        # Drawn in the dtype itself: fp32 noise for the largest GPU case would be 5 GB.
        values = torch.empty(case.rows, case.classes, dtype=case.dtype, device=device)
        return values.normal_(0, 2, generator=generator)

    student, teacher = logits().requires_grad_(), logits()
    if not case.mixed:
        return KDInputs(student, teacher)
    labels = torch.randint(case.classes, (case.rows,), generator=generator, device=device)
    partner = torch.randperm(case.rows, generator=generator, device=device)
    return KDInputs(student, teacher, labels, labels[partner], _lam(case.rows, device))


def mix_inputs(case: MixCase, device: torch.device) -> MixInputs:
    """Random words of BERT's vocabulary; the second half of each row is its second sentence."""
    generator = torch.Generator(device).manual_seed(0)

    def weight(*shape: int) -> Tensor:
        values = torch.empty(shape, device=device).normal_(0, 0.02, generator=generator)
        return values.to(case.dtype).requires_grad_(case.backward)

    norm = nn.LayerNorm(case.width, eps=1e-12, device=device, dtype=case.dtype).requires_grad_(case.backward)
    types = (torch.arange(case.length, device=device) >= case.length // 2).long()
    return MixInputs(
        input_ids=torch.randint(BERT_WORDS, (case.rows, case.length), generator=generator, device=device),
        weight=weight(BERT_WORDS, case.width),
        partner=torch.randperm(case.rows, generator=generator, device=device),
        lam=_lam(case.rows, device),
        position_weight=weight(512, case.width),
        token_type_ids=types.expand(case.rows, -1).contiguous(),
        token_type_weight=weight(2, case.width),
        layer_norm=norm,
        grad_output=torch.empty(case.rows, case.length, case.width, device=device)
        .normal_(generator=generator)
        .to(case.dtype),
    )


def relation_inputs(case: RelationCase, device: torch.device) -> RelationInputs:
    """Normal queries and keys: scores of standard deviation 1, as at the start of a training."""
    generator = torch.Generator(device).manual_seed(0)

    def heads() -> Tensor:
        flat = torch.empty(case.rows, case.length, case.heads * case.width, device=device).normal_(generator=generator)
        return flat.to(case.dtype).view(case.rows, case.length, case.heads, case.width).transpose(1, 2)

    lengths = torch.linspace(case.shortest or case.length, case.length, case.rows, device=device).round()
    return RelationInputs(
        student=(heads().requires_grad_(), heads().requires_grad_()),
        teacher=(heads(), heads()),
        mask=torch.arange(case.length, device=device) < lengths[:, None],
        grad_output=torch.linspace(0.5, 1.5, case.rows, device=device),
    )


def linear_inputs(case: LinearCase, device: torch.device) -> LinearInputs:
    """Logits of standard deviation 2, as those of `kd_inputs`."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int, deviation: float) -> Tensor:
        values = torch.empty(rows, case.width, dtype=case.dtype, device=device)
        return values.normal_(0, deviation, generator=generator)

    sides = [(normal(case.rows, 1), normal(case.classes, 2 / case.width**0.5)) for _ in range(2)]
    return LinearInputs(*(tensor.requires_grad_() for tensor in sides[0]), *sides[1])


def _lam(rows: int, device: torch.device) -> Tensor:
    """Quantiles of Beta(1/2, 1/2), close to what MixKD draws: most of them near 0 or 1."""
    steps = torch.linspace(0, 1, rows + 2, device=device)[1:-1]
    return (torch.pi / 2 * steps).sin().square()
