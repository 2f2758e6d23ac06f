"""How long the reading takes, whether it finds planted tastes, and how often it finds something if
nobody has tastes.

    python tests/benchmarks/bench_reading.py        some six minutes on one core

First the seconds at the size of the full Reddit TL;DR and of PRISM, on synthetic texts.

Then made data sets with planted tastes for length, exclamations and digits: in how many each is
named, and in how many sentences or words are named without the length.

Then data sets without tastes: all people choose by the same mixture of these three attributes.
Models of rank 2, 3 and 5 are trained, and the one with the largest personal part is read, as in a
run. More than 5 of 100 with a finding, at any column and attribute, would be a fault. So with
people who have from 2 to 125 pairs, and with test pairs that repeat the few shots. "Unguarded" is
the same reading without what keeps these from looking like tastes.

Measured: 7 and 9 s; 40, 39 and 40 of 40 data sets, sentences without the length in none; something
is found in 0, 4 and 2 of 100 data sets without tastes, unguarded in 8 and 9 of the last two.
"""

import dataclasses
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]
from test_reading import TASTES, made_study, made_text, swept, unrelated_fit

import lore.reading
from lore.controls import exchanged_accuracies
from lore.reading import associate, read_directions
from lore.study import PARTS, Study
from utils import Fit, fits_per_model

data_sets = 100  # of each kind without tastes
tasted_data_sets = 40
K_list = [2, 3, 5]
seeds = [0, 1, 2]
planted_rank = 3
d = 512  # of the embeddings, when seconds are measured
QUESTIONS = 12  # that everybody has answered, when seconds are measured


@dataclasses.dataclass
class Size:
    """How large a data set is."""

    name: str
    users: int  # half of them unseen
    few_shots: int  # of each user
    test_pairs: int  # of all unseen users
    words: int  # of a text
    ranks: list[int]
    seeds: list[int]


SIZES = [
    Size("Reddit TL;DR", 76, 50, 83_802, 10, [2, 3, 4, 5, 6], [0, 1, 2]),
    Size("PRISM", 1_288, 8, 19_727, 200, [5, 10, 15, 20, 25, 50], [0]),
]


def named_by_the_verdict(fits: list[Fit], study: Study) -> tuple[int, float]:
    """The model that a verdict without validation would be about."""
    parts = {
        model: exchanged_accuracies(study.test_unseen, fits_of_model).personal_part.mean()
        for model, fits_of_model in fits_per_model(fits).items()
    }
    return max(parts, key=parts.get)


def finds_anything(fits: list[Fit], study: Study, model: tuple[int, float]) -> bool:
    reading = read_directions(fits, study, model)
    return any(column["attributes"] for column in reading["columns"])


def asked_again(study: Study) -> Study:
    """The few shots of the unseen users are test pairs too."""
    features = [torch.cat(pair) for pair in zip(study.test_unseen, study.train_unseen)]
    texts = [
        tested + shots
        for tested, shots in zip(study.texts["test_unseen"], study.texts["train_unseen"])
    ]
    return dataclasses.replace(
        study, test_unseen=features, texts=study.texts | {"test_unseen": texts}
    )


def associate_with_anybody(
    weights: np.ndarray, quantities: np.ndarray, pairs: np.ndarray
) -> lore.reading.Association:
    """`associate`, but people are exchanged with anybody, however many pairs they have."""
    return associate(weights, quantities, np.ones_like(pairs))


def all_pairs_are_new(study: Study) -> list[np.ndarray]:
    return [np.ones(len(X), bool) for X in study.test_unseen]


def report_no_tastes(
    name: str, make_study: Callable[[int], Study], unguarded: dict[str, Any] | None = None
) -> None:
    """Count the data sets without tastes in which anything is found.

    unguarded: names of lore.reading to replace, for a second reading.
    """
    start = time.perf_counter()
    found = found_unguarded = 0
    for seed in range(data_sets):
        study = make_study(seed)
        fits = swept(study, K_list, seeds)
        model = named_by_the_verdict(fits, study)
        found += finds_anything(fits, study, model)
        if unguarded:
            with mock.patch.multiple(lore.reading, **unguarded):
                found_unguarded += finds_anything(fits, study, model)
    line = f"no tastes, {name}: something is found in {found} of {data_sets} data sets"
    if unguarded:
        line += f" (unguarded in {found_unguarded})"
    print(f"{line}; {time.perf_counter() - start:.0f} s", flush=True)


def report_tastes() -> None:
    """Count the data sets in which each planted taste is named, as more of its attribute."""
    start = time.perf_counter()
    named = dict.fromkeys(TASTES, 0)
    first = dict.fromkeys(TASTES, 0)
    sentences_alone = 0
    for seed in range(tasted_data_sets):
        study = made_study(1000 + seed)
        fits = swept(study, [planted_rank], seeds)
        reading = read_directions(fits, study, (planted_rank, 0))
        groups = [
            [entry, *entry["with"]]
            for column in reading["columns"]
            for entry in column["attributes"]
        ]
        for taste in TASTES:
            more = [
                [entry["attribute"] == taste and entry["correlation"] > 0 for entry in group]
                for group in groups
            ]
            named[taste] += any(map(any, more))
            first[taste] += any(group[0] for group in more)
        names = [{entry["attribute"] for entry in group} for group in groups]
        sentences_alone += any(
            group & {"sentences", "words"} and "length" not in group for group in names
        )
    counts = ", ".join(
        f"{taste} named in {named[taste]}, first of a finding in {first[taste]}" for taste in TASTES
    )
    print(
        f"planted tastes, {tasted_data_sets} data sets of 40 unseen users, K = {planted_rank}: "
        f"{counts}; sentences or words without the length in {sentences_alone}; "
        f"{time.perf_counter() - start:.0f} s",
        flush=True,
    )


def synthetic_study(size: Size) -> Study:
    """A study of this size whose texts, features, choices and answers are all drawn by chance."""
    chance = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    users = size.users // 2
    pairs = {
        "train": [2] * users,
        "test": [2] * users,
        "train_unseen": [size.few_shots] * users,
        "test_unseen": [len(part) for part in np.array_split(range(size.test_pairs), users)],
    }

    def text() -> str:
        words = 0
        sentences = []
        while words < size.words:
            sentences.append(made_text(chance))
            words += sentences[-1].count(" ") + 1
        return " ".join(sentences)

    texts = {
        part: [[(text(), text()) for _ in range(count)] for count in pairs[part]]
        for part in ("train_unseen", "test_unseen")
    }
    everybody = [f"{group} {i}" for group in ("seen", "unseen") for i in range(users)]
    about_users = {
        user: {f"question {i}": f"answer {chance.randrange(5)}" for i in range(QUESTIONS)}
        for user in everybody
    }
    prompts = [[chance.randrange(2000) for _ in range(count)] for count in pairs["test_unseen"]]
    return Study(
        title=size.name,
        seen=everybody[:users],
        unseen=everybody[users:],
        reward_head=torch.ones(d, 1),
        texts=texts,
        prompts={"test_unseen": prompts},
        about_users=about_users,
        **{part: [torch.randn(m, d, generator=generator) for m in pairs[part]] for part in PARTS},
    )


def report_seconds(size: Size) -> None:
    study = synthetic_study(size)
    fits: list[Fit] = []
    for K in size.ranks:
        fits += [unrelated_fit(study, K, seed) for seed in size.seeds]
    start = time.process_time()
    reading = read_directions(fits, study, (size.ranks[-1], 0))
    seconds = time.process_time() - start
    characters = np.mean([len(text) for text, _ in study.texts["test_unseen"][0]])
    print(
        f"{size.name}: {reading['users']} unseen users, {reading['pairs']:,} test pairs of texts "
        f"of {characters:.0f} characters, K = {size.ranks}, {len(size.seeds)} seeds, d = {d}: "
        f"{seconds:.1f} s of one core",
        flush=True,
    )


def main() -> None:
    torch.set_num_threads(1)
    for size in SIZES:
        report_seconds(size)
    report_tastes()
    report_no_tastes("equally many pairs", lambda seed: made_study(seed, has_tastes=False))
    report_no_tastes(
        "2 to 125 pairs",
        lambda seed: made_study(seed, has_tastes=False, is_uneven=True),
        {"associate": associate_with_anybody, "TYPICAL_PAIRS": 1e-9},
    )
    report_no_tastes(
        "few shots asked again",
        lambda seed: asked_again(made_study(seed, has_tastes=False)),
        {"new_pairs": all_pairs_are_new},
    )


if __name__ == "__main__":
    main()
