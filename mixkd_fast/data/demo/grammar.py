"""Premises, hypotheses and the two splits of the demo task, drawn from one seeded generator.

Every premise comes with three hypotheses, one for each label, so a premise alone says nothing about the label; among
the hypotheses that are possible, the one whose function words have so far been rarest with that label is taken, so a
hypothesis alone says little either. The label itself is computed by `semantics` from the two meanings.
"""

import zlib
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from random import Random
from typing import Any, Literal, Protocol

from mixkd_fast.data.demo import orders, propositions, quantified
from mixkd_fast.data.demo.semantics import LABEL_NAMES

Split = Literal["train", "validation"]
NUM_ROWS: dict[Split, int] = {"train": 18_000, "validation": 2_001}
NUM_LABELS = len(LABEL_NAMES)
CANDIDATES = 16
ENOUGH = 4
# of the premises, the share that speaks of deeds, propositions and orders; the rest says what animals and people do
SHARES = {"doing": 0.46, "deed": 0.17, "proposition": 0.28, "order": 0.09}


class Sentence(Protocol):
    """What every fragment of the grammar offers."""

    def text(self) -> str: ...
    def words(self) -> frozenset[str]: ...
    def frame(self) -> str: ...
    def judge(self, hypothesis: Any) -> int | None: ...


@dataclass(frozen=True)
class Pair:
    """One row of the task."""

    premise: str
    hypothesis: str
    label: int
    phenomenon: str


class PairGenerator:
    """Draws pairs for both splits; no content-word combination of a pair, and no premise, is in both."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.seed = seed
        # shallow cue -> its uses with each label
        self.uses: dict[str, list[int]] = {}
        # content words of a pair -> the split that has them
        self.owner: dict[frozenset[str], Split] = {}
        self.seen: set[tuple[str, str]] = set()
        self.pairs: dict[Split, list[Pair]] = {"train": [], "validation": []}

    def split_of(self, premise: Sentence) -> Split:
        """The split of everything that is said with these content words: every tenth combination is held out."""
        key = f"{self.seed} {' '.join(sorted(premise.words()))}"
        return "validation" if zlib.crc32(key.encode()) % 10 == 0 else "train"

    def draw_premise(self) -> tuple[Sentence, str]:
        """A premise and the rule that its hypotheses shall exercise."""
        rng = self.rng
        fragment = rng.choices(list(SHARES), weights=list(SHARES.values()))[0]
        if fragment == "doing":
            return quantified.draw_doing(rng), rng.choice(quantified.PHENOMENA)
        if fragment == "deed":
            return quantified.draw_deed(rng), rng.choice(quantified.DEED_PHENOMENA)
        if fragment == "proposition":
            return propositions.draw_proposition(rng), "proposition"
        wording = rng.choice((orders.TEMPORAL, orders.SPATIAL))
        return orders.draw_order(rng, wording), wording.phenomenon

    def draw_hypothesis(self, premise: Sentence, phenomenon: str) -> Sentence:
        """A hypothesis about the premise."""
        if isinstance(premise, quantified.Quantified):
            return quantified.vary(self.rng, premise, phenomenon)
        if isinstance(premise, propositions.Proposition):
            return propositions.vary_proposition(self.rng, premise)
        assert isinstance(premise, orders.Order)
        return orders.vary_order(self.rng, premise)

    def full(self, split: Split) -> bool:
        return len(self.pairs[split]) >= NUM_ROWS[split]

    def add_triple(self) -> None:
        """Draw a premise and add three pairs of it, one for each label, if it yields them and its split has room."""
        premise, phenomenon = self.draw_premise()
        split = self.split_of(premise)
        if self.full(split):
            return
        text, words = premise.text(), premise.words()
        options: list[dict[str, tuple[Sentence, frozenset[str]]]] = [{} for _ in LABEL_NAMES]
        met = {text}
        for _ in range(CANDIDATES):
            hypothesis = self.draw_hypothesis(premise, phenomenon)
            told = hypothesis.text()
            if told in met:
                continue
            met.add(told)
            combination = words | hypothesis.words()
            if self.owner.get(combination, split) != split or (text, told) in self.seen:
                continue
            label = premise.judge(hypothesis)
            if label is None:
                return
            options[label][told] = (hypothesis, combination)
            if min(map(len, options)) >= ENOUGH:
                break
        if not all(options):
            return
        for label, sentences in enumerate(options):
            cues = {told: shallow_cues(text, told, found.frame()) for told, (found, _) in sentences.items()}
            chosen = min(sentences, key=lambda told: self.surplus(cues[told], label))
            for cue in cues[chosen]:
                self.uses.setdefault(cue, [0] * NUM_LABELS)[label] += 1
            self.owner[sentences[chosen][1]] = split
            self.seen.add((text, chosen))
            self.pairs[split].append(Pair(text, chosen, label, phenomenon))

    def surplus(self, cues: list[str], label: int) -> float:
        """How strongly these cues have pointed to this label so far: excess uses over the root of all uses, summed."""
        excess = 0.0
        for cue in cues:
            uses = self.uses.get(cue)
            if uses:
                excess += (NUM_LABELS * uses[label] - sum(uses)) / sqrt(sum(uses))
        return excess


def shallow_cues(premise: str, hypothesis: str, frame: str) -> list[str]:
    """What a reader who does not compose meanings could go by: function words, and words in one sentence only."""
    before, after = set(premise.split()), set(hypothesis.split())
    gone, new, both = before - after, after - before, before & after
    return [
        frame,
        f"{len(gone)} gone {len(new)} new",
        f"{len(gone)} gone",
        f"{len(new)} new",
        f"{len(both)} both",
        *(f"new {word}" for word in sorted(new)),
        *(f"hypothesis {word}" for word in sorted(after)),
        *(f"gone {word}" for word in sorted(gone)),
        *(f"both {word}" for word in sorted(both)),
    ]


@lru_cache(maxsize=2)
def generate(seed: int) -> dict[Split, tuple[Pair, ...]]:
    """Both splits, each in random order; the same for a seed on every platform."""
    generator = PairGenerator(seed)
    while not all(generator.full(split) for split in NUM_ROWS):
        generator.add_triple()
    shuffler = Random(seed)
    for rows in generator.pairs.values():
        shuffler.shuffle(rows)
    return {split: tuple(rows) for split, rows in generator.pairs.items()}
