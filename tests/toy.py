"""A task of a few words that a tiny model learns in seconds, and launchers of the real program for tests."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from preloaded import ROOT, run_script
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

_GOOD = ["fine", "great", "lovely", "superb", "warm"]
_BAD = ["awful", "cold", "dull", "poor", "sad"]
_OTHER = ["a", "film", "is", "plot", "story", "the", "this", "very", "with"]
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def toy_rows(count: int, seed: int = 0) -> dict[str, list[Any]]:
    """Sentences of 3 to 9 words; label 1 if there are more good words than bad ones."""
    rng = random.Random(seed)
    sentences, labels = [], []
    for _ in range(count):
        label = rng.randrange(2)
        words = [rng.choice(_GOOD if label else _BAD) for _ in range(rng.randint(1, 3))]
        words += rng.choices(_OTHER, k=rng.randint(2, 6))
        rng.shuffle(words)
        sentences.append(" ".join(words))
        labels.append(label)
    return {"sentence": sentences, "label": labels}


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, BERT's special tokens."""
    vocabulary = {word: number for number, word in enumerate(_SPECIAL + _GOOD + _BAD + _OTHER)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def save_toy_teacher(folder: Path, seed: int = 0, **fields: Any) -> Path:
    """A small BERT of random weights without dropout, with the toy tokenizer, as a user would have it on disk."""
    tokenizer = toy_tokenizer()
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(
        **{"vocab_size": len(tokenizer), "max_position_embeddings": 32, "num_labels": 2, **shape, **fields},
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(seed)
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        model.classifier.weight.mul_(20)  # confident enough that imitating it is a task
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_toy_files(folder: Path, train: int = 96, validation: int = 40) -> dict[str, Any]:
    """JSONL files of the toy task; returns the `task` section that reads them."""
    for name, count, seed in (("train", train, 1), ("validation", validation, 2)):
        rows = toy_rows(count, seed)
        lines = [json.dumps({"sentence": s, "label": y}) for s, y in zip(rows["sentence"], rows["label"], strict=True)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return {
        "train_files": [str(folder / "train.jsonl")],
        "evaluation_files": {"validation": [str(folder / "validation.jsonl")]},
        "max_length": 32,
        "cache_dir": str(folder / "cache"),
    }


def toy_config(folder: Path, output: str = "run", **sections: dict[str, Any]) -> dict[str, Any]:
    """A complete MixKD configuration; sections given are merged into the default ones."""
    config: dict[str, Any] = {
        "task": write_toy_files(folder),
        "teacher": {"model": str(folder / "teacher")},
        "student": {"num_layers": 2},
        "method": {"name": "mixkd", "kd_weight": 1.0},
        "training": {
            "steps": 12,
            "batch_size": 8,
            "micro_batch_size": 4,
            "learning_rate": 1e-3,
            "evaluate_every": 6,
            "threads": 1,
        },
        "output": {"directory": str(folder / output), "report": False},  # its plots cost more than such a run
    }
    if not (folder / "teacher").exists():
        save_toy_teacher(folder / "teacher")
    for name, fields in sections.items():
        if name == "method" or not isinstance(config.get(name), dict):
            config[name] = fields
        else:
            config[name] = {**config[name], **fields}
    return config


def environment(**more: str) -> dict[str, str]:
    """The environment of a child process: this checkout first, no hub, CPU."""
    own_tools = os.path.dirname(sys.executable)
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": own_tools + os.pathsep + os.environ.get("PATH", ""),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **more,
    }


def program(*arguments: str) -> list[str]:
    """The one-process form of the program."""
    return [sys.executable, "-m", "mixkd_fast.train", *arguments]


def launched(ranks: int, *arguments: str, script: str = "mixkd_fast/train.py") -> list[str]:
    """The `deepspeed` form of the program (or of a test's own script) on this machine."""
    command = [os.path.join(os.path.dirname(sys.executable), "deepspeed"), "--num_gpus", str(ranks)]
    return [*command, "--master_port", str(free_port()), script, *arguments]


def free_port() -> int:
    """A TCP port that is free now."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(command: list[str], timeout: float = 300, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the checkout and keep what it prints; a Python script in a forked process where that works."""
    is_script = command[0] == sys.executable and (command[1] == "-m" or command[1].endswith(".py"))
    if is_script and not torch.cuda.is_available():
        return run_script(command[1:], [environment(**more)], timeout)
    return subprocess.run(
        command, cwd=ROOT, env=environment(**more), capture_output=True, text=True, timeout=timeout, check=False
    )


def must_run(command: list[str], timeout: float = 300, **more: str) -> str:
    """Run a command that has to succeed; returns its output."""
    return _output_of(run(command, timeout, **more))


def _output_of(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, (
        f"{result.args} ended with {result.returncode}:\n{result.stdout[-2000:]}\n{result.stderr[-6000:]}"
    )
    return result.stdout + result.stderr


def run_ranks(
    ranks: int, *arguments: str, script: str = "mixkd_fast/train.py", timeout: float = 300, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run a script as that many ranks, without a launcher's own processes, and keep what they print."""
    if torch.cuda.is_available():
        return run(launched(ranks, *arguments, script=script), timeout, **more)
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environments = [environment(RANK=str(rank), LOCAL_RANK=str(rank), **shared, **more) for rank in range(ranks)]
    return run_script([script, *arguments], environments, timeout)


def must_run_ranks(ranks: int, *arguments: str, **options: Any) -> str:
    """`run_ranks` that has to succeed; returns what they print."""
    return _output_of(run_ranks(ranks, *arguments, **options))


def records(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl of one kind."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def losses(folder: Path) -> list[float]:
    """The loss of every step."""
    return [line["loss"] for line in records(folder)]
