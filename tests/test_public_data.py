"""The public data sets that OwnData/prepare.py knows, on small files in their true schemas."""

import functools
import json
import random
from pathlib import Path

import pandas as pd
import pytest
from demos import build_model, quick, results_in, serve_hub, write_rows
from helpers import call, input_error, load_script, refused

import own_data
import own_files
import own_reading
import own_rows
from own_rows import Comparison

pytestmark = pytest.mark.usefixtures("one_thread")
script = functools.partial(load_script, "OwnData")

COMMUNITY = "facebook/community-alignment-dataset"
MULTIPREF = "allenai/multipref"
BENCH = "MichaelR207/chatbot_arena_personalized_0125"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("model") / "standin")


# ---- Community Alignment


def community_row(number, annotator, turns=2, lang="en", **changes):
    """A conversation; its answers are such as "c3 second b", and b is preferred."""
    row = {
        "conversation_id": f"c{number}",
        "assigned_lang": lang,
        "annotator_id": annotator,
        "annotator_age": "31-45",
        "annotator_country": "India" if annotator == "a1" else None,
    }
    for place, turn in enumerate(own_rows.TURNS):
        is_there = place < turns
        row[f"{turn}_turn_prompt"] = f"c{number} {turn} question" if is_there else None
        for response in own_rows.RESPONSES:
            text = f"c{number} {turn} {response[-1]}<|end_of_text|>"
            row[f"{turn}_turn_{response}"] = text if is_there else None
        row[f"{turn}_turn_preferred_response"] = "response_b" if is_there else None
        row[f"{turn}_turn_feedback"] = "It is shorter." if is_there else None
    return row | changes


def read(path, rows, **options):
    """What is read of a parquet file with these rows."""
    pd.DataFrame(rows).to_parquet(path)
    return own_reading.read_comparisons(path, **options)


def test_a_turn_gives_the_preferred_answer_against_each_other_one(tmp_path):
    reading = read(tmp_path / "a.parquet", [community_row(7, "a1", turns=2)])
    first = [user("c7 first question")]
    second = [*first, assistant("c7 first b"), user("c7 second question")]
    assert reading.comparisons == [
        Comparison("a1", prompt, f"c7 {turn} b", f"c7 {turn} {other}", "c7", "en")
        for turn, prompt in (("first", first), ("second", second))
        for other in "acd"
    ]
    assert reading.rows == 1
    assert not reading.left_out


@pytest.mark.parametrize("preferred", ["response_e", "prompt", "B"])
def test_a_preferred_response_that_is_none_of_the_four_is_refused(tmp_path, preferred):
    row = community_row(7, "a1", turns=3, second_turn_preferred_response=preferred)
    with input_error(
        "a.parquet, row 2: second_turn_preferred_response", *own_rows.RESPONSES, repr(preferred)
    ):
        read(tmp_path / "a.parquet", [community_row(6, "a1"), row])


@pytest.mark.parametrize("preferred", ["", None])
def test_a_turn_without_a_preferred_response_ends_the_conversation(tmp_path, preferred):
    row = community_row(7, "a1", turns=3, second_turn_preferred_response=preferred)
    reading = read(tmp_path / "a.parquet", [row])
    assert {comparison.chosen for comparison in reading.comparisons} == {"c7 first b"}
    assert reading.left_out == {own_rows.NO_PREFERENCE: 1}


@pytest.mark.parametrize("empty", ["", " ", None])
def test_an_empty_turn_in_the_middle_ends_the_conversation(tmp_path, empty):
    rows = [
        community_row(7, "a1", turns=3, second_turn_prompt=empty),
        community_row(8, "a1", turns=2, second_turn_response_b=empty),
        community_row(9, "a1", turns=1),
    ]
    reading = read(tmp_path / "a.parquet", rows)
    assert len(reading.comparisons) == 9
    assert reading.left_out == {own_rows.EMPTY_TURN: 1, own_rows.NO_PREFERENCE: 1}


def test_an_empty_response_is_no_rejected_one(tmp_path):
    row = community_row(7, "a1", turns=1, first_turn_response_c="<|end_of_text|>")
    reading = read(tmp_path / "a.parquet", [row])
    assert [comparison.rejected[-1] for comparison in reading.comparisons] == ["a", "d"]


def test_only_the_languages_that_are_asked_for_are_kept(tmp_path):
    rows = [community_row(n, "a1", 1, lang) for n, lang in enumerate(["en", "hi", "en", "fr"])]
    reading = read(tmp_path / "a.parquet", rows, languages=["en", "fr"])
    assert {comparison.language for comparison in reading.comparisons} == {"en", "fr"}
    assert reading.left_out == {"pairs in the language 'hi'": 3}


def test_a_pair_whose_language_is_not_given_is_not_said_to_be_in_another(tmp_path):
    rows = [community_row(n, "a1", 1, lang) for n, lang in enumerate(["en", None, "", "fr"])]
    reading = read(tmp_path / "a.parquet", rows, languages=["en"])
    assert len(reading.comparisons) == 3
    assert reading.left_out == {"pairs in the language 'fr'": 3, own_reading.NO_LANGUAGE: 6}


def test_languages_that_match_nothing_are_refused_and_those_of_the_data_are_named(tmp_path):
    rows = [community_row(n, "a1", 1, lang) for n, lang in enumerate(["en", "hi", "en"])]
    found = "left out: pairs in the language 'en' (6); pairs in the language 'hi' (3)"
    with input_error("no comparison in 3 rows", found, "in one of the languages"):
        read(tmp_path / "a.parquet", rows, languages=["EN"])


@pytest.mark.parametrize("setting", ["languages", "about_users"])
@pytest.mark.parametrize("value", ["en", [3]])
def test_a_setting_that_is_no_list_of_texts_is_named(tmp_path, setting, value):
    row = community_row(7, "a1", 1, None)
    expected = f"{setting}: {value!r}; give None, or a list of texts"
    with input_error(expected):
        read(tmp_path / "a.parquet", [row], **{setting: value})


def test_columns_about_annotators_are_kept_and_nothing_is_kept_of_others(tmp_path):
    rows = [community_row(0, "a1"), community_row(1, "a2", annotator_age=None)]
    reading = read(tmp_path / "a.parquet", rows, about_users=["annotator_*"])
    assert reading.about_users == {"a1": {"annotator_age": "31-45", "annotator_country": "India"}}


def test_a_conversation_without_an_annotator_is_named(tmp_path):
    rows = [community_row(0, "a1"), community_row(1, None)]
    with input_error("a.parquet, row 2: annotator_id", COMMUNITY):
        read(tmp_path / "a.parquet", rows)


def community_rows(conversations=9):
    """Of eight annotators, with answers of random words."""
    rng = random.Random(0)
    rows = []
    for number in range(8 * conversations):
        row = community_row(number, f"a{number % 8}", turns=rng.randint(1, 4))
        for column, text in row.items():
            if column[-10:-1] == "response_" and text:
                row[column] = f"{text[:-15]} {rng.randrange(10**6)}"
        rows.append(row)
    return rows


def test_it_goes_from_the_hub_to_a_report(monkeypatch, capsys, model, tmp_path):
    rows = community_rows()
    serve_hub(monkeypatch, train=rows[:3], filtered=[*rows, community_row(999, "once")])
    prepare = quick(monkeypatch, script("prepare"), hub_split="filtered", test_share=0.4)
    call(monkeypatch, prepare, "--data", COMMUNITY, "--model", model, "--dir", tmp_path)
    printed = capsys.readouterr().out
    assert "a full copy of facebook/community-alignment-dataset has 90,256 rows" in printed
    assert "left out: 1 user with one conversation only\n" in printed

    study = own_data.load_embeddings(tmp_path)
    assert len(study.seen) == len(study.unseen) == 4
    assert study.title == "community-alignment-dataset"
    assert study.about_users["a2"] == {"annotator_age": "31-45"}
    train = quick(monkeypatch, script("train_basis"), K_list=[0, 2], num_iterations=5, seeds=[0])
    call(monkeypatch, train, "--dir", tmp_path)
    for leaks in results_in(tmp_path)["leaks"].values():
        assert leaks["by_prompt"] == leaks["by_answer_in_prompt"] == 0


def test_a_split_that_the_hub_does_not_have_is_refused(monkeypatch, capsys, tmp_path):
    serve_hub(monkeypatch, train=community_rows(1))
    prepare = quick(monkeypatch, script("prepare"), hub_split="filtred")
    arguments = ["--data", COMMUNITY, "--model", "unread", "--dir", tmp_path]
    refused(monkeypatch, capsys, prepare, arguments, COMMUNITY, "'filtred'", "it has train")


# ---- MultiPref


def multipref_row(number, normal, expert):
    """normal, expert: (evaluator, preference) each."""
    columns = {"evaluator": None, "overall_pref": None, "confidence": "likely", "time_spent": 80}
    annotations = [
        [columns | {"evaluator": name, "overall_pref": preference} for name, preference in side]
        for side in (normal, expert)
    ]
    return {
        "comparison_id": f"id{number}",
        "text": f"question {number}",
        "completion_a": f"answer a {number}",
        "completion_b": f"answer b {number}",
        "normal_worker_annotations": annotations[0],
        "expert_worker_annotations": annotations[1],
    }


def test_each_annotator_of_multipref_gives_a_comparison_and_ties_are_counted(tmp_path):
    row = multipref_row(
        3,
        [("n1", "A-is-slightly-better"), ("n2", "Tie"), ("n1", None)],
        [("e1", "B-is-clearly-better"), ("e2", "A-is-clearly-better"), ("e3", "")],
    )
    path = write_rows(tmp_path / "a.jsonl", [row])
    in_parquet = tmp_path / "a.parquet"
    pd.DataFrame([row]).to_parquet(in_parquet)
    for reading in map(own_reading.read_comparisons, (path, in_parquet)):
        a, b = "answer a 3", "answer b 3"
        assert reading.comparisons == [
            Comparison("n1", "question 3", a, b),
            Comparison("e1", "question 3", b, a),
            Comparison("e2", "question 3", a, b),
        ]
        assert reading.left_out == {own_rows.TIE: 1, own_rows.NO_OPINION: 2}


@pytest.mark.parametrize("preference", ["A-is-bad", "C-is-better", "tie", "B-is-", 1])
def test_a_preference_of_multipref_that_is_not_known_is_refused(tmp_path, preference):
    rows = [
        multipref_row(3, [("n1", "A-is-slightly-better")], []),
        multipref_row(4, [("n1", "Tie"), ("n2", preference)], []),
    ]
    path = write_rows(tmp_path / "a.jsonl", rows)
    with input_error(
        "a.jsonl, row 2: normal_worker_annotations.1.overall_pref: Input should be "
        "'A-is-clearly-better', 'A-is-slightly-better', 'Tie', 'B-is-clearly-better' or "
        f"'B-is-slightly-better', and it is {preference!r}"
    ):
        own_reading.read_comparisons(path)


def test_multipref_says_how_many_rows_a_full_copy_has(monkeypatch, capsys, model, tmp_path):
    rows = [
        multipref_row(n, [("n1", "A-is-clearly-better"), ("n2", "B-is-slightly-better")], [])
        for n in range(20)
    ]
    serve_hub(monkeypatch, train=rows)
    arguments = ["--data", MULTIPREF, "--model", model, "--dir", tmp_path]
    call(monkeypatch, script("prepare"), *arguments, "--limit", 10)
    assert "full copy" not in capsys.readouterr().out
    call(monkeypatch, script("prepare"), *arguments, "--overwrite")
    assert "a full copy of allenai/multipref has 10,461 rows" in capsys.readouterr().out


# ---- PersonalRewardBench


def bench_rows(split, count):
    """Rows of three users in its schema."""
    return [
        {
            "user_id": f"user{n % 3}",
            "context": [user(f"{split} {n}?"), assistant("Well."), user("And?")],
            "chosen": assistant(f"{split} yes {n}"),
            "rejected": assistant(f"{split} no {n}"),
        }
        for n in range(count)
    ]


@pytest.mark.parametrize(
    "folder, is_bench",
    [
        ("prism_personalized_0125", True),
        ("PRISM_personalized_0125", True),
        ("prism_personalized_0125/data", True),
        ("datasets--MichaelR207--prism_personalized_0125/snapshots/0a1b", True),
        ("my_chatbot_arena_personalized_0125.copy", True),
        ("prism", False),
    ],
)
@pytest.mark.parametrize("name_of_prompt", ["context", "prompt"])
def test_a_copy_of_personal_reward_bench_is_known_however_its_path_is_written(
    monkeypatch, tmp_path, folder, is_bench, name_of_prompt
):
    (tmp_path / folder).mkdir(parents=True)
    for split in ("train", "test"):
        rows = pd.DataFrame(bench_rows(split, 9)).rename(columns={"context": name_of_prompt})
        rows.to_parquet(tmp_path / folder / f"{split}.parquet")
    monkeypatch.chdir(tmp_path / folder)
    for path in (tmp_path / folder, Path("."), Path("train.parquet")):
        reading = own_reading.read_comparisons(path)
        assert reading.kind.all_users_are_seen == is_bench


@pytest.mark.parametrize("source", ["hub", "folder"])
def test_every_user_of_personal_reward_bench_is_seen_and_its_splits_stay(
    monkeypatch, capsys, model, tmp_path, source
):
    splits = {split: bench_rows(split, 9) for split in ("train", "val", "test")}
    data = tmp_path / "prism_personalized_0125"
    if source == "hub":
        serve_hub(monkeypatch, **splits)
        data = BENCH
    else:
        data.mkdir()
        for split, rows in splits.items():
            pd.DataFrame(rows).to_parquet(data / f"{split}-00000-of-00001.parquet")
    call(monkeypatch, script("prepare"), "--data", data, "--model", model, "--dir", tmp_path)
    assert "these are rows of PersonalRewardBench" in capsys.readouterr().out
    pairs = pd.read_parquet(tmp_path / own_files.PAIRS_FILE)
    assert pairs.split.value_counts().to_dict() == {"train": 9, "validation": 9, "test": 9}
    assert json.loads(pairs.prompt[0])[1] == assistant("Well.")

    study = own_data.load_embeddings(tmp_path)
    assert study.seen == study.unseen
    assert study.provenance["data_notes"][-1].startswith("every user is seen")
    assert sorted(study.seen) == ["user0", "user1", "user2"]
    assert [len(X) for X in study.test_unseen] == [6] * 3
    halved = own_data.load_embeddings(tmp_path, seen_share=0.5)
    assert len(halved.seen) == 2 and len(halved.unseen) == 1

    capsys.readouterr()
    train = quick(monkeypatch, script("train_basis"), K_list=[0, 2], num_iterations=5, seeds=[0])
    call(monkeypatch, train, "--dir", tmp_path)
    assert "3 users (every user is seen: " in capsys.readouterr().out
    results = results_in(tmp_path)
    assert results["users"] == results["unseen_users"]
    report = (tmp_path / "results" / "report.md").read_text()
    assert "unseen" not in results["verdict"]["text"]
    assert "had no part" not in report
    assert (
        "No user is unseen: what this report says of unseen users is about the same people."
        in report
    )
    assert "Tested: 3 users, all of them seen in the training, on their 18 test pairs." in report
