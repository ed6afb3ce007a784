"""What is read on the way of a forward: the model's own hidden states, and projections that rebuild its attention."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_batch, tiny_config, tiny_encoder

from mixkd_fast.encoder_readings import layer_number, reading_projections
from mixkd_fast.errors import ModelError
from mixkd_fast.frozen_teacher import FrozenTeacher
from mixkd_fast.mixing import Mixing

FAMILIES = ["bert", "roberta", "distilbert", "electra", "deberta-v2", "modernbert"]


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_logits_are_the_models_own(family: str) -> None:
    encoder = tiny_encoder(family)
    batch = tiny_batch(encoder.config, [7, 4, 6], partner=[2, 0, 1], lam=[0.3, 0.8, 0.5])
    reading = encoder.read(batch, layers=[1])
    plain = encoder.clean(batch, output_hidden_states=True)
    torch.testing.assert_close(reading.logits, plain.logits)
    for own, expected in zip(reading.hidden_states, plain.hidden_states, strict=True):
        torch.testing.assert_close(own, expected)
    mixing = Mixing()
    both = encoder.read(batch, mixing, layers=[0], include_clean=True)
    clean, mixed = encoder.both(batch, mixing)
    torch.testing.assert_close(both.logits, torch.cat([clean.logits, mixed.logits]))
    assert both.mask.shape == both.hidden_states[0].shape[:2]
    assert both.mask[3].tolist() == [1] * 7 + [0] * (both.mask.shape[1] - 7), "the union of rows 0 and 2"


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra"])
def test_projections_give_back_the_attention_of_their_layer(family: str) -> None:
    encoder = tiny_encoder(family, attn_implementation="eager")
    batch = tiny_batch(encoder.config, [7, 4, 6])
    reading = encoder.read(batch, layers=[2])
    attentions = encoder.clean(batch, output_attentions=True).attentions
    part = reading.projections[2]
    scores = part.query @ part.key.transpose(-1, -2) / part.query.shape[-1] ** 0.5
    scores = scores.masked_fill(reading.mask[:, None, None] == 0, -torch.inf)
    torch.testing.assert_close(scores.softmax(-1), attentions[2], atol=1e-6, rtol=1e-5)
    assert part.value.shape == part.query.shape
    assert list(reading.projections) == [2]


def test_hooks_are_gone_afterwards_also_after_an_error() -> None:
    encoder = tiny_encoder("bert")
    with pytest.raises(RuntimeError, match="stop"), reading_projections(encoder.model, [0]):
        raise RuntimeError("stop")
    assert not any(m._forward_hooks for m in encoder.model.modules())


def test_unknown_layers_are_named() -> None:
    unknown = pytest.raises(ModelError, match="Linear: its layers' queries, keys and values are not found")
    with unknown, reading_projections(torch.nn.Linear(2, 2), [0]):
        pass
    assert layer_number(-1, 4, "method.layer") == 3
    with pytest.raises(ModelError, match=r"method.layer = 4: the model has 4 layers; allowed: -4 to 3"):
        layer_number(4, 4, "method.layer")


@pytest.mark.parametrize("family", FAMILIES)
def test_own_embeddings_given_back_change_nothing_and_take_gradients(family: str) -> None:
    encoder = tiny_encoder(family)
    batch = tiny_batch(encoder.config, [7, 4, 6])
    words = encoder.word_table(batch.input_ids).detach().requires_grad_()
    logits = encoder.embedded(batch, words).logits
    torch.testing.assert_close(logits, encoder.clean(batch).logits, atol=1e-5, rtol=1e-5)
    teacher = FrozenTeacher(tiny_encoder(family, seed=2).requires_grad_(False), str)
    (grad,) = torch.autograd.grad(teacher.embedded(batch, words).logits.square().sum(), words)
    assert grad.abs().sum() > 0 and grad.isfinite().all()


def test_dropout_passes_differ_and_average_to_something_near_the_answer() -> None:
    encoder = tiny_encoder("bert", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    teacher = FrozenTeacher(encoder.eval().requires_grad_(False), str)
    batch = tiny_batch(encoder.config, [7, 4, 6])
    torch.manual_seed(0)
    passes = teacher.sampled(batch, 64)
    assert passes.shape == (64, 3, encoder.config.num_labels)
    exact = teacher.clean(batch).logits
    assert not torch.equal(passes[0], passes[1])
    assert F.mse_loss(passes.mean(0), exact) < F.mse_loss(passes, exact.expand_as(passes)) / 4
    assert not encoder.model.training
    torch.testing.assert_close(teacher.clean(batch).logits, exact, rtol=0, atol=0)
    dry = FrozenTeacher(tiny_encoder("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), str)
    with pytest.raises(ModelError, match="has no dropout"):
        dry.sampled(batch, 2)


def test_reading_the_teacher_builds_no_graph() -> None:
    teacher = FrozenTeacher(tiny_encoder("bert"), str)  # its parameters would take a gradient
    batch = replace(tiny_batch(tiny_config("bert"), [5, 3]))
    reading = teacher.read(batch, layers=[0])
    assert not reading.logits.requires_grad and not reading.projections[0].query.requires_grad
