"""ReffAKD for text: soft labels from an autoencoder, no teacher (Doshi and Kim 2024, arXiv 2404.09886).

Legend of shape suffixes: N training rows, B rows of a batch, L positions, H width, Z latent width, C classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mixkd_fast.losses import kd_loss
from mixkd_fast.methods.base import Kind, Method, Moment, Setting, supervised_loss
from mixkd_fast.methods.kd import Temperature
from mixkd_fast.methods.rows import ExactTable

if TYPE_CHECKING:
    from mixkd_fast.data.batching import Batch
    from mixkd_fast.models import Encoder

PositiveInt = Annotated[int, Field(gt=0)]


class SoftLabels(ExactTable):
    """One soft label per class [C, C], as logits: row y is the target of rows labelled y before the softmax."""


class ReffAKD(Method):
    """L = (1 - alpha) * CE(S(x), y) + alpha * tau^2 KL(p_y || q), q = softmax(S(x) / tau).

    p_y = softmax(M_y / tau) with M_yc the mean cosine between latent codes of rows of class y and of class c, over all
    pairs of training rows; the codes are those of an autoencoder over pooled sentence embeddings of the initial
    student (the mean of its last hidden states over a row's tokens), trained before the first step.
    """

    uses_teacher: ClassVar[bool] = False
    kinds: ClassVar[tuple[Kind, ...]] = ("classification",)
    name: Literal["reffakd"] = "reffakd"
    """Discriminator of the method section."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Weight of the soft labels; the hard ones have 1 - alpha."""
    temperature: Temperature = 1.0
    """tau of soft labels and student; the term is multiplied by tau^2. At 1 the target is a row's softmax."""
    diagonal_boost: Annotated[float, Field(ge=0)] = 0.0
    """Added to M's diagonal before the softmax: more weight for the row's own class."""
    latent_size: PositiveInt = 32
    """Width of the latent code."""
    autoencoder_steps: PositiveInt = 300
    """Optimizer steps of the autoencoder."""
    autoencoder_batch_size: PositiveInt = 256
    """Sentence embeddings per step of the autoencoder, drawn at random."""
    autoencoder_learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate of its Adam."""

    def build(self, setting: Setting) -> SoftLabels:
        """Embed all training rows, train the autoencoder, compare the classes. Rank 0's soft labels are everybody's."""
        embeddings_NH = torch.from_numpy(setting.collect(_Pooled(setting.student))).to(setting.device)
        codes_NZ = self.codes(embeddings_NH, setting.seed)
        labels = torch.tensor(setting.rows.labels, device=setting.device)
        similarity = class_similarity(codes_NZ, labels, setting.num_labels)
        similarity += self.diagonal_boost * torch.eye(setting.num_labels, device=setting.device)
        shared = setting.share(similarity.cpu())
        return SoftLabels(shared.to(setting.device))

    def codes(self, embeddings_NH: Tensor, seed: int) -> Tensor:
        """Latent codes [N, Z] of an autoencoder trained on embeddings [N, H]; a function of them and the seed.

        H -> 2 Z -> Z -> 2 Z -> H with ReLU between, on embeddings brought to mean 0 and variance 1 in every
        coordinate; squared error, Adam.
        """
        mean, deviation = embeddings_NH.mean(0), embeddings_NH.std(0, correction=0).clamp_min(1e-6)
        inputs_NH = (embeddings_NH - mean) / deviation
        width, latent = inputs_NH.shape[1], self.latent_size
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            encoder = nn.Sequential(nn.Linear(width, 2 * latent), nn.ReLU(), nn.Linear(2 * latent, latent))
            decoder = nn.Sequential(nn.ReLU(), nn.Linear(latent, 2 * latent), nn.ReLU(), nn.Linear(2 * latent, width))
        autoencoder = nn.Sequential(encoder, decoder).to(inputs_NH.device)
        optimizer = torch.optim.Adam(autoencoder.parameters(), lr=self.autoencoder_learning_rate)
        # On the CPU: the same rows on every device.
        generator = torch.Generator().manual_seed(seed)
        size = min(self.autoencoder_batch_size, len(inputs_NH))
        for _ in range(self.autoencoder_steps):
            chosen = torch.randint(len(inputs_NH), (size,), generator=generator).to(inputs_NH.device)
            rows_BH = inputs_NH[chosen]
            optimizer.zero_grad()
            F.mse_loss(autoencoder(rows_BH), rows_BH).backward()
            optimizer.step()
        with torch.no_grad():
            codes: Tensor = encoder(inputs_NH)
        return codes

    def terms(
        self, batch: Batch, student: Encoder, teacher: Any | None, extras: nn.Module | None, moment: Moment
    ) -> dict[str, Tensor]:
        assert isinstance(extras, SoftLabels)
        logits = student.clean(batch).logits
        target = extras[batch.labels[: batch.num_rows]]
        terms = {"kd": self.alpha * kd_loss(logits, target, temperature=self.temperature, reduction="none")}
        if self.alpha < 1:
            terms["mle"] = (1 - self.alpha) * supervised_loss(logits, batch)
        return terms


class _Pooled:
    """Batch -> the mean of a student's last hidden states over each row's tokens: [B, H]."""

    def __init__(self, student: Encoder) -> None:
        self.student = student

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        was_training = self.student.training
        self.student.eval()
        reading = self.student.read(batch)
        self.student.train(was_training)
        keep_BL1 = (reading.mask != 0)[..., None]
        return (reading.hidden_states[-1].float() * keep_BL1).sum(1) / keep_BL1.sum(1)


def class_similarity(codes_NZ: Tensor, labels_N: Tensor, num_classes: int) -> Tensor:
    """Mean cosine between the codes of two classes, over all pairs of their rows: fp32 [C, C].

    Computed as the product of the classes' mean unit vectors, which is the same. A class without rows is at 0.
    """
    unit_NZ = F.normalize(codes_NZ.float(), dim=-1)
    sums_CZ = unit_NZ.new_zeros(num_classes, unit_NZ.shape[1]).index_add_(0, labels_N, unit_NZ)
    counts_C = torch.bincount(labels_N, minlength=num_classes).clamp_min(1)
    means_CZ = sums_CZ / counts_C[:, None]
    return means_CZ @ means_CZ.T
