"""The `student.lora` section: low-rank adapters beside frozen weights (Hu et al. 2022, arXiv 2106.09685)."""

from typing import Annotated, Literal

from pydantic import Field

from mixkd_fast.section import Section


class Lora(Section):
    """Train low-rank adapters of a causal language model and leave its own weights as they are.

    A linear layer W becomes W + (alpha / r) B A with A [r, in] and B [out, r]; B starts at 0. Only A, B and
    modules_to_save are trained, and only they have gradients, optimizer states and places in checkpoints.
    """

    r: Annotated[int, Field(gt=0)] = 16
    """Rank of the adapters."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The adapters' product is multiplied by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout of what goes into the adapters."""
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Names of the layers that get adapters, such as ["q_proj", "v_proj"]; "all-linear" takes every linear layer but
    the output layer."""
    modules_to_save: Annotated[list[str], Field(min_length=1)] | None = None
    """Names of further modules that are trained whole and saved with the adapters, such as ["lm_head"]."""
    merge: bool = False
    """Save the student as one model with the adapters added to its weights, in place of an adapter folder of PEFT."""
