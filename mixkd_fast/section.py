"""The strict base of every configuration section: unknown keys and wrong types are refused."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen group of typed fields; the field docstrings become the JSON Schema's descriptions."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, validate_default=True
    )
