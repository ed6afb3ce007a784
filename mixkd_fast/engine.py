"""The optimizer step over DeepSpeed: accumulation, precision, clipping, guards. The only importer of deepspeed."""

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.zero import GatheredParameters
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.profiler import record_function

from mixkd_fast import distributed
from mixkd_fast.build_locks import guarded_builds
from mixkd_fast.causal_lm import CausalLM
from mixkd_fast.configuration import Training
from mixkd_fast.data.batching import Batch
from mixkd_fast.data.next_tokens import IGNORED
from mixkd_fast.deepspeed_config import autocasts
from mixkd_fast.distillation_module import DistillationModule
from mixkd_fast.errors import CheckpointError, ConfigurationError
from mixkd_fast.extra_states import ExtraStates
from mixkd_fast.language_task import Sampling
from mixkd_fast.methods import Moment
from mixkd_fast.step_records import StepRecord, StepRecords, StepReport
from mixkd_fast.universal import model_state_files, saved_ranks, universal_state

_TAG = "engine"
_TIMEOUT = timedelta(minutes=30)


def start_distributed(device: torch.device) -> None:
    """Join the other ranks that a launcher has started (RANK, WORLD_SIZE, ...), or form a group of one.

    The group of one needs no port, no mpi4py, and no RANK in the environment, which child processes would inherit.
    """
    distributed.find_own_tools()
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on this one
    if not torch.distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if distributed.is_launched():
            torch.distributed.init_process_group(backend, timeout=_TIMEOUT)
        else:
            alone = HashStore()
            torch.distributed.init_process_group(backend, timeout=_TIMEOUT, store=alone, rank=0, world_size=1)
    with guarded_builds():
        deepspeed.init_distributed(
            dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False
        )


class Engine:
    """Trains a `DistillationModule` under the user's DeepSpeed configuration."""

    def __init__(
        self,
        module: DistillationModule,
        training: Training,
        deepspeed_config: dict[str, Any],
        device: torch.device,
        source_rows: NDArray[np.int64] | None,
    ) -> None:
        """Args: source_rows = every training row's number in the user's data, for messages; None if row ids are."""
        self.training = training
        self.device = device
        self._module = module
        self._extra_states = ExtraStates(module)
        config = dict(deepspeed_config)
        # DeepSpeed's own counting of throughput waits for the device twice in every step.
        config.setdefault("timers", {"throughput": {"enabled": False}})
        module.autocast = autocasts(training, config)
        self._records = StepRecords(source_rows, training.non_finite == "stop", training.precision == "fp16")
        groups = _parameter_groups(module, training.weight_decay)
        zero_stage = config.get("zero_optimization", {}).get("stage", 0)
        try:
            with guarded_builds():
                optimizer = None if "optimizer" in config else _adamw(module, training, config)
                self._is_plain = zero_stage == 0 and training.precision != "fp16"
                self._is_plain &= not config.get("bf16", {}).get("enabled", False)
                self._is_plain &= type(optimizer) is torch.optim.AdamW  # an offloaded one neither guards nor scales
                self._is_plain &= "scheduler" not in config  # it would count steps that were not applied
                if self._is_plain:
                    config["gradient_clipping"] = 0.0  # `_update` clips on the device, together with the guard
                self._engine, *_ = deepspeed.initialize(
                    model=module, optimizer=optimizer, model_parameters=None if optimizer else groups, config=config
                )
        except (ValidationError, DeepSpeedConfigError) as error:
            raise ConfigurationError(f"deepspeed: DeepSpeed refuses the section: {error}") from error
        # DeepSpeed's own scheduler, if its section has one, drives the learning rate; else training.schedule does.
        groups = [] if "scheduler" in config else self._engine.optimizer.param_groups
        self._shares = [group["lr"] / training.learning_rate for group in groups]
        if self._is_plain and distributed.world_size() == 1:
            # DeepSpeed would copy all gradients into one piece, exchange it with nobody, and copy it back.
            self._engine.enable_backward_allreduce = False
        self.zero_stage: int = self._engine.zero_optimization_stage()
        self._guards_itself = self._engine.optimizer is not self._engine.basic_optimizer
        # Beside adapters the student's weights come from where they came at the start; a method's own are kept.
        frozen = {id(p) for p in module.parameters() if not p.requires_grad}
        self._skips_frozen = bool(frozen) and frozen <= {id(p) for p in module.student.parameters()}
        self.monitor = self._engine.monitor

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Let go of the model and its states: ZeRO's hooks keep them alive for as long as the process lives.

        That waits for the device. After an error among several ranks it is left: the device may wait for one that is
        gone.
        """
        if error is None:
            self._engine.destroy()
        elif distributed.world_size() == 1:
            with contextlib.suppress(Exception):  # the error itself says more
                self._engine.destroy()

    def step(self, batches: Sequence[Batch], moment: Moment, learning_rate: float, batch_size: int) -> None:
        """Accumulate the micro-batches of this rank and update the weights once; `report` says how it went.

        The loss is the sum of all terms over all rows of all ranks, divided by `batch_size` rows; DeepSpeed divides
        by accumulation steps and ranks, which the scale below undoes. A step with a term or gradient that is not
        finite leaves the weights as they are.
        """
        # Looked up anew each time: loading a checkpoint replaces the groups.
        for group, share in zip(self._engine.optimizer.param_groups, self._shares, strict=False):
            group["lr"] = share * learning_rate
        self._engine.train()
        scale = distributed.world_size() * len(batches) / batch_size
        record = StepRecord(moment.step, batch_size)
        for batch in batches:
            with record_function("mixkd_fast::forward"):
                terms, record.names = self._engine(batch, moment)
            rows = terms.detach()
            record.terms.append(rows)
            record.row_ids.append(batch.row_ids[: batch.num_rows])
            # NaN in every gradient of a row that is not finite, so that no rank applies this step; nobody waits here.
            poison = torch.where(torch.isfinite(rows).all(), scale, math.nan)
            with record_function("mixkd_fast::backward"):
                self._engine.backward((terms * poison).sum())
            if batch is not batches[-1]:
                self._engine.step()
        with record_function("mixkd_fast::optimizer"):
            record.grad_norm, record.applied = self._update()
        self._records.add(record)
        method = self._module.method
        # Whether the step was applied is asked, and waited for, only where somebody wants to know.
        if method.follows_steps and bool(record.applied):
            method.after_step(self._module.student, self._module.extras, moment)

    @torch.no_grad()
    def prepare(self, batches: Sequence[Batch], moment: Moment, batch_size: int) -> list[Batch]:
        """The micro-batches that the method wants to train on in the place of these; collective if it wants any."""
        module = self._module
        if not module.method.prepares_batches:
            return list(batches)
        self._engine.eval()
        teacher = module._frozen[0]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=module.autocast):
            prepared = [
                module.method.prepare_batch(batch, module.student, teacher, module.extras, moment) for batch in batches
            ]
        self._count_targets(prepared, batch_size)
        # A method gives companions to all micro-batches of a step, on all ranks, or to none.
        self._count_targets([batch.companion for batch in prepared if batch.companion is not None], batch_size)
        return prepared

    def _count_targets(self, batches: Sequence[Batch], batch_size: int) -> None:
        """Set anew what a step's micro-batches know of each other. Collective if there are any."""
        for batch in batches:
            batch.num_tokens = int(batch.attention_mask[: batch.num_rows].sum())
        if batches and all(batch.labels.dim() == 2 for batch in batches):
            targets = sum((batch.labels[: batch.num_rows] != IGNORED).sum() for batch in batches)
            mean = float(distributed.sum_over_ranks(torch.as_tensor(targets, device=self.device))) / batch_size
            for batch in batches:
                batch.mean_targets = mean

    @torch.no_grad()
    def generate(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        options: Sampling,
        seed: int,
        eos_ids: Tensor,
        pad_id: int,
        num_tokens: int | None = None,
    ) -> Tensor:
        """The student's continuations of prompts; see `CausalLM.generate`. Collective under ZeRO-3."""
        self._engine.eval()
        model: Any = self._module.student
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._module.autocast):
            generated: Tensor = model.generate(prompt_ids, prompt_mask, options, seed, eos_ids, pad_id, num_tokens)
        return generated

    def after_evaluation(self, metrics: Mapping[str, Mapping[str, float]]) -> None:
        """Let the method know what an evaluation found."""
        self._module.method.after_evaluation(metrics, self._module.extras)

    def report(self) -> StepReport:
        """What happened in the steps since the last report. Collective; waits for the device.

        Raises: NonFiniteError when a term or gradient was not finite and training.non_finite is "stop"; the step that
        it was in was not applied.
        """
        return self._records.report()

    def _update(self) -> tuple[Tensor | None, Tensor]:
        """Clip and apply. Returns the gradient norm and whether the update was applied (finite gradients)."""
        if self._guards_itself:
            self._engine.step()
            norm = self._engine.get_global_grad_norm()
            return None if norm is None else torch.as_tensor(norm), torch.tensor(bool(self._engine.was_step_applied()))
        gradients = [p.grad for p in self._module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        applied = torch.isfinite(norm)
        if self._is_plain:
            optimizer, limit = self._engine.optimizer, self.training.max_grad_norm
            # The fused AdamW divides by grad_scale and leaves everything as it is where found_inf is 1: clipping costs
            # no pass, the guard no wait.
            optimizer.found_inf = (~applied).float()
            optimizer.grad_scale = ((norm + 1e-6) / limit).clamp(min=1.0) if limit else None
            self._engine.step()
        elif bool(applied):
            self._engine.step()
        else:
            # An optimizer of DeepSpeed in plain fp32 has no guard: drop the gradients, count the micro-batch as done.
            self._engine.zero_grad()
            self._engine.micro_steps += 1
        return norm, applied

    @torch.no_grad()
    def logits(self, batch: Batch, student: int = 0) -> Tensor:
        """A student's logits [B, C] in evaluation mode, fp32, on the CPU."""
        self._engine.eval()
        logits: Tensor = self._engine(batch, None, student)[0]
        return logits.cpu()

    @torch.no_grad()
    def teacher_logits(self, batch: Batch, teacher: Any) -> Tensor:
        """The answers [B, C] that the method takes for the teacher's in an evaluation; [B, 3] of a language model."""
        if isinstance(self._module.student, CausalLM):
            answers: Tensor = teacher.answers(batch)
            return answers
        return self._module.method.teacher_logits(batch, teacher, self._module.extras)

    @property
    def num_students(self) -> int:
        """1, but for methods that train several students together."""
        return len(self._module.students)

    def student_model(self, student: int = 0) -> nn.Module:
        """A student's transformers model, its parameters possibly partitioned."""
        return self._module.students[student].model

    def student_state(self, student: int = 0, trained_only: bool = False) -> dict[str, Tensor] | None:
        """A student's whole state on rank 0 (CPU tensors), None elsewhere; or its trained parameters. Collective."""
        model = self._module.students[student].model
        names = {id(p): name for name, p in model.named_parameters(remove_duplicate=True)}
        state: dict[str, Tensor] = {}
        for parameter in model.parameters():
            if trained_only and not parameter.requires_grad:
                continue
            with whole_parameters([parameter]):
                if distributed.rank() == 0:
                    state[names[id(parameter)]] = parameter.detach().cpu().clone()
        if distributed.rank() != 0:
            return None
        if trained_only:
            return state
        persistent = model.state_dict().keys()
        state.update({name: b.detach().cpu().clone() for name, b in model.named_buffers() if name in persistent})
        return state

    def save(self, folder: Path) -> None:
        """Write everything that training needs to go on, on every rank; a frozen student's weights are left out."""
        skips = self._skips_frozen
        self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False, exclude_frozen_parameters=skips)
        if distributed.rank() == 0:
            self._extra_states.save(folder)

    def load(self, checkpoint: Path) -> None:
        """Read what `save` wrote into the state folder of a checkpoint, on any number of ranks. Collective."""
        ranks, world = saved_ranks(checkpoint / "state", _TAG), distributed.world_size()
        is_cut_otherwise = self.zero_stage > 0 and ranks not in (0, world)
        folder = universal_state(checkpoint, _TAG) if is_cut_otherwise else checkpoint / "state"
        decays = [group.get("weight_decay") for group in self._engine.optimizer.param_groups]
        # DeepSpeed has no argument for it: its "checkpoint" section says it before anybody knows what will be loaded.
        self._engine._config.load_universal_checkpoint = is_cut_otherwise
        try:
            path, _ = self._engine.load_checkpoint(str(folder), tag=_TAG, load_module_strict=not self._skips_frozen)
        except (AssertionError, IndexError, KeyError, RuntimeError) as error:
            if not is_cut_otherwise:
                raise
            raise CheckpointError(
                f"DeepSpeed cannot load {checkpoint}, written by {ranks} ranks, on {world} ({type(error).__name__}: "
                f"{error}); resume on {ranks} ranks"
            ) from error
        finally:
            self._engine._config.load_universal_checkpoint = False
        if path is None:
            raise CheckpointError(f"DeepSpeed found no state of this ZeRO stage and number of ranks in {folder}")
        if is_cut_otherwise:
            self._complete_universal(folder / _TAG, decays)
        self._extra_states.load(checkpoint / "state")

    def _complete_universal(self, folder: Path, decays: list[float | None]) -> None:
        """What DeepSpeed leaves out of a universal checkpoint, or gets wrong, put right."""
        # Under ZeRO-3 every group gets the first one's options; ours differ in weight decay.
        groups = self._engine.optimizer.param_groups
        for group, decay in zip(groups, decays, strict=True):
            if decay is not None:
                group["weight_decay"] = decay
        # Under ZeRO-3 all subgroups share one counter of steps, which each of them would then advance.
        is_fused = any(group.get("fused") for group in groups)
        for parameter, state in self._engine.basic_optimizer.state.items():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(parameter.device if is_fused else "cpu", copy=True)
        # Frozen parameters and buffers are not among what the optimizer holds.
        files = model_state_files(folder)
        saved = torch.load(files[0], map_location="cpu", weights_only=False)
        with torch.no_grad():
            for name, buffer in self._module.named_buffers():
                if name in saved["module"]:
                    buffer.copy_(saved["module"][name])
        # Those of a student with adapters are not in the checkpoint: they are what its base was loaded with.
        named = () if self._skips_frozen else self._module.named_parameters()
        frozen = {name: p for name, p in named if not p.requires_grad}
        if frozen and self.zero_stage == 3:
            shards = [torch.load(file, map_location="cpu", weights_only=False, mmap=True) for file in files]
        for name, parameter in frozen.items():
            with whole_parameters([parameter], modify=True), torch.no_grad():
                if self.zero_stage == 3:
                    pieces = [shard["frozen_param_fragments"][name].flatten() for shard in shards]
                    value = torch.cat(pieces)[: parameter.numel()].view(parameter.shape)
                else:
                    value = saved["module"][name]
                parameter.copy_(value)


@contextlib.contextmanager
def whole_parameters(parameters: Sequence[nn.Parameter], modify: bool = False) -> Iterator[None]:
    """Gather ZeRO-3 partitioned parameters for reading, or for rank 0 to write; others pass as they are."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    with GatheredParameters(partitioned, modifier_rank=0 if modify else None, enabled=bool(partitioned)):
        yield


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices; none for biases and normalisation weights."""
    trained = [p for p in module.parameters() if p.requires_grad]
    shape = [(p, getattr(p, "ds_shape", p.shape)) for p in trained]
    return [
        {"params": [p for p, s in shape if len(s) > 1], "weight_decay": weight_decay},
        {"params": [p for p, s in shape if len(s) <= 1], "weight_decay": 0.0},
    ]


def _adamw(module: nn.Module, training: Training, config: dict[str, Any]) -> torch.optim.Optimizer:
    groups = [group for group in _parameter_groups(module, training.weight_decay) if group["params"]]
    rate, betas, epsilon = training.learning_rate, (training.betas[0], training.betas[1]), training.epsilon
    offload = config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    if offload != "none" and config.get("zero_force_ds_cpu_optimizer", True):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        offloaded: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, lr=rate, betas=betas, eps=epsilon, adamw_mode=True)
        return offloaded
    return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=epsilon, fused=True)
