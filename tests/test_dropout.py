"""The CPU's dropout: shares, scale, the same mask in the backward, nothing between neighbours."""

import math

import pytest
import torch

from mixkd_fast.ops import native
from mixkd_fast.ops.dropout import dropout

pytestmark = pytest.mark.skipif(bool(native.load("cpu")), reason=f"CPU kernels: {native.load('cpu')}")
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@every_dtype
@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_share_and_scale(dtype: torch.dtype, p: float) -> None:
    torch.manual_seed(0)
    values = torch.full((1 << 20,), 3.0, dtype=dtype)
    dropped = dropout(values, p)
    share = (dropped == 0).double().mean().item()
    assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / values.numel())
    kept = dropped[dropped != 0]
    expected = torch.full_like(kept, 3.0 / (1 - p))
    torch.testing.assert_close(kept, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)


@every_dtype
def test_backward_applies_the_same_mask(dtype: torch.dtype) -> None:
    values = torch.randn(37, 501, dtype=dtype, requires_grad=True)
    dropped = dropout(values, 0.3)
    gradient = torch.randn(37, 501).to(dtype)
    dropped.backward(gradient)
    assert values.grad is not None
    expected = torch.where(dropped == 0, 0.0, gradient.float() / 0.7)
    torch.testing.assert_close(values.grad.float(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)


def test_seed_repeats_and_calls_differ() -> None:
    values = torch.ones(100_003)
    torch.manual_seed(7)
    first, second = dropout(values, 0.2), dropout(values, 0.2)
    torch.manual_seed(7)
    assert torch.equal(dropout(values, 0.2), first) and not torch.equal(first, second)


def test_no_position_depends_on_another() -> None:
    """Correlation of the mask with itself, shifted by lags up to and beyond the block of one key, and over seeds."""
    torch.manual_seed(1)
    count = 1 << 18
    mask = (dropout(torch.ones(count), 0.5) != 0).double() * 2 - 1
    for lag in (*range(1, 70), 127, 384, 1536, 1 << 14, (1 << 14) + 1, 1 << 16):
        assert abs((mask[lag:] * mask[:-lag]).mean().item()) < 5.5 / math.sqrt(count - lag)
    other = (dropout(torch.ones(count), 0.5) != 0).double() * 2 - 1
    assert abs((mask * other).mean().item()) < 5 / math.sqrt(count)
    columns = mask.view(-1, 512).mean(0)
    assert columns.abs().max() < 5 / math.sqrt(count / 512)


def test_strided_values_and_the_edges() -> None:
    values = torch.randn(6, 8, requires_grad=True)
    turned = dropout(values.t(), 0.5)
    assert turned.shape == (8, 6) and torch.equal(turned[turned != 0], 2 * values.t()[turned != 0])
    assert dropout(values, 0.0) is values
    assert dropout(torch.empty(0, 3), 0.5).shape == (0, 3)
    assert (dropout(torch.ones(1000, dtype=torch.float64), 0.5) != 0).any()
    with pytest.raises(RuntimeError, match=r"p must be in \[0, 1\)"):
        torch.ops.mixkd_fast.dropout(torch.ones(2), torch.ones(1, dtype=torch.int64), 1.0)


def test_opcheck() -> None:
    values = torch.randn(5, 7, requires_grad=True)
    torch.library.opcheck(torch.ops.mixkd_fast.dropout.default, (values, torch.tensor([3]), 0.25))
