"""The demos' data: they are what corpora.py writes, and hold the tastes that it planted."""

import itertools
import re

import corpora
import numpy as np
import pytest
from corpus_material import REPLY_STYLES, STYLES
from demos import rows_in
from layout import DATA_SETS, ROOT

COMMITTED = {  # data set -> name -> path
    data_set: {path.name: path for path in sorted((ROOT / data_set / "demo").glob("*.gz"))}
    for data_set in DATA_SETS
}


@pytest.fixture(scope="module")
def corpora_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("corpora")


@pytest.fixture(scope="module")
def planted(corpora_folder):
    """Data set -> what its writer says that it planted, when it has written to `corpora_folder`."""
    corpora.write_rewardbench_corpus(corpora_folder / "PRISM")
    return {
        "RedditTLDR": corpora.write_tldr_corpus(corpora_folder / "RedditTLDR"),
        "PRISM": corpora.write_prism_corpus(corpora_folder / "PRISM"),
        "PersonalLLM": corpora.write_personalllm_corpus(corpora_folder / "PersonalLLM"),
        "OwnData": corpora.write_own_corpus(corpora_folder / "OwnData"),
    }


def committed(data_set, name):
    """The committed rows of a split."""
    return rows_in(COMMITTED[data_set][f"{name}.jsonl.gz"])


def contains_sentence(text, beginnings, ends):
    """Whether one of the beginnings, followed by one of the ends, is in the text."""

    def pattern(words):
        return re.sub(r"\\\{\w+\\\}", ".+?", re.escape(words))  # {age} may be anything

    return any(
        re.search(f"{pattern(beginning)} {pattern(end)}", text)
        for beginning, end in itertools.product(beginnings, ends)
    )


def style_of(text, material):
    """The style of a text, read back from its words: one side of each attribute."""
    style = []
    for sides in material.values():
        found = [side for side, parts in sides.items() if contains_sentence(text, *parts)]
        assert len(found) == 1
        style += found
    return np.array(style)


def prefers(mixture, chosen, others):
    """Whether this taste values the chosen style above all others."""
    return all(mixture @ corpora.TASTES @ (chosen - other) > 0 for other in others)


def agreement(choices, mixtures):
    """The shares of choices that agree with the user's own taste, and with the mean of all tastes.

    choices: (user, chosen style, other styles).
    """
    mean_taste = np.mean(list(mixtures.values()), 0)
    own = [prefers(mixtures[user], chosen, others) for user, chosen, others in choices]
    everyone = [prefers(mean_taste, chosen, others) for _, chosen, others in choices]
    return np.mean(own), np.mean(everyone)


@pytest.mark.parametrize("data_set", DATA_SETS)
def test_the_committed_files_are_what_the_writer_writes(corpora_folder, planted, data_set):
    folder = corpora_folder / data_set
    assert {path.name for path in folder.iterdir()} == set(COMMITTED[data_set])
    for name, path in COMMITTED[data_set].items():
        assert rows_in(folder / name) == rows_in(path)
        assert len(rows_in(path)) > 0


def test_they_are_a_few_hundred_kilobytes_in_all():
    paths = [path for paths in COMMITTED.values() for path in paths.values()]
    assert sum(path.stat().st_size for path in paths) < 500_000


def test_summaries_are_chosen_by_the_planted_tastes(planted):
    rows = [*committed("RedditTLDR", "train"), *committed("RedditTLDR", "validation")]
    choices = []
    for row in rows:
        if row["info"]["post"] is None:
            continue
        styles = [style_of(summary["text"], STYLES) for summary in row["summaries"]]
        choices.append((row["worker"], styles[row["choice"]], [styles[1 - row["choice"]]]))
    own, everyone = agreement(choices, planted["RedditTLDR"])
    assert 0.97 < own < 1
    assert everyone < 0.75


def test_replies_are_chosen_by_the_planted_tastes(planted):
    choices = []
    for conversation in committed("PRISM", "conversations"):
        history = conversation["conversation_history"]
        replies = [message for message in history if message["role"] == "model"]
        for turn in range(conversation["conversation_turns"]):
            styles = {True: [], False: []}  # chosen or not
            for reply in replies:
                if reply["turn"] == turn:
                    styles[reply["if_chosen"]].append(style_of(reply["content"], REPLY_STYLES))
            assert len(styles[True]) == 1
            choices.append((conversation["user_id"], styles[True][0], styles[False]))
    own, everyone = agreement(choices, planted["PRISM"])
    assert 0.97 < own < 1
    assert everyone < 0.7


def test_answers_in_own_data_are_chosen_by_the_planted_tastes(planted):
    choices = []
    for row in committed("OwnData", "comparisons"):
        chosen, rejected = (style_of(row[side], REPLY_STYLES) for side in ("chosen", "rejected"))
        choices.append((row["user"], chosen, [rejected]))
    own, everyone = agreement(choices, planted["OwnData"])
    assert len(planted["OwnData"]) >= 24
    assert 0.97 < own < 1
    assert everyone < 0.75


def test_conversations_in_own_data_go_on_from_the_chosen_answers():
    earlier = {}
    for row in committed("OwnData", "comparisons"):
        *history, question = row["prompt"]
        assert history == earlier.get(row["conversation"], [])
        answer = {"role": "assistant", "content": row["chosen"]}
        earlier[row["conversation"]] = [*row["prompt"], answer]
    turns = [len(messages) // 2 for messages in earlier.values()]
    assert set(turns) == {2, 3}


def test_scorers_follow_three_tastes(planted):
    for split, styles in planted["PersonalLLM"].items():
        rows = committed("PersonalLLM", split)
        assert styles.shape == (len(rows), 8, 3)
        for row, row_styles in zip(rows[:20], styles):
            for j, style in enumerate(row_styles, 1):
                assert (style_of(row[f"response_{j}"], REPLY_STYLES) == style).all()
        scores = [
            [[row[f"response_{j}_{scorer}"] for scorer in corpora.SCORERS] for j in range(1, 9)]
            for row in rows
        ]
        scores = np.array(scores)  # (prompts, 8, 10)
        tastes = corpora.TASTES[np.arange(10) % 3]  # (10, attributes)
        noise = np.std(scores - styles @ tastes.T)
        assert noise == pytest.approx(corpora.SCORER_NOISE, rel=0.05)


def test_both_splits_of_tldr_have_the_same_workers_and_different_posts():
    train = committed("RedditTLDR", "train")
    validation = committed("RedditTLDR", "validation")
    assert {row["worker"] for row in train} == {row["worker"] for row in validation}
    posts = {row["info"]["post"] for row in train}
    assert not posts & {row["info"]["post"] for row in validation}
    assert sum(row["info"]["post"] is None for row in validation) == 4


def test_both_splits_of_personalllm_have_different_prompts():
    prompts = {row["prompt"] for row in committed("PersonalLLM", "train")}
    assert not prompts & {row["prompt"] for row in committed("PersonalLLM", "test")}


def test_rows_have_every_column_of_the_hub():
    row = committed("RedditTLDR", "train")[0]
    assert set(row) == {"info", "summaries", "choice", "worker", "batch", "split", "extra"}
    assert set(row["info"]) == {"id", "post", "title", "subreddit", "site", "article"}
    assert set(committed("PRISM", "rewardbench_test")[0]) == {
        "id",
        "prompt",
        "chosen",
        "rejected",
        "num_correct",
        "num_incorrect",
        "total_completions",
        "models",
        "subset",
    }
    assert len(committed("PersonalLLM", "train")[0]) == 1 + 8 + 80
