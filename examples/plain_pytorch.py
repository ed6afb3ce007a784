"""MixKD in a plain PyTorch loop: a small student learns from a frozen teacher, also on mixed rows.

Run: python examples/plain_pytorch.py
"""

import torch
from torch import nn

from mixkd_fast.losses import kd_loss


def classifier(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 4))


def main(steps: int = 200, seed: int = 0) -> list[float]:
    """Train for `steps` and return the loss of every step."""
    torch.manual_seed(seed)
    features = torch.randn(512, 16)
    teacher = classifier(64).requires_grad_(False).eval()
    labels = teacher(features).argmax(-1)
    student = classifier(8)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    mixing = torch.distributions.Beta(0.4, 0.4)
    losses = []
    for step in range(steps):
        rows = torch.randint(512, (64,))
        x, y = features[rows], labels[rows]
        partner, lam = torch.randperm(64), mixing.sample((64,))
        mixed = lam[:, None] * x + (1 - lam[:, None]) * x[partner]
        loss = kd_loss(
            student(mixed), teacher(mixed), y, y[partner], lam, temperature=2.0, kd_weight=1.0, ce_weight=1.0
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0 or step == steps - 1:
            accuracy = (student(features).argmax(-1) == labels).float().mean().item()
            print(f"step {step:4}  loss {loss.item():.4f}  same class as the teacher {accuracy:.1%}")
    return losses


if __name__ == "__main__":
    main()
