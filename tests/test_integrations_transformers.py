"""`DistillTrainer`: its step is that of one big batch however the batch is cut; evaluation, saving, refusals."""

import functools
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")

import trainer_cases as cases
from transformers import AutoConfig, AutoModelForCausalLM, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from mixkd_fast.encoder import Encoder
from mixkd_fast.errors import ModelError
from mixkd_fast.integrations import DistillTrainer, token_loss
from mixkd_fast.integrations.mixed_rows import Fill
from mixkd_fast.losses import KDLoss, LinearKDLoss, linear_kd_loss
from mixkd_fast.mixing import Mixing

CUTS = [(8, 1), (4, 2), (2, 4)]


@pytest.mark.parametrize("loss", cases.LM_LOSSES)
@pytest.mark.parametrize(("micro_batch_size", "accumulation"), CUTS)
def test_a_step_on_tokens_is_that_of_one_big_batch(
    tmp_path: Path, loss: str, micro_batch_size: int, accumulation: int
) -> None:
    trainer = cases.lm_trainer(tmp_path, micro_batch_size, accumulation, cases.LM_LOSSES[loss])
    start = cases.weights(trainer.model)
    trainer.train()
    cases.assert_same_step(cases.weights(trainer.model), cases.lm_truth(), start)


def test_the_mean_per_micro_batch_would_be_noticed() -> None:
    """The peers' mistake is far from the truth on these rows."""
    student, teacher = (deepcopy(model).double().eval() for model in cases.lm_models())
    rows = cases.lm_rows()
    means = []
    for start in range(0, len(rows), 2):
        kd, task, count = cases.lm_parts(student, teacher, rows[start : start + 2], 2.0)
        means.append((kd + 0.5 * task) / count)
    with pytest.raises(AssertionError):
        wrong = cases.stepped(student, torch.stack(means).mean())
        cases.assert_same_step(wrong, cases.lm_truth(), cases.weights(cases.lm_models()[0]))


def test_the_logged_loss_is_that_of_the_big_batch(tmp_path: Path) -> None:
    student, teacher = (model.eval() for model in cases.lm_models())
    kd, task, count = cases.lm_parts(student, teacher, cases.lm_rows(), 2.0)
    trainer = cases.lm_trainer(tmp_path, 2, 4, cases.LM_LOSSES["kl"])
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx((kd + 0.5 * task).item() / count, rel=1e-4)


@pytest.mark.parametrize("mixing", [{}, {"padding": "zero", "lam_per": "batch", "mixed_rows": 1}])
def test_a_mixkd_step_is_that_of_one_big_batch(tmp_path: Path, mixing: dict[str, Any]) -> None:
    found = []
    for micro_batch_size, accumulation in [*CUTS, (1, 8)]:
        trainer = cases.mixkd_trainer(tmp_path, micro_batch_size, accumulation, **mixing)
        start = cases.weights(trainer.model)
        trainer.train()
        found.append(cases.weights(trainer.model))
    truth = mixkd_truth(tmp_path, mixing)
    for one in found:
        cases.assert_same_step(one, truth, start)


def mixkd_truth(folder: Path, mixing: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The step on all rows in fp64, from the trainer's draws and losses written out."""
    trainer = cases.mixkd_trainer(folder, 8, 1, **mixing)
    device = torch.device("cpu")
    (inputs,), count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, device)
    batch = inputs["mixed_rows"].batch(inputs, Fill(0, "right"))
    student, teacher = (Encoder(deepcopy(model).double().eval()) for model in cases.class_models())
    options = Mixing(**{**cases.MIXING, **mixing})
    clean, mixed = student.clean(batch).logits, student.mixed(batch, options).logits
    with torch.no_grad():
        clean_T, mixed_T = teacher.clean(batch).logits, teacher.mixed(batch, options).logits

    def kl(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        return 4 * F.kl_div((ours / 2).log_softmax(-1), (theirs / 2).log_softmax(-1), reduction="sum", log_target=True)

    first = torch.arange(len(mixed)) % 8
    assert batch.partner is not None and batch.lam is not None and count == 8
    own = F.cross_entropy(mixed, batch.labels[first], reduction="none")
    other = F.cross_entropy(mixed, batch.labels[batch.partner], reduction="none")
    loss = (0.7 * kl(clean, clean_T) + F.cross_entropy(clean, batch.labels[:8], reduction="sum")) / 8
    both = batch.lam * own + (1 - batch.lam) * other
    loss = loss + (kl(mixed, mixed_T) + 0.5 * both.sum()) / len(mixed)
    return cases.stepped(student.model, loss)


def test_a_student_that_is_made_anew_for_each_run_is_the_one_that_learns(tmp_path: Path) -> None:
    """`model_init`: what was bound to the model of before would read that one's embeddings and head."""
    for make in (cases.mixkd_trainer, functools.partial(cases.lm_trainer, loss=cases.LM_LOSSES["linear"])):
        once, anew = (make(tmp_path, 4, 2, made=made) for made in ("once", "anew"))
        start = cases.weights(once.model)
        once.train()
        before = anew.model
        anew.train()
        assert anew.model is not before
        cases.assert_same_step(cases.weights(anew.model), cases.weights(once.model), start)
        assert anew.evaluate()["eval_loss"] == pytest.approx(once.evaluate()["eval_loss"], rel=1e-4)


def test_partners_come_from_the_whole_accumulated_batch(tmp_path: Path) -> None:
    trainer = cases.mixkd_trainer(tmp_path, 1, 8)
    device = torch.device("cpu")
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 8, device)
    seen = [tuple(row[row != 0].tolist()) for b in batches for row in b["mixed_rows"].columns["input_ids"]]
    rows = [tuple(row["input_ids"]) for row in cases.class_rows()]
    assert sorted(seen) == sorted(rows * 2), "a permutation per mixed row"
    lam = torch.cat([b["mixed_rows"].lam for b in batches])
    assert lam.dtype == torch.float32 and len(set(lam.tolist())) == 16
    again = cases.mixkd_trainer(tmp_path, 1, 8)
    batches, _ = again.get_batch_samples(iter(again.get_train_dataloader()), 8, device)
    assert torch.equal(lam, torch.cat([b["mixed_rows"].lam for b in batches])), "a function of seed and step"


def test_evaluation_reports_means_over_all_targets(tmp_path: Path) -> None:
    """Batches of three rows: the mean of batch means is another number, and so is a loss without its parts."""
    student, teacher = (model.eval() for model in cases.lm_models())
    with torch.no_grad():
        kd, task, count = cases.lm_parts(student, teacher, cases.lm_rows(), 2.0)
    for loss in cases.LM_LOSSES.values():
        metrics = cases.lm_trainer(tmp_path, 8, 1, loss).evaluate()
        assert metrics["eval_kd_loss"] == pytest.approx(float(kd / count), rel=1e-4)
        assert metrics["eval_task_loss"] == pytest.approx(float(task / count), rel=1e-4)
        assert metrics["eval_loss"] == pytest.approx(float((kd + 0.5 * task) / count), rel=1e-4)


def test_metrics_get_logits_and_labels(tmp_path: Path) -> None:
    trainer = cases.mixkd_trainer(tmp_path, 8, 1)
    trainer.compute_metrics = lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())}
    metrics = trainer.evaluate()
    student, teacher = (model.eval() for model in cases.class_models())
    inputs = cases.collate(cases.class_rows())
    labels = inputs.pop("labels")
    with torch.no_grad():
        logits, teacher_logits = student(**inputs).logits, teacher(**inputs).logits
    assert metrics["eval_accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).float().mean()))
    assert metrics["eval_task_loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-4)
    p, log_q = (teacher_logits / 2).softmax(-1), (logits / 2).log_softmax(-1)
    assert metrics["eval_kd_loss"] == pytest.approx(float(4 * (p * (p.log() - log_q)).sum(-1).mean()), rel=1e-4)


def test_outputs_are_returned_when_asked(tmp_path: Path) -> None:
    inputs = cases.collate(cases.lm_rows())
    for loss in cases.LM_LOSSES.values():
        trainer = cases.lm_trainer(tmp_path, 8, 1, loss)
        value, outputs = trainer.compute_loss(trainer.model, dict(inputs), return_outputs=True)
        assert outputs.logits.shape == (*inputs["input_ids"].shape, cases.LM_VOCABULARY)
        assert trainer.compute_loss(trainer.model, dict(inputs)).item() == pytest.approx(value.item(), rel=1e-5)


def test_the_linear_loss_keeps_whole_logits_out_of_the_forward(tmp_path: Path) -> None:
    trainer = cases.lm_trainer(tmp_path, 8, 1, LinearKDLoss())
    _, outputs = trainer._token_loss(trainer.model, cases.collate(cases.lm_rows()), None, with_logits=False)
    assert outputs.logits.shape == (8, 1, cases.LM_VOCABULARY)


def test_a_head_that_is_more_than_its_weights_is_noticed(tmp_path: Path) -> None:
    """A model whose logits are not scale (h W^T + b), capped: its configuration does not say so, a comparison does."""
    trainer = cases.lm_trainer(tmp_path, 8, 1, LinearKDLoss())
    trainer.model.lm_head.register_forward_hook(lambda module, given, logits: 3 * logits + 1)
    with pytest.raises(ModelError, match="not those of its output embedding"):
        trainer.train()


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_soft_caps_and_scales_are_those_of_the_configuration(tmp_path: Path, family: str) -> None:
    fields = {"gemma2": {"final_logit_softcapping": 2.0, "head_dim": 8}, "cohere": {"logit_scale": 0.25}}
    more = fields.get(family, {"logits_scaling": 3.0})
    config = AutoConfig.for_model(
        family,
        vocab_size=cases.LM_VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
        **more,
    )
    models = [AutoModelForCausalLM.from_config(config) for _ in range(2)]
    values = []
    for loss in (KDLoss(ce_weight=1.0), LinearKDLoss(ce_weight=1.0)):
        trainer = DistillTrainer(
            deepcopy(models[0]), cases.arguments(tmp_path, 8, 1), teacher_model=models[1], loss=loss
        )
        values.append(trainer.compute_loss(trainer.model.eval(), cases.collate(cases.lm_rows())).item())
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_the_teacher_stays_as_it_is_and_out_of_what_is_saved(tmp_path: Path) -> None:
    student, teacher = cases.class_models()
    teacher.train()
    before = deepcopy(teacher.state_dict())
    trainer = DistillTrainer(
        student,
        cases.arguments(tmp_path, 4, 2, max_steps=2, save_strategy="steps", save_steps=2, eval_strategy="steps"),
        teacher_model=teacher,
        mixing={},
        data_collator=cases.collate,
        train_dataset=cases.class_rows(),
        eval_dataset=cases.class_rows(),
    )
    trainer.train()
    assert not teacher.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    trainer.save_model(str(tmp_path / "saved"))
    saved = type(student).from_pretrained(tmp_path / "saved")
    assert sum(p.numel() for p in saved.parameters()) == sum(p.numel() for p in student.parameters())
    for folder in (tmp_path / "saved", tmp_path / "checkpoint-2"):
        sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
        assert len(sizes) == 1 and sizes[0] < 1.2 * 4 * sum(p.numel() for p in student.parameters()) + 20_000


def test_a_teacher_with_token_types_gets_them_beside_a_student_without(tmp_path: Path) -> None:
    """The Trainer drops columns that the student does not take; zeros in their place would be another teacher."""
    datasets = pytest.importorskip("datasets")
    student, teacher = cases.class_models("distilbert", "bert")
    trainer = DistillTrainer(
        student,
        cases.arguments(tmp_path, 8, 1),
        teacher_model=teacher,
        data_collator=cases.collate,
        train_dataset=datasets.Dataset.from_list(cases.class_rows()),
        eval_dataset=datasets.Dataset.from_list(cases.class_rows()),
    )
    inputs = cases.collate(cases.class_rows())
    labels, types = inputs.pop("labels"), inputs.pop("token_type_ids")
    with torch.no_grad():
        p = teacher(**inputs, token_type_ids=types).logits.softmax(-1)
        log_q = student.eval()(**inputs).logits.log_softmax(-1)
    assert trainer.evaluate()["eval_kd_loss"] == pytest.approx(float((p * (p.log() - log_q)).sum(-1).mean()), rel=1e-4)
    assert len(labels) == 8


def test_labels_shift_once_and_given_shifts_are_taken(tmp_path: Path) -> None:
    trainer = cases.lm_trainer(tmp_path, 8, 1, {})
    inputs = cases.collate(cases.lm_rows())
    assert int(trainer.num_targets(inputs)) == sum(answer for _, answer in cases.LM_LENGTHS)
    shifted = torch.full_like(inputs["labels"], -100)
    shifted[:, :-1] = inputs["labels"][:, 1:]
    value = trainer.compute_loss(trainer.model, inputs)
    given = {**inputs, "shift_labels": shifted, "labels": torch.zeros_like(shifted)}
    assert trainer.compute_loss(trainer.model, given).item() == pytest.approx(value.item(), rel=1e-6)


def test_a_batch_without_targets_changes_nothing(tmp_path: Path) -> None:
    trainer = cases.lm_trainer(tmp_path, 8, 1, cases.LM_LOSSES["kl"])
    trainer.train_dataset = [{**row, "labels": [-100] * len(row["labels"])} for row in cases.lm_rows()]
    start = cases.weights(trainer.model)
    trainer.train()
    assert all(torch.equal(value, start[name]) for name, value in cases.weights(trainer.model).items())


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    def trainer(steps: int) -> Any:
        made = cases.mixkd_trainer(tmp_path, 2, 2)
        made.args.max_steps, made.args.save_strategy, made.args.save_steps = steps, "steps", 2
        return made

    whole = trainer(4)
    whole.train()
    resumed = cases.mixkd_trainer(tmp_path, 2, 2)
    resumed.args.max_steps = 4
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected, found = cases.weights(whole.model), cases.weights(resumed.model)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_bf16_autocast_reaches_the_teacher(tmp_path: Path) -> None:
    student, teacher = cases.lm_models()
    trainer = DistillTrainer(
        student,
        cases.arguments(tmp_path, 8, 1, bf16=True),
        teacher_model=teacher,
        loss=LinearKDLoss(),
        data_collator=cases.collate,
        train_dataset=cases.lm_rows(),
    )
    assert trainer.teacher(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.dtype == torch.bfloat16
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])


@pytest.mark.parametrize("bf16", [True, False])
def test_the_heads_are_multiplied_under_the_trainers_autocast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16: bool
) -> None:
    """Else a GPU would multiply fp32 weights in fp32, at a fraction of its rate."""
    seen = []

    def spied(*arguments: Any, **more: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return linear_kd_loss(*arguments, **more)

    monkeypatch.setattr(token_loss, "linear_kd_loss", spied)
    trainer = cases.lm_trainer(tmp_path, 4, 2, LinearKDLoss(), bf16=bf16)
    trainer.train()
    trainer.evaluate()
    assert len(seen) > 2 and set(seen) == {bf16}


def test_peft_students_learn_their_adapters_alone(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    student, teacher = cases.class_models()
    adapted = peft.get_peft_model(
        student, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], lora_dropout=0.0)
    )
    start = cases.weights(adapted)
    trainer = DistillTrainer(
        adapted,
        cases.arguments(tmp_path, 4, 2),
        teacher_model=teacher,
        mixing={},
        data_collator=cases.collate,
        train_dataset=cases.class_rows(),
    )
    trainer.train()
    moved = {name for name, value in cases.weights(adapted).items() if not torch.equal(value, start[name])}
    assert moved and all("lora_" in name or "modules_to_save" in name for name in moved)


def gpt2_without_logits_to_keep() -> Any:
    class Whole(GPT2LMHeadModel):
        def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None) -> Any:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)

    return Whole(GPT2Config(vocab_size=cases.LM_VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=32))


def test_what_cannot_work_is_refused_by_name(tmp_path: Path) -> None:
    def made(**changes: Any) -> Any:
        given = {"model": None, "teacher_model": None, "args": cases.arguments(tmp_path, 8, 1), **changes}
        student, teacher = cases.class_models() if given.pop("classes", False) else cases.lm_models()
        given["model"] = given["model"] or student
        given["teacher_model"] = given["teacher_model"] or teacher
        return DistillTrainer(**given)

    with pytest.raises(ValueError, match=r"loss\.reduction"):
        made(loss=KDLoss(reduction="sum"))
    with pytest.raises(ValueError, match=r"loss\.ignore_index"):
        made(loss={"ignore_index": 0})
    with pytest.raises(ValueError, match="mixing"):
        made(mixing={})
    with pytest.raises(ValueError, match=r"mixing.pairing = 'dataset'"):
        made(classes=True, mixing={"pairing": "dataset"})
    with pytest.raises(ValueError, match="LinearKDLoss"):
        made(classes=True, loss=LinearKDLoss())
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        made(args=cases.arguments(tmp_path, 8, 1, label_smoothing_factor=0.1))
    with pytest.raises(ValueError, match="task = 'translation'"):
        made(task="translation")
    with pytest.raises(ModelError, match="logits_to_keep"):
        made(loss=LinearKDLoss(), model=gpt2_without_logits_to_keep(), task="causal_lm")
    five = BertForSequenceClassification(cases.tiny_config("bert", num_labels=5))
    with pytest.raises(ModelError, match="5 classes"):
        made(classes=True, teacher_model=five)
    regression = made(classes=True)
    batch = cases.collate(cases.class_rows())
    with pytest.raises(ValueError, match="labels are"):
        regression.compute_loss(regression.model, {**batch, "labels": torch.from_numpy(np.ones(8, np.float32))})
