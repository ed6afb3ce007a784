"""Random models of a few thousand parameters for every tested family, tiny tokenizers, and batches for them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from mixkd_fast.configuration import Student, Teacher
from mixkd_fast.data.batching import Batch
from mixkd_fast.models import Encoder, load_student_encoder

FAMILIES = ("bert", "roberta", "distilbert", "electra", "modernbert", "deberta-v2")
WITH_TOKEN_TYPES = ("bert", "electra", "deberta-v2")
LABELS = ["entailment", "neutral", "contradiction"]
VOCAB_SIZE = 96
MAX_POSITIONS = 48

_FIELDS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"type_vocab_size": 1, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
    "distilbert": {},
    "electra": {"embedding_size": 12},
    "modernbert": {
        "pad_token_id": 0,
        "bos_token_id": 2,
        "cls_token_id": 2,
        "eos_token_id": 3,
        "sep_token_id": 3,
        "global_attn_every_n_layers": 3,
        "local_attention": 8,
        "classifier_pooling": "mean",
    },
    "deberta-v2": {
        "type_vocab_size": 2,
        "position_biased_input": False,
        "relative_attention": True,
        "position_buckets": 8,
        "pos_att_type": ["p2c", "c2p"],
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "embedding_size": 12,
        "conv_kernel_size": 3,
        "conv_act": "gelu",
    },
}
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_WORDS = (
    *("every", "some", "no", "not", "dog", "cat", "bird", "small", "red", "box", "sleep", "sing", "the", "an", "is"),
    *("are", "of", "left", "near", "old", "house", "two", "three", "before", "do", "play", "garden", "noon", "##er"),
    *("##ing", "##ed", "but", "all", "in", "on"),
)
_MERGES = [("t", "h"), ("th", "e"), ("d", "o"), ("do", "g"), ("c", "a"), ("ca", "t"), ("n", "o"), ("s", "l")]


def tiny_config(family: str, num_labels: int = 3, layers: int = 4, **fields: Any) -> Any:
    """A configuration of width 16 with 2 heads; `fields` replace its fields."""
    common = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": MAX_POSITIONS,
        "num_labels": num_labels,
        "type_vocab_size": 2,
        # Large enough that an error of mixing shows in the logits.
        "initializer_range": 0.3,
    }
    if family in ("distilbert", "modernbert"):
        del common["type_vocab_size"]
    if family == "distilbert":
        common["hidden_dim"] = common.pop("intermediate_size")
    return AutoConfig.for_model(family, **{**common, **_FIELDS[family], **fields})


def tiny_model(family: str, num_labels: int = 3, layers: int = 4, seed: int = 0, **fields: Any) -> Any:
    """A sequence-classification model in eval mode whose parameters are all random, norms and biases too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(tiny_config(family, num_labels, layers, **fields))
        randomise(model)
    return model.eval()


def randomise(model: nn.Module) -> None:
    """Move every parameter away from its initial value, so that no two layers or biases are alike."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def tiny_encoder(family: str, num_labels: int = 3, layers: int = 4, seed: int = 0, **fields: Any) -> Encoder:
    """`tiny_model` as an Encoder."""
    return Encoder(tiny_model(family, num_labels, layers, seed, **fields))


def save_tiny_model(path: Path, family: str, tokenizer: Any | None = None, **options: Any) -> Path:
    """Save `tiny_model(family, **options)`, and a tokenizer if given, into a folder; returns it."""
    tiny_model(family, **options).save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    return path


def save_tiny_teachers(root: Path) -> dict[str, Path]:
    """A saved teacher of four layers and the labels of LABELS with its tokenizer, per family."""
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {name: index for index, name in enumerate(LABELS)}}
    return {
        family: save_tiny_model(root / family, family, tiny_tokenizer(tokenizer_kind(family)), **labels)
        for family in FAMILIES
    }


def tokenizer_kind(family: str) -> str:
    """The kind of `tiny_tokenizer` whose pad token has the family's id."""
    return "bpe" if family == "roberta" else "wordpiece"


def teacher_of(folder: Path, **options: Any) -> Teacher:
    """The section of a saved teacher."""
    return Teacher(model=str(folder), **options)


def student_of(
    student: Student,
    teacher: Teacher | nn.Module | None,
    tokenizer: Any | None = None,
    num_labels: int = 3,
    kind: Literal["classification", "regression"] = "classification",
    label_names: list[str] | None = None,
    seed: int = 0,
) -> tuple[Encoder, list[str]]:
    """`load_student_encoder` with the defaults of these tests."""
    tokenizer = tokenizer or tiny_tokenizer()
    return load_student_encoder(student, teacher, tokenizer, num_labels, kind, label_names, seed)


def tiny_tokenizer(kind: str = "wordpiece", vocab_size: int = VOCAB_SIZE) -> Any:
    """A tokenizer of vocab_size tokens: BERT's WordPiece (pad 0, token types) or RoBERTa's byte-level BPE (pad 1).

    Special tokens, characters, then words. Not trained: trainers number equal counts differently from run to run.
    """
    if kind == "wordpiece":
        special = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
        pieces = [*_LETTERS, *(f"##{letter}" for letter in _LETTERS), *".,!?'", *_WORDS]
        vocabulary = _numbered([*special.values(), *pieces], vocab_size)
        tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
    else:
        special = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
        pieces = ["\u0120", *_LETTERS, *_LETTERS.upper(), *".,!?'", *(a + b for a, b in _MERGES)]
        vocabulary = _numbered([*special.values(), *pieces, *(f"<extra {n}>" for n in range(vocab_size))], vocab_size)
        tokenizer = Tokenizer(models.BPE(vocabulary, _MERGES, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        pair = "<s> $A </s> </s> $B </s>"
    ends = [(token, vocabulary[token]) for token in (special["cls"], special["sep"])]
    single = f"{special['cls']} $A {special['sep']}"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ends)
    inputs = ["input_ids", *(["token_type_ids"] if kind == "wordpiece" else []), "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=inputs,
        **{f"{name}_token": token for name, token in special.items()},
    )


def _numbered(pieces: Sequence[str], size: int) -> dict[str, int]:
    assert len(pieces) >= size
    vocabulary = {piece: index for index, piece in enumerate(pieces[:size])}
    assert len(vocabulary) == size
    return vocabulary


def tiny_batch(
    config: Any,
    lengths: Sequence[int] = (9, 5, 7, 12),
    partner: Sequence[int] | None = (2, 0, 3, 1),
    lam: Sequence[float] | None = (0.3, 0.8, 0.55, 0.1),
    num_rows: int | None = None,
    width: int | None = None,
    token_types: bool = True,
    seed: int = 0,
) -> Batch:
    """Rows of random tokens of these lengths, padded on the right to `width` (the longest row's, if None).

    The second half of every row has token type 1. Tokens and labels do not depend on the width.
    """
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths) if width is None else width
    padding = config.pad_token_id
    ids = torch.full((len(lengths), width), padding)
    types, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(5, config.vocab_size, (length,), generator=generator)
        types[row, length // 2 : length] = 1
        mask[row, :length] = 1
    return Batch(
        input_ids=ids,
        attention_mask=mask,
        token_type_ids=types if token_types else None,
        labels=torch.randint(0, config.num_labels, (len(lengths),), generator=generator),
        soft_labels=None,
        row_ids=torch.arange(len(lengths)),
        partner=None if partner is None else torch.tensor(partner),
        lam=None if lam is None else torch.tensor(lam, dtype=torch.float32),
        num_rows=len(lengths) if num_rows is None else num_rows,
        num_tokens=sum(lengths[: len(lengths) if num_rows is None else num_rows]),
        row_lengths=torch.tensor(lengths),
    )


def plain_logits(model: Any, ids: Tensor, mask: Tensor, types: Tensor | None) -> Tensor:
    """The model's own forward on ids, as any user would call it; token types only where its table has several rows."""
    takes_types = types is not None and model.config.model_type in WITH_TOKEN_TYPES
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **({"token_type_ids": types} if takes_types else {})).logits
