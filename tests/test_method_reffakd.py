"""ReffAKD: soft labels of an autoencoder, made before the first step and the same for everybody."""

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from method_runs import ends_of, run_method, term_of
from tiny_models import tiny_batch, tiny_config, tiny_encoder
from torch import Tensor
from toy import losses, records

from mixkd_fast.errors import ConfigurationError
from mixkd_fast.methods import Moment, ReffAKD
from mixkd_fast.methods.reffakd import SoftLabels, _Pooled, class_similarity

MOMENT = Moment(0, 10, 0.0)


def _soft_labels(seed: int = 0) -> SoftLabels:
    return SoftLabels(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize(("alpha", "temperature"), [(0.3, 1.0), (0.7, 4.0), (1.0, 2.0)])
def test_terms_are_their_equation(alpha: float, temperature: float) -> None:
    batch, student, soft = tiny_batch(tiny_config("bert")), tiny_encoder("bert"), _soft_labels()
    terms = ReffAKD(alpha=alpha, temperature=temperature).terms(batch, student, None, soft, MOMENT)
    logits = student.clean(batch).logits.double()
    p = (soft[batch.labels].double() / temperature).softmax(-1)
    kl = (p * (p.log() - (logits / temperature).log_softmax(-1))).sum(-1)
    torch.testing.assert_close(terms["kd"].double(), alpha * temperature**2 * kl, atol=1e-5, rtol=1e-4)
    assert ("mle" in terms) == (alpha < 1)
    if alpha < 1:
        mle = (1 - alpha) * F.cross_entropy(logits, batch.labels, reduction="none")
        torch.testing.assert_close(terms["mle"].double(), mle, atol=1e-5, rtol=1e-4)


def test_similarity_is_the_mean_over_all_pairs() -> None:
    generator = torch.Generator().manual_seed(1)
    codes, labels = torch.randn(40, 6, generator=generator), torch.randint(0, 3, (40,), generator=generator)
    found = class_similarity(codes, labels, 4)
    cosines = F.cosine_similarity(codes.double()[:, None], codes.double()[None], dim=-1)
    for a in range(3):
        for b in range(3):
            expected = cosines[labels == a][:, labels == b].mean()
            torch.testing.assert_close(found[a, b].double(), expected, atol=1e-5, rtol=1e-4)
    assert not found[3].any() and not found[:, 3].any(), "a class without rows is at distance 0 from all"


def _embeddings() -> tuple[Tensor, Tensor]:
    """Classes 0 and 1 lie near each other, 2 far away, along few directions of many."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(300) % 3
    centres = torch.tensor([[3.0, 1.0], [3.0, -1.0], [-3.0, 0.0]])
    inner = centres[labels] + 0.5 * torch.randn(300, 2, generator=generator)
    return inner @ torch.randn(2, 24, generator=generator) + 7.0, labels


def test_near_classes_have_near_codes() -> None:
    embeddings, labels = _embeddings()
    codes = ReffAKD(latent_size=8).codes(embeddings, 3)
    similarity = class_similarity(codes, labels, 3)
    assert codes.shape == (300, 8)
    assert similarity.argmax(-1).tolist() == [0, 1, 2]
    assert similarity[0, 1] > similarity[0, 2] + 0.2 and similarity[1, 0] > similarity[1, 2] + 0.2


def test_codes_depend_on_the_seed_alone() -> None:
    embeddings, _ = _embeddings()
    method = ReffAKD(latent_size=4, autoencoder_steps=20)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = method.codes(embeddings, 3)
    assert torch.equal(torch.get_rng_state(), before), "the run's own draws stay what they are"
    torch.manual_seed(12)
    assert torch.equal(method.codes(embeddings, 3), first)
    assert not torch.equal(method.codes(embeddings, 4), first)


def test_pooling_leaves_padding_and_dropout_out() -> None:
    student = tiny_encoder("bert", hidden_dropout_prob=0.5).train()
    narrow, wide = (_Pooled(student)(tiny_batch(tiny_config("bert"), width=width)) for width in (12, 20))
    torch.testing.assert_close(narrow, wide, atol=1e-5, rtol=1e-4)
    assert student.training and not narrow.requires_grad
    batch = tiny_batch(tiny_config("bert"))
    states = student.eval().clean(batch, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(narrow[1], states[1, :5].mean(0), atol=1e-5, rtol=1e-4)


def test_no_gradient_reaches_the_soft_labels() -> None:
    soft = _soft_labels()
    assert not list(soft.parameters()) and list(soft.state_dict()) == ["bits"]


def test_soft_labels_are_not_rounded_to_the_training_precision() -> None:
    """DeepSpeed calls this on all that a method builds, in bf16 training."""
    soft, classes = _soft_labels(), torch.arange(2)
    assert torch.equal(copy.deepcopy(soft).to(torch.bfloat16)[classes], soft[classes])
    assert not torch.equal(soft[classes].bfloat16().float(), soft[classes]), "which would have changed them"


def test_a_run_needs_no_teacher_and_its_term_falls(tmp_path: Path) -> None:
    method = {"name": "reffakd", "alpha": 0.9, "diagonal_boost": 3.0, "latent_size": 8}
    result = run_method(tmp_path, method, teacher=False)
    first, last = ends_of(tmp_path / "run", "kd")
    assert last < 0.7 * first
    assert result.summary["teacher"] is None and result.summary["training"]["steps"] == 20


def test_a_resumed_run_and_another_stage_have_the_same_soft_labels(tmp_path: Path) -> None:
    method = {"name": "reffakd", "latent_size": 8, "autoencoder_steps": 50}
    options: dict[str, Any] = {"teacher": False, "training": {"checkpoint_every": 10, "keep_best": False}}
    run_method(tmp_path, method, **options)
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    shutil.rmtree(sorted(path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.is_dir())[-1])
    run_method(tmp_path, method, resume=True, **options)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    cut: dict[str, Any] = {"deepspeed": {"zero_optimization": {"stage": 2}}, "training": {"micro_batch_size": 4}}
    run_method(tmp_path, method, "cut", teacher=False, **cut)
    assert term_of(tmp_path / "cut", "kd") == pytest.approx(term_of(tmp_path / "whole", "kd"), abs=1e-4)
    assert np.isfinite([line["loss"] for line in records(tmp_path / "cut")]).all()


def test_regression_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="classification"):
        run_method(tmp_path, {"name": "reffakd"}, teacher=False, task={"kind": "regression"})
