"""TRL's GKD trainer with this project's losses: equal to TRL's where the formulas are, and to one big batch always."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("trl.experimental.gkd", reason="needs trl")

import trainer_cases as cases
import trl_cases
from test_integrations_processes import launch, load
from trl.experimental.gkd import GKDTrainer as TrlGKDTrainer

from mixkd_fast.integrations import GKDTrainer
from mixkd_fast.losses import kd_loss


@pytest.mark.parametrize("loss", trl_cases.LOSSES)
@pytest.mark.parametrize(("micro_batch_size", "accumulation"), [(8, 1), (4, 2), (2, 4)])
def test_a_step_is_that_of_one_big_batch(tmp_path: Path, loss: str, micro_batch_size: int, accumulation: int) -> None:
    trainer = trl_cases.trainer(tmp_path, micro_batch_size, accumulation, trl_cases.LOSSES[loss])
    start = cases.weights(trainer.model)
    trainer.train()
    cases.assert_same_step(cases.weights(trainer.model), cases.lm_truth(), start)


def test_a_step_of_two_processes_is_that_of_one_big_batch(tmp_path: Path) -> None:
    """TRL divides by the tokens of all processes and then averages over them, so its step is half of this one."""
    launch(tmp_path, "trl")
    student, teacher = (model.eval() for model in cases.lm_models())
    start = cases.weights(student)
    with torch.no_grad():
        kd, task, count = cases.lm_parts(student, teacher, cases.lm_rows(), 2.0)
    for loss in trl_cases.LOSSES:
        result = load(tmp_path, loss)
        cases.assert_same_step(result["weights"], cases.lm_truth(), start)
        assert result["loss"] == pytest.approx(float((kd + 0.5 * task) / count), rel=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_the_default_is_the_loss_of_trl(tmp_path: Path, beta: float) -> None:
    """The generalised JSD at temperature 1 and both its limits, with a given count and with the batch's own."""
    ours, theirs = trl_cases.trainer(tmp_path, 8, 1, None, beta=beta), trl_cases.peer(tmp_path, 8, 1, beta=beta)
    inputs = trl_cases.collate(cases.lm_rows())
    for count in (None, torch.tensor(100)):
        found = ours.compute_loss(ours.model.eval(), dict(inputs), num_items_in_batch=count)
        expected = theirs.compute_loss(theirs.model.eval(), dict(inputs), num_items_in_batch=count)
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for one in (ours, theirs):
        one.args.max_steps = 1
        one.train()
    cases.assert_same_step(cases.weights(ours.model), cases.weights(theirs.model), cases.weights(cases.lm_models()[0]))


def test_at_a_temperature_trl_leaves_out_its_square() -> None:
    student, teacher = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    theirs = TrlGKDTrainer.generalized_jsd_loss(student, teacher, beta=0.5, temperature=2.0, reduction="sum")
    ours = kd_loss(student, teacher, divergence="jsd", beta=0.5, temperature=2.0, reduction="sum")
    assert ours.item() == pytest.approx(4 * theirs.item(), rel=1e-5)


def test_without_labels_batchmean_of_trl_divides_by_the_rows() -> None:
    """Not by the tokens, as it does with labels; `kd_loss` divides by what is compared."""
    student, teacher = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    theirs = TrlGKDTrainer.generalized_jsd_loss(student, teacher, beta=0.5)
    assert kd_loss(student, teacher, divergence="jsd").item() == pytest.approx(theirs.item() / 5, rel=1e-5)


class Recording(GKDTrainer):
    """Keeps what it trains on."""

    def get_batch_samples(self, *arguments: Any) -> Any:
        self.batches, self.count = super().get_batch_samples(*arguments)
        return self.batches, self.count


@pytest.mark.parametrize("generation", [{"lmbda": 1.0}, {"seq_kd": True}])
def test_generated_answers_are_divided_by_their_own_tokens(tmp_path: Path, generation: dict[str, Any]) -> None:
    loss = {"temperature": 2.0, "ce_weight": 0.5}
    trainer = trl_cases.trainer(tmp_path, 2, 4, loss, Recording, **generation)
    start = cases.weights(trainer.model)
    trainer.train()
    assert trainer.model.training and len(trainer.batches) == 4
    answers = 0
    kd, task = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    student, teacher = (deepcopy(model).double().eval() for model in cases.lm_models())
    for batch in trainer.batches:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        labels = batch["labels"][:, 1:]
        learnt = labels != -100
        assert batch["labels"][:, : batch["prompts"].shape[1]].eq(-100).all(), "prompts are not learnt"
        ours = student(**inputs).logits[:, :-1][learnt]
        with torch.no_grad():
            theirs = teacher(**inputs).logits[:, :-1][learnt]
        p, log_q = (theirs / 2).softmax(-1), (ours / 2).log_softmax(-1)
        kd = kd + 4 * (p * (p.log() - log_q)).sum()
        task = task + F.cross_entropy(ours, labels[learnt], reduction="sum")
        answers += int(learnt.sum())
    assert trainer.count == answers != sum(answer for _, answer in cases.LM_LENGTHS)
    cases.assert_same_step(cases.weights(trainer.model), cases.stepped(student, (kd + 0.5 * task) / answers), start)


def test_evaluation_reports_means_over_all_tokens(tmp_path: Path) -> None:
    student, teacher = (model.eval() for model in cases.lm_models())
    with torch.no_grad():
        kd, task, count = cases.lm_parts(student, teacher, cases.lm_rows(), 2.0)
    metrics = trl_cases.trainer(tmp_path, 8, 1, trl_cases.LOSSES["trl-linear"]).evaluate()
    assert metrics["eval_kd_loss"] == pytest.approx(float(kd / count), rel=1e-4)
    assert metrics["eval_task_loss"] == pytest.approx(float(task / count), rel=1e-4)
    assert metrics["eval_loss"] == pytest.approx(float((kd + 0.5 * task) / count), rel=1e-4)
