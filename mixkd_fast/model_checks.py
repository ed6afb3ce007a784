"""Whether models, tokenizers and the task fit together. Every refusal names both sides."""

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mixkd_fast.data.batching import Batch
from mixkd_fast.encoder import Encoder
from mixkd_fast.errors import ModelError
from mixkd_fast.language_task import vocabulary_size
from mixkd_fast.mixing import Mixing

_PROBES: list[tuple[str, ...]] = [
    ("Every dog sleeps.",),
    (
        "It's 3.14% — naïve Café, E-MAIL user@example.org!",
        "Two\tspaces  and a line\nbreak; unbelievably 東京 🙂",
    ),
]


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, whole also where ZeRO-3 keeps a share of each."""
    return sum(map(_numel, model.parameters()))


def largest_layer_numel(model: nn.Module) -> int:
    """Parameters of the largest part that ZeRO-3 gathers at once: a repeated layer, or a single module outside them."""
    layers = [layer for stack in model.modules() if isinstance(stack, nn.ModuleList) for layer in stack]
    sizes = [count_parameters(layer) for layer in layers]
    sizes += [sum(map(_numel, module.parameters(recurse=False))) for module in model.modules()]
    return max([1, *sizes])


def word_embedding_size(model: Any) -> int:
    """Number of rows of a transformers model's word-embedding table (its padded vocabulary)."""
    return int(model.get_input_embeddings().num_embeddings)


def check_same_tokenizer(teacher: Any, student: Any) -> None:
    """Refuse two tokenizers that do not give the same ids: mixing and distillation pair their positions.

    Compares vocabulary, special tokens and the encodings of probe texts.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    advice = "; teacher and student must share one tokenizer"
    if ours != theirs:
        token = min(set(ours.items()) ^ set(theirs.items()))[0]
        raise ModelError(
            f"the tokenizers differ: the teacher's has {len(theirs)} tokens with {token!r} as id {theirs.get(token)}, "
            f"the student's {len(ours)} with {token!r} as id {ours.get(token)}{advice}"
        )
    if student.special_tokens_map != teacher.special_tokens_map:
        raise ModelError(
            f"the tokenizers differ in their special tokens: {dict(teacher.special_tokens_map)} (teacher), "
            f"{dict(student.special_tokens_map)} (student){advice}"
        )
    for probe in _PROBES:
        ours, theirs = dict(student(*probe)), dict(teacher(*probe))
        if ours != theirs:
            raise ModelError(
                f"the tokenizers differ: {' | '.join(probe)!r} becomes {theirs} (teacher) and {ours} (student){advice}"
            )


def check_vocabulary(model: nn.Module, tokenizer: Any, who: str) -> None:
    """Refuse a word-embedding table that is smaller than the tokenizer's vocabulary; a larger (padded) one is fine.

    Args: who = "teacher" or "student", for the message.
    """
    rows, needed = word_embedding_size(model), vocabulary_size(tokenizer)
    if rows < needed:
        raise ModelError(
            f"the {who}'s word embeddings have {rows} rows, but the tokenizer's vocabulary needs {needed}: "
            "the tokenizer belongs to another model"
        )


def check_num_labels(config: Any, num_labels: int, label_names: Sequence[str] | None = None) -> None:
    """Refuse a teacher of another number of labels than the task's, or of the same labels in another order.

    Args: config = the teacher's transformers configuration; num_labels = the task's (1 for regression);
    label_names = the task's names in label order, if known. Names such as LABEL_0 say nothing about order.
    """
    if config.num_labels != num_labels:
        raise ModelError(
            f"the teacher gives {config.num_labels} logits, but the task has {num_labels} "
            f"{'label' if num_labels == 1 else 'labels'}; fine-tune a teacher for this task (method finetune)"
        )
    if label_names is not None and labels_permuted(config, label_names):
        raise ModelError(
            f"the teacher's labels are {_names(config)}, the task's {list(label_names)}: the same labels in another "
            "order; put task.label_names in the teacher's order, or reorder the teacher's classifier"
        )


def labels_permuted(config: Any, label_names: Sequence[str]) -> bool:
    """Whether a configuration has just these label names, but in another order."""
    theirs, ours = [name.casefold() for name in _names(config)], [name.casefold() for name in label_names]
    return theirs != ours and sorted(theirs) == sorted(ours)


def check_max_length(config: Any, max_length: int, who: str) -> None:
    """Refuse sequences that are longer than the model has positions for.

    Args: config = a transformers configuration; max_length = task.max_length in tokens; who = "teacher" or "student".
    """
    limit = max_positions(config)
    if limit is not None and max_length > limit:
        raise ModelError(
            f"task.max_length is {max_length}, but the {who} ({config.model_type}) has positions for {limit} tokens"
        )


def max_positions(config: Any) -> int | None:
    """Longest sequence the model takes, or None where only distances count and nothing limits them (DeBERTa-v3).

    Families that count positions from padding_idx + 1 on (RoBERTa) have that many less than their table has rows.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or positions <= 0:
        return None
    if getattr(config, "relative_attention", False) and not getattr(config, "position_biased_input", True):
        return None
    return int(positions) - (config.pad_token_id + 1 if _counts_positions_from_padding(config) else 0)


def check_mixing(encoder: Encoder) -> None:
    """Refuse a model whose logits from word embeddings differ from those of the same rows as ids.

    One forward of a few tokens each way, on the CPU, with whole (not partitioned) parameters. It catches families that
    look at the ids elsewhere too, for example to find the last token of a row.
    """
    if getattr(encoder.config, "_attn_implementation", None) not in ("eager", "sdpa", None):
        # Others (flash attention) need a GPU and half precision.
        return
    num_words, padding = word_embedding_size(encoder.model), encoder.config.pad_token_id
    tokens = [word for word in range(num_words) if word != padding][:6]
    input_ids = torch.tensor([tokens, tokens[1:4] + [padding or 0] * (len(tokens) - 3)])
    attention_mask = torch.tensor([[1] * len(tokens), [1] * 3 + [0] * (len(tokens) - 3)])
    batch = Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        token_type_ids=None,
        labels=torch.zeros(2, dtype=torch.int64),
        soft_labels=None,
        row_ids=torch.arange(2),
        partner=torch.tensor([1, 0]),
        lam=torch.ones(2),
        num_rows=2,
        num_tokens=len(tokens) + 3,
    )
    kind, was_training = type(encoder.model).__name__, encoder.training
    encoder.eval()
    try:
        with torch.no_grad():
            from_ids = encoder.clean(batch).logits.float()
            from_words = encoder.mixed(batch, Mixing()).logits.float()
    except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{kind} cannot be used for mixing: {error}") from error
    finally:
        encoder.train(was_training)
    tolerance = 1e-5 if next(encoder.parameters()).dtype == torch.float32 else 1e-2
    if not torch.allclose(from_ids, from_words, rtol=tolerance, atol=tolerance):
        raise ModelError(
            f"{kind} cannot be used for mixing: its logits from word embeddings, {from_words[0].tolist()}, differ from "
            f"those of the same row as ids, {from_ids[0].tolist()}"
        )


def _names(config: Any) -> list[str]:
    return [str(config.id2label[index]) for index in sorted(config.id2label)]


def _counts_positions_from_padding(config: Any) -> bool:
    # The configuration does not say it; the embedding class in the module beside it does.
    try:
        module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    except ImportError:
        return False
    classes = [value for value in vars(module).values() if inspect.isclass(value)]
    return any(hasattr(value, "create_position_ids_from_inputs_embeds") for value in classes)


def _numel(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))
