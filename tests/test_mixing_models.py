"""Mixed forwards of every tested family: the identities, and the mistakes public implementations make."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, WITH_TOKEN_TYPES, plain_logits, tiny_batch, tiny_encoder
from torch import Tensor, nn

from mixkd_fast.data.batching import Batch
from mixkd_fast.encoder import Encoder
from mixkd_fast.mix import mixed_attention_mask
from mixkd_fast.mixing import Mixing

BEFORE, AFTER = Mixing(), Mixing(position="after_layer_norm")
ALL_MIXINGS = [
    Mixing(position=position, padding=padding)
    for position in ("before_layer_norm", "after_layer_norm")
    for padding in ("embedding", "zero")
]
every_family = pytest.mark.parametrize("family", FAMILIES)
every_mixing = pytest.mark.parametrize("mixing", ALL_MIXINGS, ids=lambda m: f"{m.position}-{m.padding}")


def mixed_logits(encoder: Encoder, batch: Batch, mixing: Mixing = BEFORE) -> Tensor:
    with torch.no_grad():
        return encoder.mixed(batch, mixing).logits


def own_plain_logits(encoder: Encoder, batch: Batch) -> Tensor:
    return plain_logits(encoder.model, batch.input_ids, batch.attention_mask, batch.token_type_ids)


def embedding_output(encoder: Encoder, batch: Batch, mixing: Mixing) -> Tensor:
    """What the model's embedding module hands to its layers in a mixed forward."""
    seen: list[Tensor] = []
    handle = encoder._container.register_forward_hook(lambda module, inputs, output: seen.append(output))
    mixed_logits(encoder, batch, mixing)
    handle.remove()
    return seen[0]


@every_mixing
@every_family
def test_lam_one_is_the_plain_forward_bit_for_bit(family: str, mixing: Mixing) -> None:
    encoder = tiny_encoder(family)
    batch = tiny_batch(encoder.config, lam=(1, 1, 1, 1))
    assert torch.equal(mixed_logits(encoder, batch, mixing), own_plain_logits(encoder, batch))


@every_family
def test_clean_is_the_plain_forward_of_the_clean_rows(family: str) -> None:
    encoder = tiny_encoder(family)
    batch = tiny_batch(encoder.config, num_rows=2, partner=(2, 3), lam=(0.5, 0.5))
    with torch.no_grad():
        logits = encoder.clean(batch).logits
    types = None if batch.token_type_ids is None else batch.token_type_ids[:2]
    assert torch.equal(logits, plain_logits(encoder.model, batch.input_ids[:2], batch.attention_mask[:2], types))


@every_mixing
@every_family
def test_lam_zero_is_the_partner(family: str, mixing: Mixing) -> None:
    encoder = tiny_encoder(family)
    batch = tiny_batch(encoder.config, lam=(0, 0, 0, 0))
    expected = own_plain_logits(encoder, batch)[batch.partner]
    torch.testing.assert_close(mixed_logits(encoder, batch, mixing), expected, rtol=1e-5, atol=1e-5)


@every_family
def test_lam_one_is_exact_in_bf16_too(family: str) -> None:
    encoder = tiny_encoder(family).to(torch.bfloat16)
    batch = tiny_batch(encoder.config, lam=(1, 1, 1, 1))
    assert torch.equal(mixed_logits(encoder, batch), own_plain_logits(encoder, batch))


@every_mixing
@every_family
def test_swapping_the_pair_changes_nothing(family: str, mixing: Mixing) -> None:
    encoder = tiny_encoder(family)
    batch = tiny_batch(encoder.config, lengths=(9, 5), partner=(1, 0), lam=(0.3, 0.7))
    first, second = mixed_logits(encoder, batch, mixing)
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6 * first.abs().max().item() + 1e-6)


@every_mixing
@every_family
def test_more_padding_changes_nothing(family: str, mixing: Mixing) -> None:
    encoder = tiny_encoder(family)
    tight, wide = tiny_batch(encoder.config), tiny_batch(encoder.config, width=24)
    expected = mixed_logits(encoder, tight, mixing)
    torch.testing.assert_close(mixed_logits(encoder, wide, mixing), expected, rtol=1e-5, atol=1e-5)


@every_mixing
@every_family
def test_repeated_calls_are_identical(family: str, mixing: Mixing) -> None:
    encoder = tiny_encoder(family)
    batch = tiny_batch(encoder.config)
    assert torch.equal(mixed_logits(encoder, batch, mixing), mixed_logits(encoder, batch, mixing))


@every_mixing
@every_family
def test_teacher_gets_no_gradients(family: str, mixing: Mixing) -> None:
    teacher, student = tiny_encoder(family).requires_grad_(False), tiny_encoder(family, layers=2, seed=1)
    batch = tiny_batch(student.config)
    distance = (teacher.mixed(batch, mixing).logits - student.mixed(batch, mixing).logits).square().mean()
    distance.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    words = student.model.get_input_embeddings().weight.grad
    # Every token of every row is someone's, so each has a share in the loss.
    used = batch.input_ids[batch.attention_mask.bool()].unique()
    assert words is not None and (words[used].abs().sum(1) > 0).all()


@every_mixing
@every_family
def test_lam_one_has_the_plain_forwards_gradient(family: str, mixing: Mixing) -> None:
    plain, mixed = tiny_encoder(family), tiny_encoder(family)
    batch = tiny_batch(plain.config, lam=(1, 1, 1, 1))
    plain.clean(batch).logits.square().sum().backward()
    mixed.mixed(batch, mixing).logits.square().sum().backward()
    for (name, expected), parameter in zip(plain.named_parameters(), mixed.parameters(), strict=True):
        if expected.grad is None:
            assert parameter.grad is None, name
            continue
        torch.testing.assert_close(
            parameter.grad, expected.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def reference_before_layer_norm(encoder: Encoder, batch: Batch, zero_padding: bool) -> Tensor:
    """LN(lam W_i + (1 - lam) W_j + P + lam Y_i + (1 - lam) Y_j) written out, from the module's own tables."""
    module: Any = encoder._container
    words = encoder.model.get_input_embeddings().weight
    lam = batch.lam[:, None, None]
    keep = batch.attention_mask[..., None] if zero_padding else torch.ones_like(batch.attention_mask)[..., None]
    parts = words[batch.input_ids] * keep
    types = getattr(module, "token_type_embeddings", None)
    if types is not None:
        type_ids = batch.token_type_ids if types.num_embeddings > 1 else torch.zeros_like(batch.input_ids)
        parts = parts + types.weight[type_ids] * keep
    total = lam * parts + (1 - lam) * parts[batch.partner]
    positions = getattr(module, "position_embeddings", None)
    if positions is not None:
        position_ids = torch.arange(batch.input_ids.shape[1])[None]
        if encoder.config.model_type == "roberta":
            union = batch.attention_mask | batch.attention_mask[batch.partner]
            position_ids = union.cumsum(1) * union + encoder.config.pad_token_id
        total = total + positions.weight[position_ids]
    if getattr(module, "embed_proj", None) is not None:
        total = module.embed_proj(total)
    total = (module.LayerNorm if hasattr(module, "LayerNorm") else module.norm)(total)
    if encoder.config.model_type == "deberta-v2":
        total = total * (batch.attention_mask | batch.attention_mask[batch.partner])[..., None]
    return total


@pytest.mark.parametrize("padding", ["embedding", "zero"])
@every_family
def test_before_layer_norm_is_the_written_out_formula(family: str, padding: Any) -> None:
    encoder = tiny_encoder(family)
    batch = tiny_batch(encoder.config)
    with torch.no_grad():
        expected = reference_before_layer_norm(encoder, batch, padding == "zero")
    output = embedding_output(encoder, batch, Mixing(padding=padding))
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", ["embedding", "zero"])
@every_family
def test_after_layer_norm_mixes_the_rows_own_embedding_outputs(family: str, padding: Any) -> None:
    encoder = tiny_encoder(family)
    batch = tiny_batch(encoder.config)
    union = mixed_attention_mask(batch.attention_mask, batch.partner, batch.lam, batch.num_rows)
    module: Any = encoder._container
    # Captured after mixing, from the first layer's input: the embedding module's own hooks run before mixing.
    seen: list[Tensor] = []
    first_layer = next(m for m in encoder.model.modules() if isinstance(m, nn.ModuleList))[0]
    handle = first_layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
    mixed_logits(encoder, batch, Mixing(position="after_layer_norm", padding=padding))
    handle.remove()
    types = {"token_type_ids": batch.token_type_ids} if family in WITH_TOKEN_TYPES else {}
    with torch.no_grad():
        first = module(input_ids=batch.input_ids, **types)
        second = module(input_ids=batch.input_ids[batch.partner], **{k: v[batch.partner] for k, v in types.items()})
        if padding == "zero":
            first = first * batch.attention_mask[..., None]
            second = second * batch.attention_mask[batch.partner][..., None]
        lam = batch.lam[:, None, None]
        expected = lam * first + (1 - lam) * second
        if family == "deberta-v2":
            expected = expected * union[..., None]
        if family == "electra":
            expected = encoder.model.electra.embeddings_project(expected)
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-5)


@every_family
def test_embedding_outputs_are_not_fed_as_word_embeddings(family: str) -> None:
    """model.embeddings(ids) as inputs_embeds would apply positions and LayerNorm twice."""
    encoder = tiny_encoder(family, **({"embedding_size": 16} if family in ("electra", "deberta-v2") else {}))
    batch = tiny_batch(encoder.config)
    lam = batch.lam[:, None, None]
    mask = mixed_attention_mask(batch.attention_mask, batch.partner, batch.lam, batch.num_rows)
    with torch.no_grad():
        outputs = encoder._container(input_ids=batch.input_ids)
        twice = encoder.model(
            inputs_embeds=lam * outputs + (1 - lam) * outputs[batch.partner], attention_mask=mask
        ).logits
    assert (mixed_logits(encoder, batch) - twice).abs().max() > 1e-2


@every_mixing
@pytest.mark.parametrize("family", WITH_TOKEN_TYPES)
def test_token_types_are_not_zeroed(family: str, mixing: Mixing) -> None:
    encoder = tiny_encoder(family)
    batch = tiny_batch(encoder.config)
    zeroed = replace(batch, token_type_ids=torch.zeros_like(batch.token_type_ids))
    assert (mixed_logits(encoder, batch, mixing) - mixed_logits(encoder, zeroed, mixing)).abs().max() > 1e-2
    # The partner's types count as well, not only the first row's.
    of_partner = batch.token_type_ids.clone()
    of_partner[2] = 0
    changed = mixed_logits(encoder, replace(batch, token_type_ids=of_partner), mixing)
    assert (mixed_logits(encoder, batch, mixing)[0] - changed[0]).abs().max() > 1e-3


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in WITH_TOKEN_TYPES])
def test_token_types_of_the_tokenizer_do_not_reach_models_without_them(family: str) -> None:
    encoder = tiny_encoder(family)
    with_types, without = tiny_batch(encoder.config), tiny_batch(encoder.config, token_types=False)
    for mixing in ALL_MIXINGS:
        assert torch.equal(mixed_logits(encoder, with_types, mixing), mixed_logits(encoder, without, mixing))
    with torch.no_grad():
        assert torch.equal(encoder.clean(with_types).logits, encoder.clean(without).logits)


@pytest.mark.parametrize("family", WITH_TOKEN_TYPES)
def test_rows_without_token_types_are_rows_of_type_zero(family: str) -> None:
    encoder = tiny_encoder(family)
    without = tiny_batch(encoder.config, token_types=False)
    zeros = replace(without, token_type_ids=torch.zeros_like(without.input_ids))
    for mixing in ALL_MIXINGS:
        expected = mixed_logits(encoder, zeros, mixing)
        torch.testing.assert_close(mixed_logits(encoder, without, mixing), expected, rtol=1e-6, atol=1e-6)


@every_mixing
@every_family
def test_the_mask_is_the_union_of_a_right_padded_pair(family: str, mixing: Mixing) -> None:
    encoder = tiny_encoder(family)
    batch = tiny_batch(encoder.config, lengths=(5, 11), partner=(1, 0), lam=(0.5, 0.5))
    seen: list[Tensor] = []
    handle = encoder.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    logits = mixed_logits(encoder, batch, mixing)
    handle.remove()
    assert seen[0].tolist() == [[1] * 11, [1] * 11]
    # A token of the longer row, past the end of the shorter: the overlap would not see it.
    ids = batch.input_ids.clone()
    ids[1, 8] = 5 if ids[1, 8] != 5 else 6
    assert (mixed_logits(encoder, replace(batch, input_ids=ids), mixing) - logits).abs().max() > 1e-3


@every_family
def test_mixing_embeddings_differs_from_mixing_ids(family: str) -> None:
    encoder = tiny_encoder(family)
    batch = tiny_batch(encoder.config, lengths=(9, 9, 9, 9), token_types=False)
    lam = batch.lam[:, None]
    ids = (lam * batch.input_ids + (1 - lam) * batch.input_ids[batch.partner]).round().long()
    of_ids = plain_logits(encoder.model, ids, batch.attention_mask, None)
    assert (mixed_logits(encoder, batch) - of_ids).abs().max() > 1e-2


@every_family
def test_zero_padding_and_pad_embeddings_differ(family: str) -> None:
    encoder = tiny_encoder(family)
    batch = tiny_batch(encoder.config)
    difference = mixed_logits(encoder, batch) - mixed_logits(encoder, batch, Mixing(padding="zero"))
    assert difference.abs().max() > 1e-3


@every_mixing
@every_family
def test_several_mixed_rows_and_partners_outside_the_clean_rows(family: str, mixing: Mixing) -> None:
    """Mixed row m has clean row m % B as its first row; partners may be rows B and above."""
    encoder = tiny_encoder(family)
    partner, lam = (3, 0, 1, 2, 3, 1), (0.2, 0.9, 0.4, 0.6, 1.0, 0.5)
    batch = tiny_batch(encoder.config, num_rows=2, partner=partner, lam=lam)
    logits = mixed_logits(encoder, batch, mixing)
    assert logits.shape == (6, 3)
    for row in range(6):
        pair = tiny_batch(encoder.config, partner=None, lam=None)
        rows = [row % 2, partner[row]]
        alone = replace(
            pair,
            input_ids=pair.input_ids[rows],
            attention_mask=pair.attention_mask[rows],
            token_type_ids=pair.token_type_ids[rows],
            partner=torch.tensor([1]),
            lam=torch.tensor([lam[row]]),
            num_rows=1,
        )
        torch.testing.assert_close(mixed_logits(encoder, alone, mixing)[0], logits[row], rtol=1e-5, atol=1e-5)
