"""The `plan` section: models that `mixkd-fast plan` cannot read here, described."""

from typing import Any

from pydantic import model_validator

from mixkd_fast.section import Section


class PlannedModels(Section):
    """For `mixkd-fast plan` alone: shapes of models whose config.json is not at hand. Runs do not read it."""

    teacher: dict[str, Any] | None = None
    """A transformers configuration with "model_type", in the place of that of teacher.model."""
    student: dict[str, Any] | None = None
    """A transformers configuration with "model_type", in the place of that of student.model."""

    @model_validator(mode="after")
    def _consistent(self) -> "PlannedModels":
        for name in ("teacher", "student"):
            fields = getattr(self, name)
            if fields is not None and "model_type" not in fields:
                raise ValueError(f'{name} needs "model_type", the family of transformers, such as "llama"')
        return self
