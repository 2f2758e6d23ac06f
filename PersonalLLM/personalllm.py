"""PersonalLLM: where the scored responses are from, what the embeddings files hold, how users are simulated."""

import itertools
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import AllowInfNan, Field, StrictStr, create_model

from lore.embedding_files import find_reward_head
from lore.files import load_tensors
from lore.rows import hub_rows, parse_rows, read_rows, split_files
from lore.scripts import script_parser
from utils import (
    InputError,
    Pairs,
    best_and_worst,
    check_settings,
    generate_population,
    is_finite,
    count_of_share,
)

DATASET = "namkoong-lab/PersonalLLM"
FILES = ("train.safetensors", "test.safetensors")
FULL = {"train": 9402, "test": 1000}  # prompts of the full data set
RESPONSES = 8  # to each prompt
SCORERS = (
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
)  # reward models that have scored each response
TEXTS = ("prompt", *(f"response_{j}" for j in range(1, RESPONSES + 1)))
SCORES = tuple(f"{response}_{scorer}" for response in TEXTS[1:] for scorer in SCORERS)
Score = Annotated[float, Field(ge=-3e38, le=3e38), AllowInfNan(False)]  # within float32
Row = create_model(
    "Row", **{name: (StrictStr, ...) for name in TEXTS}, **{name: (Score, ...) for name in SCORES}
)


def read_prompts(folder=None):
    """The rows of both splits, (where, row) pairs: from a folder, or from the hub where it is None."""
    if folder is None:
        splits = hub_rows(DATASET)
        return {split: splits[split] for split in FULL}
    files = split_files(folder, train=["train"], test=["test", "validation"])
    return {
        split: (row for path in paths for row in read_rows(path)) for split, paths in files.items()
    }


def parse(rows, limit=None):
    """The first `limit` rows of a split -> (prompts, a list of n texts; responses, n lists of eight texts; scores,
    float32 `[n, 8, 10]`, in the order of SCORERS). Raises InputError that names row and column."""
    texts, scores = [], []
    for _, row in itertools.islice(parse_rows(rows, Row, DATASET), limit):
        texts.append([getattr(row, name) for name in TEXTS])
        scores.append([getattr(row, name) for name in SCORES])
    scores = torch.tensor(scores, dtype=torch.float32).reshape(-1, RESPONSES, len(SCORERS))
    return [prompt for prompt, *_ in texts], [responses for _, *responses in texts], scores


def conversations_of(prompts, responses):
    """One conversation per response, response j of prompt i at place 8 i + j."""
    return [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        for prompt, of_prompt in zip(prompts, responses)
        for response in of_prompt
    ]


def check_population(population):
    """Check what a script's `population` gives. Raises InputError that names the setting."""
    check_settings(**population)
    if len(population["fractions"]) != 3:
        raise InputError(
            f"fractions: {population['fractions']!r}; give three, of a seen and of an unseen user's train "
            "prompts, and of the test prompts"
        )


def scripts_parser(description, folder):
    """The command line of the scripts that train: `--dir`, and `--data` for `load_embeddings`."""
    parser = script_parser(description, folder)
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="the data set, for embeddings of the released script, "
        "which hold no scores (default: the hub)",
    )
    return parser


def load_embeddings(folder, model_name, data=None):
    """Read the embeddings of prepare.py (or of the released script) and the reward head.

    data: the folder of the data set, for the scores of files that hold none, as the released ones; default the hub.
    Returns ({"train": (embeddings `[8 * prompts, d]`, scores `[prompts, 8, 10]`), "test": the same}, head `[d, 1]`,
    what is known of model and data). Raises InputError: missing or damaged files, another number of rows than 8 a
    prompt, numbers that are not finite, different widths.
    """
    tables, width, rows = {}, {}, None
    for path, split in zip((Path(folder) / name for name in FILES), FULL):
        tensors, _ = load_tensors(path)
        embeddings, scores = tensors.get("embeddings", torch.zeros(0)), tensors.get("scores")
        if scores is None:
            rows = rows or read_prompts(data)
            scores = parse(rows[split])[2]
        if embeddings.ndim != 2 or scores.shape != (
            len(embeddings) / RESPONSES,
            RESPONSES,
            len(SCORERS),
        ):
            raise InputError(
                f"{path}: embeddings of shape {tuple(embeddings.shape)} and scores of shape "
                f"{tuple(scores.shape)}, where each prompt has {RESPONSES} responses with {len(SCORERS)} "
                "scores each; run prepare.py --overwrite"
            )
        if not is_finite(embeddings) or not is_finite(scores):
            raise InputError(f"{path}: NaN or infinite values; run prepare.py --overwrite")
        width.setdefault(embeddings.shape[1], path)
        tables[split] = embeddings, scores.float()
    head, about = find_reward_head(folder, model_name, "PersonalLLM", width, FILES)
    return tables, head, about


def simulate_pairs(embeddings, scores, W, fraction, chance, what):
    """The pairs of `simulate_user` by row numbers, for every row of W and a random `fraction` of the prompts.

    embeddings: `[8 * prompts, d]`; scores: `[prompts, 8, 10]`; W: `[N, 10]`; chance: numpy's generator; what: names
    the users in errors. Returns (list of N `Pairs`, how many pairs were dropped because all responses to a prompt are
    tied). Raises InputError where a user is left without pairs.
    """
    kept, users = count_of_share(len(scores), fraction, what), []
    for i, w in enumerate(W):
        drawn = torch.from_numpy(np.sort(chance.choice(len(scores), kept, replace=False)))
        best, worst = best_and_worst(scores[drawn], w)
        differ = best != worst
        if not differ.any():
            raise InputError(
                f"{what}, user {i}: all responses to the {kept} prompts drawn are tied; take more "
                "prompts, or other scores"
            )
        users.append(
            Pairs(
                embeddings, (RESPONSES * drawn + best)[differ], (RESPONSES * drawn + worst)[differ]
            )
        )
    return users, kept * len(users) - sum(map(len, users))


def create_dataset(tables, N, N_unseen, concentration, fractions, seed=0):
    """Simulate the users: Dirichlet mixtures over the scorers, and their pairs as `Pairs`.

    tables: of `load_embeddings`. fractions: the shares of the train prompts that a seen and an unseen user compare, and
    the share of the test prompts of both.
    Returns a dict: `seen` and `unseen`, names of users; `population` `[N, 10]` and `population_unseen` `[N_unseen,
    10]`, their mixtures, float32; a list of Pairs under each of `train`, `test`, `train_unseen`, `test_unseen`;
    `prompts`, the numbers of the training pairs' prompts, by which some can be held out: the files hold no texts, so
    that whether a test prompt stands among them, and which answer is longer, are not known; and `dropped`, how many
    pairs were left out because all responses are tied.
    """
    data = {
        "seen": [f"seen_{i}" for i in range(N)],
        "unseen": [f"unseen_{i}" for i in range(N_unseen)],
        "dropped": 0,
    }
    for of, users, stream in (("", N, 0), ("_unseen", N_unseen, 1)):
        data[f"population{of}"] = torch.from_numpy(
            generate_population(concentration, users, [seed, stream])
        ).float()
    chance = np.random.default_rng([seed, 2])
    for part, split, of, fraction in (
        ("train", "train", "", fractions[0]),
        ("test", "test", "", fractions[2]),
        ("train_unseen", "train", "_unseen", fractions[1]),
        ("test_unseen", "test", "_unseen", fractions[2]),
    ):
        data[part], dropped = simulate_pairs(
            *tables[split], data[f"population{of}"], fraction, chance, part
        )
        data["dropped"] += dropped
    data["prompts"] = {"train": [(pairs.chosen // RESPONSES).tolist() for pairs in data["train"]]}
    return data
