"""The strict base of every configuration section: unknown keys, wrong types, NaN and infinities are refused."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen group of typed fields; the field docstrings become the JSON Schema's descriptions."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
    )
