"""The words of the demo task and how their meanings relate.

Nouns stand in trees: a word below another means a subset, words on different branches are disjoint. Verbs have one
level above them and are otherwise independent (who runs may sing). Adjectives come in groups of disjoint values.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

Relation = Literal["below", "above", "disjoint", "free"]

BEINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "animals": {"dogs": ("poodles", "beagles"), "birds": ("crows", "robins")},
    "people": {"musicians": ("pianists", "drummers"), "doctors": ("surgeons", "dentists")},
}
THINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "plants": {"flowers": ("roses", "tulips"), "trees": ("oaks", "pines")},
    "goods": {"tools": ("hammers", "saws"), "toys": ("kites", "dolls")},
}
ADJECTIVES = (("small", "large"), ("black", "white"))
NAMES = ("anna", "ben", "carla", "david", "emma", "frank", "grace", "henry", "ida", "jack", "kate", "leo")


@dataclass(frozen=True)
class Verb:
    """The forms of one verb; `above` is the base form of the verb that it implies."""

    base: str
    past: str
    above: str | None = None


VERBS = {
    verb.base: verb
    for verb in (
        Verb("move", "moved"),
        Verb("run", "ran", "move"),
        Verb("swim", "swam", "move"),
        Verb("perform", "performed"),
        Verb("sing", "sang", "perform"),
        Verb("dance", "danced", "perform"),
        Verb("eat", "ate"),
        Verb("sleep", "slept"),
    )
}
ACTIONS = {
    verb.base: verb
    for verb in (
        Verb("buy", "bought"),
        Verb("sell", "sold"),
        Verb("find", "found"),
        Verb("hide", "hid"),
    )
}
PARTICIPLES = {"hide": "hidden"}


def participle(action: Verb) -> str:
    """The passive form: "were hidden by"."""
    return PARTICIPLES.get(action.base, action.past)


@cache
def noun_paths() -> dict[str, tuple[str, ...]]:
    """Noun -> the nouns above it, itself last."""
    paths: dict[str, tuple[str, ...]] = {}
    for trees in (BEINGS, THINGS):
        for top, middles in trees.items():
            paths[top] = (top,)
            for middle, leaves in middles.items():
                paths[middle] = (top, middle)
                paths.update({leaf: (top, middle, leaf) for leaf in leaves})
    return paths


@cache
def nouns_near(noun: str) -> dict[str, tuple[str, ...]]:
    """The nouns above, below and beside (same parent) a noun, in a fixed order."""
    paths = noun_paths()
    path = paths[noun]
    return {
        "above": path[:-1],
        "below": tuple(other for other in paths if other != noun and noun in paths[other]),
        "beside": tuple(o for o in paths if o != noun and len(path) > 1 and paths[o][:-1] == path[:-1]),
    }


@cache
def relation(first: str, second: str) -> Relation:
    """How the meanings of two different words relate: first is "below" second if it implies it."""
    paths = noun_paths()
    if first in paths and second in paths:
        if first in paths[second]:
            return "above"
        return "below" if second in paths[first] else "disjoint"
    if any(first in group and second in group for group in ADJECTIVES):
        return "disjoint"
    if first in VERBS and second in VERBS:
        if VERBS[first].above == second:
            return "below"
        if VERBS[second].above == first:
            return "above"
    return "free"


@cache
def verbs_near(verb: str) -> tuple[str, ...]:
    """The verbs that imply a verb or that it implies, in a fixed order."""
    return tuple(other for other in VERBS if relation(other, verb) in ("above", "below"))


@cache
def content_words() -> frozenset[str]:
    """Every content word in every form."""
    verbs = [*VERBS.values(), *ACTIONS.values()]
    forms = [form for verb in verbs for form in (verb.base, verb.past, participle(verb))]
    return frozenset((*noun_paths(), *NAMES, *(word for group in ADJECTIVES for word in group), *forms))
