"""PersonalLLM: the rows with scored responses, the files of embeddings, the simulated users."""

import argparse
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import AllowInfNan, BeforeValidator, Field, StrictStr, create_model

import lore.scripts
from lore.checkpoint import PLAIN_FORMATS, is_plain_table
from lore.data_files import SPLIT_WORDS, print_unread, split_files
from lore.embedding_files import find_reward_head
from lore.files import atomic_write, load_tensors
from lore.normal_forms import prompt_key
from lore.rows import LocatedRow, as_conversation, hub_rows, parse_rows, read_rows
from lore.study import Study
from utils import (
    InputError,
    Pairs,
    best_and_worst,
    check_number,
    check_whole,
    count_of_share,
    generate_population,
    is_finite,
)

DATASET = "namkoong-lab/PersonalLLM"
SPLITS = ("train", "test")
FILES = ("train.safetensors", "test.safetensors")  # in the order of SPLITS
TEXTS_FILE = "texts.parquet"  # a row per prompt of both splits
FULL = {"train": 9402, "test": 1000}  # prompts of the full data set
RESPONSES = 8  # to each prompt
SCORERS = (  # reward models that have scored each response
    "gemma_2b",
    "gemma_7b",
    "mistral_raft",
    "llama3_sfairx",
    "oasst_deberta_v3",
    "beaver_7b",
    "oasst_pythia_7b",
    "oasst_pythia_1b",
    "mistral_ray",
    "mistral_weqweasdas",
)


# ---- Rows

RESPONSE_COLUMNS = tuple(f"response_{j}" for j in range(1, RESPONSES + 1))
TEXT_COLUMNS = ("prompt", *RESPONSE_COLUMNS)
SCORE_COLUMNS = tuple(f"{response}_{scorer}" for response in RESPONSE_COLUMNS for scorer in SCORERS)


def no_truth_value(score: Any) -> Any:
    """A score as it is. Raises ValueError: it is true or false, which Python takes for a number."""
    if isinstance(score, bool):
        raise ValueError("a score is a number")
    return score


Score = Annotated[  # within float32
    float, Field(ge=-3e38, le=3e38), AllowInfNan(False), BeforeValidator(no_truth_value)
]
Row = create_model(
    "Row",
    **dict.fromkeys(TEXT_COLUMNS, (StrictStr, ...)),
    **dict.fromkeys(SCORE_COLUMNS, (Score, ...)),
)


TextRow = create_model(
    "TextRow",
    split=(Literal[SPLITS], ...),
    **dict.fromkeys(TEXT_COLUMNS, (StrictStr, ...)),
)


@dataclass
class Prompts:
    """The prompts of a split, and their responses."""

    prompts: list[str]  # n
    responses: list[list[str]]  # n lists of eight


@dataclass
class ScoredPrompts(Prompts):
    """The prompts of a split, their responses, and the scores of these."""

    scores: torch.Tensor  # float32 (n, 8, 10), scorers in the order of SCORERS


def read_prompts(folder: Path | None = None) -> dict[str, Iterable[LocatedRow]]:
    """The rows of both splits, with their places: from a folder, or from the hub if it is None.

    Raises InputError: the hub does not serve them, a file is missing or damaged.
    """
    if folder is None:
        splits = hub_rows(DATASET, Row)
        return {split: splits[split] for split in SPLITS}
    test_words = SPLIT_WORDS["test"] + SPLIT_WORDS["validation"]
    files_of = split_files(folder, train=SPLIT_WORDS["train"], test=test_words)
    print_unread(folder, itertools.chain(*files_of.values()))
    return {
        split: itertools.chain.from_iterable(read_rows(path, Row) for path in files)
        for split, files in files_of.items()
    }


def parse(rows: Iterable[LocatedRow], limit: int | None = None) -> ScoredPrompts:
    """The first `limit` rows of a split. Raises InputError that names row and column."""
    prompts, responses, scores = [], [], []
    for _, row in itertools.islice(parse_rows(rows, Row, DATASET), limit):
        prompts.append(row.prompt)
        responses.append([getattr(row, name) for name in RESPONSE_COLUMNS])
        scores.append([getattr(row, name) for name in SCORE_COLUMNS])
    scores = torch.tensor(scores, dtype=torch.float32)  # (n, 80)
    return ScoredPrompts(prompts, responses, scores.reshape(-1, RESPONSES, len(SCORERS)))


def conversations_of(split: ScoredPrompts) -> list[list[dict]]:
    """One conversation per response: that of response j to prompt i at place 8 i + j."""
    return [
        as_conversation(prompt, response)
        for prompt, responses in zip(split.prompts, split.responses)
        for response in responses
    ]


# ---- The texts, beside the embeddings


def save_texts(path: Path, splits: dict[str, ScoredPrompts]) -> None:
    """Write the prompts and responses of both splits."""
    rows = [
        [name, prompt, *responses]
        for name, split in splits.items()
        for prompt, responses in zip(split.prompts, split.responses)
    ]
    with atomic_write(path) as file:
        pd.DataFrame(rows, columns=["split", *TEXT_COLUMNS]).to_parquet(file)


def read_texts(path: Path) -> dict[str, Prompts]:
    """What `save_texts` wrote; empty if there is no such file, as beside older embeddings.

    Raises InputError that names file and row, if it is damaged.
    """
    if not path.exists():
        return {}
    splits = {split: Prompts([], []) for split in SPLITS}
    for _, row in parse_rows(read_rows(path, TextRow), TextRow, "prepare.py"):
        splits[row.split].prompts.append(row.prompt)
        splits[row.split].responses.append([getattr(row, name) for name in RESPONSE_COLUMNS])
    return splits


# ---- Settings


@dataclass(frozen=True)
class Population:
    """How many users are simulated, and what each of them compares.

    A user is a mixture over the ten scorers, drawn from a Dirichlet distribution.
    """

    N: int  # seen users
    N_unseen: int
    concentration: float  # of the Dirichlet distribution
    # Shares of the train prompts that a seen user and that an unseen user compares, and the share
    # of the test prompts that both compare.
    fractions: tuple[float, float, float]
    population_seed: int  # of the users and of the prompts that each compares

    def check(self) -> None:
        """Raise InputError that names the field which cannot be used."""
        check_whole("N", self.N, 1)
        check_whole("N_unseen", self.N_unseen, 1)
        check_number("concentration", self.concentration, 1e-6, 1e6)
        check_whole("population_seed", self.population_seed)
        if not isinstance(self.fractions, (list, tuple, np.ndarray)) or len(self.fractions) != 3:
            raise InputError(
                f"fractions: {self.fractions!r}; give three, of a seen and of an unseen user's "
                "train prompts, and of the test prompts"
            )
        for fraction in self.fractions:
            check_number("fractions", fraction, 1e-9, 1)


def training_parser(description: str, folder: Path | str) -> argparse.ArgumentParser:
    """The command line of the scripts that train, with `--data` for `load_embeddings`."""
    parser = lore.scripts.training_parser(description, folder)
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="the data set, for embeddings of the released script, which hold no scores (default: "
        "the hub)",
    )
    return parser


# ---- The study


@dataclass(kw_only=True)
class SimulatedStudy(Study):
    """A study of simulated users, and what they were simulated from.

    If the texts are not known, `texts` is empty, and `prompts` has the numbers of the training
    pairs' prompts only, by which some can be held out.
    """

    population: Population
    mixtures: torch.Tensor  # float32 (N, 10), of the seen users over SCORERS
    mixtures_unseen: torch.Tensor  # float32 (N_unseen, 10)
    pairs_dropped: int  # as all responses to the prompt are tied


@dataclass
class ScoredEmbeddings:
    """A split of the files: the embeddings of the responses, and their scores."""

    embeddings: torch.Tensor  # (8 * prompts, d)
    scores: torch.Tensor  # float32 (prompts, 8, 10)
    texts: Prompts | None = None  # None: not known, as of embeddings of older versions


def load_embeddings(
    folder: Path | str,
    model_name: str,
    population: Population,
    demo_population: Population | None = None,
    data: Path | None = None,
) -> SimulatedStudy:
    """Read the embeddings of `prepare.py` (or of the released script), and simulate the users.

    model_name: the checkpoint whose reward head is read if there is none beside the embeddings.
    demo_population: taken in place of `population` if the embeddings are the demo's.
    data: the folder of the data set, for the scores of files that hold none, as the released ones;
    by default the hub.
    Raises InputError: a setting that cannot be used; what `read_embeddings` refuses; a reward head
    of another width; a user without pairs.
    """
    population.check()
    if demo_population is not None:
        demo_population.check()
    splits, widths = read_embeddings(folder, data)
    files = [*FILES]
    if (Path(folder) / TEXTS_FILE).exists():
        files.append(TEXTS_FILE)
    head, provenance = find_reward_head(folder, model_name, "PersonalLLM", widths, files)
    title = provenance.pop("title")
    if provenance.get("demo") and demo_population is not None:
        population = demo_population
    return simulate_study(splits, population, title, head, provenance)


def read_embeddings(
    folder: Path | str, data: Path | None = None
) -> tuple[dict[str, ScoredEmbeddings], dict[int, Path]]:
    """Read the files of both splits: split -> embeddings, scores and texts; and widths.

    data: of `load_embeddings`. widths: d -> a file with embeddings of that width.
    Raises InputError: a file is missing or damaged, has not eight rows for each prompt, or numbers
    that are not finite.
    """
    all_texts = read_texts(Path(folder) / TEXTS_FILE)
    splits, widths = {}, {}
    rows_of = None  # of the data set, read if scores are missing
    for split, name in zip(SPLITS, FILES):
        path = Path(folder) / name
        tensors, _ = load_tensors(path)
        embeddings = tensors.get("embeddings", torch.zeros(0))
        scores = tensors.get("scores")
        texts = all_texts.get(split)
        if scores is None:
            if rows_of is None:
                rows_of = read_prompts(data)
            texts = parse(rows_of[split])
            scores = texts.scores
        _check_split(path, embeddings, scores)
        if texts is not None and len(texts.prompts) != len(scores):
            raise InputError(
                f"{path}: {len(scores)} prompts, where {TEXTS_FILE} beside it has "
                f"{len(texts.prompts)}; run prepare.py --overwrite"
            )
        splits[split] = ScoredEmbeddings(embeddings, scores.float(), texts)
        widths.setdefault(embeddings.shape[1], path)
    return splits, widths


def _check_split(path: Path, embeddings: torch.Tensor, scores: torch.Tensor) -> None:
    """Raise InputError unless there are finite scores for finite embeddings."""
    are_tables = is_plain_table(embeddings) and scores.dtype in PLAIN_FORMATS.values()
    if not are_tables or scores.shape != (len(embeddings) / RESPONSES, RESPONSES, len(SCORERS)):
        raise InputError(
            f"{path}: embeddings of shape {tuple(embeddings.shape)} in {embeddings.dtype} and "
            f"scores of shape {tuple(scores.shape)} in {scores.dtype}, where each prompt has "
            f"{RESPONSES} responses with {len(SCORERS)} scores each; run prepare.py --overwrite"
        )
    if not is_finite(embeddings) or not is_finite(scores):
        raise InputError(f"{path}: NaN or infinite values; run prepare.py --overwrite")


def simulate_study(
    splits: dict[str, ScoredEmbeddings],
    population: Population,
    title: str,
    reward_head: torch.Tensor,
    provenance: dict,
) -> SimulatedStudy:
    """Draw the users of a population, and form their pairs.

    A user prefers the response that the mixture scores highest to the one that it scores lowest.
    Raises InputError: a fraction leaves no prompt; a user has no pairs, as all responses are tied.
    """
    seed = population.population_seed
    mixtures, mixtures_unseen = (
        torch.from_numpy(
            generate_population(population.concentration, users, [seed, stream])
        ).float()
        for stream, users in enumerate((population.N, population.N_unseen))
    )  # (N, 10), (N_unseen, 10)
    of_seen, of_unseen, of_tests = population.fractions
    generator = np.random.default_rng([seed, 2])
    features, dropped = {}, 0
    prompts, texts = {}, {}
    for part, split, users, fraction in (
        ("train", "train", mixtures, of_seen),
        ("test", "test", mixtures, of_tests),
        ("train_unseen", "train", mixtures_unseen, of_unseen),
        ("test_unseen", "test", mixtures_unseen, of_tests),
    ):
        features[part], tied = simulate_pairs(splits[split], users, fraction, generator, part)
        dropped += tied
        known = splits[split].texts
        if known is not None:
            prompts[part] = prompts_of_pairs(features[part], known.prompts)
            texts[part] = texts_of_pairs(features[part], list(itertools.chain(*known.responses)))
    if "train" not in prompts:
        prompts["train"] = [(pairs.chosen // RESPONSES).tolist() for pairs in features["train"]]
    return SimulatedStudy(
        title=title,
        seen=[f"seen_{i}" for i in range(population.N)],
        unseen=[f"unseen_{i}" for i in range(population.N_unseen)],
        **features,
        reward_head=reward_head,
        prompts=prompts,
        texts=texts,
        provenance=provenance,
        population=population,
        mixtures=mixtures,
        mixtures_unseen=mixtures_unseen,
        pairs_dropped=dropped,
    )


def prompts_of_pairs(users: list[Pairs], prompts: list[str]) -> list[list[str]]:
    """The `prompt_key` of each pair of each user; prompts: those of the split."""
    keys = [prompt_key(prompt) for prompt in prompts]
    return [[keys[i] for i in (pairs.chosen // RESPONSES).tolist()] for pairs in users]


def texts_of_pairs(users: list[Pairs], responses: list[str]) -> list[list[tuple[str, str]]]:
    """The chosen and the rejected response of each pair of each user.

    responses: those of the split, as the rows of its embeddings. Users share the tuples of equal
    pairs: there may be a million pairs, but each prompt has 56 at most.
    """
    count = len(responses)
    numbers = [(pairs.chosen * count + pairs.rejected).numpy() for pairs in users]
    distinct, places = np.unique(np.concatenate(numbers), return_inverse=True)
    texts = [(responses[number // count], responses[number % count]) for number in distinct]
    ends = np.cumsum([len(pairs) for pairs in users])
    return [[texts[i] for i in rows.tolist()] for rows in np.split(places, ends[:-1])]


def simulate_pairs(
    split: ScoredEmbeddings,
    mixtures: torch.Tensor,
    fraction: float,
    generator: np.random.Generator,
    label: str,
) -> tuple[list[Pairs], int]:
    """The pairs of `simulate_user` by row numbers, of each user on a random share of the prompts.

    mixtures: float32 `[users, 10]`. label: of the users, for errors.
    Returns the pairs of each user, and how many were dropped because all responses are tied.
    Raises InputError: the fraction leaves no prompt; a user has no pairs.
    """
    embeddings, scores = split.embeddings, split.scores
    prompts = count_of_share(len(scores), fraction, label)
    users = []
    for i, mixture in enumerate(mixtures):
        drawn = generator.choice(len(scores), prompts, replace=False)
        drawn = torch.from_numpy(np.sort(drawn))
        best, worst = best_and_worst(scores[drawn], mixture)
        differ = best != worst
        if not differ.any():
            raise InputError(
                f"{label}, user {i}: all responses to the {prompts} prompts drawn are tied; take "
                "more prompts, or other scores"
            )
        first_row = RESPONSES * drawn
        users.append(Pairs(embeddings, (first_row + best)[differ], (first_row + worst)[differ]))
    return users, prompts * len(users) - sum(len(pairs) for pairs in users)
