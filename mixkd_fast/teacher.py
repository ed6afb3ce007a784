"""A frozen teacher partitioned over the ranks by DeepSpeed ZeRO-3, with the same face as an `Encoder` in memory.

The teacher's stage does not depend on the student's. Its parameters are created partitioned, and filled tensor by
tensor from safetensors files, so that no rank ever holds the whole teacher.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import psutil
import torch
from torch import nn

from mixkd_fast import distributed
from mixkd_fast.build_locks import guarded_builds
from mixkd_fast.causal_lm import CausalLM, Head, answers_of, can_probe, check_probe
from mixkd_fast.configuration import Precision, Teacher
from mixkd_fast.data.batching import Batch
from mixkd_fast.deepspeed_config import teacher_zero3_config
from mixkd_fast.engine import whole_parameters
from mixkd_fast.errors import ModelError
from mixkd_fast.host_memory import return_freed_memory
from mixkd_fast.mixing import Mixing
from mixkd_fast.model_checks import largest_layer_numel
from mixkd_fast.models import Encoder, ModelSource

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


class ShardedTeacher:
    """An `Encoder` or `CausalLM` whose parameters are gathered layer by layer in its forward. Calls are collective."""

    def __init__(self, encoder: Encoder | CausalLM, zero_config: dict[str, Any]) -> None:
        encoder.requires_grad_(False)
        self.encoder = encoder
        with guarded_builds():
            self._engine, *_ = deepspeed.initialize(model=_Dispatch(encoder), config=zero_config)
        self._engine.eval()

    @property
    def model(self) -> nn.Module:
        """The transformers model, its parameters partitioned."""
        return self.encoder.model

    @torch.no_grad()
    def clean(self, batch: Batch, **options: Any) -> Any:
        """The plain forward of the batch's clean rows; see `Encoder.clean`."""
        return self._engine("clean", (batch,), options)

    @torch.no_grad()
    def mixed(self, batch: Batch, mixing: Mixing, **options: Any) -> Any:
        """The forward of the batch's mixed rows; see `Encoder.mixed`."""
        return self._engine("mixed", (batch, mixing), options)

    @torch.no_grad()
    def both(self, batch: Batch, mixing: Mixing, **options: Any) -> Any:
        """Clean and mixed rows in one forward; see `Encoder.both`."""
        return self._engine("both", (batch, mixing), options)

    @torch.no_grad()
    def read(self, batch: Batch, mixing: Mixing | None = None, **options: Any) -> Any:
        """A forward with what its layers compute; see `Encoder.read`."""
        return self._engine("read", (batch, mixing), options)

    @torch.no_grad()
    def hidden(self, batch: Batch, mixing: Mixing | None = None) -> torch.Tensor:
        """Last hidden states of a language model; see `CausalLM.hidden`."""
        hidden: torch.Tensor = self._engine("hidden", (batch, mixing), {})
        return hidden

    @property
    def _lm(self) -> CausalLM:
        assert isinstance(self.encoder, CausalLM)
        return self.encoder

    def head(self) -> Head:
        """A language model's output layer, whole inside `gathered_head`."""
        return self._lm.head()

    @contextmanager
    def gathered_head(self) -> Iterator[None]:
        """Here, and nowhere else, the output layer is whole on every rank. Collective."""
        with whole_parameters(self._lm.head_parameters()):
            yield

    def check_head(self) -> None:
        """Refuse a language model whose head this package does not know; see `causal_lm.check_head`."""
        if can_probe(self._lm):
            found = self._engine("probe", (self._engine.device,), {})
            with self.gathered_head():
                check_probe(self._lm, found)

    @torch.no_grad()
    def answers(self, batch: Batch) -> torch.Tensor:
        """What an evaluation needs of every row; see `CausalLM.answers`."""
        hidden = self.hidden(batch)
        with self.gathered_head():
            return answers_of(hidden, self.head(), batch.labels[: batch.num_rows])

    @torch.no_grad()
    def generate(self, *arguments: Any) -> torch.Tensor:
        """Continue prompts; see `CausalLM.generate`."""
        generated: torch.Tensor = self._engine("generate", arguments, {})
        return generated

    @torch.no_grad()
    def next_logits(self, *arguments: Any) -> tuple[torch.Tensor, Any]:
        """Logits of the next token; see `CausalLM.next_logits`."""
        logits, cache = self._engine("next_logits", arguments, {})
        return logits, cache


class _Dispatch(nn.Module):
    """One module call per forward, whichever rows are wanted: ZeRO-3 hooks the outermost module."""

    def __init__(self, encoder: Encoder | CausalLM) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, call: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return getattr(self.encoder, call)(*arguments, **options)


def load_sharded_teacher(
    section: Teacher, source: ModelSource, precision: Precision, micro_batch_size: int, device: torch.device
) -> ShardedTeacher:
    """Build the teacher partitioned over the ranks and fill it from its safetensors files. Collective.

    Raises: ModelError when weights are missing. Call `require_memory_for_layer` first.
    """
    config = _zero_config(section, source.skeleton(), micro_batch_size, precision)
    if device.type == "cpu":
        return_freed_memory()
    with guarded_builds(), deepspeed.zero.Init(config_dict_or_path=config):
        model = source.build_empty()
    fill_partitioned(model, source)
    face: Encoder | CausalLM = CausalLM(model) if source.purpose == "causal_lm" else Encoder(model)
    return ShardedTeacher(face, config)


def shard_loaded_teacher(
    section: Teacher, encoder: Encoder | CausalLM, precision: Precision, micro_batch_size: int
) -> ShardedTeacher:
    """Partition a teacher that the caller has already loaded. Collective."""
    config = _zero_config(section, encoder.model, micro_batch_size, precision)
    with guarded_builds():
        deepspeed.zero.Init(module=encoder.model, config_dict_or_path=config)
    return ShardedTeacher(encoder, config)


def _zero_config(section: Teacher, model: nn.Module, micro_batch_size: int, precision: Precision) -> dict[str, Any]:
    """Raises: ModelError if the parameters are to rest on NVMe and DeepSpeed cannot read and write it here."""
    if section.offload is not None and section.offload.device == "nvme":
        from deepspeed.ops.op_builder import AsyncIOBuilder

        if not AsyncIOBuilder().is_compatible(verbose=False):
            raise ModelError(
                'teacher.offload.device = "nvme" needs the library libaio with its header (Debian and Ubuntu: apt '
                'install libaio-dev); without it use "cpu"'
            )
    largest = max(parameter.numel() for parameter in model.parameters())
    share = -(-largest // distributed.world_size())
    return teacher_zero3_config(section, largest_layer_numel(model), micro_batch_size, precision, share)


def fill_partitioned(model: nn.Module, source: ModelSource) -> None:
    """Copy the source's tensors, one at a time, into a partitioned model; rank 0 reads, every rank keeps its part."""
    parameters = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    missing = set(parameters)
    for name, read in source.tensors():
        if name in parameters:
            with whole_parameters([parameters[name]], modify=True):
                if torch.distributed.get_rank() == 0:
                    parameters[name].data.copy_(read())
            missing.discard(name)
        elif name in buffers:
            buffers[name].copy_(read())
    if missing:
        raise ModelError(f"teacher.model = {source.name!r}: no weights for {', '.join(sorted(missing)[:5])}")


def require_memory_for_layer(field: str, largest_numel: int, precision: Precision, device: torch.device) -> None:
    """ZeRO-3 must gather one layer at a time: refuse when the largest does not fit in what is free now."""
    needed = largest_numel * _BYTES[precision]
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise ModelError(
            f"{field} = 3: the largest layer has {largest_numel:,} parameters and needs {needed / 2**30:,.1f} GiB in "
            f"{precision} on every rank while it runs, but {free / 2**30:,.1f} GiB are free. "
            "Use a device with more memory, a smaller model or a lower precision"
        )
