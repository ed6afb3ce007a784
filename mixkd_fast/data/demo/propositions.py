"""Sentences of the demo task about who did what: "either anna or ben sang", "if leo ate then ida slept"."""

from dataclasses import dataclass
from random import Random

from mixkd_fast.data.demo.lexicon import NAMES, VERBS, Relation, relation, verbs_near
from mixkd_fast.data.demo.semantics import (
    Expression,
    atom,
    conjunction,
    disjunction,
    judge_propositions,
    negation,
)


@dataclass(frozen=True)
class Proposition:
    """A truth-functional sentence about who did what."""

    sentence: str
    meaning: Expression
    content: frozenset[str]
    pattern: str

    def words(self) -> frozenset[str]:
        return self.content

    def frame(self) -> str:
        return self.pattern

    def text(self) -> str:
        return self.sentence

    def judge(self, hypothesis: "Proposition") -> int | None:
        """The label of the hypothesis given this premise."""
        return judge_propositions(self.meaning, hypothesis.meaning, relate_acts)


def relate_acts(first: str, second: str) -> Relation:
    """How "anna sing" and "anna perform" relate: by their verbs if the person is the same."""
    (name, verb), (other_name, other_verb) = first.split(), second.split()
    return relation(verb, other_verb) if name == other_name else "free"


def clause(pattern: str, people: tuple[str, str], verbs: tuple[str, str]) -> Proposition:
    """One sentence of the given pattern; patterns of one person or verb use the first of each."""
    (a, b), (v, w) = people, (VERBS[verbs[0]], VERBS[verbs[1]])
    first, second = atom(f"{a} {v.base}"), atom(f"{b} {w.base}")
    shared, other_act = atom(f"{b} {v.base}"), atom(f"{a} {w.base}")
    one, two_people, two_acts, all_words = {a, v.base}, {a, b, v.base}, {a, v.base, w.base}, {a, b, v.base, w.base}
    forms: dict[str, tuple[str, Expression, set[str]]] = {
        "did": (f"{a} {v.past}", first, one),
        "did not": (f"{a} did not {v.base}", negation(first), one),
        "both": (f"{a} and {b} {v.past}", conjunction(first, shared), two_people),
        "either": (f"either {a} or {b} {v.past}", disjunction(first, shared), two_people),
        "neither": (f"neither {a} nor {b} {v.past}", negation(disjunction(first, shared)), two_people),
        "and": (f"{a} {v.past} and {w.past}", conjunction(first, other_act), two_acts),
        "or": (f"{a} {v.past} or {w.past}", disjunction(first, other_act), two_acts),
        "but not": (f"{a} {v.past} but did not {w.base}", conjunction(first, negation(other_act)), two_acts),
        "if": (f"if {a} {v.past} then {b} {w.past}", disjunction(negation(first), second), all_words),
    }
    sentence, meaning, words = forms[pattern]
    return Proposition(f"{sentence} .", meaning, frozenset(words), pattern)


RICH = ("both", "either", "neither", "and", "or", "but not", "if")
SIMPLE = ("did", "did not")


def draw_proposition(rng: Random) -> Proposition:
    """A premise of one sentence, or of a rich one and a simple one about the same people and acts."""
    (name, other), (verb, second) = rng.sample(NAMES, 2), rng.sample(list(VERBS), 2)
    rich = clause(rng.choice(RICH), (name, other), (verb, second))
    if rng.random() < 0.7:
        return rich
    simple = vary_proposition(rng, rich, patterns=SIMPLE)
    return Proposition(
        f"{rich.sentence} {simple.sentence}" if rng.random() < 0.5 else f"{simple.sentence} {rich.sentence}",
        conjunction(rich.meaning, simple.meaning),
        rich.content | simple.content,
        f"{rich.pattern} + {simple.pattern}",
    )


def vary_proposition(rng: Random, premise: Proposition, patterns: tuple[str, ...] | None = None) -> Proposition:
    """A hypothesis about the people and acts of the premise, now and then with a more general or special act."""
    people = [name for name in NAMES if name in premise.content]
    verbs = [verb for verb in VERBS if verb in premise.content]
    if patterns is None:
        near = [v for v in VERBS if v not in verbs and any(v in verbs_near(verb) for verb in verbs)]
        if near and rng.random() < 0.45:
            verbs[rng.randrange(len(verbs))] = rng.choice(near)
        patterns = SIMPLE if rng.random() < 0.6 else RICH
    rng.shuffle(people)
    rng.shuffle(verbs)
    usable = [p for p in patterns if fits(p, len(people), len(verbs))]
    return clause(rng.choice(usable or SIMPLE), (people[0], people[-1]), (verbs[0], verbs[-1]))


def fits(pattern: str, num_people: int, num_verbs: int) -> bool:
    """Whether a pattern has enough different people and verbs."""
    needs = {"did": (1, 1), "did not": (1, 1), "and": (1, 2), "or": (1, 2), "but not": (1, 2), "if": (2, 1)}
    people, verbs = needs.get(pattern, (2, 1))
    return num_people >= people and num_verbs >= verbs
