"""Premises, hypotheses and the two splits of the demo task, drawn from one seeded generator.

Every premise comes with three hypotheses, one for each label, so a premise alone says nothing about the label. Among
the hypotheses that are possible, the one whose shallow cues (function words, words in one sentence only, overlap) have
so far gone least with that label is taken, so that neither a hypothesis alone nor a count of words says much.
The label itself is computed by `semantics` from the two meanings.
"""

import zlib
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from random import Random
from typing import Any, Literal, Protocol

from mixkd_fast.data.demo import propositions, quantified, times
from mixkd_fast.data.demo.lexicon import content_words
from mixkd_fast.data.demo.semantics import LABEL_NAMES

Split = Literal["train", "validation"]
NUM_ROWS: dict[Split, int] = {"train": 18_000, "validation": 2_001}
NUM_LABELS = len(LABEL_NAMES)
# hypotheses tried per premise, at most and until there are ENOUGH of each label
CANDIDATES = 14
ENOUGH = 3
# a premise whose three hypotheses together give more away than this (see `surplus`) is dropped
TOLERANCE = 50.0
# of the premises, the share that speaks of deeds, propositions and times; the rest says what animals and people do
SHARES = {"doing": 0.5, "deed": 0.17, "proposition": 0.26, "time": 0.07}


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
        return times.draw_timed(rng), "temporal"

    def draw_hypothesis(self, premise: Sentence, phenomenon: str) -> Sentence:
        """A hypothesis about the premise."""
        if isinstance(premise, quantified.Quantified):
            return quantified.vary(self.rng, premise, phenomenon)
        if isinstance(premise, propositions.Proposition):
            return propositions.vary_proposition(self.rng, premise)
        assert isinstance(premise, times.Timed)
        return times.vary_timed(self.rng, premise)

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
        chosen = [self.least_telling(text, label, found) for label, found in enumerate(options)]
        if sum(surplus for surplus, _, _ in chosen) > TOLERANCE:
            return
        for label, (_, told, cues) in enumerate(chosen):
            for cue in cues:
                self.uses.setdefault(cue, [0] * NUM_LABELS)[label] += 1
            self.owner[options[label][told][1]] = split
            self.seen.add((text, told))
            self.pairs[split].append(Pair(text, told, label, phenomenon))

    def least_telling(
        self, premise: str, label: int, options: dict[str, tuple[Sentence, frozenset[str]]]
    ) -> tuple[float, str, list[str]]:
        """The hypothesis whose shallow cues point least to its label: (how strongly they do, text, cues)."""
        cues = {told: shallow_cues(premise, told, found.frame()) for told, (found, _) in options.items()}
        return min((self.surplus(cues[told], label), told, cues[told]) for told in options)

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
    content = content_words()
    return [
        frame,
        f"{len(gone)} gone {len(new)} new",
        f"{len(gone)} gone",
        f"{len(new)} new",
        f"{len(both)} both",
        *(f"new {word}" for word in sorted(new - content)),
        *(f"gone {word}" for word in sorted(gone - content)),
        *(f"both {word}" for word in sorted(both - content)),
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
