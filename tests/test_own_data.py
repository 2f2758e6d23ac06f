"""Comparisons of anybody's own, {user, prompt, chosen, rejected}, from a file to a report."""

import functools
import itertools
import json
import random
from collections import Counter

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from demos import (
    build_model,
    content_of,
    quick,
    results_in,
    rows_in,
    state_alone,
    write_rows,
)
from helpers import ROOT, call, load_script, refused

import lore.files
import lore.reward_model
import lore.rows
import lore.scripts
import own_data
import own_files
import own_reading
import own_rows
import own_split
import utils
from lore.normal_forms import prompt_key

pytestmark = pytest.mark.usefixtures("one_thread")
script = functools.partial(load_script, "OwnData")
EXAMPLE = ROOT / "OwnData" / "demo" / "example"


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
    """The table of pairs that prepare.py makes of data."""
    module = quick(monkeypatch, script("prepare"), **constants)
    call(monkeypatch, module, "--data", data, "--model", model, "--dir", folder)
    return pd.read_parquet(folder / own_files.PAIRS_FILE)


def is_refused(monkeypatch, capsys, data, folder, *named, **constants):
    """prepare.py refuses data before it reads the model, in one line that holds these strings."""
    module = quick(monkeypatch, script("prepare"), **constants)
    arguments = ["--data", data, "--model", "unread", "--dir", folder]
    refused(monkeypatch, capsys, module, arguments, *named)


def prompts_of(pairs):
    """The prompts in train, and those in the test."""
    in_train = pairs.split == "train"
    return set(pairs.prompt[in_train]), set(pairs.prompt[~in_train])


def parsed(path):
    """Who said what in the rows of a file: (user, prompt, chosen, rejected) each."""
    return [comparison[:4] for comparison in own_reading.read_comparisons(path).comparisons]


def split_of(rows, folder, share=0.2, seed=0):
    """The comparisons of these rows, with a split by conversation."""
    comparisons = own_reading.read_comparisons(write_rows(folder / "mine.jsonl", rows)).comparisons
    groups = own_split.group_numbers(comparisons)
    return own_split.split_comparisons(comparisons, groups, share, seed)[0]


def prompts_of_sides(comparisons):
    """The prompts, equal for those that are equal to a reader, in train and in the test."""
    sides = {"train": set(), "test": set()}
    for comparison in comparisons:
        sides[comparison.split].add(prompt_key(comparison.prompt))
    return sides["train"], sides["test"]


def test_a_file_of_20_users_with_30_comparisons_goes_to_a_report_with_two_commands(
    monkeypatch, model, rows, tmp_path
):
    pairs = prepared(monkeypatch, model, write_rows(tmp_path / "mine.jsonl", rows), tmp_path)
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
    assert results["verdict"]["personal"] == "yes"
    assert all(leaks["by_prompt"] == 0 for leaks in results["leaks"].values())
    assert list(map(len, prompts_of(pairs))) == [48, 12]


def test_a_prompt_is_on_one_side_and_the_seed_says_on_which(monkeypatch, model, rows, tmp_path):
    path = write_rows(tmp_path / "mine.jsonl", rows)
    sides = []
    for i, seed in enumerate((0, 0, 1)):
        settings = dict(test_seed=seed, test_share=0.5)
        sides.append(prompts_of(prepared(monkeypatch, model, path, tmp_path / str(i), **settings)))
    for train, test in sides:
        assert not train & test and len(train) == len(test) == 30
    assert sides[0] == sides[1] != sides[2]


def test_rows_with_a_split_two_files_and_one_file_in_a_folder_give_the_same_pairs(
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
    found = []
    for kind, data in kinds.items():
        pairs = prepared(monkeypatch, model, data, tmp_path / f"{kind}.out")
        pairs.split = pairs.split.replace("validation", "test")
        found.append(sorted(pairs.itertuples(index=False)))
    assert found[0] == found[1] == found[2]
    assert sum(pair.split == "test" for pair in found[0]) == 240


def test_a_row_that_contradicts_the_name_of_its_file_is_noted(rows, tmp_path):
    write_rows(tmp_path / "train.jsonl", [{**row, "split": "train"} for row in rows[:5]])
    write_rows(tmp_path / "test.jsonl", [{**row, "split": "dev"} for row in rows[5:7]] + rows[7:9])
    reading = own_reading.read_comparisons(tmp_path)
    assert reading.notes == ["2 rows say 'validation' in a file of test, whose name counts"]
    assert [c.split for c in reading.comparisons] == ["train"] * 5 + ["test"] * 4


def test_data_in_the_present_folder_have_its_name(monkeypatch, model, rows, tmp_path):
    write_rows(tmp_path / "mine" / "all.jsonl", rows)
    monkeypatch.chdir(tmp_path / "mine")
    prepared(monkeypatch, model, ".", tmp_path / "out")
    assert own_data.load_embeddings(tmp_path / "out").title == "mine"


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
    pairs = prepared(monkeypatch, model, write_rows(tmp_path / "mine.jsonl", rows), tmp_path)
    train = pairs[(pairs.user == "a") & (pairs.split == "train")]
    table = own_files.load_table(tmp_path).float()
    backbone, tokenizer = lore.reward_model.load_reward_model(str(model), "cpu")
    conversations = [said("One?", "Two.", "Three?", "Four.")] * 2 + [said("One?", "Two.")]
    for pair, conversation in zip(train.itertuples(), conversations, strict=True):
        shown = {pair.chosen: conversation, pair.rejected: [*conversation[:-1], *answers[1]]}
        for row, alone in shown.items():
            expected = state_alone(backbone, tokenizer, alone)
            assert table[row] == pytest.approx(expected, rel=0.01, abs=0.01)
    prompts = list(map(json.loads, train.prompt))
    assert prompts == [asked, asked, said("One?")]
    module = quick(monkeypatch, script("train_basis"), K_list=[0, 2], num_iterations=5)
    call(monkeypatch, module, "--dir", tmp_path)
    results = results_in(tmp_path)
    assert results["leaks"][utils.UNSEEN_TEST]["by_prompt"] == 1  # these prompts are on both sides
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
    pairs = prepared(monkeypatch, model, write_rows(tmp_path / "mine.jsonl", rows), tmp_path)
    table = own_files.load_table(tmp_path).float()
    as_messages, as_text = table[pairs.chosen[(pairs.user == "a") & (pairs.split == "train")]]
    assert (as_messages - as_text).norm() > 0.1 * as_text.norm()


def test_the_example_is_of_this_kind_and_goes_to_a_report(monkeypatch, model, tmp_path):
    (path,) = EXAMPLE.iterdir()
    rows = rows_in(path)
    assert len(rows) == 40 and {type(row["prompt"]) for row in rows} == {str, list}
    pairs = prepared(monkeypatch, model, EXAMPLE, tmp_path)
    assert set(pairs.user) == {row["user"] for row in rows}
    module = quick(monkeypatch, script("train_basis"), K_list=[0, 1, 2])
    call(monkeypatch, module, "--dir", tmp_path)
    assert (tmp_path / "results" / "report.md").exists()


def test_a_study_of_own_data_is_named_after_them_and_holds_the_contents_of_messages(
    monkeypatch, model, tmp_path
):
    prepared(monkeypatch, model, EXAMPLE, tmp_path)
    study = own_data.load_embeddings(tmp_path)
    assert study.title == study.provenance["data"] == EXAMPLE.name
    assert len(study.seen) == len(study.unseen) == 2
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

    class Counted(own_rows.OwnRow):
        @classmethod
        def model_validate(cls, row):
            validated[json.dumps(row, default=str)] += 1
            return super().model_validate(row)

    monkeypatch.setattr(own_reading, "KINDS", (Counted,))
    reading = own_reading.read_comparisons(write_rows(tmp_path / "mine.jsonl", rows))
    assert len(reading.comparisons) == len(rows) == len(validated)
    assert set(validated.values()) == {1}


def test_rows_without_text_are_dropped_and_counted(monkeypatch, capsys, model, rows, tmp_path):
    rows[0]["prompt"] = None
    rows[1]["chosen"] = " "
    rows[2]["rejected"] = [{"role": "assistant", "content": ""}]
    rows[3]["chosen"] = [{"role": "user", "content": rows[3]["prompt"]}]
    write_rows(tmp_path / "data" / "train.jsonl", rows)
    write_rows(tmp_path / "data" / "test.jsonl", rows[4:])
    prepared(monkeypatch, model, tmp_path / "data", tmp_path)
    counts = "1,196 rows, 1,192 comparisons by 20 users; left out: "
    reason = "pairs without a prompt or an answer, or with an empty message (4)"
    assert f"{counts}{reason}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"rejected": ...}, "rejected"),
        ({"user": None}, "user"),
        ({"user": " "}, "user"),
        ({"prompt": 3}, "prompt: Input should be a text, a message or a list of messages, and it"),
        ({"prompt": []}, "prompt.messages"),
        ({"chosen": [{"role": "assistant"}]}, "chosen.messages.0.content"),
        ({"chosen": {"role": "assistant"}}, "chosen.messages.0.content"),
        ({"chosen": ["So." * 20]}, "chosen.messages.0"),
        ({"split": "trian"}, "split"),
        ({"prompt": [{"role": "user", "content": None}]}, "prompt.messages.0.content"),
    ],
)
def test_a_spoilt_row_is_named_with_the_schema(monkeypatch, capsys, rows, tmp_path, changes, named):
    rows[2] = {key: value for key, value in {**rows[2], **changes}.items() if value is not ...}
    path = write_rows(tmp_path / "mine.jsonl", rows)
    expected = [f"mine.jsonl, row 3: {named}", "{user, prompt, chosen, rejected}"]
    is_refused(monkeypatch, capsys, path, tmp_path, *expected)
    assert {path.name for path in tmp_path.iterdir()} == {"mine.jsonl"}


def test_what_another_run_has_finished_in_the_meantime_is_not_replaced(
    monkeypatch, capsys, model, rows, tmp_path
):
    path = write_rows(tmp_path / "mine.jsonl", rows)
    others = write_rows(tmp_path / "others.jsonl", rows[60:])
    out = tmp_path / "out"
    embed = lore.scripts.embed_distinct
    finished = {}

    def embed_meanwhile(*arguments, **options):
        monkeypatch.setattr(lore.scripts, "embed_distinct", embed)
        prepared(monkeypatch, model, others, out)
        finished.update(content_of(out))
        return embed(*arguments, **options)

    monkeypatch.setattr(lore.scripts, "embed_distinct", embed_meanwhile)
    arguments = ["--data", path, "--model", model, "--dir", out]
    refused(monkeypatch, capsys, script("prepare"), arguments, "of other data", "--overwrite")
    assert finished.items() <= content_of(out).items()  # the cache has grown


def test_a_file_that_cannot_be_split_is_refused(monkeypatch, capsys, rows, tmp_path):
    def check(rows, *named, **constants):
        path = write_rows(tmp_path / "mine.jsonl", rows)
        is_refused(monkeypatch, capsys, path, tmp_path, *named, **constants)

    in_train = [{**row, "split": "train"} for row in rows]
    check(rows[:1], "on one side only")
    check(in_train, "on one side only")
    check([*in_train[:5], *rows[5:]], "row 6: no split")
    check([], "mine.jsonl", "no row in it")
    check([{"user": "a"}], "row 1: prompt", "{user, prompt, chosen, rejected}")
    check(rows, "test_seed", test_seed=-1)
    check(rows, "test_share", test_share=1.5)


@pytest.mark.parametrize(
    ("name", "other"),
    [("prompt", "context"), ("user", "worker"), ("conversation", "conversation_id")],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_column_under_two_names_is_refused(
    monkeypatch, capsys, rows, tmp_path, name, other, suffix
):
    both = pd.DataFrame(rows).assign(**{name: rows[0].get(name, "c1"), other: "another"})
    path = tmp_path / f"mine{suffix}"
    if suffix == ".csv":
        both.to_csv(path, index=False)
    else:
        both.to_json(path, orient="records", lines=True)
    is_refused(monkeypatch, capsys, path, tmp_path / "out", name, f"{other!r}", "same column")


SAID = {role: [{"role": role, "content": "Go on."}] for role in ("user", "assistant", "tool")}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"chosen": SAID["user"]}, "an answer must begin and end with"),
        ({"chosen": SAID["tool"]}, "chosen"),
        ({"chosen": SAID["assistant"] + SAID["user"]}, "an answer must begin and end with"),
        ({"prompt": SAID["user"] + SAID["assistant"]}, "the prompt ends with an assistant's"),
        (
            {
                "rejected": [
                    {"role": "user", "content": "question 0 of many ? "},
                    *SAID["assistant"],
                ]
            },
            "an answer must begin and end with",
        ),
    ],
)
def test_messages_that_are_no_answer_to_the_prompt_are_refused(
    monkeypatch, capsys, rows, tmp_path, changes, said
):
    rows[3].update(changes)
    path = write_rows(tmp_path / "mine.jsonl", rows)
    is_refused(monkeypatch, capsys, path, tmp_path / "out", "row 4", said)


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


def test_prompts_that_differ_in_white_space_alone_are_one(rows, tmp_path):
    for row in rows[::2]:
        row["prompt"] += "\n"
    train, test = prompts_of_sides(split_of(rows, tmp_path))
    assert not train & test and len(train | test) == 60


# ---- One person, one prompt, and what is odd


def test_a_person_whose_name_is_written_in_several_ways_is_one(rows, tmp_path):
    """Composed and decomposed letters, white space at the ends, numbers of a float column."""
    names = [
        ("Zoë", "Zoe\u0308", " Zoë "),
        (7, 7.0, "7.0"),
        ("Ada Lovelace", "Ada\u00a0Lovelace\n"),
    ]
    for row in rows:
        ways = names[row["user"] % 3]
        row["user"] = ways[len(row["chosen"]) % len(ways)]
    users = [user for user, *_ in parsed(write_rows(tmp_path / "mine.jsonl", rows))]
    assert set(users) == {"Zoë", "7", "Ada Lovelace"}
    assert len(users) == len(rows)


def test_prompts_that_are_equal_to_a_reader_are_on_one_side_and_stay_as_they_are(rows, tmp_path):
    written = ["où est-ce ?", "ou\u0300 est-ce ?", " où  est-ce ?\n", "o\u200bù\u00a0est-ce ?"]
    for i, row in enumerate(rows):
        row["prompt"] = f"{row['prompt']} {written[i % len(written)]}"
    comparisons = split_of(rows, tmp_path)
    train, test = prompts_of_sides(comparisons)
    assert not train & test and len(train | test) == 60
    assert {comparison.prompt for comparison in comparisons} == {row["prompt"] for row in rows}


NOTES = [
    "all: both answers of 2 pairs began with the text of their prompt, which is left out of them",
    "rows of train that repeat an earlier one word for word: 1",
    "train: 1 answer looks the same as another one to the same prompt: only white space differs, "
    "or how Unicode writes it",
    "rejected answers of the pairs in train: 1 is a list or object printed as text, and is taken "
    "as a text",
    "1 pair was chosen both ways round by the same user: one way of each is wrong under every "
    "reward",
    "a user is called 'nan', with 25 rows: is this nobody?",
]


def test_what_is_odd_is_said_once_and_kept_with_the_embeddings(
    monkeypatch, capsys, model, rows, tmp_path
):
    rows = rows[:120]  # of users 0 to 3
    for i, row in enumerate(rows):
        row["split"] = "test" if i % 30 >= 24 else "train"
    plain = {
        "user": 0,
        "prompt": "Is it so?",
        "chosen": "Yes.",
        "rejected": "No.",
        "split": "train",
    }
    whole = "Human: Where to?\n\nAssistant:"
    rows += [
        rows[0],
        {**rows[1], "chosen": rows[1]["rejected"], "rejected": rows[1]["chosen"]},
        {**plain, "rejected": "Yes.\n"},
        {**plain, "rejected": "['No.', 'Never.']"},
        {**plain, "prompt": whole, "chosen": f"{whole} Home.", "rejected": f"{whole} Away."},
        {**plain, "prompt": whole, "chosen": f"{whole} On.", "rejected": f"{whole} Back."},
    ]
    rows += [{**row, "user": "nan"} for row in rows[5:30]]
    rows.append({**plain, "user": "in train only"})
    pairs = prepared(monkeypatch, model, write_rows(tmp_path / "mine.jsonl", rows), tmp_path)
    out = capsys.readouterr().out
    assert "odd in these data:\n" + "".join(f"  - {note}\n" for note in NOTES) in out
    assert [out.count(note) for note in NOTES] == [1] * len(NOTES)
    assert "left out: 1 user with one conversation only\n" in out
    assert own_data.load_embeddings(tmp_path).provenance["data_notes"] == NOTES
    answers = pairs[pairs.user == "0"][["chosen_text", "rejected_text"]]
    assert list(answers.itertuples(index=False, name=None))[-4:] == [
        ("Yes.", "Yes.\n"),  # as it is
        ("Yes.", "['No.', 'Never.']"),
        ("Home.", "Away."),
        ("On.", "Back."),
    ]


def test_a_text_and_the_assistants_message_of_this_text_are_equal_sides():
    for rejected, expected in (
        ("So.", True),
        ([{"role": "assistant", "content": "So."}], True),
        ("So. ", False),
        ([*SAID["assistant"], *SAID["user"], {"role": "assistant", "content": "So."}], False),
    ):
        comparison = own_rows.Comparison("ada", "Why?", "So.", rejected)
        assert own_files.has_equal_sides(comparison) is expected


def test_data_with_nothing_odd_say_nothing(monkeypatch, capsys, model, rows, tmp_path):
    prepared(monkeypatch, model, write_rows(tmp_path / "mine.jsonl", rows[:120]), tmp_path)
    assert "odd in these data" not in capsys.readouterr().out
    assert own_data.load_embeddings(tmp_path).provenance["data_notes"] == []


def test_an_answer_that_is_its_prompt_and_nothing_else_is_no_answer(tmp_path):
    asked = "Where do we eat?"
    row = {"user": "a", "prompt": asked, "chosen": f"{asked} Here.", "rejected": asked}
    rows = [row, {**row, "rejected": "No."}]
    reading = own_reading.read_comparisons(write_rows(tmp_path / "mine.jsonl", rows))
    assert (len(reading.comparisons), reading.repeats) == (1, 1)
    assert reading.left_out == {own_reading.NO_TEXT: 1}


# ---- The files of others: the same comparisons as each program writes them


def chats(count=12):
    """Rows whose prompts are conversations of three messages."""
    return [
        {
            "user": f"user {i % 3}",
            "prompt": [
                {"role": "user", "content": f"It's question {i}?"},
                {"role": "assistant", "content": 'Which "day"?'},
                {"role": "user", "content": "Today } {"},
            ],
            "chosen": [{"role": "assistant", "content": f"We walk {i} miles."}],
            "rejected": "We sleep.",
        }
        for i in range(count)
    ]


def test_lists_of_messages_that_numpy_has_printed_are_messages(tmp_path):
    pd.DataFrame(chats()).to_parquet(tmp_path / "a.parquet")
    pd.read_parquet(tmp_path / "a.parquet").to_csv(tmp_path / "a.csv", index=False)
    assert "}\n {" in (tmp_path / "a.csv").read_text()
    expected = [tuple(row.values()) for row in chats()]
    assert parsed(tmp_path / "a.csv") == parsed(tmp_path / "a.parquet") == expected


def test_a_printed_list_that_lacks_its_end_is_refused_before_the_model_is_read(
    monkeypatch, capsys, tmp_path
):
    rows = chats()
    rows[4]["prompt"] = str(rows[4]["prompt"])[:-3]
    pd.DataFrame(rows).to_csv(tmp_path / "a.csv", index=False)
    named = "a.csv, row 5: prompt: begins like messages"
    is_refused(monkeypatch, capsys, tmp_path / "a.csv", tmp_path / "out", named)


def test_a_date_beyond_pythons_in_a_column_that_is_not_needed_does_no_harm(tmp_path):
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
    table = pa.Table.from_pylist(chats())
    late = pa.array([2**60] * 12, pa.timestamp("us"))
    pq.write_table(table.append_column("seen_at", late), tmp_path / "a" / "a.parquet")
    pq.write_table(table.append_column("seen_at", late), tmp_path / "b" / "train.parquet")
    pq.write_table(table, tmp_path / "b" / "test.parquet")
    assert len(parsed(tmp_path / "a" / "a.parquet")) == 12
    for data in (tmp_path / "a" / "a.parquet", tmp_path / "a", tmp_path / "b"):
        assert own_reading.read_comparisons(data).rows in (12, 24)


def test_people_whose_ids_a_float_has_mixed_up_are_refused(monkeypatch, capsys, rows, tmp_path):
    for row in rows:
        row["user"] = float(2**53 + row["user"])
    path = write_rows(tmp_path / "mine.jsonl", rows)
    named = "mine.jsonl, row 1: user: "
    is_refused(monkeypatch, capsys, path, tmp_path / "out", named, "went through a float")


def test_a_csv_file_that_was_cut_in_its_last_row_is_refused(monkeypatch, capsys, rows, tmp_path):
    path = tmp_path / "mine.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    whole = path.read_text()
    for missing in (1, 5, 30, 60):
        path.write_text(whole[:-missing])
        is_refused(monkeypatch, capsys, path, tmp_path / "out", "mine.csv, row 600: cannot be read")
