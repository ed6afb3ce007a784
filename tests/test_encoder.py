"""The encoder's other face: options that pass through, positions, the hook of after_layer_norm, and refusals."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, plain_logits, tiny_batch, tiny_encoder, tiny_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from mixkd_fast.data.batching import Batch
from mixkd_fast.encoder import Encoder
from mixkd_fast.errors import ModelError
from mixkd_fast.mix import mixed_attention_mask, positions_of
from mixkd_fast.mixing import Mixing
from mixkd_fast.model_checks import check_mixing

BEFORE, AFTER = Mixing(), Mixing(position="after_layer_norm")
every_family = pytest.mark.parametrize("family", FAMILIES)


def mixed_logits(encoder: Encoder, batch: Batch, mixing: Mixing = BEFORE) -> Tensor:
    with torch.no_grad():
        return encoder.mixed(batch, mixing).logits


def own_plain_logits(encoder: Encoder, batch: Batch) -> Tensor:
    return plain_logits(encoder.model, batch.input_ids, batch.attention_mask, batch.token_type_ids)


@every_family
def test_options_reach_the_model(family: str) -> None:
    encoder = tiny_encoder(family, attn_implementation="eager")
    batch = tiny_batch(encoder.config)
    with torch.no_grad():
        for output in (
            encoder.clean(batch, output_hidden_states=True, output_attentions=True),
            *(encoder.mixed(batch, m, output_hidden_states=True, output_attentions=True) for m in (BEFORE, AFTER)),
        ):
            assert len(output.hidden_states) == 5
            assert len(output.attentions) == 4
            width = batch.input_ids.shape[1]
            assert output.attentions[-1].shape == (4, 2, width, width)


def test_positions_of_roberta_follow_the_union_of_the_masks() -> None:
    encoder = tiny_encoder("roberta")
    batch = tiny_batch(encoder.config, lengths=(3, 6), partner=(1, 0), lam=(0.5, 1.0))
    seen: list[Tensor] = []
    handle = encoder.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    mixed_logits(encoder, batch)
    handle.remove()
    assert seen[0].tolist() == [[2, 3, 4, 5, 6, 7], [2, 3, 4, 5, 6, 7]]
    batch = replace(batch, lam=torch.tensor([1.0, 0.0]))
    mask = mixed_attention_mask(batch.attention_mask, batch.partner, batch.lam, 2)
    assert positions_of(mask, 1).tolist() == [[2, 3, 4, 1, 1, 1], [2, 3, 4, 1, 1, 1]]


def test_a_pad_token_inside_the_text_keeps_lam_one_exact() -> None:
    """RoBERTa counts positions over ids, so a literal <pad> in a text has none, whatever the attention mask says."""
    encoder = tiny_encoder("roberta")
    batch = tiny_batch(encoder.config, lam=(1, 1, 1, 1))
    batch.input_ids[0, 3] = encoder.config.pad_token_id
    assert torch.equal(mixed_logits(encoder, batch), own_plain_logits(encoder, batch))


@every_family
def test_the_hook_of_after_layer_norm_is_gone_afterwards(family: str) -> None:
    encoder = tiny_encoder(family)
    batch = tiny_batch(encoder.config)
    plain = own_plain_logits(encoder, batch)
    mixed_logits(encoder, batch, AFTER)
    assert torch.equal(own_plain_logits(encoder, batch), plain)
    assert not encoder._container._forward_hooks
    with pytest.raises(TypeError):
        encoder.mixed(batch, AFTER, output_hidden_states=True, no_such_option=object(), input_ids=batch.input_ids)
    assert not encoder._container._forward_hooks


@every_family
def test_after_layer_norm_may_be_nested(family: str) -> None:
    """A forward that starts while another one is under way leaves that one's result alone."""
    encoder = tiny_encoder(family)
    outer, inner = tiny_batch(encoder.config), tiny_batch(encoder.config, lam=(0.9, 0.2, 0.4, 0.7), seed=1)
    expected_outer, expected_inner = mixed_logits(encoder, outer, AFTER), mixed_logits(encoder, inner, AFTER)
    nested: list[Tensor] = []

    def run_inner(module: nn.Module, args: Any, kwargs: Any) -> None:
        handle.remove()
        nested.append(mixed_logits(encoder, inner, AFTER))

    # Within the embedding module, with the outer call's mixing hook already registered.
    handle = encoder._container.register_forward_pre_hook(run_inner, with_kwargs=True)
    assert torch.equal(mixed_logits(encoder, outer, AFTER), expected_outer)
    assert torch.equal(nested[0], expected_inner)


def test_each_row_draws_its_own_embedding_dropout_after_layer_norm() -> None:
    encoder = tiny_encoder("bert", hidden_dropout_prob=0.5).train()
    batch = tiny_batch(encoder.config, lengths=(8, 8), partner=(0, 1), lam=(0.5, 0.5))
    seen: list[Tensor] = []
    handle = encoder.model.bert.encoder.layer[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True
    )
    encoder.mixed(batch, AFTER)
    handle.remove()
    # A row mixed with itself: with p = 0.5, an entry is zero only if both draws drop it, in a quarter of all cases.
    assert 0.1 < (seen[0] == 0).float().mean() < 0.4


def test_a_model_without_an_embedding_module_refuses_after_layer_norm() -> None:
    config = AutoConfig.for_model("xlnet", vocab_size=96, d_model=16, n_layer=2, n_head=2, d_inner=24, pad_token_id=0)
    encoder = Encoder(AutoModelForSequenceClassification.from_config(config).eval())
    with pytest.raises(ModelError, match=r'mixing.position "after_layer_norm".*XLNetForSequenceClassification'):
        encoder.mixed(tiny_batch(config), AFTER)


def test_token_types_that_are_not_beside_the_words_are_refused() -> None:
    config = AutoConfig.for_model("xlnet", vocab_size=96, d_model=16, n_layer=2, n_head=2, d_inner=24, pad_token_id=0)
    encoder = Encoder(AutoModelForSequenceClassification.from_config(config).eval())
    with pytest.raises(ModelError, match="token types"):
        encoder.mixed(tiny_batch(config), BEFORE)


def test_a_model_without_inputs_embeds_is_refused() -> None:
    class IdsOnly(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return input_ids * attention_mask

    with pytest.raises(ModelError, match=r"IdsOnly.*inputs_embeds"):
        Encoder(IdsOnly())


@every_family
def test_check_mixing_accepts_every_family(family: str) -> None:
    encoder = tiny_encoder(family).train()
    check_mixing(encoder)
    assert encoder.training and encoder.model.training


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_check_mixing_refuses_models_that_look_at_the_ids_elsewhere(family: str) -> None:
    fields = {
        "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "pad_token_id": 0},
        "bart": {
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "decoder_ffn_dim": 16,
        },
    }[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, vocab_size=96, num_labels=3, **fields)
        model = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(ModelError, match="cannot be used for mixing"):
        check_mixing(Encoder(model))


def test_a_batch_without_partners_is_a_programming_error() -> None:
    encoder = Encoder(tiny_model("bert"))
    with pytest.raises(AssertionError, match="no partners"):
        encoder.mixed(tiny_batch(encoder.config, partner=None, lam=None), BEFORE)


@every_family
def test_after_layer_norm_works_when_another_hook_hands_on_views(family: str) -> None:
    """ZeRO-3's hooks do that to every module's arguments."""
    encoder = tiny_encoder(family)
    batch = tiny_batch(encoder.config)
    expected = mixed_logits(encoder, batch, AFTER)

    def views(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return args, {name: value.view_as(value) if torch.is_tensor(value) else value for name, value in kwargs.items()}

    handle = encoder._container.register_forward_pre_hook(views, with_kwargs=True)
    assert torch.equal(mixed_logits(encoder, batch, AFTER), expected)
    handle.remove()


@every_family
@pytest.mark.parametrize("padding", ["embedding", "zero"])
def test_the_fused_op_and_the_tables_modules_give_the_same(family: str, padding: str) -> None:
    """A module with a hook is no plain table, so its forward is called; the padding row has no gradient in either."""
    encoder = tiny_encoder(family)
    batch = tiny_batch(encoder.config)
    mixing = Mixing(padding=padding)
    results = []
    for hooked in (False, True):
        words = encoder.model.get_input_embeddings()
        handle = words.register_forward_hook(lambda *_: None) if hooked else None
        encoder.model.zero_grad()
        logits = encoder.mixed(batch, mixing).logits
        logits.square().sum().backward()
        gradients = {n: p.grad.clone() for n, p in encoder.model.named_parameters() if "embeddings" in n}
        results.append((logits.detach(), gradients))
        if handle is not None:
            handle.remove()
        if words.padding_idx is not None:
            assert (words.weight.grad[words.padding_idx] == 0).all()
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=2e-5)
