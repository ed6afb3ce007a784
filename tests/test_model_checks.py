"""Whether models, tokenizers and task fit together: each refusal names both sides."""

from typing import Any

import pytest
from tiny_models import (
    FAMILIES,
    LABELS,
    MAX_POSITIONS,
    VOCAB_SIZE,
    plain_logits,
    tiny_batch,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
)
from tokenizers import normalizers
from transformers import AutoConfig

from mixkd_fast.errors import ModelError
from mixkd_fast.models import (
    check_max_length,
    check_num_labels,
    check_same_tokenizer,
    check_vocabulary,
    count_parameters,
    describe_model,
    max_positions,
    word_embedding_size,
)

every_family = pytest.mark.parametrize("family", FAMILIES)


def test_tokenizers_with_other_vocabularies_are_refused() -> None:
    with pytest.raises(ModelError, match=r"the teacher's has 96 tokens with '.*' as id \d+, the student's 80"):
        check_same_tokenizer(tiny_tokenizer(), tiny_tokenizer(vocab_size=80))
    with pytest.raises(ModelError, match="the tokenizers differ"):
        check_same_tokenizer(tiny_tokenizer(), tiny_tokenizer("bpe"))


def test_tokenizers_with_other_special_tokens_are_refused() -> None:
    other = tiny_tokenizer()
    other.pad_token = "[MASK]"
    with pytest.raises(ModelError, match=r"special tokens: .*\[PAD\].*\(teacher\), .*\(student\)"):
        check_same_tokenizer(tiny_tokenizer(), other)


def test_tokenizers_that_split_differently_are_refused() -> None:
    other = tiny_tokenizer()
    other.backend_tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    with pytest.raises(ModelError, match=r"'.*' becomes .* \(teacher\) and .* \(student\)"):
        check_same_tokenizer(tiny_tokenizer(), other)


def test_padded_vocabularies_are_fine_and_short_ones_are_refused() -> None:
    check_vocabulary(tiny_model("bert", vocab_size=128), tiny_tokenizer(), "teacher")
    with pytest.raises(ModelError, match=f"the teacher's word embeddings have 90 rows, .* needs {VOCAB_SIZE}"):
        check_vocabulary(tiny_model("bert", vocab_size=90), tiny_tokenizer(), "teacher")


def test_number_of_labels_must_agree() -> None:
    check_num_labels(tiny_config("bert", 3), 3, LABELS)
    with pytest.raises(ModelError, match="the teacher gives 2 logits, but the task has 3 labels"):
        check_num_labels(tiny_config("bert", 2), 3)


def test_order_of_label_names_must_agree() -> None:
    config = tiny_config("bert", id2label={0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"})
    check_num_labels(config, 3, ["contradiction", "neutral", "entailment"])
    check_num_labels(config, 3, ["no", "maybe", "yes"])
    check_num_labels(config, 3)
    with pytest.raises(ModelError, match=r"\['CONTRADICTION', 'NEUTRAL', 'ENTAILMENT'\], the task's \['entailment'"):
        check_num_labels(config, 3, LABELS)


@pytest.mark.parametrize(
    ("family", "fields", "limit"),
    [
        ("bert", {}, MAX_POSITIONS),
        ("distilbert", {}, MAX_POSITIONS),
        ("electra", {}, MAX_POSITIONS),
        ("modernbert", {}, MAX_POSITIONS),
        # padding_idx 1: positions start at 2.
        ("roberta", {}, MAX_POSITIONS - 2),
        ("xlm-roberta", {"pad_token_id": 1}, MAX_POSITIONS - 2),
        ("mpnet", {}, MAX_POSITIONS - 2),
        ("deberta-v2", {}, None),
        ("deberta-v2", {"position_biased_input": True}, MAX_POSITIONS),
        ("xlnet", {}, None),
    ],
)
def test_longest_sequence_of_a_family(family: str, fields: dict[str, Any], limit: int | None) -> None:
    if family in FAMILIES:
        config = tiny_config(family, **fields)
    else:
        config = (
            AutoConfig.for_model(family, max_position_embeddings=MAX_POSITIONS if limit else None, **fields)
            if family != "xlnet"
            else AutoConfig.for_model(family)
        )
    assert max_positions(config) == limit
    if limit is None:
        check_max_length(config, 100_000, "student")
        return
    check_max_length(config, limit, "student")
    with pytest.raises(ModelError, match=f"task.max_length is {limit + 1}, but the student .* for {limit} tokens"):
        check_max_length(config, limit + 1, "student")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_sequence_runs(family: str) -> None:
    """The limit is the model's own: at it the forward works, one token more fails where positions are a table."""
    model = tiny_model(family)
    limit = max_positions(model.config) or MAX_POSITIONS
    batch = tiny_batch(model.config, lengths=(limit, 4), partner=None, lam=None)
    assert plain_logits(model, batch.input_ids, batch.attention_mask, batch.token_type_ids).isfinite().all()
    if family in ("modernbert", "deberta-v2"):
        return
    longer = tiny_batch(model.config, lengths=(limit + 1, 4), partner=None, lam=None)
    with pytest.raises((IndexError, RuntimeError)):
        plain_logits(model, longer.input_ids, longer.attention_mask, longer.token_type_ids)


def test_model_facts() -> None:
    model = tiny_model("distilbert")
    assert describe_model(model) == {"model_type": "distilbert", "layers": 4, "hidden_size": 16}
    assert count_parameters(model) == sum(tensor.numel() for tensor in model.state_dict().values())
    assert word_embedding_size(model) == VOCAB_SIZE
