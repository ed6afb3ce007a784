"""Which methods can learn from a teacher that has answered beforehand, and from which of its answers."""

from __future__ import annotations

from mixkd_fast.methods.base import Method
from mixkd_fast.methods.language import LanguageMethod


def check_offline(folder: str, has_model: bool, method: Method, kind: str | None) -> None:
    """What a configuration alone tells about `teacher.offline`. Raises: ValueError that names the field."""
    where = f"teacher.offline ({folder!r})"
    if kind != "causal_lm":
        raise ValueError(f'{where} is for task.kind "causal_lm", and the kind is {kind or "null"}; leave it out')
    if not method.takes_stored_teacher:
        name: str = vars(method)["name"]
        raise ValueError(
            f'{where} has answers for the rows of the corpus alone, and method "{name}" asks the teacher about '
            "more, or not at all; leave it out"
        )
    if method.needs_mixed_teacher and not has_model:
        raise ValueError(f"{where} has no answers for mixed rows (method.tmkd_weight above 0); add teacher.model")


def wrong_store(method: Method, kind: str, temperature: float | None) -> str | None:
    """Why a store of this kind is not what the method learns from; None if it is.

    Args: temperature = of the store's log-probabilities, kind "top_k".
    """
    if kind == "nll":
        return 'holds scores of rows (kind "nll") for method "miniplm"; a run learns from "top_k" or "hidden"'
    if kind != "top_k" or not isinstance(method, LanguageMethod):
        return None
    if method.divergence == "mse":
        return 'holds log-probabilities (kind "top_k"), and method.divergence "mse" compares logits; use kind "hidden"'
    if temperature != method.temperature:
        return (
            f"holds log-probabilities at temperature {temperature}, and method.temperature is {method.temperature}: "
            'the softmax at another temperature cannot be had from a few classes; make a new one, or use kind "hidden"'
        )
    return None
