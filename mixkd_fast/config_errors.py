"""Turns pydantic's errors into lines that name the field, its value, what is allowed, and the nearest key."""

import difflib
import types
import typing
from typing import Any

from pydantic import BaseModel, ValidationError

from mixkd_fast.errors import ConfigurationError
from mixkd_fast.section import Section


def explain(error: ValidationError, root: type[Section], prefix: str = "") -> ConfigurationError:
    """One error with a line per problem. Args: prefix = dotted name of the section, if it is not the whole."""
    lines = [_line(problem, root, prefix) for problem in error.errors()]
    if len(lines) == 1:
        return ConfigurationError(lines[0])
    return ConfigurationError(f"{len(lines)} problems:\n  " + "\n  ".join(lines))


def _line(problem: Any, root: type[Section], prefix: str) -> str:
    path = [part for part in problem["loc"] if not _is_branch(part)]
    name = ".".join([*([prefix] if prefix else []), *(str(part) for part in path)]) or "the configuration"
    kind, value = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        section = _section_at(root, [*path[:-1]], problem["loc"])
        fields = sorted(field.alias or key for key, field in section.model_fields.items())
        close = difflib.get_close_matches(str(path[-1]), fields, n=1, cutoff=0.4)
        nearest = f'; nearest: "{close[0]}"' if close else ""
        where = ".".join(name.split(".")[:-1]) or "the top level"
        return f"{name}: unknown key{nearest} ({where} has: {', '.join(fields)})"
    if kind == "missing":
        return f"{name}: is missing"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        given = value.get("name") if isinstance(value, dict) else value
        allowed = problem["ctx"].get("expected_tags", "'finetune', 'kd', 'mixkd'")
        return f"{name}.name = {given!r}: allowed: {allowed}"
    message = problem["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{name}: {message}" if path or prefix else message
    return f"{name} = {_shorten(value)}: {message[:1].lower()}{message[1:]}"


def _is_branch(part: int | str) -> bool:
    """Union members that pydantic puts into a location: tags of methods and names of types."""
    names = {"finetune", "kd", "mixkd", "str", "int", "float", "dict[str,any]", "none"}
    return isinstance(part, str) and part in names


def _section_at(root: type[Section], path: list[int | str], location: tuple[int | str, ...]) -> type[BaseModel]:
    """The section class at a dotted path."""
    section: type[BaseModel] = root
    for part in path:
        candidates = (
            list(_sections_in(section.model_fields[str(part)].annotation)) if part in section.model_fields else []
        )
        tagged = [c for c in candidates if "name" in c.model_fields and c.model_fields["name"].default in location]
        if tagged or candidates:
            section = (tagged or candidates)[0]
    return section


def _sections_in(annotation: Any) -> typing.Iterator[type[BaseModel]]:
    if (
        isinstance(annotation, type)
        and not isinstance(annotation, types.GenericAlias)
        and issubclass(annotation, BaseModel)
    ):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _sections_in(argument)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
