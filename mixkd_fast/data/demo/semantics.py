"""Meanings and what follows from them: labels of the demo task come from here and from nowhere else.

Three small logics, each decided exactly:
- quantified statements over sets: a model gives every kind of individual a count, and all counts are tried;
- statements about named individuals: all truth assignments that respect the lexicon are tried;
- times of acts: all times are tried, in steps that tell any two statements apart.
The premise entails the hypothesis if it holds in every model of the premise, contradicts it if in none.
Quantified statements presuppose that the sets they speak of are not empty, as in everyday English.
"""

from collections.abc import Callable, Iterable
from functools import cache
from itertools import product
from typing import Any

from mixkd_fast.data.demo.lexicon import Relation

ENTAILMENT, NEUTRAL, CONTRADICTION = 0, 1, 2
LABEL_NAMES = ("entailment", "neutral", "contradiction")

# ("atom", name) | ("not", e) | ("and", e, e) | ("or", e, e); canonical expressions name atoms by number
Expression = tuple[Any, ...]
# (kind, number); the number is 0 for the kinds that have none
Quantifier = tuple[str, int]
Relate = Callable[[str, str], Relation]
# larger counts behave alike: the largest number of the grammar is 4, and 5 stands for "more than four"
MOST = 5


def judge(hypothesis_truths: Iterable[bool]) -> int:
    """The label, from the hypothesis's truth in each model of the premise (at least one model)."""
    truths = set(hypothesis_truths)
    assert truths, "the premise has no model"
    if len(truths) == 2:
        return NEUTRAL
    return ENTAILMENT if truths == {True} else CONTRADICTION


def atom(name: str) -> Expression:
    return ("atom", name)


def negation(inner: Expression) -> Expression:
    return ("not", inner)


def conjunction(first: Expression, second: Expression) -> Expression:
    return ("and", first, second)


def disjunction(first: Expression, second: Expression) -> Expression:
    return ("or", first, second)


def holds(expression: Expression, assignment: tuple[bool, ...]) -> bool:
    """Truth of a canonical expression, whose atoms are positions in `assignment`."""
    kind = expression[0]
    if kind == "atom":
        return assignment[expression[1]]
    if kind == "not":
        return not holds(expression[1], assignment)
    if kind == "and":
        return holds(expression[1], assignment) and holds(expression[2], assignment)
    return holds(expression[1], assignment) or holds(expression[2], assignment)


def canonical(expressions: Iterable[Expression], relate: Relate) -> tuple[tuple[Expression, ...], tuple[Relation, ...]]:
    """Number the atoms by first appearance: pairs that differ only in their words then share one cached answer.

    Returns: the rewritten expressions, and the relations of all atom pairs (0, 1), (0, 2), (1, 2), (0, 3), ...
    """
    numbers: dict[str, int] = {}

    def rewrite(expression: Expression) -> Expression:
        if expression[0] == "atom":
            return ("atom", numbers.setdefault(expression[1], len(numbers)))
        return (expression[0], *(rewrite(inner) for inner in expression[1:]))

    rewritten = tuple(rewrite(expression) for expression in expressions)
    names = list(numbers)
    relations = tuple(relate(names[i], names[j]) for j in range(len(names)) for i in range(j))
    return rewritten, relations


@cache
def assignments(num_atoms: int, relations: tuple[Relation, ...]) -> tuple[tuple[bool, ...], ...]:
    """All truth assignments of the atoms that respect their relations."""
    pairs = [(i, j) for j in range(num_atoms) for i in range(j)]
    allowed: dict[Relation, set[tuple[bool, bool]]] = {
        "below": {(False, False), (False, True), (True, True)},
        "above": {(False, False), (True, False), (True, True)},
        "disjoint": {(False, False), (False, True), (True, False)},
        "free": {(False, False), (False, True), (True, False), (True, True)},
    }
    return tuple(
        values
        for values in product((False, True), repeat=num_atoms)
        if all((values[i], values[j]) in allowed[rel] for (i, j), rel in zip(pairs, relations, strict=True))
    )


def num_atoms_of(relations: tuple[Relation, ...]) -> int:
    """n from n (n - 1) / 2 relations, n >= 1."""
    return next(n for n in range(1, 100) if n * (n - 1) // 2 == len(relations))


def quantifier_holds(quantifier: Quantifier, inside: int, outside: int) -> bool:
    """Truth of "Q A are B" with inside = |A and B|, outside = |A without B|, counts capped at MOST."""
    kind, number = quantifier
    if kind in ("some", "no"):
        return (inside >= 1) == (kind == "some")
    if kind in ("all", "not all"):
        return (outside == 0) == (kind == "all")
    if kind == "exactly":
        return inside == number
    if kind == "fewer than":
        return inside < number
    return inside >= number if kind == "at least" else inside > number


@cache
def reachable_counts(kinds: frozenset[tuple[int, ...]]) -> frozenset[tuple[int, ...]]:
    """All count vectors, capped at MOST, that some number of individuals of each kind adds up to."""
    reached: set[tuple[int, ...]] = {(0, 0, 0, 0)}
    for kind in kinds:
        frontier = list(reached)
        while frontier:
            counts = frontier.pop()
            more = tuple(min(count + step, MOST) for count, step in zip(counts, kind, strict=True))
            if more not in reached:
                reached.add(more)
                frontier.append(more)
    # both restrictors are presupposed not to be empty
    return frozenset(c for c in reached if c[0] + c[1] and c[2] + c[3])


@cache
def kinds_of_individuals(
    expressions: tuple[Expression, ...], relations: tuple[Relation, ...]
) -> frozenset[tuple[int, ...]]:
    """The kinds (in A1 and B1, in A1 only, in A2 and B2, in A2 only) an individual can be of; all-zero left out."""
    kinds = set()
    for assignment in assignments(num_atoms_of(relations), relations):
        a1, b1, a2, b2 = (holds(expression, assignment) for expression in expressions)
        kinds.add((int(a1 and b1), int(a1 and not b1), int(a2 and b2), int(a2 and not b2)))
    return frozenset(kinds - {(0, 0, 0, 0)})


@cache
def _judge_kinds(first: Quantifier, second: Quantifier, kinds: frozenset[tuple[int, ...]]) -> int | None:
    models = [c for c in reachable_counts(kinds) if quantifier_holds(first, c[0], c[1])]
    return judge(quantifier_holds(second, c[2], c[3]) for c in models) if models else None


def judge_quantified(
    premise: tuple[Quantifier, Expression, Expression],
    hypothesis: tuple[Quantifier, Expression, Expression],
    relate: Relate,
) -> int | None:
    """Label of (Q1, A1, B1) against (Q2, A2, B2), or None if the premise has no model with the presuppositions."""
    expressions, relations = canonical((*premise[1:], *hypothesis[1:]), relate)
    return _judge_kinds(premise[0], hypothesis[0], kinds_of_individuals(expressions, relations))


@cache
def _judge_canonical(expressions: tuple[Expression, ...], relations: tuple[Relation, ...]) -> int | None:
    premise, hypothesis = expressions
    models = [a for a in assignments(num_atoms_of(relations), relations) if holds(premise, a)]
    return judge(holds(hypothesis, a) for a in models) if models else None


def judge_propositions(premise: Expression, hypothesis: Expression, relate: Relate) -> int | None:
    """Label of one truth-functional formula against another, or None if the premise has no model."""
    return _judge_canonical(*canonical((premise, hypothesis), relate))


# ("before" | "after" | "at", person, hour), ("between", person, hour, hour), ("earlier", person, person), ("not", fact)
TimeFact = tuple[Any, ...]
# half hours from half past one to half past seven: one before, one after and one between any of the hours told
HALF_HOURS = range(3, 16)


def time_holds(fact: TimeFact, times: tuple[int, ...]) -> bool:
    """Truth of a fact if person p acts at times[p] half hours."""
    kind = fact[0]
    if kind == "not":
        return not time_holds(fact[1], times)
    if kind == "earlier":
        first, second = fact[1:]
        return times[first] < times[second]
    time: int = times[fact[1]]
    hour: int = 2 * fact[2]
    if kind == "before":
        return time < hour
    if kind == "after":
        return time > hour
    return time == hour if kind == "at" else hour < time < 2 * int(fact[3])


@cache
def models_of_times(premise: tuple[TimeFact, ...], num_people: int) -> tuple[tuple[int, ...], ...]:
    """All times of the persons at which the facts hold."""
    worlds = product(HALF_HOURS, repeat=num_people)
    return tuple(times for times in worlds if all(time_holds(fact, times) for fact in premise))


def judge_times(premise: tuple[TimeFact, ...], hypothesis: TimeFact, num_people: int) -> int | None:
    """Label of a fact about time given several, or None if these contradict each other."""
    models = models_of_times(premise, num_people)
    return judge(time_holds(hypothesis, times) for times in models) if models else None
