"""What others offer for the same loss: plain PyTorch as users write it, TRL and Liger-Kernel where they run.

Each is timed from logits to their gradient, log-softmax included. Legend: N rows, C classes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import KDCase, KDInputs, LinearCase, LinearInputs

Loss = Callable[[KDInputs], Tensor]
LinearLoss = Callable[[LinearInputs], Tensor]


def eager(case: KDCase) -> Loss | str:
    """F.kl_div and F.cross_entropy in the dtype of the logits, or why nobody writes this divergence so."""
    if case.mixed:
        return _mixed(case)
    losses: dict[str, Loss] = {"forward_kl": _forward_kl(case.temperature), "reverse_kl": _reverse_kl, "jsd": _jsd}
    return losses.get(case.divergence, "has no common form")


def trl(case: KDCase) -> Loss | str:
    """The loss of TRL's GKD trainer; it applies no temperature squared, so it is compared at temperature 1."""
    betas = {"forward_kl": 0, "reverse_kl": 1, "jsd": 0.5}
    if case.mixed or case.divergence not in betas:
        return "has no such loss"
    try:
        from trl.experimental.gkd import GKDTrainer
    except ImportError as error:
        return f"trl is not installed ({error.name})"
    beta = betas[case.divergence]
    return lambda inputs: GKDTrainer.generalized_jsd_loss(inputs.student_logits, inputs.teacher_logits, beta=beta)


def liger(case: KDCase, device: torch.device) -> Loss | str:
    """Liger-Kernel's KL and JSD kernels behind PyTorch's log-softmax, which they leave to the caller."""
    if case.mixed or case.divergence not in ("forward_kl", "reverse_kl", "jsd"):
        return "has no such loss"
    if device.type != "cuda":
        return "runs on GPUs only"
    try:
        from liger_kernel.transformers import LigerJSD, LigerKLDIVLoss
    except ImportError as error:
        return f"liger-kernel is not installed ({error.name})"
    if case.divergence == "forward_kl":
        divergence = LigerKLDIVLoss(reduction="batchmean", log_target=True)
    else:
        divergence = LigerJSD(beta=1.0 if case.divergence == "reverse_kl" else 0.5)

    def loss(inputs: KDInputs) -> Tensor:
        with torch.no_grad():
            log_p = inputs.teacher_logits.log_softmax(-1)
        return divergence(inputs.student_logits.log_softmax(-1), log_p)

    return loss


def _forward_kl(temperature: float) -> Loss:
    def loss(inputs: KDInputs) -> Tensor:
        log_q = F.log_softmax(inputs.student_logits / temperature, dim=-1)
        p = F.softmax(inputs.teacher_logits / temperature, dim=-1)
        return F.kl_div(log_q, p, reduction="batchmean") * temperature**2

    return loss


def _reverse_kl(inputs: KDInputs) -> Tensor:
    log_q, log_p = F.log_softmax(inputs.student_logits, dim=-1), F.log_softmax(inputs.teacher_logits, dim=-1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def _jsd(inputs: KDInputs) -> Tensor:
    q, p = F.softmax(inputs.student_logits, dim=-1), F.softmax(inputs.teacher_logits, dim=-1)
    log_m = ((p + q) / 2).log()
    return (F.kl_div(log_m, p, reduction="batchmean") + F.kl_div(log_m, q, reduction="batchmean")) / 2


def _mixed(case: KDCase) -> Loss:
    distillation = _forward_kl(case.temperature)

    def loss(inputs: KDInputs) -> Tensor:
        first = F.cross_entropy(inputs.student_logits, inputs.labels, reduction="none")
        second = F.cross_entropy(inputs.student_logits, inputs.partner_labels, reduction="none")
        return distillation(inputs) + (inputs.lam * first + (1 - inputs.lam) * second).mean()

    return loss


def eager_linear(case: LinearCase) -> LinearLoss | str:
    """Both heads' logits in the dtype of the heads, then the loss in fp32, as language models are distilled."""
    losses: dict[str, Loss] = {"forward_kl": _forward_kl(1.0), "reverse_kl": _reverse_kl, "jsd": _jsd}
    divergence = losses.get(case.divergence)
    if divergence is None:
        return "has no common form"

    def loss(inputs: LinearInputs) -> Tensor:
        with torch.no_grad():
            teacher = F.linear(inputs.teacher_hidden, inputs.teacher_weight)
        student = F.linear(inputs.student_hidden, inputs.student_weight)
        return divergence(KDInputs(student.float(), teacher.float()))

    return loss


def liger_linear(case: LinearCase, device: torch.device, chunked: bool) -> LinearLoss | str:
    """Liger-Kernel's fused linear JSD, or its chunked distillation loss, which it compiles."""
    if case.divergence != "jsd":
        return "has no such loss"
    if device.type != "cuda":
        return "runs on GPUs only"
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
        from liger_kernel.transformers import LigerFusedLinearJSD
    except ImportError as error:
        return f"liger-kernel is not installed ({error.name})"
    if not chunked:
        fused = LigerFusedLinearJSD(jsd_beta=0.5)

        def loss(inputs: LinearInputs) -> Tensor:
            sides = inputs.student_hidden, inputs.student_weight, inputs.teacher_hidden, inputs.teacher_weight
            value: Tensor = fused(*sides)
            return value

        return loss
    compiled = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=True)
    labels = torch.zeros(case.rows, dtype=torch.long, device=device)

    def chunked_loss(inputs: LinearInputs) -> Tensor:
        sides = inputs.student_hidden, inputs.student_weight, inputs.teacher_hidden, inputs.teacher_weight
        value: Tensor = compiled(*sides, labels)
        return value

    return chunked_loss
