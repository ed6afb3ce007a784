"""What a run takes from offline stores before it starts: the teacher's answers, and rows chosen by their scores."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset

from mixkd_fast import distributed
from mixkd_fast.configuration import Config
from mixkd_fast.data.documents import corpus_hash
from mixkd_fast.data.loading import Splits
from mixkd_fast.data.tokenization import TokenRows, fingerprint
from mixkd_fast.errors import ConfigurationError, MixKDError
from mixkd_fast.methods import Method
from mixkd_fast.methods.base import RowScores
from mixkd_fast.methods.stored_teacher import wrong_store
from mixkd_fast.model_preparation import Loaded
from mixkd_fast.models import teacher_source
from mixkd_fast.offline.reading import OfflineStore
from mixkd_fast.teacher_store import store_key_of_files


def open_offline(config: Config, loaded: Loaded, rows: TokenRows, texts: Dataset, tokenizer: Any) -> OfflineStore:
    """The store of `teacher.offline`, checked against the run's rows, tokenizer, method and teacher. Collective.

    Raises: DataError that names what differs; ConfigurationError for a store that the method cannot learn from.
    """
    section = config.teacher
    assert section is not None and section.offline is not None
    store = OfflineStore(section.offline, "teacher.offline")
    reason = wrong_store(config.method, store.origin.kind, store.origin.temperature)
    if reason is not None:
        raise ConfigurationError(f"teacher.offline = {section.offline!r} {reason}")
    wanted: dict[str, Any] = {
        "tokenizer_hash": fingerprint(tokenizer),
        "corpus_hash": corpus_hash(texts),
        "max_length": rows.max_length,
        "rows_hash": rows.content_hash,
        "num_tokens": int(rows.num_targets.sum()),
    }
    if section.model is not None and loaded.teacher is None:
        wanted |= {"teacher": section.model, "teacher_hash": teacher_hash(teacher_source(section, "causal_lm"))}
    store.require(wanted)
    return store


def teacher_hash(source: Any) -> str:
    """Of the weights' files and the configuration, whatever folder they lie in; read by rank 0. Collective."""
    digest, error = "", None
    if distributed.rank() == 0:
        try:
            digest = store_key_of_files(source.files, source.config.to_json_string())
        except (MixKDError, OSError) as caught:
            error = caught
    message = distributed.first_error(error)
    if message is not None:
        raise error or MixKDError(f"rank 0 failed: {message}")
    return str(distributed.broadcast_object(digest))


def with_chosen_rows(method: Method, splits: Splits) -> tuple[Splits, dict[str, int] | None]:
    """The splits with the training rows that the method chooses, in their order; facts if it chooses any."""
    choice = method.choose_rows(scores_of(splits.train))
    if choice is None:
        return splits, None
    kept = np.isin(np.asarray(splits.train["row"]), choice.rows[choice.kept])
    facts = {"chosen_rows": int(kept.sum()), "scored_rows": len(choice.rows)}
    return replace(splits, train=splits.train.select(np.flatnonzero(kept))), facts


def scores_of(texts: Dataset) -> Callable[[str, str], RowScores]:
    """What reads the scores of these rows from a store; see `Method.choose_rows`."""
    digest = ""

    def read(folder: str, field: str) -> RowScores:
        nonlocal digest
        store = OfflineStore(folder, field)
        if store.origin.kind != "nll":
            raise ConfigurationError(f'{field} = {folder!r} is a store of kind "{store.origin.kind}"; allowed: "nll"')
        digest = digest or corpus_hash(texts)
        store.require({"corpus_hash": digest})
        records = {name: values.numpy() for name, values in store.rows(np.arange(store.origin.num_rows)).items()}
        read_by = (store.origin.tokenizer_hash, store.origin.max_length, store.origin.rows_hash)
        return RowScores(records["source_rows"], records["nll"] / records["tokens"], read_by)

    return read
