"""One forward for clean and mixed rows, and the fused forward of BERT-like models: the same numbers, less work."""

import copy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, tiny_batch, tiny_encoder
from torch import Tensor, nn

from mixkd_fast.data.batching import Batch
from mixkd_fast.encoder import Encoder
from mixkd_fast.mixing import Mixing

FUSED = ("bert", "roberta", "distilbert", "electra")
MIXINGS = [
    Mixing(position=p, padding=z) for p in ("before_layer_norm", "after_layer_norm") for z in ("embedding", "zero")
]
every_mixing = pytest.mark.parametrize("mixing", MIXINGS, ids=lambda m: f"{m.position}-{m.padding}")
every_fused = pytest.mark.parametrize("family", FUSED)


def double_pair(family: str, **fields: Any) -> tuple[Encoder, Encoder]:
    """The same fp64 model behind its own forward and behind the fused one."""
    plain, fused = (tiny_encoder(family, **fields) for _ in range(2))
    plain.double(), fused.double()
    assert fused.fuse() == ""
    return plain, fused


def double(batch: Batch) -> Batch:
    assert batch.lam is not None
    return replace(batch, lam=batch.lam.double())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@every_mixing
@pytest.mark.parametrize("family", FAMILIES)
def test_one_forward_gives_what_two_give(family: str, mixing: Mixing) -> None:
    encoder = tiny_encoder(family).double()
    batch = double(tiny_batch(encoder.config, num_rows=3, partner=(2, 0, 3), lam=(0.3, 1.0, 0.0)))
    clean, mixed = encoder.both(batch, mixing)
    torch.testing.assert_close(clean.logits, encoder.clean(batch).logits, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mixed.logits, encoder.mixed(batch, mixing).logits, rtol=1e-10, atol=1e-10)


def test_one_forward_gives_hidden_states_token_for_token() -> None:
    encoder = tiny_encoder("bert").double()
    batch = double(tiny_batch(encoder.config))
    outputs = encoder.both(batch, Mixing(), output_hidden_states=True)
    separate = (
        encoder.clean(batch, output_hidden_states=True),
        encoder.mixed(batch, Mixing(), output_hidden_states=True),
    )
    for output, other in zip(outputs, separate, strict=True):
        assert len(output.hidden_states) == 5
        for states, other_states in zip(output.hidden_states, other.hidden_states, strict=True):
            torch.testing.assert_close(states, other_states, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("padding", ["embedding", "zero"])
@pytest.mark.parametrize("mixed_rows", [1, 2])
@every_fused
def test_fused_logits_and_gradients_are_the_models(family: str, mixed_rows: int, padding: Any) -> None:
    plain, fused = double_pair(family)
    mixing = Mixing(padding=padding, mixed_rows=mixed_rows)
    partner, lam = (2, 0, 3, 3, 1, 1)[: 3 * mixed_rows], (0.3, 1.0, 0.0, 0.6, 0.2, 0.9)[: 3 * mixed_rows]
    batch = double(tiny_batch(plain.config, num_rows=3, partner=partner, lam=lam))
    results = []
    for encoder in (plain, fused):
        clean, mixed = encoder.both(batch, mixing)
        (clean.logits.square().sum() + 2 * mixed.logits.square().sum()).backward()
        results.append((clean.logits, mixed.logits, encoder.clean(batch).logits, encoder.mixed(batch, mixing).logits))
    for own, other in zip(*results, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-9)
    expected, found = gradients(plain.model), gradients(fused.model)
    # A pooler's or a key's bias without influence may be left out by either.
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@every_fused
def test_fused_forward_counts_positions_and_types_as_the_model(family: str) -> None:
    """Rows without token types, a pad token inside the text, rows of one width more."""
    plain, fused = double_pair(family)
    batch = double(tiny_batch(plain.config, token_types=False, width=17))
    batch.input_ids[1, 2] = plain.config.pad_token_id
    for own, other in zip(plain.both(batch, Mixing()), fused.both(batch, Mixing()), strict=True):
        torch.testing.assert_close(own.logits, other.logits, rtol=1e-9, atol=1e-9)


@every_fused
def test_fused_bf16_is_as_near_the_truth_as_the_models_own(family: str) -> None:
    truth, fused = double_pair(family)
    plain = tiny_encoder(family).to(torch.bfloat16)
    low = fused.to(torch.bfloat16)
    batch = tiny_batch(truth.config)
    with torch.no_grad():
        exact = torch.cat([output.logits for output in truth.both(double(batch), Mixing())])
        errors = [
            (torch.cat([output.logits.double() for output in encoder.both(batch, Mixing())]) - exact).norm()
            for encoder in (low, plain)
        ]
    assert errors[0] <= 2 * errors[1] + 1e-3 * exact.norm()


def test_autocast_computes_the_layers_in_bf16_and_keeps_fp32_gradients() -> None:
    truth, fused = double_pair("bert")
    fused.float()
    batch = tiny_batch(fused.config)
    with torch.autocast("cpu", torch.bfloat16):
        clean, mixed = fused.both(batch, Mixing())
    logits = torch.cat([clean.logits, mixed.logits]).double()
    exact = torch.cat([output.logits for output in truth.both(double(batch), Mixing())])
    assert 1e-5 < (logits - exact).norm() / exact.norm() < 0.05
    logits.sum().backward()
    assert {p.grad.dtype for p in fused.model.parameters() if p.grad is not None} == {torch.float32}


def test_dropout_is_drawn_anew_and_repeated_by_the_seed() -> None:
    encoder = tiny_encoder("bert", hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2)
    assert encoder.fuse() == ""
    batch = tiny_batch(encoder.config)
    quiet = encoder.clean(batch).logits
    encoder.train()
    draws = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        draws.append(encoder.clean(batch).logits)
    assert torch.equal(draws[0], draws[2]) and not torch.allclose(draws[0], draws[1])
    assert not torch.allclose(draws[0], quiet)
    torch.manual_seed(0)
    mean = torch.stack([encoder.clean(batch).logits.detach() for _ in range(400)]).mean(0)
    assert (mean - quiet).abs().max() < 0.5 * (draws[0] - quiet).abs().max() + 0.1


def test_a_frozen_models_weights_are_cast_once_and_follow_changes() -> None:
    encoder = tiny_encoder("bert").requires_grad_(False)
    assert encoder.fuse() == "" and encoder.fused is not None
    batch = tiny_batch(encoder.config)
    before = encoder.clean(batch).logits
    kept = encoder.fused._weights(torch.float32)
    assert encoder.fused._weights(torch.float32) is kept
    encoder.model.bert.encoder.layer[0].output.dense.weight.mul_(1.5)
    assert not torch.allclose(encoder.clean(batch).logits, before)


@pytest.mark.parametrize("family", ["modernbert", "deberta-v2"])
def test_other_families_say_why_they_are_not_fused(family: str) -> None:
    encoder = tiny_encoder(family)
    assert "is not one of" in encoder.fuse() and encoder.fused is None


def test_a_replaced_layer_is_not_fused() -> None:
    class Adapter(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    encoder = tiny_encoder("bert")
    encoder.model.bert.encoder.layer[1].attention.self.query = Adapter(16, 16)
    assert "Adapter" in encoder.fuse()


def test_hooks_are_obeyed() -> None:
    """With a hook inside, the model's own forward runs; afterwards the fused one again."""
    encoder = tiny_encoder("bert")
    encoder.fuse()
    batch = tiny_batch(encoder.config)
    before = encoder.clean(batch).logits
    handle = encoder.model.bert.encoder.layer[1].register_forward_hook(lambda module, args, output: output * 2)
    assert not torch.allclose(encoder.clean(batch).logits, before)
    handle.remove()
    assert torch.equal(encoder.clean(batch).logits, before)


@pytest.mark.slow
def test_compiled_layers_serve_every_shape_with_few_compilations() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    encoder = tiny_encoder("bert")
    encoder.fuse()
    assert encoder.fused is not None
    from mixkd_fast import fused_encoder

    counter = CompileCounterWithBackend("aot_eager")
    encoder.fused._layers = torch.compile(fused_encoder.run_layers, dynamic=True, backend=counter)
    for lengths in [(9, 5, 7, 12), (20, 5, 7, 3), (30, 2, 7, 3), (4, 5, 7, 8)]:
        batch = tiny_batch(encoder.config, lengths=lengths)
        clean, mixed = encoder.both(batch, Mixing())
        eager = tiny_encoder("bert").both(batch, Mixing())
        torch.testing.assert_close(clean.logits, eager[0].logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mixed.logits, eager[1].logits, rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 2


def test_why_padding_stays_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from mixkd_fast.model_preparation import _unpadded_notes

    gpu, right = torch.device("cuda"), SimpleNamespace(padding_side="right")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    wide, dropping = (tiny_encoder("bert", hidden_size=64, attention_probs_dropout_prob=rate) for rate in (0.0, 0.1))
    for encoder in (wide, dropping):
        assert encoder.fuse() == ""
    notes = partial(_unpadded_notes, device=gpu, tokenizer=right, reason="")
    assert notes(wide, torch.bfloat16) == []
    assert "the dropout of its attention is 0.1" in notes(dropping, torch.bfloat16)[0]
    assert dropping.fused is not None and dropping.fused.why_padded(gpu, torch.bfloat16, training=False) == ""
    assert "computed in float32" in notes(wide, torch.float32)[0]
    assert "pads on the left" in notes(wide, torch.bfloat16, tokenizer=SimpleNamespace(padding_side="left"))[0]
    assert "no fused layers" in notes(wide, torch.bfloat16, reason="no fused layers")[0]
    assert "is for a GPU" in notes(wide, torch.bfloat16, device=torch.device("cpu"))[0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "older than compute capability 8.0" in notes(wide, torch.bfloat16)[0]


@pytest.mark.parametrize("mixed_rows", [1, 2])
@every_fused
def test_without_padding_nothing_changes(family: str, mixed_rows: int) -> None:
    """Logits and gradients of the packed layers, with lam = 0 and 1 among the pairs, whose mixed rows are shorter."""
    padded, packed = double_pair(family)
    other = tiny_encoder(family).double()
    assert other.fuse() == "" and other.fused is not None
    other.fused.unpadded = True
    lam = torch.tensor((0.3, 1.0, 0.0, 0.6, 0.2, 0.9)[: 3 * mixed_rows])
    partner = torch.tensor((2, 0, 3, 3, 1, 1)[: 3 * mixed_rows])
    batch = tiny_batch(padded.config, num_rows=3, partner=partner.tolist(), lam=lam.tolist(), width=14)
    lengths = torch.tensor((9, 5, 7, 12))
    own = lengths[:3].repeat(mixed_rows)
    mixed_lengths = torch.maximum(own * (lam > 0), lengths[partner] * (lam < 1))
    batch = double(replace(batch, row_lengths=lengths, mixed_lengths=mixed_lengths))
    results = []
    for encoder in (packed, other):
        clean, mixed = encoder.both(batch, Mixing(mixed_rows=mixed_rows))
        (clean.logits.square().sum() + 2 * mixed.logits.square().sum()).backward()
        results.append((clean.logits, mixed.logits, encoder.clean(batch).logits, encoder.mixed(batch, Mixing()).logits))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)
    expected, found = gradients(packed.model), gradients(other.model)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_batches_know_the_lengths_that_masks_have() -> None:
    from test_batching import PADDING, make_rows

    from mixkd_fast.data.batching import GlobalBatches, Padding, micro_batches
    from mixkd_fast.mix import mixed_attention_mask

    rows = make_rows(60)
    draw = GlobalBatches(60, 16, seed=0, mixing=Mixing(mixed_rows=2)).draw(0)
    assert draw.lam is not None
    draw.lam[:3] = 1.0, 0.0, 1.0
    for batch in micro_batches(rows, draw, 0, 1, 8, PADDING):
        assert batch.partner is not None and batch.lam is not None
        assert batch.row_lengths is not None and batch.mixed_lengths is not None
        assert torch.equal(batch.row_lengths, batch.attention_mask.sum(1))
        mask = mixed_attention_mask(batch.attention_mask, batch.partner, batch.lam, batch.num_rows)
        assert torch.equal(batch.mixed_lengths, mask.sum(1))
    left = micro_batches(rows, draw, 0, 1, 8, Padding(999, "left"))[0]
    assert left.row_lengths is None and left.mixed_lengths is None


@pytest.mark.parametrize("fused", [False, True])
def test_zero_padding_leaves_clean_rows_that_are_padded_on_the_left_alone(fused: bool) -> None:
    """Their first token is a pad token; its embedding is zero in a mixed row only."""
    encoder = tiny_encoder("bert").double()
    if fused:
        encoder.fuse()
    batch = double(tiny_batch(encoder.config))
    turned = {name: getattr(batch, name).flip(1) for name in ("input_ids", "attention_mask", "token_type_ids")}
    batch = replace(batch, **turned, row_lengths=None)
    mixing = Mixing(padding="zero")
    clean, mixed = encoder.both(batch, mixing)
    torch.testing.assert_close(clean.logits, encoder.clean(batch).logits, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mixed.logits, encoder.mixed(batch, mixing).logits, rtol=1e-10, atol=1e-10)


@every_fused
def test_a_copy_answers_with_its_own_weights(family: str) -> None:
    encoder = tiny_encoder(family)
    encoder.fuse()
    batch = tiny_batch(encoder.config)
    twin = copy.deepcopy(encoder)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
    assert not torch.allclose(twin.clean(batch).logits, encoder.clean(batch).logits)
    torch.testing.assert_close(twin.clean(batch).logits, tiny_encoder(family).clean(batch).logits, rtol=1e-4, atol=1e-4)


def test_a_model_with_a_forward_of_its_own_is_not_fused() -> None:
    encoder = tiny_encoder("bert")
    encoder.model.forward = encoder.model.forward
    assert "not that of transformers" in encoder.fuse()


def test_a_layer_replaced_later_and_backward_hooks_are_noticed() -> None:
    encoder = tiny_encoder("bert")
    assert encoder.fuse() == "" and encoder.fused is not None
    attention = encoder.model.bert.encoder.layer[1].attention.self
    original = attention.query
    attention.query = torch.nn.Linear(original.in_features, original.out_features)
    assert encoder.fused.why_not_now() == "a layer has been replaced"
    batch = tiny_batch(encoder.config, [5, 3])
    torch.testing.assert_close(encoder.clean(batch).logits, Encoder(encoder.model).clean(batch).logits)
    attention.query = original
    assert encoder.fused.why_not_now() == ""
    with_hook = original.register_full_backward_hook(lambda *_: None)
    assert encoder.fused.why_not_now() == "a backward hook is registered inside it"
    with_hook.remove()
    assert encoder.fused.why_not_now() == ""


@pytest.mark.slow
def test_every_width_is_compiled_for_teacher_and_student() -> None:
    """More widths than torch.compile allows by itself: beyond its limit it would run the layers eagerly, silently."""
    compiled: dict[str, int] = {"teacher": 0, "student": 0}

    def counting(name: str) -> Any:
        def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
            compiled[name] += 1
            return graph.forward

        return backend

    encoders = {name: tiny_encoder("bert", seed=number) for number, name in enumerate(compiled)}
    encoders["teacher"].requires_grad_(False)
    for name, encoder in encoders.items():
        assert encoder.fuse() == "" and encoder.fused is not None
        encoder.fused.compile(dynamic=False, backend=counting(name))
    widths = range(3, 15)
    for encoder in encoders.values():
        for width in widths:
            encoder.clean(tiny_batch(encoder.config, [width, width - 1]))
    assert compiled == {"teacher": len(widths), "student": len(widths)}
