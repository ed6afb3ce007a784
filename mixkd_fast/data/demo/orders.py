"""Sentences of the demo task about order in time and space: "anna arrived before ben and carla"."""

from dataclasses import dataclass
from random import Random

from mixkd_fast.data.demo.lexicon import NAMES
from mixkd_fast.data.demo.semantics import OrderFact, judge_order


@dataclass(frozen=True)
class OrderWords:
    """How one strict order is told: x less y, y more x, x is the first or the last of all."""

    phenomenon: str
    verb: str
    denied: str
    less: str
    more: str
    first: str
    last: str


TEMPORAL = OrderWords("temporal", "arrived", "did not arrive", "before", "after", "first", "last")
SPATIAL = OrderWords("spatial", "stood", "did not stand", "left of", "right of", "leftmost", "rightmost")


@dataclass(frozen=True)
class Order:
    """One or more facts about the order of some entities, which the facts name by number."""

    wording: OrderWords
    entities: tuple[str, ...]
    facts: tuple[OrderFact, ...]
    sentence: str
    pattern: str

    def words(self) -> frozenset[str]:
        """The content words, with the phenomenon for the verb."""
        return frozenset((*self.entities, self.wording.phenomenon))

    def frame(self) -> str:
        return f"{self.wording.phenomenon} {self.pattern}"

    def text(self) -> str:
        return self.sentence

    def judge(self, hypothesis: "Order") -> int | None:
        """The label of the hypothesis given this premise; both speak of the same entities."""
        return judge_order(self.facts, hypothesis.facts[0], tuple(range(len(self.entities))))


def draw_order(rng: Random, wording: OrderWords) -> Order:
    """A premise: one before or after two, two before or after one, or a chain; "before" more often than "after"."""
    shape = rng.choices(("one to two", "two to one", "chain"), weights=(4, 4, 1))[0]
    turned = rng.random() < 0.15
    relation = wording.more if turned else wording.less
    entities = tuple(rng.sample(NAMES, 4 if shape == "chain" else 3))
    x, y, z = entities[:3]
    if shape == "one to two":
        pairs = [(0, 1), (0, 2)]
        sentence = f"{x} {wording.verb} {relation} {y} and {z} ."
    else:
        pairs = [(0, 2), (1, 2)]
        sentence = f"{x} and {y} {wording.verb} {relation} {z} ."
    if shape == "chain":
        pairs.append((2, 3))
        sentence += f" {z} {wording.verb} {relation} {entities[3]} ."
    facts = tuple(("less", b, a) if turned else ("less", a, b) for a, b in pairs)
    return Order(wording, entities, facts, sentence, f"{shape} {turned}")


def vary_order(rng: Random, premise: Order) -> Order:
    """A hypothesis: who is first or last, or a comparison of two, which may be denied."""
    wording, entities = premise.wording, premise.entities
    a, b = rng.sample(range(len(entities)), 2)
    fact: OrderFact
    if rng.random() < 0.5:
        kind = rng.choice(("first", "last"))
        told = wording.first if kind == "first" else wording.last
        return Order(wording, entities, ((kind, a),), f"{entities[a]} {wording.verb} {told} .", kind)
    turned, denied = rng.random() < 0.25, rng.random() < 0.15
    fact = ("less", b, a) if turned else ("less", a, b)
    fact = ("not", fact) if denied else fact
    verb = wording.denied if denied else wording.verb
    sentence = f"{entities[a]} {verb} {wording.more if turned else wording.less} {entities[b]} ."
    return Order(wording, entities, (fact,), sentence, f"{turned} {denied}")
