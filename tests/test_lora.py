"""student.lora: the base stays as it was, adapters alone are trained, saved, resumed and merged, at every stage."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from toy import losses, must_run_ranks, records
from toy_lm import SHAPE, byte_tokenizer, language_config, save_lm
from transformers import AutoModelForCausalLM

from mixkd_fast import distill
from mixkd_fast.cli_evaluate import evaluate_saved
from mixkd_fast.configuration import Config, Student, validate
from mixkd_fast.errors import ConfigurationError, ModelError

WORKER = "tests/workers/distill_runs.py"
LORA = {"r": 4, "alpha": 16.0}
NO_PERSISTENCE = {"stage3_param_persistence_threshold": 0}


def lora_config(folder: Path, output: str = "run", **sections: Any) -> dict[str, Any]:
    """A teacher that is also the adapters' base."""
    student = {"num_layers": None, "lora": LORA, **sections.pop("student", {})}
    fields = {"student": student, **sections}
    fields["training"] = {"learning_rate": 2e-2, "steps": 4, **sections.get("training", {})}
    config = language_config(folder, output, **fields)
    if not (folder / "base").exists():
        save_lm(folder / "base", seed=9)
    config["student"].setdefault("model", str(folder / "base"))
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process at stage 0; two at 0, 2 and 3, whole and partitioned teacher."""
    folder = tmp_path_factory.mktemp("lora")
    runs = []
    for student, teacher in [(0, 0), (2, 3), (3, 3)]:
        zero = {"zero_optimization": {"stage": student, **(NO_PERSISTENCE if student == 3 else {})}}
        config = lora_config(folder, f"two-{student}", deepspeed=zero, teacher={"zero_stage": teacher})
        config["training"]["micro_batch_size"] = 2
        runs.append(config)
    (folder / "runs.json").write_text(json.dumps(runs))
    distill(**lora_config(folder, "one"), progress=False)
    must_run_ranks(2, str(folder / "runs.json"), script=WORKER)
    return folder


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_ranks_give_the_adapters_of_one(folder: Path, stage: int) -> None:
    one, two = folder / "one", folder / f"two-{stage}"
    assert max(losses(one)) - min(losses(one)) > 1e-2, "the losses must move for the comparison to mean anything"
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    expected, found = (load_file(run / "student" / "adapter_model.safetensors") for run in (one, two))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=1e-3)


def test_adapters_alone_are_saved_and_checkpointed(folder: Path) -> None:
    saved = folder / "one" / "student"
    state = load_file(saved / "adapter_model.safetensors")
    # Seven linear layers in each of two layers, A and B.
    assert len(state) == 2 * 7 * 2 and all(".lora_" in name for name in state)
    assert any(tensor.abs().max() > 0 for name, tensor in state.items() if ".lora_B." in name)
    assert not (saved / "model.safetensors").exists()
    assert json.loads((saved / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder / "base")
    base = (folder / "base" / "model.safetensors").stat().st_size
    trained = sum(tensor.nbytes for tensor in state.values())
    for run, parts in (("one", 1), ("two-0", 1), ("two-2", 2), ("two-3", 2)):
        newest = max((folder / run / "checkpoints").glob("step-*"))
        stored = sum(path.stat().st_size for path in newest.rglob("*.pt"))
        # Weights, masters and two moments of the adapters, and what torch.save adds; nothing of the base.
        assert stored < 4.5 * trained + parts * 60_000, (run, stored, trained)
        if run != "two-3":
            assert 3 * trained < stored < base


def test_saved_adapters_are_pefts(folder: Path) -> None:
    ours = AutoModelForCausalLM.from_pretrained(folder / "one" / "student").eval()
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    theirs = PeftModel.from_pretrained(base, str(folder / "one" / "student")).eval()
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(folder / "base").eval()(input_ids=ids).logits
        torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
        assert (ours(input_ids=ids).logits - plain).abs().max() > 0.1
    evaluated = records(folder / "one", "evaluation")[-1]["metrics"]["nll"]
    assert evaluated == pytest.approx(mean_nll(ours, folder), rel=1e-4)


def mean_nll(model: Any, folder: Path) -> float:
    """Of the validation texts, packed, by PyTorch alone."""
    stream: list[int] = []
    for line in (folder / "validation_text.jsonl").read_text().splitlines():
        stream += [*byte_tokenizer()(json.loads(line)["text"])["input_ids"], 256]
    total, count = 0.0, 0
    for start in range(0, len(stream), 48):
        ids = torch.tensor([stream[start : start + 48]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        total += float(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return total / count


@pytest.mark.parametrize("stage", [0, 3])
def test_merged_student_is_base_plus_adapters(folder: Path, stage: int) -> None:
    zero = {"zero_optimization": {"stage": stage, **(NO_PERSISTENCE if stage == 3 else {})}}
    fields = lora_config(folder, f"merged-{stage}", student={"lora": {**LORA, "merge": True}}, deepspeed=zero)
    result = distill(**fields, progress=False)
    assert not (result.directory / "student" / "adapter_config.json").exists()
    apart = AutoModelForCausalLM.from_pretrained(folder / "one" / "student").eval()
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            result.student(input_ids=ids).logits, apart(input_ids=ids).logits, atol=2e-3, rtol=1e-3
        )


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path, stage: int) -> None:
    zero = {"zero_optimization": {"stage": stage, **(NO_PERSISTENCE if stage == 3 else {})}}
    training = {"checkpoint_every": 2, "keep_checkpoints": 9}
    lora = {**LORA, "dropout": 0.1}
    fields = lora_config(tmp_path, "whole", deepspeed=zero, training=training, student={"lora": lora})
    distill(**fields, progress=False)
    whole = losses(tmp_path / "whole")
    expected = load_file(tmp_path / "whole" / "student" / "adapter_model.safetensors")
    (tmp_path / "whole" / "checkpoints" / "step-00000004").rename(tmp_path / "gone")
    distill(**fields, resume=True, progress=False)
    assert losses(tmp_path / "whole") == whole
    found = load_file(tmp_path / "whole" / "student" / "adapter_model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_bf16_keeps_the_base_in_bf16_and_checkpointing_changes_nothing(tmp_path: Path) -> None:
    fp32 = distill(**lora_config(tmp_path, "fp32"), progress=False)
    for name, more in (("bf16", {}), ("checkpointed", {"gradient_checkpointing": True})):
        fields = lora_config(tmp_path, name, training={"precision": "bf16", **more})
        distill(**fields, progress=False)
        assert losses(tmp_path / name) == pytest.approx(losses(fp32.directory), rel=2e-2)
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "checkpointed"), rel=1e-3)


def test_whole_modules_are_trained_beside_adapters_of_the_teacher_itself(tmp_path: Path) -> None:
    lora = {**LORA, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    fields = lora_config(tmp_path, student={"lora": lora})
    del fields["student"]["model"]
    result = distill(**fields, progress=False)
    saved = result.directory / "student"
    named = json.loads((saved / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tmp_path / "teacher")
    state = load_file(saved / "adapter_model.safetensors")
    (head,) = (tensor for name, tensor in state.items() if "lm_head" in name)
    before = load_file(tmp_path / "teacher" / "model.safetensors")["lm_head.weight"]
    assert head.shape == before.shape and (head - before).abs().max() > 1e-3
    assert len(state) == 2 * 2 + 1


def test_adapter_folders_are_evaluated(folder: Path) -> None:
    task = validate(Config, lora_config(folder, "one")).task
    results = evaluate_saved(folder / "one" / "student", task)
    found = {split: result.metrics for split, (result, _) in results.items()}
    metrics = records(folder / "one", "evaluation")[-1]["metrics"]
    assert found["validation"]["perplexity"] == pytest.approx(metrics["perplexity"], rel=1e-4)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"target_modules": ["nothing"]}, r"student\.lora\.target_modules = \['nothing'\]"),
        ({"target_modules": ["lm_head"]}, "names the word embeddings or the output layer"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, "in which they are one"),
    ],
)
def test_layers_that_cannot_have_adapters_are_refused(tmp_path: Path, lora: dict[str, Any], message: str) -> None:
    save_lm(tmp_path / "base", seed=9, tie_word_embeddings="one" in message)
    with pytest.raises(ModelError, match=message):
        distill(**lora_config(tmp_path, student={"lora": lora}), progress=False)


def test_a_base_that_is_nowhere_needs_merge(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"num_layers makes a new one; set lora\.merge"):
        validate(Student, {"num_layers": 1, "lora": {}}, "student")
    shape = {"model_type": "llama", "intermediate_size": 48, **SHAPE}
    fields = lora_config(tmp_path, student={"config": shape, "lora": {"merge": True}})
    del fields["student"]["model"]
    assert distill(**fields, progress=False).student.config.num_hidden_layers == 2


def test_the_adapters_name_the_revision_of_their_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[tuple[str, Any]] = []
    plain = AutoModelForCausalLM.from_pretrained

    def spy(name: Any, **options: Any) -> Any:
        loaded.append((Path(name).name, options.get("revision")))
        return plain(name, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    # A folder has no revisions, and does not mind one being named.
    config = lora_config(tmp_path, student={"revision": "v1"}, training={"steps": 1, "evaluate_every": 1})
    result = distill(**config, progress=False)
    saved = json.loads((result.directory / "student" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(tmp_path / "base") and saved["revision"] == "v1"
    assert loaded[-1] == ("student", "v1")
