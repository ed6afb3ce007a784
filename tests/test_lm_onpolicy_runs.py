"""Runs of the real program whose rows the student writes: they learn, resume bit for bit, and agree on two ranks."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy import losses, must_run_ranks, records
from toy_lm import language_config, run

from mixkd_fast.checkpoint import write_manifest

DRAWN = {"max_new_tokens": 8}
# Every evaluation that is not better than the first lets the student write in every step; the buffer is soon full.
EAGER = {"name": "distillm", "loss_margin": 0.0, "phi_step": 1.0, "replay_capacity": 12, "generation": DRAWN}
EAGER |= {"ce_weight": 0.1}
# A rate that rises far too high makes the second evaluation worse than the first.
WORSE = {"evaluate_every": 1, "learning_rate": 0.1, "warmup": 0.3}
WORKER = "tests/workers/zero_stages.py"


def state_of(checkpoint: Path) -> dict[str, Any]:
    """The replay buffer's part of a checkpoint."""
    states = torch.load(checkpoint / "state" / "extra_states.pt", weights_only=False)
    assert list(states) == ["extras"] and "phi" in states["extras"]
    state: dict[str, Any] = states["extras"]
    return state


@pytest.mark.parametrize(
    ("method", "term"),
    [
        ({"name": "gkd", "lam_student": 1.0, "generation": DRAWN}, "kd"),
        ({"name": "distillm", "divergence": "skew_forward_kl", "generation": DRAWN}, "kd"),
        ({"name": "distillm2", "teacher_answers": "generated", "generation": DRAWN}, "forward"),
        ({"name": "distillm2", "generation": DRAWN}, "reverse"),
    ],
    ids=["gkd", "distillm", "distillm2", "distillm2 of the data set"],
)
def test_twenty_steps_lower_the_term(tmp_path: Path, method: dict[str, Any], term: str) -> None:
    student = {"num_layers": None, "config": {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1}}
    student["config"] |= {"num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
    config = language_config(tmp_path, instruct=True, method=method, student=student)
    config["training"] |= {"steps": 20, "evaluate_every": 20, "learning_rate": 1e-2, "schedule": "constant"}
    config["task"]["generation_rows"] = 0
    run(config)
    course = [line["terms"][term] for line in records(tmp_path / "run")]
    # The weight of DistiLLM-2's terms changes with the step.
    weight = [1.0] * 20
    if term in ("forward", "reverse"):
        betas = [1 + 0.5 * min(1.0, 2 * step / 20) for step in range(20)]
        weight = [2 - beta if term == "forward" else beta for beta in betas]
    course = [value / of for value, of in zip(course, weight, strict=True)]
    assert sum(course[-4:]) < 0.7 * sum(course[:4])


@pytest.mark.parametrize("stage", [0, 3])
def test_a_resumed_run_is_bit_identical(tmp_path: Path, stage: int) -> None:
    """Weights, buffer and phi, with rows that are written, replayed and read in both halves."""
    whole = language_config(tmp_path, "whole", instruct=True, method=EAGER, task={"generation_rows": 0})
    whole["training"] |= {"steps": 16, "keep_checkpoints": 9, **WORSE} | {"checkpoint_every": 4}
    whole["deepspeed"] = {"zero_optimization": {"stage": stage}}
    run(whole)
    checkpoints = {int(path.name[5:]): path for path in (tmp_path / "whole" / "checkpoints").glob("step-*")}
    middle, end = state_of(checkpoints[8]), state_of(checkpoints[16])
    assert middle["phi"] == 1.0 and len(middle["lengths"]) == len(end["lengths"]) == 12
    assert not torch.equal(middle["tokens"], end["tokens"]), "rows are written after the resume as well"
    course, weights = losses(tmp_path / "whole"), load_file(tmp_path / "whole" / "student" / "model.safetensors")
    resume_at(8, whole, checkpoints)
    assert losses(tmp_path / "whole") == course
    again = state_of(checkpoints[16])
    for name, value in end.items():
        assert torch.equal(value, again[name]) if isinstance(value, torch.Tensor) else value == again[name], name
    for name, tensor in load_file(tmp_path / "whole" / "student" / "model.safetensors").items():
        assert torch.equal(tensor, weights[name])


def resume_at(step: int, config: dict[str, Any], checkpoints: dict[int, Path]) -> None:
    """Go on from what a kill after this step leaves."""
    for later in [path for number, path in checkpoints.items() if number > step]:
        shutil.rmtree(later)
    run(config, resume=True)


@pytest.mark.slow
def test_two_ranks_resume_on_one(tmp_path: Path) -> None:
    """phi and the buffer stay, at stages whose states are cut by rank, and with adapters."""
    whole = language_config(tmp_path, instruct=True, method=EAGER, task={"generation_rows": 0})
    whole["training"] |= {"steps": 8, "keep_checkpoints": 9, **WORSE} | {"checkpoint_every": 4}
    runs = []
    for stage, student in ((2, {}), (3, {"lora": {"r": 4, "merge": True}})):
        run_of_stage = {**whole, "deepspeed": {"zero_optimization": {"stage": stage}}}
        run_of_stage |= {"student": whole["student"] | student, "output": {"directory": str(tmp_path / f"run{stage}")}}
        runs.append(run_of_stage)
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    must_run_ranks(2, str(tmp_path / "runs.json"), script="tests/workers/distill_runs.py")
    for config in runs:
        folder = Path(config["output"]["directory"])
        checkpoints = {int(path.name[5:]): path for path in (folder / "checkpoints").glob("step-*")}
        middle, end, course = state_of(checkpoints[4]), state_of(checkpoints[8]), losses(folder)
        assert middle["phi"] == 1.0 and not torch.equal(middle["tokens"], end["tokens"])
        resume_at(4, config, checkpoints)
        assert losses(folder) == pytest.approx(course, rel=1e-4)
        again = state_of(checkpoints[8])
        assert torch.equal(again["tokens"], end["tokens"]) and again["phi"] == end["phi"]


def test_a_checkpoint_with_these_states_among_the_weights_is_read(tmp_path: Path) -> None:
    config = language_config(tmp_path, "whole", instruct=True, method=EAGER, task={"generation_rows": 0})
    config["training"] |= {"steps": 6, "keep_checkpoints": 9, **WORSE} | {"checkpoint_every": 3}
    run(config)
    checkpoints = {int(path.name[5:]): path for path in (tmp_path / "whole" / "checkpoints").glob("step-*")}
    course, apart = losses(tmp_path / "whole"), checkpoints[3] / "state" / "extra_states.pt"
    (file,) = (checkpoints[3] / "state" / "engine").glob("*model_states.pt")
    states, content = torch.load(apart, weights_only=False), torch.load(file, weights_only=False)
    assert not any(name.endswith("_extra_state") for name in content["module"])
    content["module"]["extras._extra_state"] = states["extras"]
    torch.save(content, file)
    apart.unlink()
    manifest = json.loads((checkpoints[3] / "manifest.json").read_text())
    write_manifest(checkpoints[3], {name: manifest[name] for name in ("step", "state")})
    resume_at(3, config, checkpoints)
    assert losses(tmp_path / "whole") == course


def test_a_resumed_distillm2_has_its_teachers_answers(tmp_path: Path) -> None:
    method = {"name": "distillm2", "teacher_answers": "generated", "generation": DRAWN}
    whole = language_config(tmp_path, "whole", instruct=True, method=method, task={"generation_rows": 0})
    whole["training"] |= {"steps": 4, "evaluate_every": 2}
    run(whole)
    course = losses(tmp_path / "whole")
    checkpoints = {int(path.name[5:]): path for path in (tmp_path / "whole" / "checkpoints").glob("step-*")}
    resume_at(2, whole, checkpoints)
    assert losses(tmp_path / "whole") == course


@pytest.mark.parametrize("name", ["gkd", "distillm2"])
def test_accumulation_changes_nothing(tmp_path: Path, name: str) -> None:
    """Without drawing, the rows do not depend on how a step is cut; nor does the token mean over all of them."""
    for folder, size in (("one", 8), ("cut", 2)):
        method = {"name": name, "generation": {"temperature": 0.0, "max_new_tokens": 8}}
        method |= {"lam_student": 1.0} if name == "gkd" else {}
        config = language_config(tmp_path, folder, instruct=True, method=method, task={"generation_rows": 0})
        config["training"] |= {"steps": 3, "micro_batch_size": size, "evaluate_every": 3, "learning_rate": 1e-3}
        run(config)
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.parametrize(
    "training", [{"precision": "bf16"}, {"gradient_checkpointing": True}], ids=["bf16", "checkpointing"]
)
def test_options_of_training_work(tmp_path: Path, training: dict[str, Any]) -> None:
    config = language_config(tmp_path, method={"name": "gkd", "lam_student": 1.0, "generation": DRAWN})
    config["training"] |= {"steps": 2, "evaluate_every": 2, **training}
    assert run(config).metrics["validation"]["perplexity"] < 1e4


RANKS: dict[str, dict[str, Any]] = {
    "distillm": EAGER,
    "distillm2": {"name": "distillm2", "teacher_answers": "generated", "generation": DRAWN},
}
STAGES = {"distillm": ["0-0", "3-0"], "distillm2": ["0-0", "3-3"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", RANKS)
def test_two_ranks_give_what_one_gives(tmp_path: Path, name: str) -> None:
    """The same micro-batches, accumulated or shared: the same draws, the same buffer, the same losses."""
    training = {"steps": 8, "batch_size": 8, "micro_batch_size": None, **WORSE}
    if name == "distillm2":
        training |= {"steps": 3, "evaluate_every": 3, "learning_rate": 1e-3}
    config = language_config(
        tmp_path, instruct=True, method=RANKS[name], task={"generation_rows": 0}, training=training
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    one = tmp_path / "one"
    alone = {**config, "output": {"directory": str(one), "report": False}}
    run(alone | {"training": config["training"] | {"micro_batch_size": 4}})
    must_run_ranks(2, str(tmp_path), "two", "4", *STAGES[name], script=WORKER)
    expected = losses(one)
    if name == "distillm":
        state = state_of(sorted((one / "checkpoints").glob("step-*"))[-1])
        assert state["phi"] == 1.0 and len(state["lengths"]) == 12
    for stages in STAGES[name]:
        student, teacher = stages.split("-")
        two = tmp_path / f"two-student{student}-teacher{teacher}"
        assert losses(two) == pytest.approx(expected, rel=1e-4)
        tokens = [[line["tokens_per_s"] * line["step_ms"] for line in records(folder)] for folder in (one, two)]
        assert tokens[1] == pytest.approx(tokens[0], rel=1e-6), "rows of the same lengths"
