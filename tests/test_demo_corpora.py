"""The demos' corpora: what wrote them still writes the same files, and in them are the tastes that it planted; who
imports whom."""

import ast
import itertools
import re

import corpora
import numpy as np
import pytest
from demos import rows_in
from helpers import ROOT

ROOMS = {"RedditTLDR": "tldr", "PRISM": "prism", "PersonalLLM": "personalllm"}
COMMITTED = {
    data_set: {path.name: path for path in sorted((ROOT / data_set / "demo").glob("*.gz"))}
    for data_set in ROOMS
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of each data set's corpus, written anew, and what the writer says that it planted."""
    root = tmp_path_factory.mktemp("corpora")
    planted = {
        "RedditTLDR": corpora.write_tldr_corpus(root / "RedditTLDR"),
        "PRISM": corpora.write_prism_corpus(root / "PRISM"),
        "PersonalLLM": corpora.write_personalllm_corpus(root / "PersonalLLM"),
    }
    corpora.write_rewardbench_corpus(root / "PRISM")
    return root, planted


def committed(data_set, name):
    return rows_in(COMMITTED[data_set][f"{name}.jsonl.gz"])


def styles_in(text, material):
    """The style of a text, read back from its words: a side of each attribute of STYLES or REPLY_STYLES."""

    def pattern(part):
        return re.sub(r"\\\{\w+\\\}", ".+?", re.escape(part))

    found = []
    for sides in material.values():
        there = [
            side
            for side, parts in sides.items()
            if any(
                re.search(f"{pattern(begin)} {pattern(end)}", text)
                for begin, end in itertools.product(*parts)
            )
        ]
        assert len(there) == 1
        found += there
    return np.array(found)


def agreement(choices, mixtures):
    """Of choices (user, chosen style, other styles) the share that agrees with each user's taste, and with a taste of
    all users alike, the mean."""
    everyone = np.mean(list(mixtures.values()), 0)
    right = [
        [
            all(taste @ corpora.TASTES @ (chosen - other) > 0 for other in others)
            for taste in (mixtures[user], everyone)
        ]
        for user, chosen, others in choices
    ]
    return np.mean(right, 0)


@pytest.mark.parametrize("data_set", ROOMS)
def test_the_committed_files_are_what_the_writer_writes(written, data_set):
    folder = written[0] / data_set
    assert {path.name for path in folder.iterdir()} == set(COMMITTED[data_set])
    for name, path in COMMITTED[data_set].items():
        assert rows_in(folder / name) == rows_in(path) and len(rows_in(path)) > 0


def test_they_are_a_few_hundred_kilobytes_in_all():
    assert (
        sum(path.stat().st_size for paths in COMMITTED.values() for path in paths.values())
        < 500_000
    )


def test_summaries_are_chosen_by_the_planted_tastes(written):
    choices = []
    for split in ("train", "validation"):
        for row in (row for row in committed("RedditTLDR", split) if row["info"]["post"]):
            styles = [styles_in(summary["text"], corpora.STYLES) for summary in row["summaries"]]
            choices.append((row["worker"], styles[row["choice"]], [styles[1 - row["choice"]]]))
    own, everyone = agreement(choices, written[1]["RedditTLDR"])
    assert 0.97 < own < 1 and everyone < 0.75


def test_replies_are_chosen_by_the_planted_tastes(written):
    choices = []
    for conversation in committed("PRISM", "conversations"):
        by_turn = {}
        for message in (m for m in conversation["conversation_history"] if m["role"] == "model"):
            style = styles_in(message["content"], corpora.REPLY_STYLES)
            by_turn.setdefault(message["turn"], {True: [], False: []})[message["if_chosen"]].append(
                style
            )
        for sides in by_turn.values():
            (chosen,) = sides[True]
            choices.append((conversation["user_id"], chosen, sides[False]))
    own, everyone = agreement(choices, written[1]["PRISM"])
    assert 0.97 < own < 1 and everyone < 0.7


def test_scorers_follow_three_tastes(written):
    for split, styles in written[1]["PersonalLLM"].items():
        rows = committed("PersonalLLM", split)
        assert styles.shape == (len(rows), 8, 3)
        for row, of_row in itertools.islice(zip(rows, styles), 20):
            for j, style in enumerate(of_row, 1):
                assert (styles_in(row[f"response_{j}"], corpora.REPLY_STYLES) == style).all()
        scores = np.array(
            [
                [[row[f"response_{j}_{scorer}"] for scorer in corpora.SCORERS] for j in range(1, 9)]
                for row in rows
            ]
        )  # (prompts, 8, 10)
        tastes = corpora.TASTES[np.arange(10) % 3]  # (10, attributes)
        assert np.std(scores - styles @ tastes.T) == pytest.approx(corpora.SCORER_NOISE, rel=0.05)


def test_both_splits_have_the_same_workers_and_different_prompts():
    train, validation = (committed("RedditTLDR", split) for split in ("train", "validation"))
    assert {row["worker"] for row in train} == {row["worker"] for row in validation}
    assert not {row["info"]["post"] for row in train} & {row["info"]["post"] for row in validation}
    assert sum(row["info"]["post"] is None for row in validation) == 4
    train, test = (
        {row["prompt"] for row in committed("PersonalLLM", split)} for split in ("train", "test")
    )
    assert not train & test


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


# ---- Who imports whom -----------------------------------------------------------------------------------------------


def product():
    return [
        ROOT / "utils.py",
        *sorted((ROOT / "lore").glob("*.py")),
        *(path for data_set in ROOMS for path in sorted((ROOT / data_set).glob("*.py"))),
    ]


def imports_of(path):
    """The first names of the modules that a file imports, also inside functions, and its strings but docstrings."""
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    modules = {
        name.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for name in node.names
    }
    modules |= {
        node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
    }
    return modules, [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in docstrings
    ]


def test_nothing_outside_the_tests_imports_from_them():
    ours = {path.stem for path in (ROOT / "tests").rglob("*.py")} | {"tests"}
    for path in product():
        modules, strings = imports_of(path)
        assert not modules & ours, path
        assert not any(re.search(r"\btests\b", string) for string in strings), path


def test_utils_imports_nothing_of_ours_and_no_data_set_imports_another():
    local = {path.stem for path in product() if path.parent.name != "lore"} | {"lore"}
    for path in product():
        allowed = {"utils": set(), "lore": {"utils", "lore"}}.get(
            path.parent.name if path.parent.name == "lore" else path.stem,
            {"utils", "lore", ROOMS.get(path.parent.name)},
        )
        assert imports_of(path)[0] & local <= allowed, path


def test_utils_names_no_data_set():
    """But in the public names of design.md section 2."""
    source = re.sub(r"\bcreate_dataset_prism(_shots)?\b", "", (ROOT / "utils.py").read_text())
    names = r"tldr|tl;dr|reddit|prism|personal_?llm|reward.?bench|skywork|summarize_from|namkoong|hannahrose|allenai"
    assert re.findall(f".*(?:{names}).*", source, re.IGNORECASE) == []
