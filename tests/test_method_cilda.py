"""CILDA: the student minimises, the generator maximises, the teacher gets no gradient."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from method_runs import ends_of, run_method, save_masked_lm
from tiny_models import tiny_batch, tiny_config, tiny_encoder, tiny_tokenizer
from toy import losses, records
from transformers import AutoModelForMaskedLM

from mixkd_fast.data.batching import Batch
from mixkd_fast.encoder import Encoder
from mixkd_fast.errors import ConfigurationError, ModelError
from mixkd_fast.frozen_teacher import FrozenTeacher
from mixkd_fast.methods import CILDA, MixKD, Moment
from mixkd_fast.methods.cilda import Adversary, _placed, reverse_gradient
from mixkd_fast.methods.masked_tokens import mask_tokens

MOMENT = Moment(0, 10, 0.0)


def _batch(**options: Any) -> Batch:
    batch = tiny_batch(tiny_config("bert"), **options)
    return replace(batch, mean_tokens=batch.num_tokens / batch.num_rows)


def _parts(frozen: bool = True) -> tuple[Encoder, Any, Adversary]:
    student = tiny_encoder("bert", layers=2, seed=1, hidden_dropout_prob=0.0)
    teacher = FrozenTeacher(tiny_encoder("bert", seed=2, hidden_size=24).requires_grad_(not frozen), lambda: "")
    torch.manual_seed(3)
    generator = Encoder(AutoModelForMaskedLM.from_config(tiny_config("bert")).eval())
    setting: Any = SimpleNamespace(student=student, teacher=teacher, tokenizer=tiny_tokenizer())
    return student, teacher, Adversary(setting, generator, 8)


def _terms(method: CILDA, batch: Batch, parts: Any, seed: int = 5) -> Any:
    torch.manual_seed(seed)
    return method.terms(batch, *parts, MOMENT)


@pytest.mark.parametrize("straight_through", [True, False])
def test_terms_are_their_equations(straight_through: bool) -> None:
    batch, (student, teacher, adversary) = _batch(), _parts()
    method = CILDA(
        generator="g",
        adversarial_weight=0.5,
        contrastive_weight=2.0,
        temperature=3.0,
        straight_through=straight_through,
        sm_weight=1.0,
        tmkd_weight=0.3,
    )
    terms = _terms(method, batch, (student, teacher, adversary))
    assert list(terms) == ["mle", "kd", "sm", "tmkd", "adversarial", "contrastive"]
    plain = MixKD(kd_weight=1.0, tmkd_weight=0.3, temperature=3.0).terms(batch, student, teacher, None, MOMENT)
    for name, value in plain.items():
        torch.testing.assert_close(terms[name], value, atol=1e-5, rtol=1e-4)
    torch.manual_seed(5)
    masked = mask_tokens(batch, adversary.vocabulary, 0.3, keep_and_replace=False)
    words = method.rewrite(masked, adversary)
    readings = []
    for model in (student.model, teacher.model):
        embeddings: Any = model
        rows = embeddings.bert.embeddings.word_embeddings(batch.input_ids).clone()
        for number, place in enumerate(masked.places_K.tolist()):
            rows[place // 12, place % 12] = words[number] @ embeddings.bert.embeddings.word_embeddings.weight
        inputs = {"attention_mask": batch.attention_mask, "token_type_ids": batch.token_type_ids}
        rewritten = model(inputs_embeds=rows, output_hidden_states=True, **inputs)
        readings.append((rewritten, model(input_ids=batch.input_ids, output_hidden_states=True, **inputs)))
    own, theirs = (reading[0].logits.double() / 3.0 for reading in readings)
    kl = (theirs.softmax(-1) * (theirs.log_softmax(-1) - own.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(terms["adversarial"].double(), 0.5 * 9 * kl, atol=1e-4, rtol=1e-3)
    expected = torch.zeros(4, dtype=torch.float64)
    for one, other in zip(*readings, strict=True):
        s, t = (
            torch.stack(
                [
                    torch.cat([state[row, :length].mean(0) for state in reading.hidden_states[1:]])
                    for row, length in enumerate([9, 5, 7, 12])
                ]
            )
            for reading in (one, other)
        )
        s = F.normalize(s.double() @ adversary.student_projection.weight.double().T, dim=-1)
        t = F.normalize(t.double() @ adversary.teacher_projection.weight.double().T, dim=-1)
        for i in range(4):
            scores = torch.stack([s[i] @ t[j] for j in range(4)]) / 0.1
            expected[i] += 2.0 * 0.5 * (torch.logsumexp(scores, 0) - scores[i])
    torch.testing.assert_close(terms["contrastive"].double(), expected, atol=1e-3, rtol=1e-3)


def test_the_generator_goes_uphill_and_the_student_downhill() -> None:
    """The gradients of the same term, with the reversal and without it (factor -1)."""
    batch, parts = _batch(), _parts()
    student, _, adversary = parts
    watched = [adversary.generator.model.cls.predictions.bias, student.model.bert.encoder.layer[0].output.dense.weight]
    found = {}
    for factor in (1.0, 2.0, -1.0):
        # model_copy does not validate: -1 is no allowed option, but turns the reversal off.
        method = CILDA(generator="g", contrastive_weight=0.0).model_copy(update={"generator_weight": factor})
        found[factor] = torch.autograd.grad(_terms(method, batch, parts)["adversarial"].sum(), watched)
    generator, own = zip(*(found[factor] for factor in (1.0, 2.0, -1.0)), strict=True)
    assert generator[0].abs().max() > 1e-6
    torch.testing.assert_close(generator[0], -generator[2])
    torch.testing.assert_close(generator[1], 2 * generator[0])
    assert torch.equal(own[0], own[2]) and own[0].any()


def test_a_step_along_the_generator_s_gradient_raises_the_divergence() -> None:
    batch, parts = _batch(), _parts()
    method = CILDA(generator="g", contrastive_weight=0.0, straight_through=False)
    before = _terms(method, batch, parts)["adversarial"].sum()
    before.backward()
    with torch.no_grad():
        for parameter in parts[2].generator.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad / (1e-8 + parameter.grad.norm())
    assert _terms(method, batch, parts)["adversarial"].sum() > before


def test_no_gradient_enters_the_teacher_s_weights() -> None:
    batch, parts = _batch(), _parts()
    sum(term.sum() for term in _terms(CILDA(generator="g"), batch, parts).values()).backward()
    student, teacher, adversary = parts
    assert not any(p.grad is not None for p in teacher.model.parameters())
    own = {id(p) for p in teacher.model.parameters()}
    assert not own & {id(p) for p in [*adversary.parameters(), *student.parameters()]}
    for module in (adversary.generator, adversary.student_projection, adversary.teacher_projection, student):
        assert any(p.grad is not None and p.grad.any() for p in module.parameters())


def test_clean_rows_alone_leave_the_generator_out_of_the_contrast() -> None:
    batch, parts = _batch(), _parts()
    for rows, reaches in (("both", True), ("clean", False)):
        method = CILDA(generator="g", contrastive_rows=rows)
        loss = _terms(method, batch, parts)["contrastive"].sum()
        gradients = torch.autograd.grad(loss, list(parts[2].generator.parameters()), allow_unused=True)
        assert any(g is not None and g.any() for g in gradients) == reaches


def test_equal_models_do_not_differ_on_rewritten_rows() -> None:
    batch, (student, _, first) = _batch(), _parts()
    alike = FrozenTeacher(student, str)
    setting: Any = SimpleNamespace(student=student, teacher=alike, tokenizer=tiny_tokenizer())
    parts = (student, alike, Adversary(setting, first.generator, 8))
    terms = _terms(CILDA(generator="g", contrastive_weight=0.0), batch, parts)
    torch.testing.assert_close(terms["adversarial"], torch.zeros(4), atol=1e-5, rtol=0)


def test_rewritten_words_are_words() -> None:
    batch, (_, _, adversary) = _batch(width=20), _parts()
    masked = mask_tokens(batch, adversary.vocabulary, 0.3, keep_and_replace=False)
    for straight_through in (True, False):
        words = CILDA(generator="g", straight_through=straight_through).rewrite(masked, adversary)
        torch.testing.assert_close(words.sum(-1), torch.ones(len(words)))
        assert not words[:, adversary.vocabulary.special_V].any()
        assert ((words.max(-1).values - 1).abs().max() < 1e-6) == straight_through
        table: Any = adversary.generator.word_table
        own = table(batch.input_ids)
        placed = _placed(own, words @ table.weight, masked)
        changed = (placed != own).any(-1).flatten()
        assert set(changed.nonzero().flatten().tolist()) <= set(masked.places_K.tolist())


def test_padding_changes_nothing() -> None:
    parts = _parts()
    method = CILDA(generator="g")
    narrow, wide = (_terms(method, _batch(width=width), parts) for width in (12, 20))
    for name, value in narrow.items():
        torch.testing.assert_close(wide[name], value, atol=1e-4, rtol=1e-3)


def test_reversal_is_exact() -> None:
    values = torch.randn(3, requires_grad=True)
    reversed_values = reverse_gradient(values, 0.5)
    assert torch.equal(reversed_values, values)
    (reversed_values * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [-0.5, -1.0, -1.5]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_run_trains_all_parts(tmp_path: Path, stage: int) -> None:
    method = {
        "name": "cilda",
        "generator": str(save_masked_lm(tmp_path / "lm")),
        "mle_weight": 0.0,
        "projection_size": 16,
    }
    sections: dict[str, Any] = {"deepspeed": {"zero_optimization": {"stage": stage}}}
    run_method(tmp_path, method, **sections)
    for name in ("adversarial", "kd", "contrastive"):
        first, last = ends_of(tmp_path / "run", name)
        assert last < 0.9 * first, name
    assert len(records(tmp_path / "run")) == 20


def test_stages_agree(tmp_path: Path) -> None:
    method = {"name": "cilda", "generator": str(save_masked_lm(tmp_path / "lm")), "projection_size": 16}
    for stage in (0, 3):
        sections: dict[str, Any] = {"deepspeed": {"zero_optimization": {"stage": stage}}}
        run_method(tmp_path, method, f"stage{stage}", training={"steps": 3}, **sections)
    assert losses(tmp_path / "stage3") == pytest.approx(losses(tmp_path / "stage0"), abs=1e-3)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    generator = str(save_masked_lm(tmp_path / "lm"))
    with pytest.raises(ModelError, match=r"zero_stage = 3"):
        run_method(tmp_path, {"name": "cilda", "generator": generator}, "cut", teacher_options={"zero_stage": 3})
    with pytest.raises(ConfigurationError, match="quantization"):
        run_method(
            tmp_path, {"name": "cilda", "generator": generator}, "int8", teacher_options={"quantization": "int8"}
        )
    other = str(save_masked_lm(tmp_path / "other", tokenizer=tiny_tokenizer()))
    with pytest.raises(ModelError, match=r"method\.generator.*tokenizers differ"):
        run_method(tmp_path, {"name": "cilda", "generator": other}, "foreign")


@pytest.mark.parametrize("term", ["mle", "kd", "sm", "tmkd", "adversarial"])
def test_the_contrast_alone_trains_no_classifier(term: str) -> None:
    alone: dict[str, Any] = dict.fromkeys(("mle_weight", "kd_weight", "sm_weight", "tmkd_weight"), 0.0)
    assert not CILDA(generator="g", **alone, adversarial_weight=0.0).trains_classifier
    assert CILDA(generator="g", **{**alone, "adversarial_weight": 0.0, f"{term}_weight": 1.0}).trains_classifier
