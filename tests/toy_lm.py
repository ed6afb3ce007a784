"""Language modelling on the spot: a byte-level tokenizer, tiny random models, texts and instructions of a few words."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from mixkd_fast.configuration import Config, validate
from mixkd_fast.data.batching import Batch, Draw, EvaluationBatches, Padding, micro_batches
from mixkd_fast.data.tokenization import TokenRows
from mixkd_fast.distillation import Result, run_config
from mixkd_fast.methods import Setting

_WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "red", "dog", "run")
_COLOURS = {"apple": "red", "grass": "green", "sky": "blue", "snow": "white", "coal": "black"}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 256}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 48, "num_key_value_heads": 1},
    "qwen2": {"intermediate_size": 48, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "gpt2": {},
    "gemma2": {
        "intermediate_size": 48,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "final_logit_softcapping": 3.0,
        "attn_implementation": "eager",
    },
    "cohere": {"intermediate_size": 48, "num_key_value_heads": 2, "logit_scale": 0.25},
    "granite": {"intermediate_size": 48, "num_key_value_heads": 2, "logits_scaling": 3.0},
    "phi": {"intermediate_size": 48},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}


def byte_tokenizer(pad: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte, <eos> 256, and with `pad` <pad> 257."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate([*alphabet, "<eos>", *(["<pad>"] if pad else [])])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    names = {"eos_token": "<eos>"} | ({"pad_token": "<pad>"} if pad else {})
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def tiny_lm(family: str = "llama", vocab_size: int = 258, seed: int = 0, **fields: Any) -> Any:
    """A causal language model of random weights in eval mode; `fields` replace those of its configuration."""
    given = {**SHAPE, **FAMILIES[family], **fields}
    attention = {"attn_implementation": given.pop("attn_implementation")} if "attn_implementation" in given else {}
    ids = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": 256}
    config = AutoConfig.for_model(family, vocab_size=vocab_size, **ids, **given)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, **attention)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def save_lm(folder: Path, family: str = "llama", tokenizer: Any | None = None, **fields: Any) -> Path:
    """`tiny_lm` and the byte tokenizer as a user would have them on disk."""
    tiny_lm(family, **fields).save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder


def sentences(count: int, seed: int = 0) -> list[str]:
    """Texts of 3 to 9 words."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(_WORDS, k=rng.randint(3, 9))) + "." for _ in range(count)]


def instructions(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Questions for the colour of a thing; every second one with an input."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        thing = rng.choice(list(_COLOURS))
        about = f"the {thing}" if number % 2 else ""
        rows.append({"instruction": f"colour of {thing}?", "input": about, "output": f"it is {_COLOURS[thing]}"})
    return rows


def write_lines(path: Path, rows: list[dict[str, str]]) -> str:
    """A JSONL file; returns its path as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def language_task(folder: Path, instruct: bool = False, **fields: Any) -> dict[str, Any]:
    """The `task` section of a small causal_lm task whose files lie in `folder`."""
    files = {}
    for name, count, seed in (("train", 64, 1), ("validation", 12, 2)):
        rows = instructions(count, seed) if instruct else [{"text": text} for text in sentences(count, seed)]
        files[name] = write_lines(folder / f"{name}_{'instruct' if instruct else 'text'}.jsonl", rows)
    templates = {"prompt_template": "Q: {prompt} {input}\nA: "} if instruct else {}
    return {
        "kind": "causal_lm",
        "train_files": [files["train"]],
        "evaluation_files": {"validation": [files["validation"]]},
        "max_length": 48,
        "cache_dir": str(folder / "cache"),
        "generation_rows": 2 if instruct else 0,
        **({"generation": {"max_new_tokens": 8}} if instruct else {}),
        **templates,
        **fields,
    }


def language_config(folder: Path, output: str = "run", instruct: bool = False, **sections: Any) -> dict[str, Any]:
    """A complete lm_kd configuration; sections given are merged into the default ones."""
    if not (folder / "teacher").exists():
        save_lm(folder / "teacher", seed=3)
    config: dict[str, Any] = {
        "task": language_task(folder, instruct),
        "teacher": {"model": str(folder / "teacher")},
        "student": {"num_layers": 1},
        "method": {"name": "lm_kd"},
        "training": {
            "steps": 8,
            "batch_size": 8,
            "micro_batch_size": 4,
            "learning_rate": 5e-3,
            "evaluate_every": 4,
            "threads": 1,
        },
        "output": {"directory": str(folder / output), "report": False},
    }
    for name, fields in sections.items():
        replaced = name == "method" or fields is None or not isinstance(config.get(name), dict)
        config[name] = fields if replaced else {**config[name], **fields}
    return config


def rows_of(texts: list[tuple[list[int], int]], max_length: int = 32) -> TokenRows:
    """Rows of these tokens and prompt lengths."""
    import numpy as np

    lengths = np.array([len(tokens) for tokens, _ in texts], dtype=np.int64)
    return TokenRows(
        tokens=np.concatenate([np.array(tokens, dtype=np.int32) for tokens, _ in texts]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        token_types=None,
        labels=np.zeros(len(texts), dtype=np.int64),
        soft_labels=None,
        source_rows=np.arange(len(texts), dtype=np.int64),
        max_length=max_length,
        num_truncated=0,
        content_hash="",
        prompt_lengths=np.array([prompt for _, prompt in texts], dtype=np.int64),
    )


def random_rows(count: int = 8, vocab_size: int = 96, seed: int = 0) -> TokenRows:
    """Rows of 4 to 20 random tokens with prompts of 0 to 3."""
    rng = random.Random(seed)
    return rows_of(
        [([rng.randrange(vocab_size) for _ in range(rng.randint(4, 20))], rng.randint(0, 3)) for _ in range(count)]
    )


def batch_of(rows: TokenRows, **draw: Any) -> Batch:
    """All rows as one training batch. Args: draw = partner_ids and lam, for mixing."""
    import numpy as np

    whole = Draw(np.arange(len(rows)), draw.get("partner_ids"), draw.get("lam"))
    return micro_batches(rows, whole, 0, 1, len(rows), Padding(0, "right", 1))[0]


def setting_of(rows: TokenRows, student: Any = None, teacher: Any = None, **fields: Any) -> Setting:
    """What a run of these rows hands to a method: the byte tokenizer, one rank, `collect` over batches of three."""
    import numpy as np

    padding = Padding(257)

    def collect(forward: Any) -> Any:
        parts = [
            (batch.row_ids.numpy(), forward(batch).float().numpy())
            for batch in EvaluationBatches(rows, 3, 0, 1, padding)
        ]
        order = np.argsort(np.concatenate([numbers for numbers, _ in parts]))
        return np.concatenate([values for _, values in parts])[order]

    def refused(*_: Any) -> Any:
        raise AssertionError("not needed here")

    given: dict[str, Any] = {"seed": 5, "collect": collect, **fields}
    return Setting(
        student=student,
        teacher=teacher,
        rows=rows,
        num_labels=0,
        kind="causal_lm",
        tokenizer=byte_tokenizer(),
        device=torch.device("cpu"),
        load_teacher=refused,
        load_masked_lm=refused,
        load_texts=refused,
        new_student=refused,
        share=refused,
        **given,
    )


def byte_rows(count: int = 8, max_length: int = 32, prompts: bool = True, seed: int = 0) -> TokenRows:
    """Rows of 6 to 20 random bytes that end with <eos>, with prompts of 2 to 4 bytes, or none as plain text has."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        tokens = [rng.randrange(256) for _ in range(rng.randint(5, 19))] + [256]
        texts.append((tokens, rng.randint(2, 4) if prompts else 0))
    return rows_of(texts, max_length)


def byte_batch(rows: TokenRows, chosen: list[int] | None = None) -> Batch:
    """These rows, all of them by default, as one training batch, padded as a run pads."""
    import numpy as np

    numbers = np.array(chosen if chosen is not None else range(len(rows)))
    return micro_batches(rows, Draw(numbers, None, None), 0, 1, len(numbers), Padding(257))[0]


def run(config: dict[str, Any], resume: bool = False) -> Result:
    """Train as the mapping says, in this process."""
    return run_config(validate(Config, config), resume=resume, progress=False)


def gradient_of(value: Tensor, model: torch.nn.Module) -> list[Tensor]:
    """d value / d parameter for every parameter, zero where the value does not depend on it; the graph stays usable."""
    found = torch.autograd.grad(value, list(model.parameters()), retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), found, strict=True)]
