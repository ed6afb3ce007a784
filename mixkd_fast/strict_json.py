"""Strict JSON for configurations: no duplicate keys, no NaN, no infinity, and errors that say where."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixkd_fast.errors import ConfigurationError


def read_object(path: str | Path, what: str) -> dict[str, Any]:
    """A JSON file whose top level is an object.

    Args: what = what the file is, for error messages ("--config", "deepspeed").
    Raises: ConfigurationError naming the file, the line and the problem.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{what} = {str(path)!r}: cannot be read: {error}") from error
    try:
        content = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise ConfigurationError(
            f"{what} = {str(path)!r}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}"
        ) from error
    except ValueError as error:
        raise ConfigurationError(f"{what} = {str(path)!r}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{what} = {str(path)!r}: the top level is not an object {{...}}")
    return content


def apply_overrides(content: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Set dotted fields: "training.steps=100". Values are JSON where they parse as JSON, else text.

    Raises: ConfigurationError for text without "=" or an empty name, and where a section is not an object.
    """
    result: dict[str, Any] = json.loads(json.dumps(content))
    for override in overrides:
        name, equals, text = override.partition("=")
        keys = name.split(".")
        if not equals or not all(re.fullmatch(r"[$\w]+", key) for key in keys):
            raise ConfigurationError(f"--set {override!r} is not of the form section.field=value")
        section = result
        for depth, key in enumerate(keys[:-1]):
            if section.get(key) is None:
                section[key] = {}
            section = section[key]
            if not isinstance(section, dict):
                place = ".".join(keys[: depth + 1])
                raise ConfigurationError(f"--set {override!r}: {place} is {section!r}, which has no fields")
        section[keys[-1]] = _value(text)
    return result


def _value(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    except ValueError:
        return text


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {double!r} stands twice in one object")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"{text} is larger than any floating-point number")
    return number
