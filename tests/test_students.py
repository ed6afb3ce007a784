"""Students: which tensors go where, what is new, random weights, and refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import (
    FAMILIES,
    LABELS,
    VOCAB_SIZE,
    plain_logits,
    save_tiny_model,
    save_tiny_teachers,
    student_of,
    teacher_of,
    tiny_batch,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
    tokenizer_kind,
)
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from mixkd_fast.configuration import Student
from mixkd_fast.errors import ModelError
from mixkd_fast.models import (
    Encoder,
    ModelSource,
    num_layers,
    word_embedding_size,
)
from mixkd_fast.student_layers import layer_list, pick_layers

every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_tiny_teachers(tmp_path_factory.mktemp("teachers"))


@pytest.mark.parametrize("loaded", [False, True], ids=["from-files", "from-memory"])
@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({"num_layers": 2}, [0, 1]),
        ({"layers": [0, 3]}, [0, 3]),
        ({"layers": [0, 2, 2]}, [0, 2, 2]),
        ({}, [0, 1, 2, 3]),
    ],
)
@every_family
def test_student_has_the_chosen_layers_and_everything_else(
    family: str, options: dict[str, Any], layers: list[int], loaded: bool, folders: dict[str, Path]
) -> None:
    teacher = tiny_model(family)
    source = teacher if loaded else teacher_of(folders[family])
    encoder, notes = student_of(Student(**options), source, tiny_tokenizer(tokenizer_kind(family)))
    assert num_layers(encoder.config) == len(layers)
    name, copied = layer_list(encoder.model)
    originals = layer_list(teacher)[1]
    for place, layer in enumerate(layers):
        for key, tensor in copied[place].state_dict().items():
            assert torch.equal(tensor, originals[layer].state_dict()[key]), (place, key)
    expected = teacher.state_dict()
    others = {key: value for key, value in encoder.model.state_dict().items() if not key.startswith(f"{name}.")}
    assert any(key.startswith("classifier") for key in others)
    for key, tensor in others.items():
        assert torch.equal(tensor, expected[key]), key
    assert len(notes) == (1 if options else 0)
    assert all(parameter.requires_grad for parameter in encoder.parameters())


@every_family
def test_student_of_all_layers_gives_the_teachers_logits(family: str, folders: dict[str, Path]) -> None:
    encoder, _ = student_of(Student(), teacher_of(folders[family]), tiny_tokenizer(tokenizer_kind(family)))
    teacher = tiny_model(family)
    batch = tiny_batch(teacher.config)
    arguments = (batch.input_ids, batch.attention_mask, batch.token_type_ids)
    assert torch.equal(plain_logits(encoder.model, *arguments), plain_logits(teacher, *arguments))


@every_family
def test_student_survives_saving(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """What is written describes the copied layers, whatever the family keeps per layer."""
    student = Student(layers=[0, 3])
    encoder, _ = student_of(student, teacher_of(folders[family]), tiny_tokenizer(tokenizer_kind(family)))
    encoder.model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    batch = tiny_batch(encoder.config)
    arguments = (batch.input_ids, batch.attention_mask, batch.token_type_ids)
    assert torch.equal(plain_logits(again, *arguments), plain_logits(encoder.model, *arguments))


def test_modernbert_layers_keep_their_own_attention_type(folders: dict[str, Path]) -> None:
    full, sliding = "full_attention", "sliding_attention"
    assert tiny_config("modernbert").layer_types == [full, sliding, sliding, full]
    encoder, _ = student_of(Student(layers=[0, 3, 1]), teacher_of(folders["modernbert"]))
    assert encoder.config.layer_types == [full, full, sliding]
    assert [layer.attention_type for layer in encoder.model.model.layers] == [full, full, sliding]


def test_a_layer_that_does_not_fit_its_place_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"layer 1 of ModernBert.* cannot become layer 0 .*attn_norm.weight"):
        student_of(Student(layers=[1, 3]), teacher_of(folders["modernbert"]))


def test_shared_layers_are_refused() -> None:
    config = AutoConfig.for_model(
        "albert",
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        embedding_size=12,
        num_attention_heads=2,
        intermediate_size=24,
        num_hidden_layers=4,
        num_labels=3,
    )
    teacher = AutoModelForSequenceClassification.from_config(config).eval()
    with pytest.raises(ModelError, match=r"AlbertForSequenceClassification cannot be copied one by one.*share"):
        student_of(Student(num_layers=2), teacher)
    encoder, _ = student_of(Student(), teacher)
    assert torch.equal(encoder.model.classifier.weight, teacher.classifier.weight)


def test_a_student_copied_from_a_loaded_teacher_shares_no_memory_with_it() -> None:
    teacher = tiny_model("bert")
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    encoder, _ = student_of(Student(), Encoder(teacher))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert num_layers(teacher.config) == 4


def test_student_of_a_half_precision_teacher_is_fp32() -> None:
    encoder, _ = student_of(Student(num_layers=2), tiny_model("bert").to(torch.bfloat16))
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}


def test_student_model_goes_before_the_teacher(folders: dict[str, Path], tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "bert", seed=7)
    encoder, _ = student_of(Student(model=str(tmp_path), num_layers=1), teacher_of(folders["bert"]))
    expected = tiny_model("bert", seed=7).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in encoder.model.state_dict().items())


def test_only_the_tensors_of_the_chosen_layers_are_read(folders: dict[str, Path]) -> None:
    """The weights of a layer that is left out may be unreadable: nobody looks at them."""
    source = ModelSource(str(folders["bert"]))

    def tensors() -> Any:
        for name, read in source.stored_tensors():
            yield name, (lambda: pytest.fail("read")) if ".layer.1." in name or ".layer.3." in name else read

    picked = dict(pick_layers(tensors(), source.skeleton(), [2, 0]))
    assert {key.split(".")[3] for key in picked if ".layer." in key} == {"0", "1"}
    key = "bert.encoder.layer.{}.output.dense.weight"
    assert torch.equal(picked[key.format(0)](), load_file(folders["bert"] / "model.safetensors")[key.format(2)])


def test_another_number_of_labels_gets_a_new_seeded_head(folders: dict[str, Path]) -> None:
    first, notes = student_of(Student(num_layers=2), teacher_of(folders["roberta"]), tiny_tokenizer("bpe"), 2, seed=1)
    again, _ = student_of(Student(num_layers=2), teacher_of(folders["roberta"]), tiny_tokenizer("bpe"), 2, seed=1)
    other, _ = student_of(Student(num_layers=2), teacher_of(folders["roberta"]), tiny_tokenizer("bpe"), 2, seed=2)
    heads = [encoder.model.classifier.out_proj.weight for encoder in (first, again, other)]
    assert heads[0].shape == (2, 16) and first.config.num_labels == 2
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    # The part of the head that does not depend on the labels is kept.
    assert torch.equal(first.model.classifier.dense.weight, tiny_model("roberta").classifier.dense.weight)
    assert "classifier.out_proj.bias, classifier.out_proj.weight are new: 3 labels in" in notes[1]


def test_the_same_labels_in_another_order_get_a_new_head(folders: dict[str, Path]) -> None:
    encoder, notes = student_of(Student(), teacher_of(folders["bert"]), label_names=LABELS[::-1])
    assert not torch.equal(encoder.model.classifier.weight, tiny_model("bert").classifier.weight)
    assert "labels are in another order" in notes[0]
    assert encoder.config.id2label == dict(enumerate(LABELS[::-1]))


def test_loading_leaves_the_global_generator_alone(folders: dict[str, Path]) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    student_of(Student(num_layers=2), teacher_of(folders["bert"]), num_labels=2)
    student_of(Student(config=_random_config()), None)
    assert torch.equal(torch.rand(3), expected)


def test_label_names_are_stored(folders: dict[str, Path]) -> None:
    encoder, _ = student_of(Student(num_layers=1), teacher_of(folders["distilbert"]), label_names=LABELS)
    assert encoder.config.label2id == {"entailment": 0, "neutral": 1, "contradiction": 2}
    with pytest.raises(ModelError, match=r"task.label_names has 2 names"):
        student_of(Student(num_layers=1), teacher_of(folders["bert"]), label_names=LABELS[:2])


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@every_family
def test_dropout_replaces_every_probability(family: str, dropout: float, folders: dict[str, Path]) -> None:
    tokenizer = tiny_tokenizer(tokenizer_kind(family))
    encoder, _ = student_of(Student(num_layers=2, dropout=dropout), teacher_of(folders[family]), tokenizer)
    assert {module.p for module in encoder.modules() if isinstance(module, nn.Dropout)} == {dropout}
    attention = [module for module in encoder.modules() if type(module).__name__.endswith("SelfAttention")]
    assert all(getattr(module, "attention_dropout", dropout) in (dropout, None) for module in attention)
    batch = tiny_batch(encoder.config)
    encoder.train()
    first, second = encoder.clean(batch).logits, encoder.clean(batch).logits
    assert torch.equal(first, second) == (dropout == 0)


def _random_config(**fields: Any) -> dict[str, Any]:
    return {
        "model_type": "bert",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        **fields,
    }


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_random_student_takes_vocabulary_and_special_tokens_from_the_tokenizer(family: str) -> None:
    tokenizer = tiny_tokenizer(tokenizer_kind(family))
    student = Student(config=_random_config(model_type=family))
    first, notes = student_of(student, None, tokenizer, label_names=LABELS, seed=3)
    again, _ = student_of(student, None, tokenizer, label_names=LABELS, seed=3)
    other, _ = student_of(student, None, tokenizer, label_names=LABELS, seed=4)
    assert word_embedding_size(first.model) == len(tokenizer) == first.config.vocab_size
    assert first.config.pad_token_id == tokenizer.pad_token_id
    assert first.config.id2label == dict(enumerate(LABELS))
    words = [encoder.model.get_input_embeddings().weight for encoder in (first, again, other)]
    assert torch.equal(words[0], words[1]) and not torch.equal(words[0], words[2])
    assert notes == ["the student's weights are random (student.config)"]


def test_random_student_has_a_row_for_every_id_of_a_vocabulary_with_gaps() -> None:
    description = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    gap = description["model"]["vocab"]["zebra"] = VOCAB_SIZE + 4
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(description)))
    encoder, _ = student_of(Student(config=_random_config()), None, tokenizer)
    assert word_embedding_size(encoder.model) == gap + 1 > len(tokenizer)


def test_random_student_keeps_a_padded_vocabulary() -> None:
    encoder, _ = student_of(Student(config=_random_config(vocab_size=128)), None)
    assert word_embedding_size(encoder.model) == 128
    with pytest.raises(ModelError, match=f"student's word embeddings have 50 rows, .* needs {VOCAB_SIZE}"):
        student_of(Student(config=_random_config(vocab_size=50)), None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (_random_config(model_type="bertt"), "'bertt' is not a family.*did you mean 'bert'"),
        (_random_config(hidden_size="16"), "hidden_size.*expected int"),
        (_random_config(num_attention_heads=3), "not a multiple of the number of attention heads"),
        (_random_config(model_type="vit"), "ViTConfig"),
    ],
)
def test_bad_student_config_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        student_of(Student(config=config), None)


def test_unknown_field_of_student_config_is_noted() -> None:
    _, notes = student_of(Student(config=_random_config(hidden_sze=32)), None)
    assert "'hidden_sze' is not a standard field of bert; did you mean 'hidden_size'?" in notes[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 5}, r"student.num_layers is 5, but .* has 4 layers"),
        ({"layers": [0, 4]}, r"student.layers asks for layer 4, but .* has 4 layers"),
        ({"layers": []}, r"student.layers is empty"),
    ],
)
def test_layers_that_are_not_there_are_refused(options: Any, message: str, folders: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=message):
        student_of(Student(**options), teacher_of(folders["bert"]))


def test_a_student_needs_a_source() -> None:
    with pytest.raises(ModelError, match=r"student.model or student.config"):
        student_of(Student(), None)
