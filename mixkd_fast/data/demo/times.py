"""Sentences of the demo task about temporal order: "anna sang before three", "ben ate between two and five"."""

from dataclasses import dataclass
from random import Random

from mixkd_fast.data.demo.lexicon import NAMES, VERBS
from mixkd_fast.data.demo.semantics import TimeFact, judge_times

HOURS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven"}
RELATIONS = ("before", "after", "at", "between")


@dataclass(frozen=True)
class Timed:
    """Facts about when one or two persons did something; the facts name the persons by number."""

    people: tuple[str, ...]
    verb: str
    facts: tuple[TimeFact, ...]
    sentence: str
    pattern: str

    def words(self) -> frozenset[str]:
        """The content words."""
        return frozenset((*self.people, self.verb))

    def frame(self) -> str:
        return self.pattern

    def text(self) -> str:
        return self.sentence

    def judge(self, hypothesis: "Timed") -> int | None:
        """The label of the hypothesis given this premise; both speak of the same persons."""
        return judge_times(self.facts, hypothesis.facts[0], len(self.people))


def draw_fact(rng: Random, person: int) -> tuple[TimeFact, str]:
    """When a person did it, as a fact and in words."""
    relation = rng.choice(RELATIONS)
    if relation == "between":
        start, end = sorted(rng.sample(list(HOURS), 2))
        return (relation, person, start, end), f"between {HOURS[start]} and {HOURS[end]}"
    hour = rng.choice(list(HOURS))
    return (relation, person, hour), f"{relation} {HOURS[hour]}"


def draw_timed(rng: Random) -> Timed:
    """A premise: the time of one person's act, or the times of two."""
    people = tuple(rng.sample(NAMES, 2 if rng.random() < 0.5 else 1))
    verb = VERBS[rng.choice(list(VERBS))]
    drawn = [draw_fact(rng, number) for number in range(len(people))]
    clauses = [f"{name} {verb.past} {told}" for name, (_, told) in zip(people, drawn, strict=True)]
    facts = tuple(fact for fact, _ in drawn)
    return Timed(people, verb.base, facts, " and ".join(clauses) + " .", "times")


def vary_timed(rng: Random, premise: Timed) -> Timed:
    """A hypothesis: another time of one of the persons, perhaps denied, or who of two came first."""
    people, verb = premise.people, VERBS[premise.verb]
    person = rng.randrange(len(people))
    if len(people) == 2 and rng.random() < 0.3:
        relation, other = rng.choice(("before", "after")), 1 - person
        fact: TimeFact = ("earlier", person, other) if relation == "before" else ("earlier", other, person)
        sentence = f"{people[person]} {verb.past} {relation} {people[other]} ."
        return Timed(people, premise.verb, (fact,), sentence, f"{relation} somebody")
    fact, told = draw_fact(rng, person)
    denied = rng.random() < 0.15
    did = f"did not {verb.base}" if denied else verb.past
    pattern = f"{fact[0]} {fact[2:]} {denied}"
    fact = ("not", fact) if denied else fact
    return Timed(people, premise.verb, (fact,), f"{people[person]} {did} {told} .", pattern)
