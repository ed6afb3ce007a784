"""Language-model runs of the real program: training, evaluation, resume, reports, saved students."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from toy import losses, records
from toy_lm import byte_tokenizer, language_config, run, save_lm, sentences, tiny_lm
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixkd_fast.causal_lm import CausalLM, Head
from mixkd_fast.cli_evaluate import evaluate_saved, main
from mixkd_fast.compare import compare
from mixkd_fast.configuration import Config, validate
from mixkd_fast.distillation import Result, distill
from mixkd_fast.errors import ConfigurationError, ModelError
from mixkd_fast.methods import LanguageMethod, Moment
from mixkd_fast.metrics import evaluate_language, rouge_l


@pytest.fixture(scope="module")
def instructed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Result]:
    folder = tmp_path_factory.mktemp("instruct")
    (folder / "x").mkdir()
    config = language_config(folder, instruct=True, student={"num_layers": 1, "layers": None})
    config["output"]["report"] = True
    return folder, config, run(config)


def test_twenty_steps_lower_the_loss(tmp_path: Path) -> None:
    student = {"num_layers": None, "config": {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1}}
    student["config"] |= {"num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
    config = language_config(tmp_path, method={"name": "finetune"}, teacher=None, student=student)
    config["student"]["tokenizer"] = str(tmp_path / "teacher")
    config["training"] |= {"steps": 20, "evaluate_every": 10}
    result = run(config)
    course = losses(tmp_path / "run")
    assert sum(course[-4:]) / 4 < 0.75 * course[0] and course[0] == pytest.approx(5.55, abs=0.3)  # log 258
    evaluations = records(tmp_path / "run", "evaluation")
    assert evaluations[1]["metrics"]["perplexity"] < evaluations[0]["metrics"]["perplexity"]
    assert result.summary["best"]["value"] == result.metrics["validation"]["perplexity"]


def test_perplexity_is_that_of_an_independent_forward(instructed: tuple[Path, dict[str, Any], Result]) -> None:
    folder, config, result = instructed
    model = AutoModelForCausalLM.from_pretrained(folder / "run" / "student").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "run" / "student")
    nll, correct, count = 0.0, 0, 0
    rows = [
        json.loads(line) for line in Path(config["task"]["evaluation_files"]["validation"][0]).read_text().splitlines()
    ]
    for row in rows:
        prompt = tokenizer(f"Q: {row['instruction']} {row['input']}\nA: ").input_ids
        ids = (prompt + tokenizer(row["output"]).input_ids + [tokenizer.eos_token_id])[:48]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0]
        for place in range(len(prompt), len(ids)):
            nll -= float(logits[place - 1].log_softmax(-1)[ids[place]])
            correct += int(logits[place - 1].argmax() == ids[place])
            count += 1
    figures = result.metrics["validation"]
    assert figures["nll"] == pytest.approx(nll / count, rel=1e-4)
    assert figures["perplexity"] == pytest.approx(torch.tensor(nll / count).exp().item(), rel=1e-4)
    assert figures["token_accuracy"] == pytest.approx(correct / count)


def test_samples_are_what_greedy_generation_gives(instructed: tuple[Path, dict[str, Any], Result]) -> None:
    folder, _, result = instructed
    samples = result.summary["samples"]["validation"]
    assert len(samples) == 2 and list(samples[0]) == ["prompt", "reference", "student", "teacher"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "run" / "student")
    for name, place in (("student", folder / "run" / "student"), ("teacher", folder / "teacher")):
        model = AutoModelForCausalLM.from_pretrained(place).eval()
        for sample in samples:
            ids = torch.tensor([tokenizer(sample["prompt"]).input_ids])
            out = model.generate(ids, do_sample=False, max_new_tokens=8, pad_token_id=257)[0, ids.shape[1] :]
            assert tokenizer.decode(out, skip_special_tokens=True) == sample[name]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    for name, figures in (("student", result.metrics), ("teacher", result.summary["teacher"]["metrics"])):
        scores = [scorer.score(sample["reference"], sample[name])["rougeL"].fmeasure for sample in samples]
        assert figures["validation"]["rouge_l"] == pytest.approx(sum(scores) / 2)


def test_a_saved_student_is_evaluated_alike(instructed: tuple[Path, dict[str, Any], Result]) -> None:
    folder, config, result = instructed
    task = validate(Config, config).task
    found = evaluate_saved(folder / "run" / "student", task)["validation"][0].metrics
    assert found == pytest.approx(result.metrics["validation"], rel=1e-5)


def test_drawn_answers_are_those_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`evaluate` draws from the run's seed; neither draws a class beyond the tokenizer's, which training never does."""
    calls: list[tuple[int, int]] = []
    generate = CausalLM.generate

    def recorded(self: CausalLM, *arguments: Any) -> torch.Tensor:
        calls.append((arguments[3], arguments[6]))
        return generate(self, *arguments)

    monkeypatch.setattr(CausalLM, "generate", recorded)
    save_lm(tmp_path / "padded", vocab_size=272)
    config = language_config(tmp_path, instruct=True, method={"name": "finetune"}, teacher=None)
    config["student"] = {"model": str(tmp_path / "padded")}
    config["task"]["generation"] |= {"temperature": 1.0}
    config["training"] |= {"steps": 1, "evaluate_every": 1, "seed": 7}
    result = run(config)
    of_the_run = list(calls)
    capsys.readouterr()
    assert main([str(tmp_path / "run" / "student")]) == 0
    assert calls[len(of_the_run) :] == of_the_run and {tokens for _, tokens in calls} == {258}
    found = json.loads(capsys.readouterr().out)["validation"]
    assert found == pytest.approx(result.metrics["validation"], rel=1e-5)


def test_a_partitioned_teacher_with_an_unknown_head_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = CausalLM.head

    def other(self: CausalLM) -> Head:
        found = head(self)
        return found._replace(scale=2.0) if self.config.model_type == "gpt2" else found

    monkeypatch.setattr(CausalLM, "head", other)
    save_lm(tmp_path / "strange", "gpt2")
    save_lm(tmp_path / "student")
    teacher = {"model": str(tmp_path / "strange"), "zero_stage": 3}
    config = language_config(
        tmp_path, teacher=teacher, student={"model": str(tmp_path / "student"), "num_layers": None}
    )
    with pytest.raises(ModelError, match="GPT2LMHeadModel cannot be used: its logits are not"):
        run(config)


def test_what_people_read(instructed: tuple[Path, dict[str, Any], Result]) -> None:
    folder, _, result = instructed
    report = (folder / "run" / "report.html").read_text()
    assert "Samples: validation" in report and "it is" in report and "perplexity" in report
    card = (folder / "run" / "student" / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card and "A causal language model for the task" in card
    header, rows = compare([folder / "run"])
    assert header[1] == "perplexity" and rows[1][1] == result.metrics["validation"]["perplexity"]
    assert result.summary["kind"] == "causal_lm"


def test_samples_are_escaped(instructed: tuple[Path, dict[str, Any], Result], tmp_path: Path) -> None:
    from mixkd_fast.report import write_report

    folder, _, _ = instructed
    shutil.copytree(folder / "run", tmp_path / "run")
    path = tmp_path / "run" / "summary.json"
    summary = json.loads(path.read_text())
    summary["samples"]["validation"][0]["student"] = "<script>alert(1)</script>"
    path.write_text(json.dumps(summary))
    assert "<script>alert" not in write_report(tmp_path / "run").read_text()


def test_a_resumed_run_is_bit_identical(tmp_path: Path) -> None:
    method = {"name": "lm_kd", "divergence": "jsd", "sm_weight": 0.5, "tmkd_weight": 0.5}
    whole = language_config(tmp_path, "whole", instruct=True, method=method)
    whole["task"]["generation"] = {"max_new_tokens": 4, "temperature": 1.0}
    run(whole)
    part = {**whole, "output": {"directory": str(tmp_path / "part"), "report": False}}
    # The first half of the same schedule: what a kill after step 4 leaves.
    run(part)
    kept = tmp_path / "part" / "checkpoints"
    for newer in sorted(kept.iterdir())[1:]:
        if newer.is_dir():
            shutil.rmtree(newer)
    run(part, resume=True)
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    first, second = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "student").state_dict() for name in ("whole", "part")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (
        records(tmp_path / "part", "evaluation")[-1]["metrics"]
        == records(tmp_path / "whole", "evaluation")[-1]["metrics"]
    )


@pytest.mark.parametrize("micro", [2, 8])
def test_accumulation_changes_nothing(tmp_path: Path, micro: int) -> None:
    """The token mean is over the whole batch, whichever way it is cut."""
    for name, size in (("one", 8), ("cut", micro)):
        training = {"steps": 3, "batch_size": 8, "micro_batch_size": size, "evaluate_every": 3, "threads": 1}
        run(language_config(tmp_path, name, instruct=True, task={"generation_rows": 0}, training=training))
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.parametrize(
    "training",
    [{"batching": "length", "tokens_per_micro_batch": 200}, {"gradient_checkpointing": True}, {"precision": "bf16"}],
    ids=["token budget", "checkpointing", "bf16"],
)
def test_options_of_training_work(tmp_path: Path, training: dict[str, Any]) -> None:
    result = run(language_config(tmp_path, training={"steps": 2, **training}))
    assert result.metrics["validation"]["perplexity"] < 1e4


class _EvenTokens(LanguageMethod):
    """Learns even tokens alone, which it finds out before the step."""

    name: Literal["even_tokens"] = "even_tokens"
    seen: ClassVar[list[tuple[float, int, int, bool]]] = []
    evaluated: ClassVar[list[float]] = []

    def prepare_batch(self, batch: Any, student: Any, teacher: Any, extras: Any, moment: Moment) -> Any:
        labels = batch.labels.where(batch.labels % 2 == 0, torch.tensor(-100))
        assert not student.model.training and not torch.is_grad_enabled()
        return replace(batch, labels=labels)

    def terms(self, batch: Any, student: Any, teacher: Any, extras: Any, moment: Moment) -> dict[str, torch.Tensor]:
        self.seen.append(
            (batch.mean_targets, int((batch.labels != -100).sum()), batch.num_rows, student.model.training)
        )
        return self.token_terms(batch, student, teacher, ce_weight=1.0)

    def after_evaluation(self, metrics: Any, extras: Any) -> None:
        self.evaluated.append(metrics["validation"]["perplexity"])


def test_a_method_may_replace_batches(tmp_path: Path) -> None:
    """The divisor of the token mean is counted anew, over all micro-batches."""
    config = language_config(tmp_path, training={"steps": 2, "evaluate_every": 1})
    sections = {name: config[name] for name in ("task", "teacher", "student", "training", "output")}
    result = distill(**sections, method=_EvenTokens(), progress=False)
    seen = _EvenTokens.seen
    assert len(seen) == 4 and all(training for *_, training in seen)
    for first, second in (seen[:2], seen[2:]):
        assert first[0] == second[0] == (first[1] + second[1]) / (first[2] + second[2])
    assert len(_EvenTokens.evaluated) == 2 and result.summary["best"]["value"] == min(_EvenTokens.evaluated)


def test_models_handed_over(tmp_path: Path) -> None:
    """Loaded objects, a tied student of another family and padded width, plain text as a data set."""
    from datasets import Dataset

    rows = Dataset.from_dict({"text": sentences(40)})
    result = distill(
        task={"kind": "causal_lm", "max_length": 32, "cache_dir": str(tmp_path / "cache")},
        teacher=tiny_lm("gpt2", 264),
        student=tiny_lm("qwen2", 258),
        tokenizer=byte_tokenizer(),
        train=rows,
        evaluation=rows,
        method={"name": "lm_kd", "divergence": "reverse_kl"},
        training={"steps": 2, "batch_size": 4, "threads": 1},
        output=str(tmp_path / "run"),
        progress=False,
    )
    assert result.student.config.model_type == "qwen2"
    assert result.student.get_output_embeddings().weight is result.student.get_input_embeddings().weight


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    save_lm(tmp_path / "other", tokenizer=byte_tokenizer(pad=False))
    config = language_config(tmp_path, student={"model": str(tmp_path / "other"), "num_layers": None})
    with pytest.raises(ModelError, match="the tokenizers differ"):
        run(config)


def test_methods_of_classifiers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match='method "kd" is for classification and regression tasks'):
        run(language_config(tmp_path, method={"name": "kd"}))


def test_options_of_encoders_are_refused_or_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"training\.compile"):
        run(language_config(tmp_path, training={"compile": "dynamic"}))
    with pytest.raises(ConfigurationError, match=r"teacher\.quantization"):
        run(language_config(tmp_path, "other", teacher={"quantization": "int8"}))


def test_figures_by_hand() -> None:
    import numpy as np

    answers = np.array([[2.0, 1, 2], [4.0, 3, 4]])
    found = evaluate_language(answers, ["token_accuracy"])
    assert list(found) == ["token_accuracy", "perplexity", "nll"]
    assert (
        found["nll"] == 1.0 and found["perplexity"] == pytest.approx(2.718281828) and found["token_accuracy"] == 4 / 6
    )
    # Longest common subsequence of 2 words, 3 words against 2: F = 2 * (2/2) * (2/3) / (2/2 + 2/3).
    assert rouge_l(["the cats sat", "a"], ["the cat", "b"]) == pytest.approx(0.8 / 2)
