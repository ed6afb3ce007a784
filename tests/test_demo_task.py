"""The demo task: labels follow from meaning, splits share nothing, and shallow cues do not give the label away."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise, product
from random import Random
from typing import Any

import pytest

from mixkd_fast.data.demo import LABEL_NAMES, NUM_ROWS, demo_dataset, demo_rows, propositions, train_demo_tokenizer
from mixkd_fast.data.demo.grammar import PairGenerator
from mixkd_fast.data.demo.lexicon import ACTIONS, NAMES, VERBS, noun_paths, participle, relation
from mixkd_fast.data.demo.quantified import Deed, Doing, Quantified
from mixkd_fast.data.demo.semantics import CONTRADICTION, ENTAILMENT, NEUTRAL

E, N, C = ENTAILMENT, NEUTRAL, CONTRADICTION
FINGERPRINT = "21b8be3898dab9b2f7482a0fe8c4c9e388372b5ac3c7c0ad63396994dd41964e"
VOCABULARY_FINGERPRINT = "977adb2921643c666e824e1a2d6f3adb01f94fffd02ac09a042f27612a096377"


def rows_of(split: str) -> list[tuple[str, str, int, str]]:
    columns = demo_rows(split)
    return list(zip(columns["premise"], columns["hypothesis"], columns["label"], columns["phenomenon"], strict=True))


def fingerprint() -> str:
    digest = hashlib.sha256()
    for split in NUM_ROWS:
        digest.update(json.dumps(demo_rows(split)).encode())
    return digest.hexdigest()


def vocabulary_fingerprint() -> str:
    vocabulary = sorted(train_demo_tokenizer().get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def test_sizes_and_balance() -> None:
    for split, num_rows in NUM_ROWS.items():
        rows = rows_of(split)
        assert len(rows) == num_rows
        assert set(Counter(label for _, _, label, _ in rows).values()) == {num_rows // 3}
        assert len({(premise, hypothesis) for premise, hypothesis, _, _ in rows}) == num_rows
    assert 19_000 <= sum(NUM_ROWS.values()) <= 21_000
    phenomena = Counter(phenomenon for *_, phenomenon in rows_of("validation"))
    assert len(phenomena) == 9
    assert min(phenomena.values()) >= 30


def test_rows_are_those_of_other_platforms_and_processes() -> None:
    assert fingerprint() == FINGERPRINT
    code = "import sys; sys.path.insert(0, 'tests'); import test_demo_task as t; print(t.fingerprint())"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    output = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert output.stdout.strip() == FINGERPRINT


def test_another_seed_gives_other_rows() -> None:
    first, again, other = (PairGenerator(seed) for seed in (0, 0, 1))
    for generator in (first, again, other):
        for _ in range(30):
            generator.add_triple()
    assert first.pairs == again.pairs != other.pairs


def test_unknown_split_is_refused() -> None:
    unknown: Any = "test"
    with pytest.raises(ValueError, match=r"split is 'test'.*train.*validation"):
        demo_rows(unknown)


# ------- meaning -------
def say(quantifier: str, noun: str, *verbs: str, number: int = 0, **more: object) -> Quantified:
    joined, negated = str(more.get("joined", "")), bool(more.get("negated", False))
    adjective = str(more["adjective"]) if "adjective" in more else None
    return Quantified((quantifier, number), noun, adjective, Doing(verbs, joined, negated))


def bought(quantifier: str, noun: str, number: int = 0, name: str = "rita", passive: bool = False) -> Quantified:
    return Quantified((quantifier, number), noun, None, Deed(name, "buy", passive))


QUANTIFIED = [
    (say("all", "dogs", "run"), say("all", "poodles", "run"), E),
    (say("all", "poodles", "run"), say("all", "dogs", "run"), N),
    (say("all", "dogs", "run"), say("all", "dogs", "move"), E),
    (say("all", "dogs", "run"), say("some", "dogs", "run"), E),
    (say("all", "dogs", "run"), say("some", "animals", "move"), E),
    (say("all", "dogs", "run"), say("some", "poodles", "run", negated=True), C),
    (say("all", "dogs", "run"), say("all", "dogs", "run", adjective="small"), E),
    (say("all", "dogs", "run", adjective="small"), say("no", "dogs", "run"), C),
    (say("all", "dogs", "run"), say("some", "crows", "run"), N),
    (say("no", "dogs", "move"), say("no", "poodles", "run"), E),
    (say("no", "dogs", "move"), say("some", "poodles", "run"), C),
    (say("no", "dogs", "run"), say("no", "dogs", "move"), N),
    (say("not all", "poodles", "move"), say("some", "dogs", "run", negated=True), E),
    (say("some", "poodles", "run"), say("no", "dogs", "move"), C),
    (say("some", "dogs", "run"), say("not all", "dogs", "run"), N),
    (say("at least", "dogs", "run", number=3), say("at least", "animals", "move", number=2), E),
    (say("at least", "dogs", "run", number=3), say("fewer than", "dogs", "run", number=3), C),
    (say("exactly", "dogs", "run", number=3), say("at least", "dogs", "run", number=3), E),
    (say("exactly", "poodles", "run", number=3), say("exactly", "dogs", "run", number=2), C),
    (say("exactly", "poodles", "run", number=2), say("exactly", "dogs", "run", number=3), N),
    (say("fewer than", "dogs", "move", number=2), say("fewer than", "poodles", "run", number=4), E),
    (say("at least", "dogs", "run", number=4), say("exactly", "dogs", "run", number=4), N),
    (say("some", "dogs", "run", negated=True), say("all", "animals", "run"), C),
    (say("exactly", "dogs", "run", number=2), say("fewer than", "dogs", "run", number=3, negated=True), N),
    (say("all", "dogs", "run", "sing", joined="and"), say("all", "dogs", "sing"), E),
    (say("all", "dogs", "run", "sing", joined="or"), say("all", "dogs", "sing"), N),
    (say("no", "dogs", "run", "sing", joined="or"), say("no", "dogs", "sing"), E),
    (say("no", "dogs", "run", "sing", joined="and"), say("no", "dogs", "sing"), N),
    (bought("at least", "roses", 2), bought("some", "flowers", passive=True), E),
    (bought("no", "plants"), bought("exactly", "oaks", 2), C),
    (bought("all", "tools"), bought("all", "tools", name="tom"), N),
]


@pytest.mark.parametrize(
    ("premise", "hypothesis", "label"),
    QUANTIFIED,
    ids=lambda value: value.text() if isinstance(value, Quantified) else None,
)
def test_quantified_meaning(premise: Quantified, hypothesis: Quantified, label: int) -> None:
    assert premise.judge(hypothesis) == label


@pytest.mark.parametrize(
    ("premise", "hypothesis", "label"),
    [
        ("neither", "did not", E),
        ("neither", "did", C),
        ("either", "did", N),
        ("both", "either", E),
        ("and", "or", E),
        ("but not", "and", C),
        ("if", "but not", N),
        ("or", "did", N),
    ],
)
def test_propositional_meaning(premise: str, hypothesis: str, label: int) -> None:
    words = (("rita", "tom"), ("sing", "eat"))
    assert propositions.clause(premise, *words).judge(propositions.clause(hypothesis, *words)) == label


def test_propositions_know_hypernyms_and_disjunctive_syllogism() -> None:
    people = ("rita", "sam")
    ran = propositions.clause("did", people, ("run", "eat"))
    assert ran.judge(propositions.clause("did", people, ("move", "eat"))) == E
    assert propositions.clause("did not", people, ("move", "eat")).judge(ran) == C
    either, not_rita = (propositions.clause(pattern, people, ("run", "eat")) for pattern in ("either", "did not"))
    both = propositions.Proposition("", ("and", either.meaning, not_rita.meaning), frozenset(), "")
    assert both.judge(propositions.clause("did", ("sam", "rita"), ("run", "eat"))) == E


HOURS = {"two": 2.0, "three": 3.0, "four": 4.0, "five": 5.0, "six": 6.0, "seven": 7.0}
CLAUSE = re.compile(rf"(\w+) (did not )?\w+ (before|after|at|between) (\w+)(?: and ({'|'.join(HOURS)}))?")


def time_true(sentence: str, times: dict[str, float]) -> bool:
    """Truth of a surface text if the persons act at these times: a reading that shares nothing with the grammar."""
    for found in CLAUSE.finditer(sentence):
        name, denied, relation, mark, end = found.groups()
        time, other = times[name], HOURS.get(mark, times.get(mark, 0.0))
        truth = {
            "before": time < other,
            "after": time > other,
            "at": time == other,
            "between": other < time < HOURS.get(end or "", 0.0),
        }[relation]
        if truth == bool(denied):
            return False
    return True


def test_temporal_labels_agree_with_an_independent_reading_of_the_text() -> None:
    quarters = [quarter / 2 for quarter in range(2, 17)]
    checked = 0
    for premise, hypothesis, label, phenomenon in rows_of("validation"):
        if phenomenon != "temporal":
            continue
        names = [name for name in NAMES if name in premise.split()]
        worlds = [dict(zip(names, times, strict=True)) for times in product(quarters, repeat=len(names))]
        truths = {time_true(hypothesis, world) for world in worlds if time_true(premise, world)}
        assert truths
        assert label == (N if len(truths) == 2 else E if truths == {True} else C), (premise, hypothesis)
        checked += 1
    assert checked > 100


def test_quantified_labels_agree_with_random_worlds() -> None:
    """No world with a few individuals contradicts a label, and a neutral one is witnessed both ways."""
    rng = Random(0)
    for premise, hypothesis, expected in QUANTIFIED:
        seen = set()
        for _ in range(3000):
            world = draw_world(rng, premise, hypothesis)
            if world is not None and statement_true(premise, world):
                seen.add(statement_true(hypothesis, world))
        assert seen == {E: {True}, N: {True, False}, C: {False}}[expected], (premise.text(), hypothesis.text())


World = list[frozenset[str]]


def draw_world(rng: Random, *statements: Quantified) -> World | None:
    """Some individuals with random nouns, adjectives, verbs and deeds, or None if a statement has no subjects."""
    nouns = sorted({word for s in statements for word in noun_paths() if s.noun in noun_paths()[word]})
    acts = sorted({act for s in statements for act in acts_of(s)})
    world = []
    for _ in range(rng.randrange(1, 8)):
        known = {*noun_paths()[rng.choice(nouns)], rng.choice(("small", "large"))}
        chance = rng.random()
        for act in acts:
            if rng.random() < chance:
                known |= {act} | ({VERBS[act].above or act} if act in VERBS else set())
        world.append(frozenset(known))
    return world if all(subjects(s, world) for s in statements) else None


def acts_of(statement: Quantified) -> tuple[str, ...]:
    predicate = statement.predicate
    return predicate.verbs if isinstance(predicate, Doing) else (f"{predicate.name} {predicate.action}",)


def subjects(statement: Quantified, world: World) -> World:
    return [one for one in world if {statement.noun, statement.adjective} - {None} <= one]


def statement_true(statement: Quantified, world: World) -> bool:
    predicate, acts = statement.predicate, set(acts_of(statement))
    joined = predicate.joined if isinstance(predicate, Doing) else ""
    negated = isinstance(predicate, Doing) and predicate.negated
    does = [bool(acts & one) if joined == "or" else acts <= one for one in subjects(statement, world)]
    hits, (kind, number) = sum(done != negated for done in does), statement.quantifier
    truths = {
        "all": hits == len(does),
        "some": hits > 0,
        "no": hits == 0,
        "not all": hits < len(does),
        "at least": hits >= number,
        "exactly": hits == number,
        "fewer than": hits < number,
    }
    return truths[kind]


def test_lexicon_relations_are_consistent() -> None:
    words = [*noun_paths(), *VERBS]
    opposite = {"above": "below", "below": "above", "disjoint": "disjoint", "free": "free"}
    for first, second in product(words, words):
        if first != second:
            assert relation(second, first) == opposite[relation(first, second)]
    assert relation("poodles", "animals") == "below"
    assert relation("poodles", "beagles") == "disjoint"
    assert relation("small", "large") == "disjoint"
    assert relation("run", "move") == "below"
    assert relation("run", "sing") == "free"


# ------- splits -------
FUNCTION_WORDS = set(
    re.findall(
        r"\S+",
        "all some no not at least exactly fewer than two three four five six seven do did were by and or "
        "either neither nor but if then before after between .",
    )
)


def stem(word: str) -> str:
    verbs = [*VERBS.values(), *ACTIONS.values()]
    forms = {form: verb.base for verb in verbs for form in (verb.base, verb.past, participle(verb))}
    return forms.get(word, word)


def content(*texts: str) -> frozenset[str]:
    return frozenset(stem(word) for text in texts for word in text.split() if word not in FUNCTION_WORDS)


def frame(text: str) -> str:
    return " ".join(word if word in FUNCTION_WORDS else "_" for word in text.split())


def test_splits_share_no_pair_no_premise_and_no_combination() -> None:
    train, validation = rows_of("train"), rows_of("validation")
    for key in (
        lambda premise, hypothesis: (premise, hypothesis),
        lambda premise, hypothesis: premise,
        lambda premise, hypothesis: (frame(premise), frame(hypothesis), content(premise, hypothesis)),
        # stricter than asked: the content words alone are new, whatever the template
        lambda premise, hypothesis: content(premise, hypothesis),
    ):
        seen = {key(premise, hypothesis) for premise, hypothesis, *_ in train}
        assert seen.isdisjoint({key(premise, hypothesis) for premise, hypothesis, *_ in validation})


def test_every_validation_word_is_in_train() -> None:
    words = {word for premise, hypothesis, *_ in rows_of("train") for word in (premise + " " + hypothesis).split()}
    assert {w for p, h, *_ in rows_of("validation") for w in (p + " " + h).split()} <= words
    assert all(re.fullmatch(r"[a-z]+|\.", word) for word in words)
    assert set(NAMES) <= words


# ------- shallow cues -------
def cues(premise: str, hypothesis: str, kind: str) -> dict[str, float]:
    first, second = premise.split(), hypothesis.split()
    found: dict[str, float] = {}
    if kind != "overlap":
        found.update({f"hypothesis {word}": 1.0 for word in second})
    if kind in ("both", "all"):
        found.update({f"premise {word}": 1.0 for word in first})
    if kind == "bigrams":
        found.update({f"premise {a} {b}": 1.0 for a, b in pairwise(first)})
        found.update({f"hypothesis {a} {b}": 1.0 for a, b in pairwise(second)})
    if kind in ("overlap", "all"):
        before, after = set(first), set(second)
        found.update({f"shared {word}": 1.0 for word in before & after})
        found.update({f"gone {word}": 1.0 for word in before - after})
        found.update({f"new {word}": 1.0 for word in after - before})
        found["num shared"], found["num new"] = len(before & after) / 5, len(after - before) / 5
        found["num gone"], found["jaccard"] = len(before - after) / 5, len(before & after) / len(before | after)
        found["longer"], found["subset"] = (len(first) - len(second)) / 5, float(after <= before)
    return found


@pytest.mark.parametrize("kind", ["hypothesis", "both", "bigrams", "overlap", "all"])
def test_bag_of_words_stays_below_55_percent(kind: str) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    from sklearn.feature_extraction import DictVectorizer

    train, validation = rows_of("train"), rows_of("validation")
    vectorizer = DictVectorizer()
    model = linear_model.LogisticRegression(max_iter=300)
    model.fit(vectorizer.fit_transform([cues(p, h, kind) for p, h, *_ in train]), [row[2] for row in train])
    features = vectorizer.transform([cues(p, h, kind) for p, h, *_ in validation])
    accuracy = model.score(features, [row[2] for row in validation])
    assert 0.28 < accuracy < 0.55, f"{kind}: {accuracy:.3f}"


# ------- tokenizer and data set -------
def test_dataset_has_class_labels() -> None:
    pytest.importorskip("datasets", reason="datasets is not installed")
    dataset = demo_dataset("validation")
    assert dataset.features["label"].names == list(LABEL_NAMES) == ["entailment", "neutral", "contradiction"]
    assert dataset.to_dict() == demo_rows("validation")


def test_tokenizer_survives_saving_and_knows_every_word(tmp_path: object) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizer = train_demo_tokenizer()
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(5)] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    # weights trained with one numbering are worthless with another
    assert vocabulary_fingerprint() == VOCABULARY_FINGERPRINT
    tokenizer.save_pretrained(str(tmp_path))
    loaded = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert isinstance(loaded, transformers.PreTrainedTokenizerFast)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.pad_token_id, loaded.unk_token_id, loaded.model_max_length) == (0, 1, 64)

    columns = demo_rows("validation")
    encoded = loaded(columns["premise"], columns["hypothesis"])
    assert encoded == tokenizer(columns["premise"], columns["hypothesis"])
    assert max(map(len, encoded["input_ids"])) <= 64
    assert not any(loaded.unk_token_id in ids for ids in encoded["input_ids"])

    one = loaded("All DOGS run .", "some dogs run .")
    assert loaded.decode(one["input_ids"]) == "[CLS] all dogs run. [SEP] some dogs run. [SEP]"
    assert one["token_type_ids"] == [0] * 6 + [1] * 5
