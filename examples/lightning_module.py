"""MixKD in PyTorch Lightning: a LightningModule that holds student and teacher and mixes rows in its training step.

Tiny random data, nothing is downloaded. Run: python examples/lightning_module.py
"""

from typing import Any

import lightning
import torch
from torch import Tensor, nn

from mixkd_fast.losses import KDLoss


def classifier(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 4))


class MixKD(lightning.LightningModule):
    """Trains `student` to follow `teacher` on rows mixed with lam ~ Beta(alpha, alpha)."""

    def __init__(self, student: nn.Module, teacher: nn.Module, alpha: float = 0.4) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher.requires_grad_(False)
        self.mixing = torch.distributions.Beta(alpha, alpha)
        self.kd_loss = KDLoss(temperature=2.0, ce_weight=1.0)
        self.losses: list[float] = []

    def on_train_epoch_start(self) -> None:
        # Whatever put the module into training mode put the teacher's dropout into it too.
        self.teacher.eval()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, labels = batch
        partner, lam = torch.randperm(len(x), device=x.device), self.mixing.sample((len(x),)).to(x.device)
        mixed = lam[:, None] * x + (1 - lam[:, None]) * x[partner]
        return self.kd_loss(self.student(mixed), self.teacher(mixed), labels, labels[partner], lam)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.student.parameters(), lr=1e-2)


def main(epochs: int = 25, seed: int = 0) -> list[float]:
    """Train for `epochs` of 8 steps and return the loss of every step."""
    torch.manual_seed(seed)
    features, teacher = torch.randn(512, 16), classifier(64)
    with torch.no_grad():
        labels = teacher(features).argmax(-1)
    rows = torch.utils.data.TensorDataset(features, labels)
    module = MixKD(classifier(8), teacher)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=64, shuffle=True))
    return module.losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps")
