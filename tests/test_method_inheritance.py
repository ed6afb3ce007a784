"""Masked tokens, and knowledge inheritance over them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from method_runs import RANDOM_STUDENT, run_method, save_masked_lm, term_of
from tiny_models import VOCAB_SIZE, tiny_batch, tiny_config, tiny_encoder, tiny_tokenizer
from toy import losses, toy_tokenizer
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from mixkd_fast.data.batching import Batch
from mixkd_fast.encoder import Encoder
from mixkd_fast.errors import ModelError
from mixkd_fast.methods import Inheritance, Moment
from mixkd_fast.methods.inheritance import MaskedLMHead
from mixkd_fast.methods.masked_tokens import Vocabulary, mask_tokens

METHOD = Inheritance(masked_lm_teacher="somewhere", temperature=2.0)


def _batch(**options: Any) -> Batch:
    batch = tiny_batch(tiny_config("bert"), partner=None, lam=None, **options)
    ids = batch.input_ids.clone()
    ids[:, 0] = 2  # [CLS]
    return replace(batch, input_ids=ids, mean_tokens=batch.num_tokens / batch.num_rows)


def _masked_lm(seed: int = 0, **fields: Any) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(AutoModelForMaskedLM.from_config(tiny_config("bert", **fields)).eval().requires_grad_(False))


def _head(student: Encoder, teacher: Encoder) -> MaskedLMHead:
    torch.manual_seed(1)
    return MaskedLMHead(student, Vocabulary(tiny_tokenizer()), teacher)


def test_only_ordinary_tokens_are_masked() -> None:
    batch, vocabulary = _batch(width=20), Vocabulary(tiny_tokenizer())
    for seed in range(50):
        torch.manual_seed(seed)
        masked = mask_tokens(batch, vocabulary, 0.4, keep_and_replace=False)
        changed = masked.batch.input_ids != batch.input_ids
        assert len(masked.places_K) == round(0.4 * 33) == int(changed.sum()) and masked.valid_K.all()
        assert (masked.batch.input_ids[changed] == 4).all()
        assert (batch.input_ids[changed] > 4).all(), "special tokens stay"
        assert batch.attention_mask[changed].all(), "padding stays"
        assert torch.equal(masked.targets_K, batch.input_ids[masked.rows_K, masked.places_K % 20])


def test_masking_is_15_percent_in_bert_s_shares() -> None:
    config = tiny_config("bert")
    batch, vocabulary = _batch(lengths=[40] * 200), Vocabulary(tiny_tokenizer())
    torch.manual_seed(0)
    masked = mask_tokens(batch, vocabulary, 0.15, keep_and_replace=True)
    new = masked.batch.input_ids.flatten()[masked.places_K]
    assert len(new) == 0.15 * 8000 == len(masked.places_K.unique())
    assert (new == 4).float().mean() == pytest.approx(0.8, abs=0.04)
    assert (new == masked.targets_K).float().mean() == pytest.approx(0.1, abs=0.03)
    others = new[(new != 4) & (new != masked.targets_K)]
    assert len(others) / len(new) == pytest.approx(0.1, abs=0.03) and (others > 4).all()
    positions = (masked.places_K % 40).float()
    assert positions.mean() == pytest.approx(20.0, abs=1.5) and config.pad_token_id not in new


def test_padding_moves_no_mask() -> None:
    vocabulary, found = Vocabulary(tiny_tokenizer()), []
    for width in (12, 20):
        torch.manual_seed(3)
        masked = mask_tokens(_batch(width=width), vocabulary, 0.15, keep_and_replace=True)
        found.append((masked.rows_K, masked.places_K % width, masked.batch.input_ids[:, :12]))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_rows_without_ordinary_tokens_stay_as_they_are() -> None:
    batch = _batch()
    batch = replace(batch, input_ids=torch.where(batch.input_ids == 2, batch.input_ids, 3))
    masked = mask_tokens(batch, Vocabulary(tiny_tokenizer()), 0.15, keep_and_replace=True)
    assert torch.equal(masked.batch.input_ids, batch.input_ids) and not masked.valid_K.any()


@pytest.mark.parametrize("step", [0, 3, 10])
def test_terms_are_their_equation(step: int) -> None:
    batch, student, teacher = _batch(), tiny_encoder("bert", hidden_dropout_prob=0.0), _masked_lm()
    head, moment = _head(student, teacher), Moment(step, 20, 0.0)
    method = METHOD.model_copy(update={"inheritance_share": 0.5, "mask_probability": 0.3})
    torch.manual_seed(7)
    terms = method.terms(batch, student, None, head, moment)
    torch.manual_seed(7)
    masked = mask_tokens(batch, head.vocabulary, 0.3, keep_and_replace=True)
    rate = max(0.0, 1 - step / 10)
    teacher_logits = teacher.model(
        input_ids=masked.batch.input_ids, attention_mask=batch.attention_mask, token_type_ids=batch.token_type_ids
    ).logits.double()
    body = student.model.bert(
        input_ids=masked.batch.input_ids, attention_mask=batch.attention_mask, token_type_ids=batch.token_type_ids
    )
    student_logits = head(body.last_hidden_state).double()
    mlm, inherited = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for place in masked.places_K.tolist():
        row, position = divmod(place, 12)
        own, theirs = student_logits[row, position], teacher_logits[row, position]
        p, log_q = (theirs / 2).softmax(-1), (own / 2).log_softmax(-1)
        mlm[row] += (1 - rate) * F.cross_entropy(own, batch.input_ids[row, position])
        inherited[row] += rate * 4 * (p * (p.log() - log_q)).sum()
    scale = 4 / len(masked.places_K)  # of a mean over masked tokens, once the engine has divided by the 4 rows
    torch.testing.assert_close(terms["mlm"].double(), scale * mlm, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(terms["inheritance"].double(), scale * inherited, atol=1e-4, rtol=1e-4)
    # The gradient is that of the sum.
    expected = torch.autograd.grad(scale * (mlm + inherited).sum(), head.transform.weight, retain_graph=True)[0]
    found = torch.autograd.grad(sum(term.sum() for term in terms.values()), head.transform.weight)[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_the_engine_s_division_gives_the_mean_over_masked_tokens() -> None:
    """Constant loss 1 per token: whatever the micro-batches, the sum of all rows over their number is 1."""
    whole, vocabulary = _batch(lengths=[9, 5, 7, 12, 30, 3]), Vocabulary(tiny_tokenizer())
    for cuts in ([6], [2, 4], [1, 1, 4]):
        total, start = 0.0, 0
        for size in cuts:
            rows = slice(start, start + size)
            part = replace(
                whole,
                input_ids=whole.input_ids[rows],
                attention_mask=whole.attention_mask[rows],
                token_type_ids=None,
                num_rows=size,
                num_tokens=int(whole.attention_mask[rows].sum()),
            )
            masked = mask_tokens(part, vocabulary, 0.15, keep_and_replace=True)
            total += float(masked.per_row(torch.full((len(masked.places_K),), masked.weight)).sum())
            start += size
        assert total / 6 == pytest.approx(1.0)


def test_a_student_that_is_its_teacher_inherits_nothing() -> None:
    batch, student, teacher = _batch(), tiny_encoder("bert", hidden_dropout_prob=0.0), _masked_lm()
    head = _head(student, teacher)
    bert: Any = teacher.model
    student.model.bert.load_state_dict(bert.bert.state_dict(), strict=False)
    transform = bert.cls.predictions.transform
    head.transform.load_state_dict(transform.dense.state_dict())
    head.norm.load_state_dict(transform.LayerNorm.state_dict())
    head.decoder.load_state_dict(bert.cls.predictions.decoder.state_dict())
    student.eval()
    terms = METHOD.terms(batch, student, None, head, Moment(0, 10, 0.0))
    torch.testing.assert_close(terms["inheritance"], torch.zeros(4), atol=1e-5, rtol=0)


def test_the_teacher_gets_no_gradient_and_is_not_asked_in_the_end() -> None:
    batch, student = _batch(), tiny_encoder("bert")
    teacher = _masked_lm().requires_grad_(True)
    head = _head(student, teacher)
    terms = METHOD.terms(batch, student, None, head, Moment(2, 10, 0.0))
    (terms["mlm"] + terms["inheritance"]).sum().backward()
    assert not any(p.grad is not None for p in teacher.parameters())
    assert not any(parameter is own for parameter in teacher.parameters() for own in head.parameters())
    assert head.decoder.weight is student.model.bert.embeddings.word_embeddings.weight, "one parameter for both"
    head.frozen = (None,)
    late = METHOD.terms(batch, student, None, head, Moment(10, 10, 0.0))
    assert not late["inheritance"].any() and late["mlm"].sum() > 0


def test_vocabularies_padded_to_different_sizes_compare_what_they_share() -> None:
    batch, student = _batch(), tiny_encoder("bert", hidden_dropout_prob=0.0)
    wide = _masked_lm(vocab_size=VOCAB_SIZE + 8)
    head = _head(student, wide)
    with torch.no_grad():
        wide.model.cls.predictions.bias[VOCAB_SIZE:] = 50.0  # nonsense that must not count
    torch.manual_seed(2)
    terms = METHOD.terms(batch, student, None, head, Moment(0, 10, 0.0))
    assert terms["inheritance"].max() < 50


def test_narrow_word_embeddings_are_tied_too() -> None:
    student = tiny_encoder("electra")
    head = _head(student, _masked_lm())
    assert head.decoder.weight.shape == (VOCAB_SIZE, 12) and head(torch.zeros(5, 16)).shape == (5, VOCAB_SIZE)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_student_takes_over_what_the_teacher_knows(tmp_path: Path, stage: int) -> None:
    method = {"name": "inheritance", "masked_lm_teacher": str(save_masked_lm(tmp_path / "lm")), "mask_probability": 0.3}
    result = run_method(
        tmp_path,
        method,
        teacher=False,
        training={"learning_rate": 1e-2},
        deepspeed={"zero_optimization": {"stage": stage}},
    )
    # The weights r and 1 - r move both terms; what stands behind them has to fall. This teacher knows nothing of the
    # data, so the divergence rises again once the data outweighs it.
    parts = zip(*(term_of(tmp_path / "run", name) for name in ("inheritance", "mlm")), strict=True)
    behind = [(kd / (1 - step / 20), mlm / (step / 20 or 1)) for step, (kd, mlm) in enumerate(parts)]
    divergence, entropy = (list(values) for values in zip(*behind, strict=True))
    assert sum(divergence[5:10]) < 0.7 * sum(divergence[:5])
    assert sum(entropy[15:]) < 0.9 * sum(entropy[1:6])
    assert entropy[0] == 0 and len(divergence) == 20, "the first step has the teacher alone"
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "student")
    assert all(torch.equal(one, two) for one, two in zip(saved.parameters(), result.student.parameters(), strict=True))
    assert not list((tmp_path / "run").glob("best/*")), "the last step's weights are kept"


def test_stages_and_micro_batches_agree_where_no_mask_is_drawn_anew(tmp_path: Path) -> None:
    method = {"name": "inheritance", "masked_lm_teacher": str(save_masked_lm(tmp_path / "lm")), "mle_weight": 1.0}
    training = {"micro_batch_size": 16, "steps": 4}
    for stage in (0, 2, 3):
        sections = {"deepspeed": {"zero_optimization": {"stage": stage}}, "training": training}
        run_method(tmp_path, method, f"stage{stage}", teacher=False, **sections)
    for stage in (2, 3):
        assert losses(tmp_path / f"stage{stage}") == pytest.approx(losses(tmp_path / "stage0"), abs=1e-4)
    assert term_of(tmp_path / "stage0", "mle")[0] > 0


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"method\.masked_lm_teacher"):
        run_method(tmp_path, {"name": "inheritance", "masked_lm_teacher": str(tmp_path / "no")}, "no", teacher=False)
    other = save_masked_lm(tmp_path / "other", tokenizer=tiny_tokenizer())
    with pytest.raises(ModelError, match=r"method\.masked_lm_teacher.*tokenizers differ"):
        run_method(tmp_path, {"name": "inheritance", "masked_lm_teacher": str(other)}, "foreign", teacher=False)
    tokenizer = toy_tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(ModelError, match="mask_token"):
        Vocabulary(tokenizer)
    assert not METHOD.trains_classifier and RANDOM_STUDENT["model_type"] == "bert"
