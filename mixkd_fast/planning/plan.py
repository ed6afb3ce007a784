"""The whole plan of a configuration: memory and speed on every asked-for device and number of ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from mixkd_fast.configuration import Config, batch_arithmetic
from mixkd_fast.deepspeed_config import student_deepspeed_config
from mixkd_fast.errors import ConfigurationError
from mixkd_fast.planning.decoders import DecoderShape
from mixkd_fast.planning.hardware import GPUS, Device, Rates, cpu_device, gpu_rates, measured_rates
from mixkd_fast.planning.lengths import row_lengths
from mixkd_fast.planning.memory import Offload, Placement, RankMemory, TeacherOffload, placements, rank_memory
from mixkd_fast.planning.models import PlannedModel, planned_student, planned_teacher
from mixkd_fast.planning.row_lengths import RowLengths
from mixkd_fast.planning.throughput import Throughput, throughput
from mixkd_fast.planning.workload import Workload, workload

DEFAULT_RANKS = (1, 8, 64, 512, 1024)


@dataclass(frozen=True)
class RankPlan:
    """One number of ranks: what each holds for every placement, and how fast the configured one runs."""

    ranks: int
    impossible: str | None
    """Why the batch cannot be shared among so many; the rest is then empty."""
    work: Workload | None
    memory: dict[Placement, RankMemory]
    throughput: Throughput | None


@dataclass(frozen=True)
class DevicePlan:
    """A device and the numbers of it that were asked for (one, where it is the CPU)."""

    device: Device
    is_gpu: bool
    counts: list[RankPlan]
    student_rates: Rates
    teacher_rates: Rates | None

    def fits(self, memory: RankMemory) -> bool:
        """Whether a rank fits; on the CPU offloaded states take the same memory."""
        host = 0 if self.is_gpu else memory.host_bytes
        return memory.total_bytes + host <= self.device.usable_bytes


@dataclass(frozen=True)
class Plan:
    """What `mixkd-fast plan` says."""

    student: PlannedModel
    teacher: PlannedModel | None
    lengths: RowLengths
    placement: Placement
    """The configured one."""
    devices: list[DevicePlan]


def make_plan(config: Config, names: Sequence[str], ranks: Sequence[int]) -> Plan:
    """Plan a run. Args: names = of devices, from GPUS or "cpu"; ranks = numbers of GPUs.

    Raises: ConfigurationError, DataError or ModelError for what is wrong with the configuration.
    """
    student, teacher = planned_student(config), planned_teacher(config)
    lengths = row_lengths(config)
    zero = _zero_section(config)
    placement = configured_placement(config, zero, teacher is not None)
    devices = []
    for name in names:
        is_gpu = name != "cpu"
        if not is_gpu and config.training.precision == "fp16":
            raise ConfigurationError('training.precision = "fp16" needs a GPU; allowed on the CPU: "fp32", "bf16"')
        device = GPUS[name] if is_gpu else cpu_device()
        works = {count: _workload(config, lengths, count) for count in (ranks if is_gpu else [1])}
        possible = next((work for work in works.values() if isinstance(work, Workload)), None)
        if possible is None:
            raise ConfigurationError(
                f"none of these numbers of ranks can share the batch: {next(iter(works.values()))}"
            )

        @cache
        def rates(
            model: PlannedModel, work: Workload = possible, device: Device = device, is_gpu: bool = is_gpu
        ) -> Rates:
            return _rates(model, model is teacher, work, placement, device, is_gpu, config.training.threads)

        counts = []
        for count, work in works.items():
            if isinstance(work, str):
                counts.append(RankPlan(count, work, None, {}, None))
                continue
            memory = {
                choice: rank_memory(student, teacher, choice, work, zero, is_gpu)
                for choice in placements(teacher is not None, _offered_offload(config, teacher))
            }
            speed = throughput(student, teacher, work, placement, device, rates)
            counts.append(RankPlan(count, None, work, memory, speed))
        teacher_rates = None if teacher is None else rates(teacher)
        devices.append(DevicePlan(device, is_gpu, counts, rates(student), teacher_rates))
    return Plan(student, teacher, lengths, placement, devices)


def _offered_offload(config: Config, teacher: PlannedModel | None) -> TeacherOffload:
    """Where a language model's teacher might rest: the configured place, or the memory of the CPU."""
    section = config.teacher
    if section is not None and section.offload is not None:
        return section.offload.device
    return "cpu" if teacher is not None and isinstance(teacher.shape, DecoderShape) else "none"


def configured_placement(config: Config, zero: Mapping[str, Any], has_teacher: bool) -> Placement:
    """Where the configuration puts the states. Parameters offloaded alone count as not offloaded."""
    section = config.teacher if has_teacher else None
    optimizer = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    parameters = zero.get("offload_param", {}).get("device", "none") != "none"
    teacher_stage = section.zero_stage if section is not None else None
    offload: Offload = "optimizer+parameters" if optimizer and parameters else "optimizer" if optimizer else "none"
    rests: TeacherOffload = "none" if section is None or section.offload is None else section.offload.device
    return Placement(zero.get("stage", 0), offload, teacher_stage, rests)


def _zero_section(config: Config) -> dict[str, Any]:
    section = student_deepspeed_config(config, batch_arithmetic(config.training, 1))
    zero: dict[str, Any] = section.get("zero_optimization", {})
    return zero


def _workload(config: Config, lengths: RowLengths, ranks: int) -> Workload | str:
    """The step of so many ranks, or why they cannot share the batch."""
    if ranks > config.training.batch_size:
        return f"training.batch_size = {config.training.batch_size} has fewer rows than {ranks} ranks"
    try:
        return workload(config, lengths, ranks)
    except ConfigurationError as error:
        return str(error)


def _rates(
    model: PlannedModel,
    is_teacher: bool,
    work: Workload,
    placement: Placement,
    device: Device,
    is_gpu: bool,
    threads: int | None,
) -> Rates:
    precision = work.teacher_precision if is_teacher else work.student_precision
    if is_gpu:
        return gpu_rates(device, precision)
    rows = work.teacher_rows if is_teacher else work.student_rows
    stage = (placement.teacher_stage or 0) if is_teacher else placement.student_stage
    width = max(1, round(float(work.lengths.clean.mean())))
    return measured_rates(model, max(rows, 1), width, precision, work.is_fused(model, stage), threads)
