"""Comparisons of anybody's own, {user, prompt, chosen, rejected}, from a file to a report."""

import functools
import itertools
import json
import pickle
import random
from collections import Counter

import pandas as pd
import pytest
from demos import (
    EMBEDDINGS,
    build_model,
    plain,
    quick,
    results_in,
    rows_in,
    state_alone,
    write_rows,
)
from helpers import ROOT, call, load_script, refused

import lore.reward_model
import lore.rows
import tldr
import utils

pytestmark = pytest.mark.usefixtures("one_thread")
script = functools.partial(load_script, "RedditTLDR")
EXAMPLE = ROOT / "RedditTLDR" / "demo" / "own_data"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("model") / "standin")


@pytest.fixture
def rows():
    """Of 20 users, each asked 30 of 60 questions; half of them want few words, the others many."""
    chance = random.Random(5)
    short = "yes , one two"
    long = (
        "well , let us go through all of it slowly , one by one , and then once more from the start"
    )
    rows = []
    for number, question in itertools.product(range(20), range(0, 60, 2)):
        question += number % 2
        answers = [f"{text} {chance.randrange(1000)}" for text in (short, long)]
        wants_long = number // 2 % 2
        rows.append(
            {
                "user": number,
                "prompt": f"question {question} of many ?",
                "chosen": answers[wants_long],
                "rejected": answers[1 - wants_long],
            }
        )
    return rows


def prepared(monkeypatch, model, data, folder, **constants):
    """Both pickles that prepare.py makes of data."""
    module = quick(monkeypatch, script("prepare"), **constants)
    call(monkeypatch, module, "--data", data, "--model", model, "--dir", folder)
    return [pickle.loads((folder / name).read_bytes()) for name in EMBEDDINGS["RedditTLDR"]]


def is_refused(monkeypatch, capsys, data, folder, *named, **constants):
    """prepare.py refuses data before it reads the model, in one line that holds these strings."""
    module = quick(monkeypatch, script("prepare"), **constants)
    arguments = ["--data", data, "--model", "unread", "--dir", folder]
    refused(monkeypatch, capsys, module, arguments, *named)


def prompts_of(pickled):
    return {pair["text"] for pairs in pickled.values() for pair in pairs}


def parsed(path):
    """The preferences in the rows of a file."""
    rows = lore.rows.parse_rows(tldr.read_file(path), tldr.OwnComparison, "own")
    return [row.preference() for _, row in rows]


def test_a_file_of_20_users_with_30_comparisons_goes_to_a_report_with_two_commands(
    monkeypatch, model, rows, tmp_path
):
    train, validation = prepared(
        monkeypatch, model, write_rows(tmp_path / "mine.jsonl", rows), tmp_path
    )
    call(monkeypatch, script("train_basis"), "--dir", tmp_path)
    results = results_in(tmp_path)
    assert (
        (tmp_path / "results" / "report.md")
        .read_text()
        .startswith("# mine.jsonl: is the reward personal?")
    )
    assert sorted(results["users"] + results["unseen_users"], key=int) == [
        str(number) for number in range(20)
    ]
    assert results["verdict"]["personal"] == "yes" and not any(results["leaks"].values())
    assert len(prompts_of(validation)) == 12 and len(prompts_of(train)) == 48


def test_a_prompt_is_on_one_side_and_the_seed_says_on_which(monkeypatch, model, rows, tmp_path):
    path = write_rows(tmp_path / "mine.jsonl", rows)
    sides = []
    for i, seed in enumerate((0, 0, 1)):
        settings = dict(test_seed=seed, test_share=0.5)
        pickles = prepared(monkeypatch, model, path, tmp_path / str(i), **settings)
        sides.append([prompts_of(pickled) for pickled in pickles])
    for train, validation in sides:
        assert not train & validation and len(train) == len(validation) == 30
    assert sides[0] == sides[1] != sides[2]


def test_rows_with_a_split_two_files_and_one_file_in_a_folder_give_the_same_pickles(
    monkeypatch, model, rows, tmp_path
):
    files = {"my_train": [], "my_test": []}
    for row, split in zip(rows, itertools.cycle(["train", "train", "test", "train", "validation"])):
        files["my_train" if split == "train" else "my_test"].append(dict(row))
        row["split"] = split
    kinds = {
        "file": write_rows(tmp_path / "mine.jsonl", rows),
        "folder": tmp_path / "folder",
        "pair": tmp_path / "pair",
    }
    write_rows(kinds["folder"] / "all.jsonl", rows)
    for name, rows_of_file in files.items():
        write_rows(kinds["pair"] / f"{name}.jsonl", rows_of_file)
    first, *others = (
        plain(prepared(monkeypatch, model, data, tmp_path / f"{kind}.out"))
        for kind, data in kinds.items()
    )
    assert others == [first, first] and sum(map(len, first[1].values())) == 240


def test_messages_are_embedded_as_conversations_and_may_repeat_the_prompt(
    monkeypatch, model, tmp_path
):
    def said(*texts):
        return [
            {"role": role, "content": text}
            for role, text in zip(itertools.cycle(("user", "assistant")), texts)
        ]

    asked = said("One?", "Two.", "Three?")
    answers = [said("-", text)[1:] for text in ("Four.", "No more.")]
    rows = [
        {"user": user, "prompt": prompt, "chosen": chosen, "rejected": rejected, "split": split}
        for user in "abcd"
        for split in ("train", "test")
        for prompt, chosen, rejected in (
            (asked, answers[0], answers[1]),
            (asked, asked + answers[0], "No more."),
            ("One?", "Two.", "No more."),
        )
    ]
    train, _ = prepared(monkeypatch, model, write_rows(tmp_path / "mine.jsonl", rows), tmp_path)
    backbone, tokenizer = lore.reward_model.load_reward_model(str(model), "cpu")
    conversations = [said("One?", "Two.", "Three?", "Four.")] * 2 + [said("One?", "Two.")]
    for pair, conversation in zip(train["a"], conversations, strict=True):
        shown = {"winning": conversation, "losing": [*conversation[:-1], *answers[1]]}
        for side, alone in shown.items():
            expected = state_alone(backbone, tokenizer, alone)
            vector = pair["embeddings"][side][0].float()
            assert vector == pytest.approx(expected, rel=0.01, abs=0.01)
    assert train["a"][0]["text"] == asked and train["a"][2]["text"] == "One?"
    module = quick(monkeypatch, script("train_basis"), K_list=[0, 2], num_iterations=5)
    call(monkeypatch, module, "--dir", tmp_path)
    results = results_in(tmp_path)
    assert results["leaks"][utils.UNSEEN_TEST] == 1  # these prompts are on both sides
    longer = results["evidence"][0]["controls"]["longer"]["mean"]
    assert longer == 0  # "Four." is chosen over "No more."


def test_a_text_is_not_taken_for_the_messages_whose_json_it_is(monkeypatch, model, tmp_path):
    messages = [[{"role": "user", "content": "Why?"}], [{"role": "assistant", "content": "So."}]]
    rows = [
        {"user": user, "prompt": prompt, "chosen": chosen, "rejected": "No.", "split": split}
        for user in "ab"
        for split in ("train", "test")
        for prompt, chosen in (messages, map(json.dumps, messages))
    ]
    train, _ = prepared(monkeypatch, model, write_rows(tmp_path / "mine.jsonl", rows), tmp_path)
    as_messages, as_text = (pair["embeddings"]["winning"][0].float() for pair in train["a"])
    assert (as_messages - as_text).norm() > 0.1 * as_text.norm()


def test_the_example_is_of_this_kind_and_goes_to_a_report(monkeypatch, model, tmp_path):
    (path,) = EXAMPLE.iterdir()
    rows = rows_in(path)
    assert len(rows) == 40 and {type(row["prompt"]) for row in rows} == {str, list}
    train, validation = prepared(monkeypatch, model, EXAMPLE, tmp_path)
    assert train.keys() == validation.keys() == {row["user"] for row in rows}
    module = quick(monkeypatch, script("train_basis"), K_list=[0, 1, 2])
    call(monkeypatch, module, "--dir", tmp_path)
    assert (tmp_path / "results" / "report.md").exists()


def test_a_study_of_own_data_is_named_after_them_and_holds_the_contents_of_messages(
    monkeypatch, model, tmp_path
):
    prepared(monkeypatch, model, EXAMPLE, tmp_path)
    study = tldr.load_embeddings(tmp_path, None, 100, 100)
    assert study.title == study.provenance["data"] == EXAMPLE.name
    assert study.left_out == 0 and len(study.seen + study.unseen) == 4
    texts = {}
    for part, users in study.texts.items():
        names = study.unseen if part.endswith("unseen") else study.seen
        for name, pairs in zip(names, users, strict=True):
            texts.setdefault(name, []).extend(pairs)
    expected = {}
    for row in rows_in(next(EXAMPLE.iterdir())):
        answers = (row["chosen"], row["rejected"])
        pair = tuple(
            answer if isinstance(answer, str) else "".join(turn["content"] for turn in answer)
            for answer in answers
        )
        expected.setdefault(row["user"], []).append(pair)
    assert {name: sorted(pairs) for name, pairs in texts.items()} == {
        name: sorted(pairs) for name, pairs in expected.items()
    }


def test_each_row_is_validated_once(monkeypatch, model, rows, tmp_path):
    validated = Counter()

    class Counted(tldr.OwnComparison):
        @classmethod
        def model_validate(cls, row):
            validated[json.dumps(row, default=str)] += 1
            return super().model_validate(row)

    monkeypatch.setattr(tldr, "OwnComparison", Counted)
    path = write_rows(tmp_path / "mine.jsonl", rows)
    is_own, splits = tldr.read_comparisons(path, 0.2, 0)
    kept = sum(
        len(pairs)
        for split in splits.values()
        for pairs in tldr.comparisons_by_worker(split)[0].values()
    )
    assert is_own and kept == len(rows) == len(validated) and set(validated.values()) == {1}


def test_rows_without_text_are_dropped_and_counted(monkeypatch, capsys, model, rows, tmp_path):
    rows[0]["prompt"] = None
    rows[1]["chosen"] = " "
    rows[2]["rejected"] = [{"role": "assistant", "content": ""}]
    rows[3]["chosen"] = [{"role": "user", "content": rows[3]["prompt"]}]
    write_rows(tmp_path / "data" / "train.jsonl", rows)
    write_rows(tmp_path / "data" / "test.jsonl", rows[4:])
    prepared(monkeypatch, model, tmp_path / "data", tmp_path)
    assert "train: 596 comparisons by 20 workers, 4 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"rejected": ...}, "rejected"),
        ({"user": None}, "user"),
        ({"user": " "}, "user"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"chosen": [{"role": "assistant"}]}, "chosen"),
        ({"split": "trian"}, "split"),
        ({"prompt": [{"role": "user", "content": None}]}, "prompt"),
    ],
)
def test_a_spoilt_row_is_named_with_both_schemas(
    monkeypatch, capsys, rows, tmp_path, changes, named
):
    rows[2] = {key: value for key, value in {**rows[2], **changes}.items() if value is not ...}
    path = write_rows(tmp_path / "mine.jsonl", rows)
    expected = [f"mine.jsonl, row 3: {named}", tldr.DATASET, "{user, prompt, chosen, rejected}"]
    is_refused(monkeypatch, capsys, path, tmp_path, *expected)
    assert not list(tmp_path.glob("*.pkl"))


def test_a_file_that_cannot_be_split_is_refused(monkeypatch, capsys, rows, tmp_path):
    def check(rows, *named, **constants):
        path = write_rows(tmp_path / "mine.jsonl", rows)
        is_refused(monkeypatch, capsys, path, tmp_path, *named, **constants)

    in_train = [{**row, "split": "train"} for row in rows]
    check(rows[:1], "on one side only")
    check(in_train, "on one side only")
    check([*in_train[:5], *rows[5:]], "row 6: no split")
    check([], "mine.jsonl", "no row in it")
    check([{"user": "a"}], "row 1: prompt", tldr.DATASET)
    check(rows, "test_seed", test_seed=-1)
    check(rows, "test_share", test_share=1.5)


SAID = {role: [{"role": role, "content": "Go on."}] for role in ("user", "assistant", "tool")}


@pytest.mark.parametrize(
    "changes",
    [
        {"chosen": SAID["user"]},
        {"chosen": SAID["tool"]},
        {"chosen": SAID["assistant"] + SAID["user"]},
        {"prompt": SAID["user"] + SAID["assistant"]},
        {"rejected": [{"role": "user", "content": "question 0 of many ? "}, *SAID["assistant"]]},
    ],
)
def test_messages_that_are_no_answer_to_the_prompt_are_refused(
    monkeypatch, capsys, rows, tmp_path, changes
):
    rows[3].update(changes)
    path = write_rows(tmp_path / "mine.jsonl", rows)
    is_refused(monkeypatch, capsys, path, tmp_path / "out", "row 4")


@pytest.mark.parametrize("text_of", [json.dumps, repr])
def test_messages_in_a_csv_file_are_messages_and_other_texts_stay(tmp_path, text_of):
    said = {
        "user": "ada",
        "prompt": text_of(SAID["user"]),
        "chosen": text_of(SAID["assistant"]),
        "rejected": "[sic] no",
    }
    texts = {
        "user": "ada",
        "prompt": "[{" + "-" * 200_000 + "1",
        "chosen": '[{"name": "Ada"}]',
        "rejected": "[{1}]",
    }
    mixed = {**texts, "prompt": "[{'a': 1}, 5]"}
    pd.DataFrame([said, texts, mixed]).to_csv(tmp_path / "mine.csv", index=False)
    assert parsed(tmp_path / "mine.csv") == [
        ("ada", SAID["user"], SAID["assistant"], "[sic] no"),
        tuple(texts.values()),
        tuple(mixed.values()),
    ]


def test_a_text_in_json_lines_that_looks_like_messages_is_a_text(tmp_path):
    said = {
        "user": "ada",
        "prompt": "As JSON?",
        "chosen": json.dumps(SAID["assistant"]),
        "rejected": '[{"name": "Ada"}]',
    }
    assert parsed(write_rows(tmp_path / "mine.jsonl", [said])) == [tuple(said.values())]


def test_json_lines_whose_name_holds_csv_are_json_lines(tmp_path):
    said = {"user": "ada", "prompt": "Why?", "chosen": "So.", "rejected": "[{'role': 1}]"}
    assert parsed(write_rows(tmp_path / "mine.csv.jsonl", [said])) == [tuple(said.values())]


def test_prompts_that_differ_in_white_space_alone_are_one(rows):
    for row in rows[::2]:
        row["prompt"] += "\n"
    splits = tldr.split_own([("here", row) for row in rows], 0.2, 0)
    train, validation = (
        {tldr.prompt_key(comparison.prompt) for comparison in split} for split in splits.values()
    )
    assert not train & validation and len(train | validation) == 60


def test_white_space_around_a_name_is_not_of_it():
    assert [tldr.worker_id(name) for name in (" u1 ", "u1", 7, 7.0)] == ["u1", "u1", "7", "7"]
