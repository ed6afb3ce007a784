"""Turns pydantic's errors into lines that name the field, its value, what is allowed, and the nearest key."""

import difflib
import types
import typing
from typing import Annotated, Any, Union

from pydantic import BaseModel, ValidationError

from mixkd_fast.errors import ConfigurationError
from mixkd_fast.section import Section


def explain(error: ValidationError, root: type[Section], prefix: str = "") -> ConfigurationError:
    """One error with a line per problem.

    Args: prefix = dotted name of the validated section, if it is not the whole.
    """
    # A value that fits no member of a union has a problem per member: one line for all of them.
    messages: dict[str, list[str]] = {}
    for problem in error.errors():
        subject, message = _subject_and_message(problem, root, prefix)
        messages.setdefault(subject, []).append(message)
    lines = [subject + _either(parts) for subject, parts in messages.items()]
    if len(lines) == 1:
        return ConfigurationError(lines[0])
    return ConfigurationError(f"{len(lines)} problems:\n  " + "\n  ".join(lines))


def _subject_and_message(problem: Any, root: type[Section], prefix: str) -> tuple[str, str]:
    path, place = _follow(root, problem["loc"])
    name = ".".join([*([prefix] if prefix else []), *path]) or "the configuration"
    kind, value = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        fields = sorted(field.alias or key for key, field in place.model_fields.items())
        close = difflib.get_close_matches(path[-1], fields, n=1, cutoff=0.4)
        nearest = f'; nearest: "{close[0]}"' if close else ""
        where = name.rpartition(".")[0] or "the top level"
        return f"{name}: ", f"unknown key{nearest} ({where} has: {', '.join(fields)})"
    if kind == "missing":
        return f"{name}: ", "is missing"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        given = value.get("name") if isinstance(value, dict) else value
        allowed = ", ".join(repr(_tag(member)) for member in _members(place))
        return f"{name}.name = {_shorten(given)}: ", f"allowed: {allowed}"
    message = problem["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return (f"{name}: " if path or prefix else ""), message
    return f"{name} = {_shorten(value)}: ", f"{message[:1].lower()}{message[1:]}"


def _follow(root: type[Section], location: tuple[int | str, ...]) -> tuple[list[str], Any]:
    """Pydantic's location without the names of union members that it holds.

    Returns: the dotted path's parts; the type found there, or for an unknown key the section that lacks it.
    """
    path: list[str] = []
    place: Any = root
    for part in location:
        members = _members(place)
        if len(members) > 1:
            place = next((member for member in members if _tag(member) == part), None)
            continue
        path.append(str(part))
        place = members[0] if members else None
        if isinstance(place, type) and issubclass(place, BaseModel):
            found = (f for key, f in place.model_fields.items() if part == (f.alias or key))
            field = next(found, None)
            place = place if field is None else field.annotation
        else:
            place = next(reversed(typing.get_args(place)), None)  # what a list or a mapping holds
    return path, place


def _members(annotation: Any) -> list[Any]:
    """The types of a union without None; a list of one for other types."""
    if typing.get_origin(annotation) is Annotated:
        return _members(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return [member for part in typing.get_args(annotation) for member in _members(part)]
    return [] if annotation in (None, types.NoneType) else [annotation]


def _tag(member: Any) -> Any:
    """The `name` that selects a section of a union."""
    fields = getattr(member, "model_fields", {})
    return fields["name"].default if "name" in fields else None


def _either(messages: list[str]) -> str:
    return " or ".join([messages[0], *(message.removeprefix("input should be ") for message in messages[1:])])


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
