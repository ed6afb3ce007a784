"""The fused encoder on a GPU: padded, unpadded and compiled, against the model's own forward."""

from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_batch, tiny_encoder

from mixkd_fast.data.batching import Batch
from mixkd_fast.encoder import Encoder
from mixkd_fast.frozen_teacher import FrozenTeacher
from mixkd_fast.mixing import Mixing

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def pair(unpadded: bool) -> tuple[Encoder, Encoder, Batch]:
    """fp32 truth, bf16 fused, and a batch that knows its lengths. 64 wide: heads of 32, as attention kernels want."""
    shape = {"hidden_size": 64, "intermediate_size": 128}
    truth, fused = (tiny_encoder("bert", **shape).cuda() for _ in range(2))
    fused.to(torch.bfloat16)
    assert fused.fuse() == "" and fused.fused is not None
    fused.fused.unpadded = unpadded
    lengths = torch.tensor((9, 5, 7, 12))
    batch = tiny_batch(truth.config, width=16)
    assert batch.partner is not None
    batch = replace(batch, row_lengths=lengths, mixed_lengths=torch.maximum(lengths, lengths[batch.partner]))
    return truth, fused, batch.to("cuda")


def test_a_teacher_on_its_own_stream_gives_the_same() -> None:
    _, fused, batch = pair(False)
    fused.requires_grad_(False)
    plain, beside = FrozenTeacher(fused, str), FrozenTeacher(fused, str, torch.cuda.Stream())
    for _ in range(20):
        expected, found = plain.both(batch, Mixing()), beside.both(batch, Mixing())
        noise = torch.randn(512, 512, device="cuda") @ torch.randn(512, 512, device="cuda")
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one.logits, other.logits)
        del noise


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("unpadded", [False, True])
def test_logits_and_gradients(unpadded: bool, compiled: bool) -> None:
    truth, fused, batch = pair(unpadded)
    if compiled:
        assert fused.fused is not None
        fused.fused.compile(dynamic=True)
    found = torch.cat([output.logits for output in fused.both(batch, Mixing())])
    exact = torch.cat([output.logits for output in truth.both(batch, Mixing())])
    assert (found.float() - exact).norm() <= 0.05 * exact.norm()
    found.float().square().sum().backward()
    exact.square().sum().backward()
    for (name, one), (_, other) in zip(fused.model.named_parameters(), truth.model.named_parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None and other.grad is not None and other.grad.norm() > 1e-3:
            assert (one.grad.float() - other.grad).norm() <= 0.15 * other.grad.norm(), name
