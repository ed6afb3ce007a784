"""Pretrained models and tokenizers by hub name, local folder or in memory; the only importer of transformers.

Weights come from safetensors files, tensor by tensor; no code of a repository runs unless it is allowed.
"""

import copy
import difflib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.initialization import no_init_weights
from transformers.utils import cached_file, logging

from mixkd_fast.errors import ModelError
from mixkd_fast.student_layers import ReadTensor

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FOLDER = "config.json, model.safetensors, tokenizer.json and tokenizer_config.json"
_REASON_LENGTH = 300
Purpose = Literal["classification", "causal_lm"]
"""What a model's head is for."""
_THEIRS = (SafetensorError, StrictDataclassError)


@dataclass(frozen=True, kw_only=True)
class _Source:
    """How models of this source are built."""

    attention: str | None = None
    """Attention implementation of transformers; None lets it choose."""
    trust_remote_code: bool = False
    field: str = "model"
    """The configuration field that names the source, for messages."""
    purpose: Purpose = "classification"

    @property
    def what(self) -> str:
        """The source in a message."""
        return self.field

    def structure(self, config: Any) -> nn.Module:
        """The model of a configuration without memory (parameters on the meta device)."""
        with _explained(self.what), torch.device("meta"):
            return new_model(config, self.attention, self.trust_remote_code, self.purpose)

    def build(
        self, config: Any, state: Mapping[str, Tensor], dtype: torch.dtype, seed: int = 0
    ) -> tuple[nn.Module, list[str], list[str]]:
        """The model of `config` with the tensors of `state` (names as stored); those it lacks are initialised, seeded.

        Returns: the model in eval mode on the CPU, the names that are new, the names whose stored shape did not fit
        (new as well).
        """
        model_class: Any = type(self.structure(config))
        options = {} if self.attention is None else {"attn_implementation": self.attention}
        with _explained(self.what), quiet(), seeded(seed):
            model, report = model_class.from_pretrained(
                None,
                config=config,
                state_dict=dict(state),
                dtype=dtype,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
        misfits = {name for name, *_ in report["mismatched_keys"]}
        return model, sorted(set(report["missing_keys"]) - misfits), sorted(misfits)


@dataclass(frozen=True)
class ModelSource(_Source):
    """A model by hub name or local folder: its configuration, and its weights tensor by tensor."""

    name: str
    revision: str | None = field(default=None, kw_only=True)

    @property
    def what(self) -> str:
        return f"{self.field} = {self.name!r}"

    @cached_property
    def config(self) -> Any:
        """The transformers configuration, as stored. Raises ModelError if it cannot be found or read."""
        with _explained(self.what, self.name):
            return AutoConfig.from_pretrained(
                self.name, revision=self.revision or "main", trust_remote_code=self.trust_remote_code
            )

    @cached_property
    def files(self) -> list[Path]:
        """The safetensors files. Raises ModelError if there are none, or one that their index lists is missing."""
        # A name that cannot be reached at all is told apart from a file that is not there.
        assert self.config is not None
        weights = self._file(_WEIGHTS)
        if weights is not None:
            return [weights]
        index = self._file(_INDEX)
        if index is not None:
            with _explained(f"{self.what}, {_INDEX}"):
                shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            paths = [self._file(shard) for shard in shards]
            if None in paths:
                raise ModelError(f"{self.what}: {_INDEX} lists {shards[paths.index(None)]}, which is missing")
            return [path for path in paths if path is not None]
        pickled = "; its pytorch_model.bin is not read" if self._is_file("pytorch_model.bin") else ""
        raise ModelError(
            f"{self.what} has no {_WEIGHTS}{pickled}: weights are read from safetensors only; save_pretrained of "
            f"transformers writes {_WEIGHTS}"
        )

    def skeleton(self) -> nn.Module:
        """The stored model's structure without memory (parameters on the meta device)."""
        return self.structure(self.config)

    def build_empty(self) -> nn.Module:
        """The stored model with parameters of arbitrary values, to be filled from `tensors`; its buffers are ready."""
        with _explained(self.what), no_init_weights():
            model: Any = new_model(self.config, self.attention, self.trust_remote_code, self.purpose)
        model.tie_weights()  # left out with the initial values
        built: nn.Module = model
        return built

    def stored_tensors(self) -> Iterator[tuple[str, ReadTensor]]:
        """(name in the file, function that reads the tensor) of every stored tensor.

        Each reading opens the file for itself: what was read before is then no longer mapped into memory.
        """
        for path in self.files:
            with _explained(f"{self.what}, {path.name}"), safe_open(path, "pt") as tensors:
                keys = list(tensors.keys())
            for key in keys:
                yield key, partial(_read_tensor, path, key)

    def tensors(self) -> Iterator[tuple[str, ReadTensor]]:
        """(name in the model, function that reads the tensor) of every stored tensor that the model has."""
        skeleton: Any = self.skeleton()
        known = set(skeleton.state_dict())
        for stored, read in self.stored_tensors():
            # Names of BERT's first checkpoints.
            name = stored.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
            name = name if name in known else f"{skeleton.base_model_prefix}.{name}"
            if name in known:
                yield name, read

    def _is_file(self, filename: str) -> bool:
        return (Path(self.name) / filename).is_file()

    def _file(self, filename: str) -> Path | None:
        if Path(self.name).is_dir():
            return Path(self.name) / filename if self._is_file(filename) else None
        try:
            found = cached_file(self.name, filename, revision=self.revision or "main")
        except OSError:
            return None
        return None if found is None else Path(found)


@dataclass(frozen=True)
class LoadedSource(_Source):
    """A transformers model that is already in memory; its tensors are copied, never shared."""

    model: nn.Module

    @property
    def what(self) -> str:
        return f"{self.field} (a loaded {type(self.model).__name__})"

    @property
    def config(self) -> Any:
        """The model's transformers configuration."""
        return self.model.config

    def skeleton(self) -> nn.Module:
        """The model itself."""
        return self.model

    def stored_tensors(self) -> Iterator[tuple[str, ReadTensor]]:
        """(name, function that copies the tensor) of the model's whole state."""
        if any(hasattr(parameter, "ds_id") for parameter in self.model.parameters()):
            raise ModelError(
                f"{self.what} is partitioned by ZeRO-3, its layers cannot be copied; give its name instead"
            )
        for key, tensor in self.model.state_dict().items():
            yield key, partial(_copy_to_cpu, tensor)


def _copy_to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _read_tensor(path: Path, key: str) -> Tensor:
    with safe_open(path, "pt") as tensors:
        tensor: Tensor = tensors.get_tensor(key)
    return tensor


def load_tokenizer(
    name: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    field: str = "student.tokenizer",
    purpose: Purpose = "classification",
) -> Any:
    """The tokenizer of a hub name or local folder; a language model's pads with eos_token if it has no other.

    Raises: ModelError if there is none, or it cannot pad.
    """
    what = f"{field} = {name!r}"
    with _explained(what, name):
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision or "main", trust_remote_code=trust_remote_code
        )
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ModelError(f"{what} has no tokenizer; the folder should hold {_FOLDER}")
    if purpose == "causal_lm":
        tokenizer = with_padding(tokenizer)
    if tokenizer.pad_token_id is None:
        raise ModelError(f"{what}: the tokenizer has no padding token, which batches need")
    return tokenizer


def with_padding(tokenizer: Any) -> Any:
    """The tokenizer, or a copy whose pad token is its end-of-text token where it has none (GPT-2, Llama)."""
    if tokenizer.pad_token_id is not None or tokenizer.eos_token_id is None:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_masked_lm(name: str, field: str, trust_remote_code: bool = False) -> nn.Module:
    """A pretrained masked language model in fp32 on the CPU, in eval mode.

    Raises: ModelError if it cannot be loaded, or has no trained masked-language-model head.
    """
    what = f"{field} = {name!r}"
    with _explained(what, name), quiet():
        model, report = AutoModelForMaskedLM.from_pretrained(
            name,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    if report["missing_keys"]:
        lacking = ", ".join(sorted(report["missing_keys"])[:5])
        raise ModelError(f"{what} has no trained head for masked tokens (no weights for {lacking})")
    loaded: nn.Module = model.eval()
    return loaded


def new_config(model_type: str, fields: Mapping[str, Any], where: str = "student.config") -> Any:
    """A transformers configuration of a family, with these fields. Raises ModelError if transformers refuses them.

    Args: where = the field that describes it, for the message.
    """
    if model_type not in CONFIG_MAPPING:
        close = difflib.get_close_matches(str(model_type), CONFIG_MAPPING.keys(), 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ModelError(f"{where}: model_type {model_type!r} is not a family of transformers{hint}")
    with _explained(where):
        return AutoConfig.for_model(model_type, **fields)


def new_model(
    config: Any, attention: str | None = None, trust_remote_code: bool = False, purpose: Purpose = "classification"
) -> nn.Module:
    """A sequence-classification or causal language model with fresh weights of the global generator."""
    options = {} if attention is None else {"attn_implementation": attention}
    family = AutoModelForCausalLM if purpose == "causal_lm" else AutoModelForSequenceClassification
    with _explained(f"a model of type {config.model_type!r}"):
        model: nn.Module = family.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code, **options)
    return model


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from a CPU generator seeded anew; afterwards the global one goes on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back transformers' reports, such as of new weights, and its bars: our own notes say what matters."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


@contextmanager
def _explained(what: str, name: str | None = None) -> Iterator[None]:
    """Turn what transformers raises into a ModelError; `name` = the hub name or folder that is being read."""
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, TypeError, ImportError, KeyError, RuntimeError, *_THEIRS) as error:
        reason = " ".join(str(error).split())[:_REASON_LENGTH] or type(error).__name__
        if name is None:
            raise ModelError(f"{what}: {reason}") from error
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{what} needs code from its repository, which is not run unless trust_remote_code is true beside it"
            ) from error
        if Path(name).is_dir():
            raise ModelError(f"{what}: the folder cannot be read; it should hold {_FOLDER}: {reason}") from error
        if Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name:
            raise ModelError(f"{what}: there is no such folder") from error
        raise ModelError(
            f"{what} is neither a local folder nor reachable on the Hugging Face hub; without a network, put the "
            f"model's {_FOLDER} into a folder and give its path: {reason}"
        ) from error
