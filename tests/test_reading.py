"""The reading of directions, against counts by hand, plain loops and planted tastes."""

import dataclasses
import functools
import itertools
import json
import random
import time

import numpy as np
import pandas as pd
import pytest
import studies
import torch
from helpers import planted_weights

import lore.reading
import utils
from lore.reading import (
    ATTRIBUTES,
    EXAMPLES,
    FOUND,
    PATTERNS,
    WORD_SETS,
    associate,
    count_attributes,
    count_choices,
    group_attributes,
    known_answers,
    new_pairs,
    prompt_text,
    read_attributes,
    read_directions,
    read_known,
    shorten,
    similar_permutations,
    weights_table,
)
from lore.study import PARTS, Study
from utils import SEEN_TEST, SETTINGS, UNSEEN_TEST, Fit

pytestmark = pytest.mark.usefixtures("one_thread")

TASTES = ("length", "exclamations", "digits")
PAIRS = {"train": 40, "test": 10, "train_unseen": 30, "test_unseen": 50}  # of each user
d = 24
VOCABULARY = (
    "a the about after because before book broke called city cold cousin dinner door evening "
    "family fence floor friend garden green house kitchen later letter little loud money morning "
    "moved music neighbour never night office old open paint phone plan quiet rain river school "
    "sister slow small spring story street summer table ticket train walked warm week window work"
).split()


# ---- Made data: texts with countable attributes, people who choose by them


def made_text(chance: random.Random) -> str:
    """One to six sentences, with more or fewer exclamations, questions, digits and "I"."""
    exclaims, asks, counts, tells = (chance.random() ** 2 for _ in range(4))
    sentences = []
    for _ in range(chance.randint(1, 6)):
        words = chance.choices(VOCABULARY, k=chance.randint(4, 12))
        if chance.random() < counts:
            words.append(str(chance.randint(1, 999)))
        if chance.random() < tells:
            words.insert(0, "I")
        end = "!" if chance.random() < exclaims else "?" if chance.random() < asks else "."
        sentences.append(" ".join(words) + end)
    return " ".join(sentences)


@functools.cache
def text_pool() -> tuple[list[str], np.ndarray]:
    """The texts that all made data draw from, and their attributes in units of their spread."""
    chance = random.Random(0)
    texts = [made_text(chance) for _ in range(3000)]
    counts = np.array([count_attributes(text) for text in texts])
    return texts, counts / np.maximum(counts.std(0), 0.1)


def made_pairs(
    taste: np.ndarray, pairs: int, generator: np.random.Generator
) -> tuple[torch.Tensor, list[tuple[str, str]]]:
    """The pairs of a user who chooses by a mixture of TASTES: features `[pairs, d]`, and texts.

    The features are all attributes, mixed, and noise. Choices are drawn from the Bradley-Terry
    model.
    """
    texts, counts = text_pool()
    rows = generator.integers(len(texts), size=(pairs, 2))
    difference = counts[rows[:, 0]] - counts[rows[:, 1]]  # (pairs, attributes)
    margin = 3 * difference[:, [ATTRIBUTES.index(attribute) for attribute in TASTES]] @ taste
    is_first = generator.random(pairs) < 1 / (1 + np.exp(-margin))
    rows = np.where(is_first[:, None], rows, rows[:, ::-1])  # chosen, rejected
    mixture = np.random.default_rng(0).standard_normal((len(ATTRIBUTES), d)) / d**0.5
    phi = counts @ mixture  # (texts, d)
    X = phi[rows[:, 0]] - phi[rows[:, 1]] + 0.1 * generator.standard_normal((pairs, d))
    return torch.tensor(100 * X, dtype=torch.float32), [(texts[a], texts[b]) for a, b in rows]


def made_study(
    seed: int, users: int = 40, has_tastes: bool = True, is_uneven: bool = False
) -> Study:
    """As many seen as unseen users. Without tastes all choose by the same mixture of TASTES.

    is_uneven: some have fifty times as many pairs as others, in all parts.
    """
    generator = np.random.default_rng(seed)
    weights = np.full((2 * users, len(TASTES)), 1 / len(TASTES))
    if has_tastes:
        weights = planted_weights(2 * users, len(TASTES), 0.2, seed).double().numpy()
    sizes = np.ones(2 * users)
    if is_uneven:
        sizes = np.exp(generator.uniform(np.log(0.05), np.log(2.5), 2 * users))
    features, texts = {}, {}
    for part in PARTS:
        people = range(users, 2 * users) if "unseen" in part else range(users)
        made = [
            made_pairs(weights[i], max(2, round(PAIRS[part] * sizes[i])), generator) for i in people
        ]
        features[part] = [X for X, _ in made]
        texts[part] = [pairs for _, pairs in made]
    return Study(
        title="made",
        seen=[f"seen {i}" for i in range(users)],
        unseen=[f"unseen {i}" for i in range(users)],
        reward_head=torch.ones(d, 1),
        texts=texts,
        **features,
    )


def swept(study: Study, K_list=(3,), seeds=(0,), num_iterations=200) -> list[Fit]:
    return studies.swept(study, K_list, seeds, num_iterations=num_iterations)


def found_attributes(reading: dict) -> list[list[str]]:
    """All groups of attributes that any column goes with, each as a list of names."""
    return [
        [entry["attribute"], *(other["attribute"] for other in entry["with"])]
        for column in reading["columns"]
        for entry in column["attributes"]
    ]


def unrelated_fit(study: Study, K: int = 3, seed: int = 0) -> Fit:
    """A fit that knows nothing of the study: weights and a basis drawn by chance."""
    generator = torch.Generator().manual_seed(seed)
    V = torch.randn(study.train[0].shape[1], K, generator=generator)
    W = planted_weights(len(study.seen), K, 0.3, seed)
    W_unseen = planted_weights(len(study.unseen), K, 0.3, seed + 1)
    features = list(study.features().values())
    weights = [W, W, W_unseen, W_unseen]
    accuracies = {
        setting: utils.accuracies_per_user(X, [V], [w])[0]
        for setting, X, w in zip(SETTINGS, features, weights)
    }
    return Fit(K, 0, seed, V, W, W_unseen, 0.0, accuracies)


@pytest.fixture(scope="module")
def study():
    return made_study(0)


@pytest.fixture(scope="module")
def fits(study):
    return swept(study, K_list=(0, 1, 3), seeds=(0, 1))


@pytest.fixture(scope="module")
def reading(fits, study):
    return read_directions(fits, study, (3, 0))


@pytest.fixture(scope="module")
def small():
    """Twelve unseen users without tastes, and a fit that has nothing to do with them."""
    study = made_study(1, users=12, has_tastes=False)
    prompts = [[f"prompt {j // 2}" for j in range(len(X))] for X in study.test_unseen]
    study = dataclasses.replace(study, prompts={"test_unseen": prompts})
    return study, unrelated_fit(study)


# ---- Attributes

EXAMPLE_COUNTS = {
    "": {},
    "One two. Three": {"length": 14, "words": 3, "word length": 11 / 3, "sentences": 1},
    "It's": {"length": 4, "words": 1, "word length": 4},
    'No. (Yes.) "Why?" v1.5 ... !': {
        "length": 28,
        "words": 5,  # No, Yes, Why, v1, 5
        "word length": 11 / 5,
        "sentences": 5,
        "questions": 1,
        "exclamations": 1,
        "digits": 2,
        "quotations": 1,
    },
    "I'm sure. My US friends and I told us, but we’re late": {"first person": 5},
    "Me? You said your car; you'd better ask yourself.": {"first person": 1, "second person": 4},
    "Maybe I think it could. It seems so. I think!": {"hedges": 5, "first person": 2},
    "Sorry, I can't. I cannot. As an AI I’m unable to. Unfortunately they can't.": {
        "apologies and refusals": 6,
        "first person": 3,
    },
    "- one\n* two\n  3. three\n10) ten\n-no\n2.5 no\nx - no": {"list items": 4, "digits": 5},
    "# Title\n## Part\n#no\n**bold** and **bold** * no *": {"headings and bold": 4},
    "Use `x` or\n```\ny\n```": {"code": 4},
    "fun 😀🎉 ✔": {"emoji": 3},
    'He "said" so. “Really” she said "': {"quotations": 2},
}


@pytest.mark.parametrize("text", EXAMPLE_COUNTS)
def test_attributes_are_those_counted_by_hand(text):
    counts = dict(zip(ATTRIBUTES, count_attributes(text)))
    expected = EXAMPLE_COUNTS[text]
    if "length" in expected:
        assert counts == pytest.approx(dict.fromkeys(ATTRIBUTES, 0) | expected)
    else:
        assert {name: counts[name] for name in expected} == expected


def test_every_attribute_is_counted_in_some_example():
    assert len(set(ATTRIBUTES)) == len(ATTRIBUTES) == 16
    assert {*PATTERNS, *WORD_SETS} < set(ATTRIBUTES)
    assert set(ATTRIBUTES) == {name for counts in EXAMPLE_COUNTS.values() for name in counts}


def test_no_text_makes_counting_slow():
    pieces = [
        "a",
        "a'",
        " ",
        "\n",
        "\n ",
        "#",
        "1",
        "**",
        "**a",
        "`",
        '"',
        "“",
        "“a",
        "!",
        ".)",
        "-",
    ]
    start = time.perf_counter()
    for piece in pieces:
        count_attributes(piece * 50_000)
        count_attributes("\n" + piece * 50_000 + "x")
    assert time.perf_counter() - start < 20  # what is quadratic takes minutes


def test_choices_are_counted_pair_by_pair(study):
    users = study.texts["test_unseen"][:3]
    choices = count_choices(users)
    for i, pairs in enumerate(users):
        for j in range(len(ATTRIBUTES)):
            signs = [np.sign(count_attributes(a)[j] - count_attributes(b)[j]) for a, b in pairs]
            assert choices.more[i, j] == signs.count(1)
            assert choices.less[i, j] == signs.count(-1)


def test_a_share_is_that_of_the_pairs_that_differ_and_few_pairs_draw_it_to_everybodys():
    loud, calm = ("Yes!", "Yes."), ("Yes.", "Yes!")
    choices = count_choices([[loud, loud, loud, calm], [loud], [("Yes.", "Yes.")]])
    j = ATTRIBUTES.index("exclamations")
    np.testing.assert_allclose(choices.shares()[:, j], [3 / 4, 1, np.nan])
    everybody = 4 / 5
    expected = [(3 + 5 * everybody) / (4 + 5), (1 + 5 * everybody) / (1 + 5), everybody]
    np.testing.assert_allclose(choices.steady_shares()[:, j], expected)


# ---- Correlations over people


def plain_association(W, A, permutations):
    """Correlations, and p from a loop over permutations, in float64."""

    def correlations(A):
        return np.array([[np.corrcoef(w, a)[0, 1] for a in A.T] for w in W.T])

    largest = np.array([np.abs(correlations(A[order])).max() for order in permutations])
    r = correlations(A)
    counts = (largest[:, None, None] >= np.abs(r) - 1e-5).sum(0)
    return r, (1 + counts) / (1 + len(largest))


def test_p_is_that_of_a_plain_loop_over_exchanged_people(monkeypatch):
    monkeypatch.setattr(lore.reading, "DRAWS", 200)
    generator = np.random.default_rng(0)
    W, A = generator.random((13, 3)), generator.random((13, 4))
    A[:, 0] += W[:, 1]
    pairs = generator.integers(2, 30, 13)
    r, p = plain_association(W, A, similar_permutations(pairs))
    result = associate(W, A, pairs)
    np.testing.assert_allclose(result.correlation, r, atol=1e-9)
    np.testing.assert_allclose(result.p, p)
    assert ((p < FOUND) == (np.abs(r) > result.threshold)).all()


def test_p_of_few_people_is_that_of_all_their_orders():
    generator = np.random.default_rng(3)
    W, A = generator.random((6, 2)), generator.random((6, 2))
    A[:, 0] += W[:, 0]
    _, exact = plain_association(W, A, np.array(list(itertools.permutations(range(6)))))
    np.testing.assert_allclose(associate(W, A, np.full(6, 9)).p, exact, atol=0.03)


def test_people_are_exchanged_with_those_who_have_about_equally_many_pairs():
    pairs = np.array([9, 1, 7, 3, 50, 2, 50, 5, 50, 4, 50])
    permutations = similar_permutations(pairs)
    assert (np.sort(permutations, 1) == np.arange(11)).all()
    few = np.flatnonzero(pairs <= 5)  # five people: a group
    assert np.isin(permutations[:, few], few).all()
    among = {tuple(order) for order in permutations[:, few]}
    assert len(among) == 120  # all their orders
    equal = similar_permutations(np.full(11, 3))
    assert np.unique(equal[:, 0]).tolist() == list(range(11))


def test_uneven_people_without_tastes_seldom_look_like_a_finding():
    found, found_by_any_exchange = 0, 0
    for seed in range(40):
        generator = np.random.default_rng(seed)
        pairs = np.exp(generator.uniform(np.log(2), np.log(60), 40)).astype(int)
        noise = pairs[:, None] ** -0.5
        W, A = (noise * generator.standard_normal((40, k)) for k in (3, 16))
        found += (associate(W, A, pairs).p < FOUND).any()
        found_by_any_exchange += (associate(W, A, np.ones(40)).p < FOUND).any()
    assert found <= 4
    assert found_by_any_exchange >= 8  # what the groups are for


def test_what_is_unknown_of_a_person_and_what_is_equal_for_all_tells_nothing():
    generator = np.random.default_rng(0)
    W, A = generator.random((20, 2)), generator.random((20, 3))
    A[:, 1] = 7
    A[5:8, 0] = np.nan
    A[:, 2] = np.nan
    W[:, 1] = 1 / 3
    result = associate(W, A, np.full(20, 9))
    known = ~np.isnan(A[:, 0])
    filled = np.where(known, A[:, 0], A[known, 0].mean())
    assert result.correlation[0, 0] == pytest.approx(np.corrcoef(W[:, 0], filled)[0, 1])
    assert (result.correlation[:, 1:] == 0).all() and (result.correlation[1] == 0).all()
    assert (result.p[:, 1:] == 1).all()


# ---- Which attributes are told apart


def grouped(correlation, between, p=None, users=60):
    """`group_attributes` of two attributes whose correlation with one another is `between`."""
    p = [0.001, 0.001] if p is None else p
    matrix = np.array([[1, between], [between, 1]])
    return group_attributes(np.array(correlation), np.array(p), matrix, users)


def test_what_only_follows_from_the_strongest_attribute_goes_with_it():
    assert grouped([0.63, 0.9], between=0.7) == [[1, 0]]  # 0.63 = 0.9 * 0.7: nothing is left
    assert grouped([-0.63, 0.9], between=-0.7) == [[1, 0]]


def test_what_would_explain_the_strongest_attribute_as_well_goes_with_it():
    assert grouped([0.78, 0.8], between=0.97, p=[0.2, 0.01]) == [[1, 0]]
    assert grouped([0.1, 0.8], between=0.1, p=[0.2, 0.01]) == [[1]]


def test_of_attributes_that_explain_it_about_as_well_the_first_in_the_table_leads():
    assert grouped([0.78, 0.8], between=0.97) == [[0, 1]]
    assert grouped([0.7, 0.8], between=0.9) == [[1, 0]]
    assert grouped([0.8, 0.8], between=1.0) == [[0, 1]]


def test_two_tastes_in_one_column_are_two_findings():
    assert grouped([0.6, 0.7], between=0.0) == [[1], [0]]
    assert grouped([0.6, 0.7], between=0.0, p=[0.2, 0.2]) == []


# ---- What is known of the people


def test_numbers_stay_and_other_answers_become_yes_or_no():
    people = 12
    about = [
        {
            "age": 20 + i,
            "country": "Chile" if i < 5 else "Peru" if i < 10 else "Cuba",
            "tested": i % 2 == 0,
            "same": "yes",
            "own": f"answer {i}",
            "level": i % 2,  # two numbers are two answers
        }
        for i in range(people)
    ]
    about[0] |= {"age": None, "country": ""}
    about[1]["age"] = float("nan")
    about.append({"country": "Chile"})
    answers = known_answers(about)
    assert set(answers) == {
        "age",
        "country: Chile",
        "country: Peru",
        "tested: True",
        "level: 0",
    }
    nan = np.nan
    np.testing.assert_array_equal(answers["age"], [nan, nan, *range(22, 32), nan])
    chile = [nan, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1]
    np.testing.assert_array_equal(answers["country: Chile"], chile)
    np.testing.assert_array_equal(answers["level: 0"], [1, 0] * 6 + [nan])


def test_odd_values_are_answers_and_no_errors():
    about = [{"a": 10**400, "b": [1, 2], "c": float("inf"), "d": pd.NA} for _ in range(6)]
    about += [{"a": i, "b": "x", "c": i, "d": " "} for i in range(6)]
    assert set(known_answers(about)) == {f"a: {10**400}", "b: [1, 2]", "c: inf"}


def ages(fit, study, noise):
    """An age for each user, which goes with the weight of column 1."""
    generator = np.random.default_rng(0)
    users = [*study.seen, *study.unseen]
    weights = torch.cat([fit.W, fit.W_unseen])[:, 1].tolist()
    return {
        user: {"age": 40 + 20 * weight + noise * generator.standard_normal(), "coin": "ab"[i % 2]}
        for i, (user, weight) in enumerate(zip(users, weights))
    }


def test_an_answer_that_goes_with_a_weight_is_found_among_seen_and_unseen_users(small):
    study, _ = small
    fit = unrelated_fit(study)
    reading = read_directions(
        [fit], dataclasses.replace(study, about_users=ages(fit, study, noise=4)), (3, 0)
    )
    known = reading["known"]
    assert known["users"] == 24
    assert known["names"] == ["age", "coin: a"]
    (entry,) = reading["columns"][1]["known"]
    weights = torch.cat([fit.W, fit.W_unseen])[:, 1].double().numpy()
    age = [person["age"] for person in ages(fit, study, noise=4).values()]
    assert entry["answer"] == "age" and entry["p"] < FOUND
    assert entry["correlation"] == pytest.approx(np.corrcoef(weights, age)[0, 1])
    assert entry["text"].startswith("age, correlation +0.")


def test_answers_that_have_nothing_to_do_with_the_weights_are_seldom_found(small):
    study, _ = small
    found = 0
    for seed in range(20):
        generator = np.random.default_rng(seed)
        about = {
            user: {"age": int(generator.integers(18, 80)), "country": generator.choice(["A", "B"])}
            for user in [*study.seen, *study.unseen]
        }
        part = read_known(
            unrelated_fit(study, seed=seed), dataclasses.replace(study, about_users=about)
        )
        found += any(part.found)
    assert found <= 3


def test_a_user_who_is_both_seen_and_unseen_counts_once(small):
    study, fit = small
    study = dataclasses.replace(study, unseen=study.seen)
    about = {user: {"age": 20 + i} for i, user in enumerate(study.seen)}
    assert (
        read_directions([fit], dataclasses.replace(study, about_users=about), (3, 0))["known"][
            "users"
        ]
        == 12
    )


# ---- No choice is used twice


def test_the_few_shots_are_not_looked_at(small):
    study, fit = small
    changed = dataclasses.replace(
        study,
        train_unseen=[-X for X in study.train_unseen],
        texts=study.texts
        | {"train_unseen": [[("changed!", "text") for _ in X] for X in study.train_unseen]},
    )
    assert read_directions([fit], changed, (3, 0)) == read_directions([fit], study, (3, 0))


def test_a_test_pair_that_repeats_a_few_shot_is_not_counted(small):
    """Each few shot is asked again with its answers exchanged, and the first one as it was."""
    study, fit = small
    shots = study.texts["train_unseen"]
    again = [
        tested + [(rejected, chosen) for chosen, rejected in known] + known[:1]
        for tested, known in zip(study.texts["test_unseen"], shots)
    ]
    leaky = dataclasses.replace(
        study,
        test_unseen=[
            torch.cat([X, -few, few[:1]]) for X, few in zip(study.test_unseen, study.train_unseen)
        ],
        texts=study.texts | {"test_unseen": again},
        prompts={},
    )
    assert [mask.sum() for mask in new_pairs(leaky)] == [len(X) for X in study.test_unseen]
    part = read_attributes(fit, [], leaky)
    assert part.table == read_attributes(fit, [], study).table
    count = sum(len(known) + 1 for known in shots)
    assert part.notes[0].startswith(f"The attributes leave out {count:,} test pairs, because")

    unknown = dataclasses.replace(leaky, texts={"test_unseen": again})  # told by the features
    assert [mask.sum() for mask in new_pairs(unknown)] == [len(X) for X in study.test_unseen]


# ---- Examples


def plain_examples(fit, study, k):
    """(strength, user, preferred text) of the strongest contradiction of each prompt, by loops.

    Only pairs of users who weigh column k most.
    """
    V, W = fit.V.double(), fit.W_unseen.double()
    mean = V @ W.mean(0)
    pairs = [
        (float(x.double() @ V[:, k]), float(x.double() @ mean), prompt, user, texts)
        for X, prompts, user, user_texts in zip(
            study.test_unseen,
            study.prompts["test_unseen"],
            study.unseen,
            study.texts["test_unseen"],
        )
        for x, prompt, texts in zip(X, prompts, user_texts)
    ]
    spread, mean_spread = (np.mean([pair[side] ** 2 for pair in pairs]) ** 0.5 for side in (0, 1))
    strongest = {}
    heaviest = {user: w.tolist().index(max(w.tolist())) for user, w in zip(study.unseen, W)}
    for score, everybody, prompt, user, texts in pairs:
        if score * everybody < 0 and heaviest[user] == k:
            strength = min(abs(score) / spread, abs(everybody) / mean_spread)
            preferred = texts[0] if score > 0 else texts[1]
            if strength > strongest.get(prompt, (0,))[0]:
                strongest[prompt] = (strength, user, preferred)
    return sorted(strongest.values(), reverse=True)[:EXAMPLES]


def test_examples_are_contradictions_of_those_who_weigh_the_column_most_one_a_prompt(small):
    study, fit = small
    for k, column in enumerate(read_directions([fit], study, (3, 0))["columns"]):
        expected = plain_examples(fit, study, k)
        shown = column["examples"]
        assert len(expected) == EXAMPLES
        for example, (strength, user, preferred) in zip(shown, expected, strict=True):
            assert example["user"] == user
            assert preferred.startswith(example["preferred"].strip("… ")[:50])
            assert example["column_score"] > 0 > example["everybody_score"]
            scores = example["column_score"], -example["everybody_score"]
            assert min(scores) == pytest.approx(strength, rel=1e-4)
        assert len({example["prompt"] for example in shown}) == EXAMPLES


def test_no_two_texts_are_compared_at_two_columns(small):
    """Everybody is asked the same pairs."""
    study, fit = small
    same = dataclasses.replace(
        study,
        test_unseen=[study.test_unseen[0]] * 12,
        texts=study.texts | {"test_unseen": [study.texts["test_unseen"][0]] * 12},
        prompts={},
    )
    columns = read_directions([fit], same, (3, 0))["columns"]
    examples = [example for column in columns for example in column["examples"]]
    compared = [frozenset([example["preferred"], example["other"]]) for example in examples]
    assert len(compared) == len(set(compared)) > EXAMPLES
    strongest = max(plain_examples(fit, with_prompt_of_texts(same), k)[0] for k in range(3))
    first = max(
        (example for column in columns for example in column["examples"][:1]),
        key=lambda example: min(example["column_score"], -example["everybody_score"]),
    )
    assert strongest[2].startswith(first["preferred"].removesuffix(" …"))


def with_prompt_of_texts(study):
    """The study with a prompt for each pair of texts."""
    prompts = [[str(sorted(pair)) for pair in user] for user in study.texts["test_unseen"]]
    return dataclasses.replace(study, prompts={"test_unseen": prompts})


def test_a_column_that_nobody_weighs_most_has_no_examples(small):
    study, fit = small
    fit = dataclasses.replace(fit, W_unseen=fit.W_unseen * torch.tensor([1.0, 1.0, 0.0]))
    columns = read_directions([fit], study, (3, 0))["columns"]
    assert [len(column["examples"]) for column in columns] == [EXAMPLES, EXAMPLES, 0]


def test_an_example_says_whether_the_user_agrees_with_the_column(small):
    study, fit = small
    chosen = {
        user: {text for text, _ in pairs}
        for user, pairs in zip(study.unseen, study.texts["test_unseen"])
    }
    for column in read_directions([fit], study, (3, 0))["columns"]:
        for example in column["examples"]:
            agrees = any(
                text.startswith(example["preferred"].removesuffix(" …"))
                for text in chosen[example["user"]]
            )
            assert example["user_agrees"] == agrees


def test_long_texts_are_shown_from_where_they_differ():
    same = "word " * 100
    text, other = shorten(same + "then\n\nA" + "a" * 400, same + "then B")
    assert text.startswith("… ") and "then A" in text and text.endswith(" …")
    assert other.endswith("then B")
    assert len(text) < 310 and "\n" not in text
    assert shorten("short A", "short B") == ("short A", "short B")


def test_a_prompt_is_shown_if_it_is_a_text():
    assert prompt_text("What\nis it?") == "What is it?"
    messages = json.dumps([["user", "Hi"], ["assistant", "Yes?"], ["user", "A poem!"]])
    assert prompt_text(messages) == "A poem!"
    assert prompt_text(json.dumps([{"role": "user", "content": "A song!"}])) == "A song!"
    assert prompt_text(json.dumps([])) == "[]"
    assert prompt_text("[" * 100_000).startswith("[[[")
    assert prompt_text('{"question": "Why?"}') == '{"question": "Why?"}'
    assert prompt_text(7) is None


# ---- People, and the same column from other seeds


def test_who_weigh_a_column_most_and_how_well_they_are_served(small):
    study, fit = small
    W_unseen = torch.zeros(12, 3)
    W_unseen[:4, 1] = 1
    W_unseen[4:, 2] = 1
    fit = dataclasses.replace(fit, W_unseen=W_unseen)
    accuracies = fit.accuracies[UNSEEN_TEST]
    columns = [column["weigh_most"] for column in read_directions([fit], study, (3, 0))["columns"]]
    assert [column["unseen"] for column in columns] == [0, 4, 8]
    assert columns[0]["unseen_accuracy"] is None
    assert columns[1]["unseen_accuracy"] == pytest.approx(accuracies[:4].mean())
    assert sum(column["seen"] for column in columns) == 12
    seen = sum(column["seen"] * (column["seen_accuracy"] or 0) for column in columns)
    assert seen / 12 == pytest.approx(fit.accuracies[SEEN_TEST].mean())


def test_a_column_is_found_again_in_another_seed_whatever_all_columns_share(small):
    study, fit = small
    order = torch.tensor([2, 0, 1])
    shared = torch.randn(d, 1, generator=torch.Generator().manual_seed(9))
    same = dataclasses.replace(
        fit,
        V=fit.V[:, order] + 5 * shared,
        W_unseen=fit.W_unseen[:, order],
        seed=7,
        loss=1.0,  # so that the other one is kept
    )
    unlike = unrelated_fit(study, seed=5)
    columns = read_directions([fit, dataclasses.replace(same), unlike], study, (3, 0))["columns"]
    for k, column in enumerate(columns):
        again, other = column["found_again"]
        assert (again["seed"], again["column"]) == (7, order.tolist().index(k))
        assert again["correlation"] == pytest.approx(1, abs=1e-4)
        assert other["seed"] == 5 and other["correlation"] < 0.9


# ---- Planted tastes, and none


def test_planted_tastes_are_found_each_at_a_column_of_its_own(reading):
    strongest = [column["attributes"][0] for column in reading["columns"]]
    assert sorted(entry["attribute"] for entry in strongest) == sorted(TASTES)
    for entry in strongest:
        assert entry["p"] < 0.01 and entry["correlation"] > reading["attributes"]["threshold"]
        assert entry["share_of_its_users"] > entry["share_of_others"] + 0.15


def test_a_planted_length_taste_is_not_reported_as_sentences_alone(reading):
    groups = [names for names in found_attributes(reading) if "sentences" in names]
    assert groups and all("length" in names for names in groups)
    (text,) = [
        entry["text"]
        for column in reading["columns"]
        for entry in column["attributes"]
        if entry["attribute"] == "length" and entry["correlation"] > 0
    ]
    assert text.startswith("longer texts (and with it more sentences, more words)")


def test_the_columns_of_planted_tastes_are_found_again_in_the_other_seed(reading):
    for column in reading["columns"]:
        (again,) = column["found_again"]
        assert again["correlation"] > 0.8


def test_the_reading_is_of_the_kept_seed_and_is_json(reading, fits):
    kept = min((fit for fit in fits if fit.K == 3), key=lambda fit: fit.loss)
    assert (reading["K"], reading["alpha"], reading["seed"]) == (3, 0, kept.seed)
    assert json.loads(json.dumps(reading, allow_nan=False)) == reading
    assert reading["users"] == 40 and reading["pairs"] == 40 * PAIRS["test_unseen"]
    assert np.shape(reading["attributes"]["correlation"]) == (3, len(ATTRIBUTES))


def test_p_holds_for_the_columns_of_all_models_that_are_given(small):
    study, fit = small
    alone = read_directions([fit], study, (3, 0))["attributes"]
    other = dataclasses.replace(unrelated_fit(study, K=6, seed=8), K=6)
    together = read_directions([fit, other], study, (3, 0))["attributes"]
    assert together["correlation"] == alone["correlation"]
    assert together["threshold"] > alone["threshold"]
    assert (np.array(together["p"]) >= np.array(alone["p"])).all()


def test_without_tastes_attributes_are_seldom_found():
    study = made_study(2, users=20, has_tastes=False, is_uneven=True)
    shares = count_choices(study.texts["test_unseen"]).steady_shares()
    pairs = np.array(list(map(len, study.train_unseen)))
    found = [
        (associate(unrelated_fit(study, seed=seed).W_unseen.numpy(), shares, pairs).p < FOUND).any()
        for seed in range(40)
    ]
    assert sum(found) <= 4


# ---- Invariance


def test_the_order_of_users_and_of_columns_does_not_matter(small):
    study, fit = small
    users, columns = [5, 2, 11, 0, 8, 3, 10, 1, 7, 4, 9, 6], [2, 0, 1]
    reading = read_directions([fit], study, (3, 0))
    moved_study = dataclasses.replace(
        study,
        unseen=[study.unseen[i] for i in users],
        train_unseen=[study.train_unseen[i] for i in users],
        test_unseen=[study.test_unseen[i] for i in users],
        texts={part: [texts[i] for i in users] for part, texts in study.texts.items()},
        prompts={part: [prompts[i] for i in users] for part, prompts in study.prompts.items()},
    )
    moved_fit = dataclasses.replace(
        fit, V=fit.V[:, columns], W=fit.W[:, columns], W_unseen=fit.W_unseen[users][:, columns]
    )
    moved = read_directions([moved_fit], moved_study, (3, 0))
    correlation = np.array(reading["attributes"]["correlation"])[columns]
    np.testing.assert_allclose(moved["attributes"]["correlation"], correlation, atol=1e-9)
    p = np.array(reading["attributes"]["p"])[columns]
    np.testing.assert_allclose(moved["attributes"]["p"], p, atol=0.04)
    for k, column in zip(columns, moved["columns"]):
        shown = [example["preferred"] for example in reading["columns"][k]["examples"]]
        assert [example["preferred"] for example in column["examples"]] == shown


def test_the_length_of_the_basis_does_not_matter(small):
    study, fit = small
    longer = dataclasses.replace(fit, V=2 * fit.V)
    assert read_directions([longer], study, (3, 0)) == read_directions([fit], study, (3, 0))


# ---- What cannot be told


def test_few_people_cannot_be_told(small):
    study, fit = small
    few = dataclasses.replace(
        study,
        unseen=study.unseen[:5],
        train_unseen=study.train_unseen[:5],
        test_unseen=study.test_unseen[:5],
        texts={part: texts[:5] for part, texts in study.texts.items()},
        prompts={},
    )
    accuracies = {
        setting: values[:5] if "Un" in setting[:2] else values
        for setting, values in fit.accuracies.items()
    }
    fit = dataclasses.replace(fit, W_unseen=fit.W_unseen[:5], accuracies=accuracies)
    about = {"unseen 0": {"age": 20}, "unseen 1": {"age": 30}, "nobody": {"age": 40}}
    reading = read_directions([fit], dataclasses.replace(few, about_users=about), (3, 0))
    assert reading["attributes"] is None and reading["known"] is None
    assert reading["notes"] == [
        "5 unseen users cannot tell what weights go with: 6 are needed.",
        "2 users of whom something is known cannot tell what weights go with: 6 are needed.",
    ]
    assert reading["columns"][0]["text"].endswith("what it prefers could not be told.")
    assert any(column["examples"] for column in reading["columns"])


def test_without_texts_the_people_and_the_seeds_are_read_all_the_same(small):
    study, fit = small
    reading = read_directions([fit], dataclasses.replace(study, texts={}, prompts={}), (3, 0))
    assert reading["notes"] == [
        "The texts are not known, so there are no attributes and no examples."
    ]
    assert reading["attributes"] is None
    for column in reading["columns"]:
        assert column["examples"] == [] and column["attributes"] == []
    assert sum(column["weigh_most"]["unseen"] for column in reading["columns"]) == 12


def test_one_direction_for_everybody_has_nothing_to_compare(fits, study):
    for K in (0, 1):
        reading = read_directions(fits, study, (K, 0))
        assert reading["columns"] == []
        assert reading["notes"] == [
            "This model has one direction for everybody, so there is nothing to compare."
        ]


# ---- A row for each person


def test_the_table_has_a_row_for_each_person(small):
    study, fit = small
    about = {"seen 1": {"age": 33, "name": "<script>"}, "unseen 2": {"age": None}}
    table = weights_table([fit], dataclasses.replace(study, about_users=about), (3, 0))
    assert list(table) == [
        *("user", "seen", "weight_0", "weight_1", "weight_2"),
        *("pairs", "test_pairs", "accuracy", "about_age", "about_name"),
    ]
    assert table["user"].tolist() == study.seen + study.unseen
    assert table["seen"].tolist() == [True] * 12 + [False] * 12
    row = table.set_index("user").loc["unseen 2"]
    assert row[["weight_0", "weight_1", "weight_2"]].tolist() == pytest.approx(
        fit.W_unseen[2].tolist()
    )
    assert (row["pairs"], row["test_pairs"]) == (30, 50)
    assert row["accuracy"] == fit.accuracies[UNSEEN_TEST][2]
    assert table.set_index("user").loc["seen 1", ["about_age", "about_name"]].tolist() == [
        33,
        "<script>",
    ]
    assert table["about_age"].isna().sum() == 23


def test_the_table_has_no_further_columns_if_nothing_is_known_of_the_people(small):
    study, fit = small
    table = weights_table([fit], study, (3, 0))
    assert len(table) == 24 and list(table)[-1] == "accuracy"
