"""The WordPiece tokenizer of the demo task, trained on its training texts."""

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING

from mixkd_fast.data.demo.grammar import generate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
VOCABULARY_SIZE = 512
MAX_LENGTH = 64


def learn_word_pieces(counts: Counter[str], size: int) -> list[str]:
    """WordPiece vocabulary of counted words: their characters, then merges of the most frequent neighbours.

    tokenizers has a trainer for this, but it numbers equally frequent pieces differently in every run, and weights
    that were trained with one numbering are worthless with another; here ties go to the alphabetically first.
    Returns: at most `size` pieces (never fewer than the characters); those that continue a word start with "##".
    """
    split = {word: [word[0], *(f"##{letter}" for letter in word[1:])] for word in sorted(counts)}
    pieces = sorted({piece for parts in split.values() for piece in parts})
    while len(pieces) < size:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in split.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[word]
        if not pairs:
            break
        first, second = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merged = first + second.removeprefix("##")
        if merged not in pieces:
            pieces.append(merged)
        split = {word: _merge(parts, first, second, merged) for word, parts in split.items()}
    return pieces


def _merge(parts: list[str], first: str, second: str, merged: str) -> list[str]:
    result: list[str] = []
    for part in parts:
        if result and result[-1] == first and part == second:
            result[-1] = merged
        else:
            result.append(part)
    return result


def train_demo_tokenizer(seed: int = 0) -> "PreTrainedTokenizerFast":
    """A lower-case BERT tokenizer for the demo task, the same for a seed every time.

    Pairs become "[CLS] premise [SEP] hypothesis [SEP]" with token types 0 and 1. Token ids: the special tokens in
    the order [PAD], [UNK], [CLS], [SEP], [MASK] are 0 to 4. Needs transformers and tokenizers.
    """
    texts = (text for pair in generate(seed)["train"] for text in (pair.premise, pair.hypothesis))
    special = list(SPECIAL_TOKENS.values())
    words = Counter(word for text in texts for word in text.split())
    return bert_tokenizer([*special, *learn_word_pieces(words, VOCABULARY_SIZE - len(special))])


def bert_tokenizer(pieces: Iterable[str]) -> "PreTrainedTokenizerFast":
    """The lower-case BERT tokenizer whose vocabulary is these pieces, numbered in this order."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import BertTokenizerFast

    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    return BertTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_LENGTH, **SPECIAL_TOKENS)
