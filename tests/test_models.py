"""Loading of teachers, tokenizers and weight files, and every refusal with its message."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from tiny_models import (
    FAMILIES,
    LABELS,
    VOCAB_SIZE,
    save_tiny_model,
    save_tiny_teachers,
    student_of,
    teacher_of,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
    tokenizer_kind,
)

from mixkd_fast.configuration import Student, Teacher
from mixkd_fast.errors import ModelError
from mixkd_fast.models import (
    ModelSource,
    check_same_tokenizer,
    load_teacher_encoder,
    load_tokenizer,
)

every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_tiny_teachers(tmp_path_factory.mktemp("teachers"))


@every_family
def test_teacher_is_whole_frozen_and_in_eval_mode(family: str, folders: dict[str, Path]) -> None:
    encoder = load_teacher_encoder(teacher_of(folders[family]), 3, "classification", LABELS)
    expected = tiny_model(family).state_dict()
    for name, tensor in encoder.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize(("own", "given", "dtype"), [(None, "bf16", "bfloat16"), ("fp32", "bf16", "float32")])
def test_teacher_precision(own: Any, given: Any, dtype: str, folders: dict[str, Path]) -> None:
    section = teacher_of(folders["bert"], precision=own)
    encoder = load_teacher_encoder(section, 3, "classification", precision=given)
    assert {parameter.dtype for parameter in encoder.parameters()} == {getattr(torch, dtype)}


def test_teacher_attention_implementation(folders: dict[str, Path]) -> None:
    encoder = load_teacher_encoder(teacher_of(folders["bert"], attention="eager"), 3, "classification")
    assert encoder.config._attn_implementation == "eager"
    with pytest.raises(ModelError, match="nonsense"):
        load_teacher_encoder(teacher_of(folders["bert"], attention="nonsense"), 3, "classification")


def test_sharded_files_and_names_without_the_base_prefix(tmp_path: Path) -> None:
    """A base model's checkpoint (no head, no "bert."), in several files with an index."""
    model = tiny_model("bert")
    model.bert.save_pretrained(tmp_path, max_shard_size="8KB")
    assert not (tmp_path / "model.safetensors").exists()
    encoder, notes = student_of(Student(layers=[1, 2]), teacher_of(tmp_path))
    state = encoder.model.state_dict()
    assert torch.equal(
        state["bert.encoder.layer.1.output.dense.weight"], model.bert.encoder.layer[2].output.dense.weight
    )
    assert torch.equal(state["bert.pooler.dense.weight"], model.bert.pooler.dense.weight)
    assert "classifier.bias, classifier.weight are new" in notes[1]
    (
        tmp_path
        / json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]["embeddings.LayerNorm.bias"]
    ).unlink()
    with pytest.raises(ModelError, match=r"index.json lists model-.*\.safetensors, which is missing"):
        student_of(Student(layers=[1, 2]), teacher_of(tmp_path))


def test_source_tensors_have_the_models_names(tmp_path: Path) -> None:
    """Old BERT files say LayerNorm.gamma and lack the prefix; heads of pretraining are not the model's."""
    model = tiny_model("bert")
    stored = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): t for name, t in model.bert.state_dict().items()}
    stored["cls.predictions.bias"] = torch.zeros(VOCAB_SIZE)
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(tmp_path)
    source = ModelSource(str(tmp_path))
    read = {name: read() for name, read in source.tensors()}
    expected = {f"bert.{name}": tensor for name, tensor in model.bert.state_dict().items()}
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in expected)
    assert {parameter.device.type for parameter in source.skeleton().parameters()} == {"meta"}
    empty = source.build_empty()
    assert empty.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(empty.bert.embeddings.position_ids, model.bert.embeddings.position_ids)


def test_regression_has_one_label_and_its_problem_type(folders: dict[str, Path], tmp_path: Path) -> None:
    encoder, _ = student_of(Student(num_layers=1), teacher_of(folders["bert"]), num_labels=1, kind="regression")
    assert (encoder.config.num_labels, encoder.config.problem_type) == (1, "regression")
    with pytest.raises(ModelError, match="the teacher gives 3 logits, but the task has 1 label"):
        load_teacher_encoder(teacher_of(folders["bert"]), 1, "regression")
    save_tiny_model(tmp_path, "bert", num_labels=1)
    assert load_teacher_encoder(teacher_of(tmp_path), 1, "regression").config.num_labels == 1


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = tiny_model("bert")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    message = r"teacher.model = '.*' has no model.safetensors; its pytorch_model.bin is not read"
    for load in (
        lambda: load_teacher_encoder(teacher_of(tmp_path), 3, "classification"),
        lambda: student_of(Student(num_layers=2), teacher_of(tmp_path)),
    ):
        with pytest.raises(ModelError, match=message) as caught:
            load()
        assert str(tmp_path) in str(caught.value)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    weights = save_tiny_model(tmp_path, "bert") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(ModelError, match=r"teacher.model = '.*', model.safetensors: "):
        load_teacher_encoder(teacher_of(tmp_path), 3, "classification")


def test_weights_that_do_not_fit_the_configuration_are_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "bert")
    tiny_config("bert", layers=5).save_pretrained(tmp_path)
    for load in (
        lambda: load_teacher_encoder(teacher_of(tmp_path), 3, "classification"),
        lambda: student_of(Student(), teacher_of(tmp_path)),
    ):
        with pytest.raises(ModelError, match=r"do not fit config.json: 16 tensors .*bert.encoder.layer.4"):
            load()
    with pytest.raises(ModelError, match=r"no tensors named encoder.layer.4"):
        student_of(Student(layers=[0, 4]), teacher_of(tmp_path))


def test_a_teacher_without_a_trained_head_is_refused(tmp_path: Path) -> None:
    model = tiny_model("bert")
    model.bert.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no trained classification head .*classifier.bias.*method finetune"):
        load_teacher_encoder(teacher_of(tmp_path), 3, "classification")


def test_a_missing_or_empty_folder_is_refused(tmp_path: Path) -> None:
    for load in (
        lambda name: load_teacher_encoder(Teacher(model=name), 3, "classification"),
        lambda name: load_tokenizer(name),
        lambda name: student_of(Student(model=name), None),
    ):
        with pytest.raises(ModelError, match=r"'.*/absent': there is no such folder"):
            load(str(tmp_path / "absent"))
        with pytest.raises(ModelError, match=r"the folder cannot be read; it should hold config.json, model.safe"):
            load(str(tmp_path))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "bert")
    with pytest.raises(ModelError, match=r"student.tokenizer = .* has no tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_a_pad_token_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no padding token"):
        load_tokenizer(str(tmp_path))


def test_a_hub_name_without_a_network_says_what_to_put_locally(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for load in (
        lambda: load_teacher_encoder(Teacher(model="somebody/some-model"), 3, "classification"),
        lambda: student_of(Student(model="somebody/some-model", num_layers=3), None),
        lambda: load_tokenizer("somebody/some-model"),
    ):
        with pytest.raises(ModelError) as caught:
            load()
        message = str(caught.value)
        assert "'somebody/some-model' is neither a local folder nor reachable" in message
        assert "config.json, model.safetensors, tokenizer.json" in message


def test_remote_code_is_off_unless_the_configuration_says_so(tmp_path: Path) -> None:
    """The code stands in the folder; running it would leave a file behind."""
    save_tiny_model(tmp_path, "bert", tiny_tokenizer())
    witness = tmp_path / "ran"
    (tmp_path / "configuration_odd.py").write_text(
        f"open({str(witness)!r}, 'w').close()\n"
        "from transformers import BertConfig\n\n\nclass OddConfig(BertConfig):\n    model_type = 'odd'\n"
    )
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "odd", "auto_map": {"AutoConfig": "configuration_odd.OddConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"needs code from its repository.*trust_remote_code"):
        load_teacher_encoder(teacher_of(tmp_path), 3, "classification")
    assert not witness.exists()


def test_tokenizer_round_trip(folders: dict[str, Path]) -> None:
    for family in ("bert", "roberta"):
        tokenizer = load_tokenizer(str(folders[family]))
        text = ("Every small dog sleeps.", "No cat sings!")
        assert dict(tokenizer(*text)) == dict(tiny_tokenizer(tokenizer_kind(family))(*text))
        check_same_tokenizer(tokenizer, tiny_tokenizer(tokenizer_kind(family)))
