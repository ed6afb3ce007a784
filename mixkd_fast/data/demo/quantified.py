"""Quantified sentences of the demo task: "not all small dogs that run sing", "rita bought at least two roses"."""

from dataclasses import dataclass, replace
from random import Random

from mixkd_fast.data.demo.lexicon import (
    ACTIONS,
    ADJECTIVES,
    NAMES,
    VERBS,
    noun_paths,
    nouns_near,
    participle,
    relation,
    verbs_near,
)
from mixkd_fast.data.demo.semantics import (
    Expression,
    Quantifier,
    atom,
    conjunction,
    disjunction,
    judge_quantified,
    negation,
)

PHENOMENA = ("quantifier", "number", "hypernym", "modifier", "conjunction", "negation")
DEED_PHENOMENA = ("quantifier", "number", "hypernym", "modifier", "voice")
NUMBER_WORDS = {2: "two", 3: "three", 4: "four"}
NUMERIC = ("at least", "exactly", "fewer than")
PLAIN = ("all", "some", "no", "not all")
# "all dogs do not sing" has two readings, "no dogs do not sing" is not everyday English
MAY_NEGATE = ("some", *NUMERIC)


@dataclass(frozen=True)
class Deed:
    """What a named person did to the things: "rita bought ..." or "... were bought by rita"."""

    name: str
    action: str
    passive: bool

    def expression(self) -> Expression:
        return atom(f"{self.name} {self.action}")

    def words(self) -> tuple[str, ...]:
        return (self.name, self.action)


@dataclass(frozen=True)
class Doing:
    """What the subjects do: one or two verbs, joined by "and" or "or", perhaps negated (not with "and")."""

    verbs: tuple[str, ...]
    joined: str = ""
    negated: bool = False

    def expression(self) -> Expression:
        inner = atom(self.verbs[0])
        if self.joined:
            inner = (conjunction if self.joined == "and" else disjunction)(inner, atom(self.verbs[1]))
        return negation(inner) if self.negated else inner

    def words(self) -> tuple[str, ...]:
        return self.verbs

    def text(self) -> str:
        return ("do not " if self.negated else "") + f" {self.joined} ".join(self.verbs)


@dataclass(frozen=True)
class Quantified:
    """A statement "Q A B" with A = (adjective and) noun, B = predicate."""

    quantifier: Quantifier
    noun: str
    adjective: str | None
    predicate: Doing | Deed

    def restrictor(self) -> Expression:
        """The set the quantifier ranges over."""
        subject = atom(self.noun)
        return conjunction(subject, atom(self.adjective)) if self.adjective else subject

    def words(self) -> frozenset[str]:
        """The content words."""
        adjective = (self.adjective,) if self.adjective else ()
        return frozenset((self.noun, *adjective, *self.predicate.words()))

    def frame(self) -> str:
        """The function words: what remains of the sentence without its content words."""
        joined = f"{self.predicate.joined} {self.predicate.negated}" if isinstance(self.predicate, Doing) else "deed"
        return f"{self.quantifier[0]} {self.quantifier[1]} {joined}"

    def text(self) -> str:
        kind, number = self.quantifier
        quantity = f"{kind} {NUMBER_WORDS[number]}" if number else kind
        subject = " ".join(word for word in (self.adjective, self.noun) if word)
        if isinstance(self.predicate, Doing):
            return f"{quantity} {subject} {self.predicate.text()} ."
        name, action = self.predicate.name, ACTIONS[self.predicate.action]
        if self.predicate.passive:
            return f"{quantity} {subject} were {participle(action)} by {name} ."
        if kind == "not all":
            return f"{name} did not {action.base} all {subject} ."
        return f"{name} {action.past} {quantity} {subject} ."

    def judge(self, hypothesis: "Quantified") -> int | None:
        """The label of the hypothesis given this premise."""
        return judge_quantified(
            (self.quantifier, self.restrictor(), self.predicate.expression()),
            (hypothesis.quantifier, hypothesis.restrictor(), hypothesis.predicate.expression()),
            relation,
        )


def draw_quantifier(rng: Random, numeric: bool) -> Quantifier:
    """A random quantifier with or without a number."""
    return (rng.choice(NUMERIC), rng.choice((2, 3, 4))) if numeric else (rng.choice(PLAIN), 0)


def draw_doing(rng: Random) -> Quantified:
    """A random statement about what animals or people do."""
    noun = rng.choice([noun for noun, path in noun_paths().items() if path[0] in ("animals", "people")])
    verbs = rng.sample(list(VERBS), 2 if rng.random() < 0.25 else 1)
    joined = rng.choice(("and", "or")) if len(verbs) == 2 else ""
    statement = Quantified(
        draw_quantifier(rng, rng.random() < 0.35),
        noun,
        rng.choice(rng.choice(ADJECTIVES)) if rng.random() < 0.35 else None,
        Doing(tuple(verbs), joined, rng.random() < 0.1),
    )
    return tidy(statement)


def draw_deed(rng: Random) -> Quantified:
    """A random statement about what somebody did to things."""
    noun = rng.choice([noun for noun, path in noun_paths().items() if path[0] in ("plants", "goods")])
    return Quantified(
        draw_quantifier(rng, rng.random() < 0.5),
        noun,
        rng.choice(rng.choice(ADJECTIVES)) if rng.random() < 0.5 else None,
        Deed(rng.choice(NAMES), rng.choice(list(ACTIONS)), rng.random() < 0.5),
    )


def tidy(statement: Quantified) -> Quantified:
    """Drop a negation that the grammar does not allow because its scope would be ambiguous."""
    doing = statement.predicate
    if not isinstance(doing, Doing) or not doing.negated:
        return statement
    if statement.quantifier[0] not in MAY_NEGATE or doing.joined == "and":
        return replace(statement, predicate=replace(doing, negated=False))
    return statement


def edit(rng: Random, statement: Quantified, phenomenon: str) -> Quantified:
    """A variant of the statement that puts the named rule to the test."""
    if phenomenon == "quantifier":
        return replace(statement, quantifier=draw_quantifier(rng, rng.random() < 0.3))
    if phenomenon == "number":
        return replace(statement, quantifier=draw_quantifier(rng, True))
    if phenomenon == "hypernym":
        near = nouns_near(statement.noun)
        options = near["above"] + near["below"] + (near["beside"] if rng.random() < 0.1 else ())
        verb = edit_verb(rng, statement) if rng.random() < 0.35 else statement
        return verb if verb != statement else replace(statement, noun=rng.choice(options))
    if phenomenon == "modifier":
        if statement.adjective and rng.random() < 0.8:
            return replace(statement, adjective=None)
        return replace(statement, adjective=rng.choice(rng.choice(ADJECTIVES)))
    doing = statement.predicate
    if isinstance(doing, Deed):
        return replace(statement, predicate=replace(doing, passive=not doing.passive))
    if phenomenon == "negation":
        opposite = {"all": "not all", "not all": "all", "some": "no", "no": "some"}
        kind, number = statement.quantifier
        if kind in opposite and rng.random() < 0.5:
            return tidy(replace(statement, quantifier=(opposite[kind], number)))
        kind = kind if kind in MAY_NEGATE else "some"
        return tidy(replace(statement, quantifier=(kind, number), predicate=replace(doing, negated=not doing.negated)))
    if doing.joined and rng.random() < 0.75:
        return tidy(replace(statement, predicate=Doing((rng.choice(doing.verbs),), "", doing.negated)))
    if doing.joined:
        other = "or" if doing.joined == "and" else "and"
        return tidy(replace(statement, predicate=replace(doing, joined=other)))
    more = rng.choice([verb for verb in VERBS if verb not in doing.verbs])
    verbs = (*doing.verbs, more) if rng.random() < 0.5 else (more, *doing.verbs)
    return tidy(replace(statement, predicate=Doing(verbs, rng.choice(("and", "or")), doing.negated)))


def edit_verb(rng: Random, statement: Quantified) -> Quantified:
    """Replace one verb of the predicate by one that it implies or that implies it, if there is one."""
    doing = statement.predicate
    if isinstance(doing, Deed):
        return statement
    place = rng.randrange(len(doing.verbs))
    near = [verb for verb in verbs_near(doing.verbs[place]) if verb not in doing.verbs]
    if not near:
        return statement
    verbs = (*doing.verbs[:place], rng.choice(near), *doing.verbs[place + 1 :])
    return tidy(replace(statement, predicate=replace(doing, verbs=verbs)))


def vary(rng: Random, statement: Quantified, phenomenon: str) -> Quantified:
    """A hypothesis: the named edit, and often another quantifier, so that the edit alone does not decide the label."""
    varied = edit(rng, statement, phenomenon)
    counting = phenomenon in ("quantifier", "number")
    if rng.random() < (0.3 if counting else 0.6):
        varied = edit(rng, varied, rng.choice(("hypernym", "modifier")) if counting else "quantifier")
    if phenomenon == "voice" and rng.random() < 0.5:
        varied = edit(rng, varied, rng.choice(("hypernym", "modifier")))
    return tidy(varied)
