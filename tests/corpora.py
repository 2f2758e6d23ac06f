"""Composes the synthetic data in demo/ of RedditTLDR, PRISM, PersonalLLM and OwnData.

    python tests/corpora.py           writes them, byte for byte as they are committed

    write_tldr_corpus(folder)         comparisons as in openai/summarize_from_feedback
    write_prism_corpus(folder)        conversations as in HannahRoseKirk/prism-alignment
    write_rewardbench_corpus(folder)  questions as in allenai/reward-bench-2
    write_personalllm_corpus(folder)  prompts with scored responses as in namkoong-lab/PersonalLLM
    write_own_corpus(folder)          comparisons in conversations, as anybody may have them

A text is made from the material in corpus_material.py. It has a style: a side, +1 or -1, of each of
three attributes (detail, warmth, verdict). A user has a taste: a mixture of PLANTED_RANK directions
over these attributes, the rows of TASTES. The directions pull against each other, so one reward for
all users fails many of them, and LoRe with K = PLANTED_RANK can serve each.

A style is words and nothing else, because the stand-in model's last state is near a mean over the
words. Material and tastes were chosen so that a demo of seconds shows the effect.
"""

import gzip
import itertools
import json
import string
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from corpus_material import (
    ARTICLES,
    CLOSERS,
    FACTS,
    FOLLOW_UPS,
    OPENERS,
    PEOPLE,
    PLACES,
    QUESTIONS,
    REPLY_STYLES,
    SITUATIONS,
    STYLES,
    TIES,
)

Style = tuple[int, ...]  # a side, +1 or -1, of each attribute

# ---- Styles and tastes

ALL_STYLES = list(itertools.product([1, -1], repeat=len(STYLES)))
PLANTED_RANK = 3
TASTES = np.array(
    [[1.0, -0.6, 0.0], [0.0, 1.0, -0.6], [-0.6, 0.0, 1.0]]
)  # (PLANTED_RANK, attributes)
CLEAR = 1.0  # a user is asked about two texts only if the taste for them differs by this much
NOISE = 0.01  # the share of choices that go against the user's taste


def tell(rng: Random, material: dict[str, Any], style: Style) -> list[str]:
    """A sentence for each attribute of STYLES or REPLY_STYLES, on the side that `style` has."""
    sentences = []
    for sides, side in zip(material.values(), style):
        beginnings, ends = sides[side]
        sentences.append(f"{rng.choice(beginnings)} {rng.choice(ends)}")
    return sentences


def plant_tastes(rng: Random, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Give each user a mixture over the rows of TASTES, float64 `[3]`; one row has 0.8 or more.

    names: in the order in which the pipeline sorts them. Each third of them has the same direction.
    This is not left to chance, because the pipeline splits users with a fixed seed, and seen and
    unseen users must both have every direction.
    """
    mixtures = {}
    for i, name in enumerate(names):
        direction = i * PLANTED_RANK // len(names)
        rest = np.array([rng.uniform(0, 0.2 / PLANTED_RANK) for _ in range(PLANTED_RANK)])
        mixtures[name] = rest + (1 - rest.sum()) * np.eye(PLANTED_RANK)[direction]
    return mixtures


def draw_comparison(rng: Random, mixture: np.ndarray) -> tuple[Style, Style, float]:
    """Draw two styles that differ clearly for a user's taste -> (first, second, preference).

    preference: positive if the user chooses the second. In a share NOISE of the draws its sign is
    wrong.
    """
    while True:
        first, second = rng.sample(ALL_STYLES, 2)
        preference = float(mixture @ TASTES @ np.subtract(second, first))
        if abs(preference) >= CLEAR:
            break
    if rng.random() < NOISE:
        preference = -preference
    return first, second, preference


def draw_choice(rng: Random, mixture: np.ndarray, count: int) -> tuple[list[Style], int]:
    """Draw `count` styles, one of which a user clearly prefers -> (styles, number of the chosen).

    In a share NOISE of the draws the user chooses another one.
    """
    while True:
        styles = rng.sample(ALL_STYLES, count)
        values = [float(mixture @ TASTES @ np.array(style)) for style in styles]
        second_best, best = sorted(values)[-2:]
        if best - second_best >= CLEAR:
            break
    chosen = values.index(best)
    if rng.random() < NOISE:
        chosen = (chosen + 1) % count
    return styles, chosen


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """Write rows as gzipped JSON lines; equal rows give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    # gzip would write the file's name and the time, so it gets neither.
    with open(path, "wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
        packed.write(lines.encode())


# ---- Reddit TL;DR

TLDR_WORKERS = 30
TLDR_PAIRS = {"train": (14, 18), "validation": (8, 12)}  # fewest and most comparisons of a worker
TLDR_TRAIN_SITUATIONS = 20  # the others are for validation, so its prompts are unseen
SMALL_WORKERS = (2, 3)  # comparisons of two further workers, whom the pipeline leaves out
POSTS_OF_A_SITUATION = 2


def compose_posts(rng: Random, situations: Sequence[tuple[str, ...]]) -> list[dict[str, Any]]:
    """Write posts, and a summary of each in every style.

    Each is a dict: `title`, `post`, `subreddit`, and `summaries`, a dict from style to text.
    """
    posts = []
    for subreddit, title, story, gist in situations:
        for who, he, him, his in rng.sample(PEOPLE, POSTS_OF_A_SITUATION):
            slots = {
                "who": who,
                "Who": who.capitalize(),
                "he": he,
                "He": he.capitalize(),
                "him": him,
                "his": his,
                "age": rng.randint(19, 49),
                "count": rng.randint(3, 19),
                "days": rng.randint(2, 29),
                "time": f"{rng.randint(2, 9)} {rng.choice(['months', 'years'])}",
            }
            sentences = [rng.choice(OPENERS), story, rng.choice(FACTS), rng.choice(CLOSERS)]
            summaries = {}
            for style in ALL_STYLES:
                summary = " ".join([gist, *tell(rng, STYLES, style)])
                summaries[style] = summary.format(**slots)
            posts.append(
                {
                    "title": title.format(**slots),
                    "post": " ".join(sentences).format(**slots),
                    "subreddit": subreddit,
                    "summaries": summaries,
                }
            )
    return posts


def tldr_row(
    summaries: Sequence[str],
    choice: int,
    worker: str,
    split: str,
    confidence: int | None = None,
    **info: str,
) -> dict[str, Any]:
    """One comparison with every column of the hub's rows. Columns of `info` not given are null."""
    columns = dict.fromkeys(("id", "post", "title", "subreddit", "site", "article"))
    return {
        "info": {**columns, **info},
        "summaries": [{"text": text, "policy": "written", "note": None} for text in summaries],
        "choice": choice,
        "worker": worker,
        "batch": "demo",
        "split": split,
        "extra": {"confidence": confidence},
    }


def worker_rows(
    rng: Random,
    split: str,
    posts: Sequence[dict[str, Any]],
    worker: str,
    count: int,
    mixture: np.ndarray,
) -> list[dict[str, Any]]:
    """The comparisons of one worker, about `count` different posts."""
    rows = []
    for number in rng.sample(range(len(posts)), count):
        post = posts[number]
        first, second, preference = draw_comparison(rng, mixture)
        confidence = round(5 + preference) if split == "validation" else None
        rows.append(
            tldr_row(
                [post["summaries"][first], post["summaries"][second]],
                int(preference > 0),
                worker,
                split,
                confidence,
                id=f"{split}_{number:02}",
                post=post["post"],
                title=post["title"],
                subreddit=post["subreddit"],
            )
        )
    return rows


def article_rows(rng: Random, workers: Sequence[str]) -> list[dict[str, Any]]:
    """Two comparisons about each news article, which have no post."""
    rows = []
    for number, (article, *summaries) in enumerate(ARTICLES):
        for worker in rng.sample(workers, 2):
            rows.append(
                tldr_row(
                    summaries,
                    rng.randint(0, 1),
                    worker,
                    "validation",
                    5,
                    id=f"article_{number}",
                    site="cnn",
                    article=article,
                )
            )
    return rows


def write_tldr_corpus(folder: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """Write `train.jsonl.gz` and `validation.jsonl.gz`: about 800 comparisons by 32 workers.

    Both files have the same workers and different posts. A worker sees a post at most once.
    Returns the planted tastes: worker -> mixture, float64 `[3]`.
    """
    rng = Random(seed)
    names = sorted(
        "".join(rng.choices(string.ascii_lowercase, k=10))
        for _ in range(TLDR_WORKERS + len(SMALL_WORKERS))
    )
    mixtures = plant_tastes(rng, names[:TLDR_WORKERS])
    mixtures |= plant_tastes(rng, names[TLDR_WORKERS:])
    situations = {
        "train": SITUATIONS[:TLDR_TRAIN_SITUATIONS],
        "validation": SITUATIONS[TLDR_TRAIN_SITUATIONS:],
    }
    for split in situations:
        posts = compose_posts(rng, situations[split])
        counts = [rng.randint(*TLDR_PAIRS[split]) for _ in range(TLDR_WORKERS)]
        counts += SMALL_WORKERS
        rows = []
        for worker, count in zip(names, counts, strict=True):
            rows += worker_rows(rng, split, posts, worker, count, mixtures[worker])
        if split == "validation":
            rows += article_rows(rng, names)
        rng.shuffle(rows)
        write_rows(Path(folder) / f"{split}.jsonl.gz", rows)
    return mixtures


# ---- PRISM

PRISM_USERS = 42
PRISM_CONVERSATIONS = 6  # of a user; half of them are for training
# Users with fewer conversations, whom the pipeline leaves out. The last only did the survey.
PRISM_FEWER = {"user7": 5, "user18": 3, "user25": 0}
PRISM_MODELS = ["written-a", "written-b", "written-c", "written-d"]
PRISM_RATINGS = (
    "values",
    "fluency",
    "factuality",
    "safety",
    "diversity",
    "creativity",
    "helpfulness",
)
QUESTION_TYPES = sorted({question[0] for question in QUESTIONS})


def questions_of_type(question_type: str) -> list[tuple[str, str, str]]:
    """The questions of one of QUESTION_TYPES."""
    return [question for question in QUESTIONS if question[0] == question_type]


def draw_slots(rng: Random) -> dict[str, Any]:
    """What is filled into a question."""
    return {"place": rng.choice(PLACES), "years": rng.randint(4, 19)}


def compose_reply(rng: Random, gist: str, style: Style, slots: dict[str, Any]) -> str:
    """A reply in the given style."""
    reply = " ".join([gist, *tell(rng, REPLY_STYLES, style)])
    return reply.format(**slots, count=rng.randint(3, 19), days=rng.randint(2, 29))


def prism_user_message(turn: int, content: str) -> dict[str, Any]:
    """A user's message, with every column of the hub's messages."""
    return {
        "turn": turn,
        "role": "user",
        "content": content,
        "model_name": None,
        "model_provider": None,
        "score": None,
        "if_chosen": None,
        "within_turn_id": None,
    }


def prism_conversation(
    rng: Random, number: int, user: str, question: tuple[str, str, str], mixture: np.ndarray
) -> dict[str, Any]:
    """One row of conversations.jsonl, of two or three turns.

    Two to four models reply to the first message. The model that was chosen replies twice to each
    later message.
    """
    question_type, opening, gist = question
    slots = draw_slots(rng)
    later = rng.sample(FOLLOW_UPS, rng.randint(1, 2))
    messages = [(opening.format(**slots), gist), *later]
    history = []
    winner = None
    for turn, (message, gist) in enumerate(messages):
        history.append(prism_user_message(turn, message))
        if turn == 0:
            styles, chosen = draw_choice(rng, mixture, rng.randint(2, 4))
            models = rng.sample(PRISM_MODELS, len(styles))
            winner = models[chosen]
        else:
            styles, chosen = draw_choice(rng, mixture, 2)
            models = [winner] * 2
        for place, (style, model) in enumerate(zip(styles, models)):
            reply = compose_reply(rng, gist, style, slots)
            score = rng.randint(60, 100) if place == chosen else rng.randint(1, 59)
            history.append(
                {
                    "turn": turn,
                    "role": "model",
                    "content": reply,
                    "model_name": model,
                    "model_provider": "written",
                    "score": score,
                    "if_chosen": place == chosen,
                    "within_turn_id": place,
                }
            )
    return {
        "conversation_id": f"c{number}",
        "user_id": user,
        "conversation_type": question_type,
        "opening_prompt": messages[0][0],
        "conversation_turns": len(messages),
        "conversation_history": history,
        "performance_attributes": {name: rng.randint(1, 100) for name in PRISM_RATINGS},
        "choice_attributes": {name: rng.randint(1, 100) for name in PRISM_RATINGS},
        "open_feedback": "",
        "generated_datetime": f"2023-11-{1 + number % 28:02} 12:00:00",
        "timing_duration_s": rng.randint(200, 900),
        "included_in_balanced_subset": True,
    }


def prism_survey_row(rng: Random, user: str, conversations: int) -> dict[str, Any]:
    """One row of survey.jsonl."""
    return {
        "user_id": user,
        "survey_only": conversations == 0,
        "num_completed_conversations": conversations,
        "consent": "Yes, I consent to take part",
        "consent_age": "Yes, I am 18 or older",
        "lm_familiarity": rng.choice(["Somewhat familiar", "Very familiar", "Not familiar at all"]),
        "self_description": "",
        "system_string": "",
        "age": rng.choice(["18-24 years old", "25-34 years old"]),
        "gender": rng.choice(["Female", "Male", "Non-binary / third gender"]),
        "location": {
            "birth_country": "Portugal",
            "reside_country": "Portugal",
            "same_birth_reside_country": "Yes",
        },
        "generated_datetime": "2023-11-01 12:00:00",
    }


def write_prism_corpus(folder: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """Write `survey.jsonl.gz` and `conversations.jsonl.gz` to `folder`: 42 users.

    Most users have six conversations, two of each type.
    Returns the planted tastes: user -> mixture, float64 `[3]`.
    """
    rng = Random(seed)
    users = [f"user{i}" for i in range(PRISM_USERS)]
    mixtures = plant_tastes(rng, users)
    survey = []
    conversations = []
    for user in users:
        questions = []
        for question_type in QUESTION_TYPES:
            count = PRISM_CONVERSATIONS // len(QUESTION_TYPES)
            questions += rng.sample(questions_of_type(question_type), count)
        rng.shuffle(questions)
        questions = questions[: PRISM_FEWER.get(user, PRISM_CONVERSATIONS)]
        survey.append(prism_survey_row(rng, user, len(questions)))
        for question in questions:
            number = len(conversations)
            conversations.append(prism_conversation(rng, number, user, question, mixtures[user]))
    write_rows(Path(folder) / "survey.jsonl.gz", survey)
    write_rows(Path(folder) / "conversations.jsonl.gz", conversations)
    return mixtures


# ---- RewardBench 2

BENCHMARK_ROWS = 6  # of each subset except Ties
BENCHMARK_SUBSETS = ("Factuality", "Precise IF", "Math", "Safety", "Focus")
BENCHMARK_CHOSEN = (1, 1, 1)
BENCHMARK_REJECTED = [(-1, 1, -1), (1, -1, -1), (-1, -1, 1)]


def benchmark_row(
    row_id: str, subset: str, prompt: str, chosen: list[str], rejected: list[str]
) -> dict[str, Any]:
    """One question, with every column of the hub's rows."""
    completions = len(chosen) + len(rejected)
    return {
        "id": row_id,
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "num_correct": len(chosen),
        "num_incorrect": len(rejected),
        "total_completions": completions,
        "models": ["written"] * completions,
        "subset": subset,
    }


def write_rewardbench_corpus(folder: Path, seed: int = 0) -> None:
    """Write `rewardbench_test.jsonl.gz` to `folder`: questions of all six subsets.

    Outside Ties a row has one chosen and three rejected answers. In Ties two rows belong together:
    "ref:P" has one right answer, and "tied:P" has several.
    """
    rng = Random(seed)
    rows = []
    for subset in BENCHMARK_SUBSETS:
        for _, question, gist in rng.sample(QUESTIONS, BENCHMARK_ROWS):
            slots = draw_slots(rng)
            chosen = [compose_reply(rng, gist, BENCHMARK_CHOSEN, slots)]
            rejected = [compose_reply(rng, gist, style, slots) for style in BENCHMARK_REJECTED]
            row_id = str(len(rows))
            rows.append(benchmark_row(row_id, subset, question.format(**slots), chosen, rejected))
    for number, (ref, ref_answers, tied, tied_answers, wrong) in enumerate(TIES):
        rows.append(benchmark_row(f"ref:{number}", "Ties", ref, ref_answers, wrong))
        rows.append(benchmark_row(f"tied:{number}", "Ties", tied, tied_answers, wrong))
    write_rows(Path(folder) / "rewardbench_test.jsonl.gz", rows)


# ---- PersonalLLM: a reply in each of the eight styles to every prompt, with ten scores

PERSONALLLM_PROMPTS = {"train": 240, "test": 60}
# The last questions of each type are for the test, so its prompts are unseen.
PERSONALLLM_TEST_QUESTIONS = 2
# The hub's reward models. Only their names: the scores are made here.
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
)
SCORER_NOISE = 0.3  # standard deviation of a score around the scorer's taste


def personalllm_questions(split: str) -> list[tuple[str, str, str]]:
    """The questions of a split, which are unseen in the other one."""
    questions = []
    for question_type in QUESTION_TYPES:
        of_type = questions_of_type(question_type)
        if split == "train":
            questions += of_type[:-PERSONALLLM_TEST_QUESTIONS]
        else:
            questions += of_type[-PERSONALLLM_TEST_QUESTIONS:]
    return questions


def personalllm_row(
    rng: Random, question: tuple[str, str, str], slots: dict[str, Any], styles: Sequence[Style]
) -> dict[str, Any]:
    """One prompt, a reply in each of these styles, and every scorer's score of each reply."""
    _, prompt, gist = question
    row = {"prompt": prompt.format(**slots)}
    for j, style in enumerate(styles, 1):
        row[f"response_{j}"] = compose_reply(rng, gist, style, slots)
    for j, style in enumerate(styles, 1):
        for m, scorer in enumerate(SCORERS):
            taste = TASTES[m % PLANTED_RANK]
            score = float(taste @ np.array(style)) + rng.gauss(0, SCORER_NOISE)
            row[f"response_{j}_{scorer}"] = round(score, 4)
    return row


def write_personalllm_corpus(folder: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """Write `train.jsonl.gz` and `test.jsonl.gz` to `folder`: 240 and 60 prompts.

    The replies to a prompt have the eight styles, in random order. Scorer m follows row
    m % PLANTED_RANK of TASTES, so a mixture of scorers is a mixture of PLANTED_RANK directions.
    Returns the style of each reply: split -> int array `[prompts, 8, attributes]` of +1 and -1.
    """
    rng = Random(seed)
    styles_per_split = {}
    for split, count in PERSONALLLM_PROMPTS.items():
        possible = list(itertools.product(personalllm_questions(split), PLACES, range(4, 20)))
        rows = []
        styles_per_row = []
        for question, place, years in rng.sample(possible, count):
            styles = list(ALL_STYLES)
            rng.shuffle(styles)
            slots = {"place": place, "years": years}
            rows.append(personalllm_row(rng, question, slots, styles))
            styles_per_row.append(styles)
        write_rows(Path(folder) / f"{split}.jsonl.gz", rows)
        styles_per_split[split] = np.array(styles_per_row)
    return styles_per_split


# ---- OwnData: conversations of two or three turns, each with a chosen and a rejected reply

OWN_USERS = 36
OWN_CONVERSATIONS = 14  # of a user


def own_rows(rng: Random, user: str, number: int, mixture: np.ndarray) -> list[dict[str, Any]]:
    """The rows of one conversation: a comparison for each turn."""
    _, opening, gist = rng.choice(QUESTIONS)
    slots = draw_slots(rng)
    turns = [(opening.format(**slots), gist), *rng.sample(FOLLOW_UPS, rng.randint(1, 2))]
    rows = []
    history = []
    for message, gist in turns:
        prompt = [*history, {"role": "user", "content": message}]
        first, second, preference = draw_comparison(rng, mixture)
        chosen, rejected = (second, first) if preference > 0 else (first, second)
        row = {
            "user": user,
            "conversation": f"c{number}",
            "prompt": prompt,
            "chosen": compose_reply(rng, gist, chosen, slots),
            "rejected": compose_reply(rng, gist, rejected, slots),
        }
        rows.append(row)
        history = [*prompt, {"role": "assistant", "content": row["chosen"]}]
    return rows


def write_own_corpus(folder: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """Write `comparisons.jsonl.gz` to `folder`: about 1,200 comparisons by 36 users.

    Each row has the turns before it in its prompt, and an age, which has nothing to do with tastes.
    Returns the planted tastes: user -> mixture, float64 `[3]`.
    """
    rng = Random(seed)
    users = [f"person{i:02}" for i in range(OWN_USERS)]
    mixtures = plant_tastes(rng, users)
    rows = []
    for place, user in enumerate(users):
        age = rng.randint(19, 79)
        for number in range(OWN_CONVERSATIONS):
            conversation = place * OWN_CONVERSATIONS + number
            for row in own_rows(rng, user, conversation, mixtures[user]):
                rows.append({**row, "age": age})
    write_rows(Path(folder) / "comparisons.jsonl.gz", rows)
    return mixtures


def main() -> None:
    root = Path(__file__).parents[1]
    write_tldr_corpus(root / "RedditTLDR" / "demo")
    write_prism_corpus(root / "PRISM" / "demo")
    write_rewardbench_corpus(root / "PRISM" / "demo")
    write_personalllm_corpus(root / "PersonalLLM" / "demo")
    write_own_corpus(root / "OwnData" / "demo")


if __name__ == "__main__":
    main()
