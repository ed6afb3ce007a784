"""The configuration's `teacher` section, and the types of fields that it shares with others."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mixkd_fast.section import Section

Precision = Literal["fp32", "bf16", "fp16"]
PositiveInt = Annotated[int, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]


class Offload(Section):
    """Where parameters of a ZeRO-3 teacher rest while they are not in use."""

    device: Literal["cpu", "nvme"]
    """Resting place of the partitioned parameters."""
    nvme_path: str | None = None
    """Folder on the NVMe disk; needed for device "nvme"."""

    @model_validator(mode="after")
    def _consistent(self) -> "Offload":
        if self.device == "nvme" and self.nvme_path is None:
            raise ValueError('device "nvme" needs nvme_path, a folder on the NVMe disk')
        return self


class Teacher(Section):
    """The frozen model that is imitated."""

    model: Text | None = None
    """Hub name or local folder with safetensors weights; may be left out where `offline` says all that is needed."""
    offline: Text | None = None
    """causal_lm: folder that `mixkd-fast teach` has filled with what the teacher says of the training rows (kind top_k
    or hidden); the teacher then does not run on them. Without `model` it is not evaluated either."""
    revision: str | None = None
    """Revision on the hub."""
    zero_stage: Literal[0, 3] = 0
    """0 keeps the whole teacher on every rank; 3 partitions it over the ranks."""
    offload: Offload | None = None
    """ZeRO-3 only: parameters rest in CPU memory or on NVMe."""
    precision: Precision | None = None
    """null takes training.precision."""
    stream: bool = False
    """On a GPU: run on a CUDA stream of its own, beside the student's forward (zero_stage 0)."""
    quantization: Literal["int8", "fp8"] | None = None
    """Linear layers in 8 bits, their inputs rounded as they come (zero_stage 0): int8 on the CPU, fp8 on a GPU."""
    store: bool = True
    """Keep the logits of clean training rows on disk and read them, where a run of several epochs needs them."""
    store_dir: str | None = None
    """Folder of the kept logits; null means teacher_logits in task.cache_dir or its default."""
    store_mib: PositiveInt = 4096
    """Limit of that folder; a training set whose logits need more is not kept."""
    attention: str | None = None
    """Attention implementation of transformers (sdpa, eager, flash_attention_2); null lets it choose."""
    trust_remote_code: bool = False
    """Run model code from the hub repository."""

    @model_validator(mode="after")
    def _consistent(self) -> "Teacher":
        if self.model is None and self.offline is None:
            raise ValueError("model is missing: the teacher's hub name or folder; or give offline, a teacher store")
        if self.model is None and self.zero_stage != 0:
            raise ValueError(f"zero_stage is {self.zero_stage}, and there is no model that could be partitioned")
        if self.offload is not None and self.zero_stage != 3:
            raise ValueError(f"offload needs zero_stage 3, and zero_stage is {self.zero_stage}")
        around = {"int8": "fp32", "fp8": "bf16"}.get(self.quantization or "")
        if around is not None and (self.zero_stage != 0 or self.precision not in (None, around)):
            raise ValueError(
                f'quantization "{self.quantization}" needs zero_stage 0 and no precision but {around}; they are '
                f"{self.zero_stage} and {self.precision}"
            )
        return self
