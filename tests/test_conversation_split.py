"""OwnData's split keeps conversations whole; its files, its demo, and what it says of leaks."""

import functools
import itertools
import json
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from demos import (
    build_model,
    content_of,
    interrupted,
    printed,
    quick,
    results_in,
    start,
    two_processes,
    without_forward,
    write_rows,
)
from helpers import ROOT, call, input_error, load_script, refused, sign_again
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import lore.embedding_files
import lore.files
import lore.scripts
import own_data
import own_files
import own_reading
import own_rows
import own_split
from own_rows import Comparison
from utils import UNSEEN_TEST

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPTS = ROOT / "OwnData"  # of the fixture `ran`
script = functools.partial(load_script, "OwnData")


def messages(*texts):
    """A conversation of these texts, which the user begins."""
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": text} for role, text in zip(roles, texts)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("model") / "standin")


# ---- Groups


def linked(a, b):
    """Whether two comparisons share an id or an opening, by a rule of its own."""

    def opening(comparison):
        prompt = comparison.prompt
        return " ".join((prompt if isinstance(prompt, str) else prompt[0]["content"]).split())

    same_id = a.conversation is not None and a.conversation == b.conversation
    return same_id or opening(a) == opening(b)


def groups_by_spreading(comparisons):
    """The least number in the group of each comparison, spread until nothing moves."""
    least = list(range(len(comparisons)))
    moved = True
    while moved:
        moved = False
        for i, j in itertools.permutations(range(len(comparisons)), 2):
            if least[i] > least[j] and linked(comparisons[i], comparisons[j]):
                least[i] = least[j]
                moved = True
    return least


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_what_ids_and_openings_link_directly_or_through_others(seed):
    rng = random.Random(seed)
    comparisons = []
    for _ in range(40):
        opening = f"question {rng.randrange(30)}" + rng.choice(["", "\n", " "])
        prompt = rng.choice([opening, messages(opening), messages(opening, "So.", "And then?")])
        conversation = rng.choice([None, *(f"c{n}" for n in range(60))])
        comparisons.append(Comparison("ada", prompt, "Yes.", "No.", conversation))
    groups = own_split.group_numbers(comparisons)
    expected = groups_by_spreading(comparisons)
    assert len(set(expected)) > 5
    assert len(set(zip(groups, expected))) == len(set(groups)) == len(set(expected))


def test_a_system_message_is_no_opening():
    system = {"role": "system", "content": "Be brief."}
    comparisons = [
        Comparison("ada", [system, *messages(text)], "Yes.", "No.") for text in ("One?", "Two?")
    ]
    assert len(set(own_split.group_numbers(comparisons))) == 2


def test_turns_that_prompts_hold_as_plain_text_are_of_one_group():
    first = "Human: Where do we eat?\n\nAssistant:"
    prompts = [
        first,
        f"{first} At the pier.\n\nHuman: And then?\n\nAssistant:",
        f"{first} At home.\n\nHuman: Why?\n\nAssistant:",
        "Human: Where do we eat?\n\nAssistants: ",
        "Hi you",
        "Hi you there, where do we eat?",
    ]
    groups = own_split.group_numbers([Comparison("a", text, "Yes.", "No.") for text in prompts])
    assert groups[0] == groups[1] == groups[2]
    assert len(set(groups)) == 4


# ---- Who has conversations on both sides


def asked(user, groups):
    """A comparison of this user in each of these groups."""
    return [Comparison(user, f"question {group}?", "Yes.", "No.") for group in groups]


def sides_of(comparisons, share=0.2, seed=0):
    """Draws a split -> user -> the groups in train and those in the test; the share of the test."""
    groups = own_split.group_numbers(comparisons)
    split, notes = own_split.split_comparisons(comparisons, groups, share, seed)
    assert notes == []
    sides = {row.user: {"train": set(), "test": set()} for row in split}
    for row in split:
        sides[row.user][row.split].add(row.prompt)
    in_test = {row.prompt for row in split if row.split == "test"}
    return sides, len(in_test) / len({row.prompt for row in split})


def one_sided(sides):
    """The users who have several groups, all of them on one side."""
    return {
        user
        for user, of_user in sides.items()
        if len(of_user["train"] | of_user["test"]) > 1
        if not (of_user["train"] and of_user["test"])
    }


@pytest.mark.parametrize("prompts", [2, 3, 4, 10])
@pytest.mark.parametrize("people", [2, 12])
def test_nobody_who_has_several_prompts_is_left_out_whatever_the_seed(prompts, people):
    rows = [
        row
        for user in range(people)
        for row in asked(f"user {user}", [f"{user} {n}" for n in range(prompts)])
    ]
    groups = own_split.group_numbers(rows)
    for seed in range(60):
        split, _ = own_split.split_comparisons(rows, groups, 0.2, seed)
        kept, notes = own_split.users_to_keep(split, groups, 2)
        assert (len(kept), notes) == (people, [])


@st.composite
def shared_groups(draw):
    """The comparisons of a few people, whose groups may be those of others."""
    people = st.lists(st.sets(st.integers(0, 12), min_size=1, max_size=8), min_size=2, max_size=8)
    rows = []
    for user, groups in enumerate(draw(people)):
        rows += asked(f"user {user}", sorted(groups)) * draw(st.integers(1, 2))
    return rows


@settings(derandomize=True, deadline=None, database=None, max_examples=200)
@given(shared_groups(), st.sampled_from([0.01, 0.2, 0.5, 0.9, 0.99]), st.integers(0, 99))
def test_a_group_is_never_cut_and_who_has_one_alone_has_both_sides(rows, share, seed):
    assume(any(len({row.prompt for row in rows if row.user == user}) > 1 for user, *_ in rows))
    sides, _ = sides_of(rows, share, seed)
    train = set().union(*(of_user["train"] for of_user in sides.values()))
    test = set().union(*(of_user["test"] for of_user in sides.values()))
    assert not train & test
    people_in = Counter(group for _, group in {(row.user, row.prompt) for row in rows})
    for user in one_sided(sides):
        assert all(people_in[group] > 1 for group in sides[user]["train"] | sides[user]["test"])
    assert sides_of(rows[::-1], share, seed)[0] == sides


def fewest_one_sided(rows):
    """How many users must have one side only, found by trying all splits."""
    places = {group: place for place, group in enumerate({row.prompt for row in rows})}
    groups_of = {}  # user -> a bit for each group
    for row in rows:
        groups_of[row.user] = groups_of.get(row.user, 0) | 1 << places[row.prompt]
    several = [bits for bits in groups_of.values() if bits.bit_count() > 1]
    return min(
        sum(split & bits in (0, bits) for bits in several) for split in range(2 ** len(places))
    )


def test_people_who_share_all_their_groups_have_both_sides_whenever_that_is_possible():
    fewest = []
    for number in range(100):
        rng = random.Random(number)
        count = rng.randrange(3, 8)
        rows = [
            row
            for user in range(rng.randrange(2, 9))
            for row in asked(f"user {user}", rng.sample(range(count), rng.randrange(2, 4)))
        ]
        fewest.append(fewest_one_sided(rows))
        assert len(one_sided(sides_of(rows, seed=number)[0])) == fewest[-1]
    assert fewest.count(0) > 50 and sum(fewest) > 10  # some cannot all have both


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_the_share_is_kept_if_people_have_many_groups(share):
    own = [row for n in range(30) for row in asked(f"user {n}", [f"{n} {m}" for m in range(20)])]
    shared = [row for n in range(30) for row in asked(f"user {n}", range(n, n + 40))]
    for rows in (own, shared):
        for seed in range(5):
            assert sides_of(rows, share, seed)[1] == pytest.approx(share, abs=0.02)


def test_the_order_of_the_rows_does_not_change_the_split_and_the_seed_does():
    rows = asked("ada", range(50))
    splits = [sides_of(rows, 0.3, 1), sides_of(rows[::-1], 0.3, 1), sides_of(rows, 0.3, 2)]
    assert splits[0] == splits[1]
    assert [len(sides["ada"]["test"]) for sides, _ in splits] == [15, 15, 15]
    assert splits[0] != splits[2]


# ---- Conversations without tastes

WORDS = [f"{a}{b}{c}" for a, b, c in itertools.product("bdfgklmnprst", "aeiou", "lnrst")]


def conversations_without_tastes(rng, users=40, conversations=30):
    """The rows of two-turn conversations whose choices are tossed."""

    def text(count):
        return " ".join(rng.choices(WORDS, k=count))

    rows = []
    for user, conversation in itertools.product(range(users), range(conversations)):
        history = []
        for _ in range(2):
            prompt = [*history, *messages(text(4))]
            row = {
                "user": f"user {user}",
                "conversation": f"{user}-{conversation}",
                "prompt": prompt,
                "chosen": text(6),
                "rejected": text(6),
            }
            rows.append(row)
            history = [*prompt, {"role": "assistant", "content": row["chosen"]}]
    return rows


def trained(monkeypatch, model, path, folder):
    """The results of training on a file of rows."""
    arguments = ["--data", path, "--model", model, "--dir", folder, "--overwrite"]
    call(monkeypatch, script("prepare"), *arguments)
    short = dict(K_list=[0, 1, 3], num_iterations=100, seeds=[0], controls=False)
    call(monkeypatch, quick(monkeypatch, script("train_basis"), **short), "--dir", folder)
    return results_in(folder)


def test_without_tastes_nothing_leaks_and_a_split_of_pairs_is_called_a_leak(
    monkeypatch, capsys, model, tmp_path
):
    rng = random.Random(0)
    rows = conversations_without_tastes(rng)
    results = trained(monkeypatch, model, write_rows(tmp_path / "mine.jsonl", rows), tmp_path)
    pairs = pd.read_parquet(tmp_path / own_files.PAIRS_FILE)
    in_train = pairs.split == "train"
    train_prompts = "\n".join(pairs.prompt[in_train])
    for answer in itertools.chain(pairs.chosen_text[~in_train], pairs.rejected_text[~in_train]):
        assert answer not in train_prompts
    assert results["verdict"]["personal"] != "yes"
    assert "a leak" not in results["verdict"]["text"]
    for leaks in results["leaks"].values():
        assert leaks["by_prompt"] == leaks["by_answer_in_prompt"] == leaks["by_answers"] == 0

    capsys.readouterr()
    for row in rows:
        row["split"] = rng.choice(["train", "train", "train", "train", "test"])
    results = trained(monkeypatch, model, write_rows(tmp_path / "mine.jsonl", rows), tmp_path)
    assert "a leak, as test answers may be in training prompts" in capsys.readouterr().out
    assert results["verdict"]["personal"] != "yes"
    assert "Signs of an artefact: a leak" in results["verdict"]["text"]
    leaks = results["leaks"][UNSEEN_TEST]
    # Of the test pairs the other turn of the conversation is in train with probability .8, and a
    # first turn's answer is then in its prompt.
    assert leaks["by_prompt"] == pytest.approx(0.8, abs=0.1)
    assert leaks["by_answer_in_prompt"] == pytest.approx(0.4, abs=0.1)


# ---- The files


def test_the_files_hold_each_conversation_once_and_the_texts_as_they_were(ran):
    pairs = pd.read_parquet(ran.folder / own_files.PAIRS_FILE)
    table = own_files.load_table(ran.folder)
    assert table.dtype == torch.bfloat16
    assert len(table.unique(dim=0)) == len(table)
    row_of = {}
    for pair in pairs.itertuples():
        for row, answer in ((pair.chosen, pair.chosen_text), (pair.rejected, pair.rejected_text)):
            assert row_of.setdefault((pair.prompt, answer), row) == row
    assert len(set(row_of.values())) == len(row_of) == len(table)
    (source,) = ran.data.glob("*.gz")
    rows = [row for _, row in lore.scripts.read_rows(source)]
    written = {(row["user"], json.dumps(row["prompt"]), row["chosen"]) for row in rows}
    kept = zip(pairs.user, pairs.prompt, pairs.chosen_text)
    assert set(kept) == {row for row in written if row[0] in set(pairs.user)}


def test_a_study_shares_one_table_that_is_not_copied(ran):
    study = own_data.load_embeddings(ran.folder, unseen_pairs=5)
    tables = {X.embeddings.data_ptr() for part in study.features().values() for X in part}
    assert len(tables) == 1
    maps = Path("/proc/self/maps")  # which only Linux has
    if maps.exists():
        assert str(ran.folder / own_files.EMBEDDINGS_FILE) in maps.read_text()
    assert all(len(X) <= 5 for X in study.train_unseen)
    pairs = pd.read_parquet(ran.folder / own_files.PAIRS_FILE)
    user = study.seen[0]
    own = pairs[(pairs.user == user) & (pairs.split == "train")]
    table = own_files.load_table(ran.folder).float()
    expected = table[own.chosen.tolist()] - table[own.rejected.tolist()]
    assert torch.equal(study.train[0].dense(), expected)
    assert study.texts["train"][0] == list(zip(own.chosen_text, own.rejected_text))
    assert set(study.about_users) == set(pairs.user)
    assert all(about.keys() == {"age"} for about in study.about_users.values())


def test_users_are_halved_by_a_seed_and_a_share_of_one_sees_everybody(ran):
    halves = [own_data.load_embeddings(ran.folder, split_seed=seed) for seed in (0, 0, 1)]
    users = set(pd.read_parquet(ran.folder / own_files.PAIRS_FILE).user)
    for study in halves:
        assert set(study.seen) | set(study.unseen) == users
        assert not set(study.seen) & set(study.unseen)
        assert abs(len(study.seen) - len(study.unseen)) <= 1
    assert halves[0].seen == halves[1].seen != halves[2].seen
    everybody = own_data.load_embeddings(ran.folder, seen_share=1)
    assert everybody.seen == everybody.unseen
    assert set(everybody.seen) == users
    for setting, known in (("seen_share", 0), ("seen_share", 1.5), ("unseen_pairs", 0)):
        with input_error(setting):
            own_data.load_embeddings(ran.folder, **{setting: known})


@pytest.mark.parametrize("name", own_files.FILES)
def test_a_file_that_is_missing_damaged_or_of_another_run_is_named(embeddings, name):
    path = embeddings / name
    whole = path.read_bytes()
    path.unlink()
    with input_error(str(path), "run prepare.py"):
        own_data.load_embeddings(embeddings)
    path.write_bytes(whole[:-7])
    with input_error(str(path)):
        own_data.load_embeddings(embeddings)
    sign_again(embeddings)
    if name != own_files.EMBEDDINGS_FILE:
        with input_error(str(path), "write it again"):
            own_data.load_embeddings(embeddings)


def test_embeddings_without_their_head_are_refused(embeddings):
    (embeddings / lore.embedding_files.HEAD_FILE).unlink()
    with input_error(lore.embedding_files.HEAD_FILE, "run prepare.py first"):
        own_data.load_embeddings(embeddings)


def test_a_killed_prepare_goes_on_from_its_cache(monkeypatch, capsys, ran, tmp_path):
    arguments = ["--data", ran.data, "--model", ran.model, "--dir", tmp_path]
    with monkeypatch.context() as patch:

        def stop(*_, **__):
            raise KeyboardInterrupt

        patch.setattr(own_files, "save_pairs", stop)
        interrupted(patch, capsys, script("prepare"), *arguments)
    assert {path.name for path in tmp_path.iterdir()} == {".embedding_cache"}
    without_forward(monkeypatch)
    call(monkeypatch, script("prepare"), *arguments)
    for name in own_files.FILES:
        assert (tmp_path / name).read_bytes() == (ran.folder / name).read_bytes()


def test_other_splits_are_other_data(monkeypatch, capsys, ran, embeddings):
    before = content_of(embeddings)
    arguments = ["--data", ran.data, "--model", ran.model, "--dir", embeddings]
    call(monkeypatch, script("prepare"), *arguments)
    assert "finished already" in capsys.readouterr().out
    prepare = quick(monkeypatch, script("prepare"), test_seed=1)
    refused(monkeypatch, capsys, prepare, arguments, "other data", "--overwrite")
    assert content_of(embeddings) == before


# ---- What is refused and what is said


def test_columns_that_are_not_known_are_named_with_the_nearest(monkeypatch, capsys, tmp_path):
    row = {"user": "ada", "promt": "Why?", "chosen": "So.", "rejected": "No.", "id": 3}
    path = write_rows(tmp_path / "mine.jsonl", [row])
    named = ["mine.jsonl, row 1: prompt: no such column", "'promt' (is it 'prompt'?)"]
    arguments = ["--data", path, "--model", "unread", "--dir", tmp_path]
    refused(monkeypatch, capsys, script("prepare"), arguments, *named)
    row = {"user": "ada", "prompt": "Why?", "chosen": "So.", "rejected": "No.", "conversaton": 3}
    reading = own_reading.read_comparisons(write_rows(tmp_path / "mine.jsonl", [row]))
    assert reading.notes == ["columns that are not read: 'conversaton' (is it 'conversation'?)"]


def test_users_who_are_left_out_are_counted_with_the_reason(tmp_path):
    rows = []
    for user, questions in {"a": 8, "b": 8, "few": 2, "one": 1, "train only": 4}.items():
        for n in range(questions):
            split = "test" if n % 2 and user != "train only" else "train"
            row = Comparison(user, f"question {n}?", "Yes.", "No.", f"{user} {n}", split=split)
            rows.append(row)
    groups = np.arange(len(rows))
    kept, notes = own_split.users_to_keep(rows, groups, 3)
    assert kept == {"a", "b"}
    assert notes == [
        "left out: 1 user with one conversation only",
        "left out: 1 user with pairs on one side of the split only",
        "left out: 1 user with fewer than 3 pairs",
    ]


def test_one_person_alone_is_too_few_and_nothing_more_is_said():
    rows = [
        Comparison("a", f"question {n}?", "Yes.", "No.", split="test" if n % 2 else "train")
        for n in range(6)
    ]
    with input_error("1 of 1, and at least 2 are needed; give rows of more people"):
        own_split.users_to_keep(rows, np.arange(len(rows)), 2)


@pytest.mark.parametrize("name", ["nan", "None", "null"])
def test_a_conversation_that_is_called_nothing_is_said_before_the_split_is_refused(
    monkeypatch, capsys, tmp_path, name
):
    rows = [
        dict(user=f"user {n % 3}", prompt=f"{n}?", chosen="Yes.", rejected="No.", conversation=name)
        for n in range(12)
    ]
    path = write_rows(tmp_path / "mine.jsonl", rows)
    arguments = ["--data", path, "--model", "unread", "--dir", tmp_path]
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, arguments)])
    with input_error("12 comparisons of 1 group of conversations on one side only"):
        script("prepare").main()
    note = f"a conversation is called {name!r}, with 12 rows, which stay together"
    assert f"odd in these data:\n  - {note}" in capsys.readouterr().out


@pytest.mark.parametrize("nothing", ["", None])
def test_an_empty_id_of_a_conversation_is_none(tmp_path, nothing):
    row = dict(user="ada", prompt="Why?", chosen="Yes.", rejected="No.", conversation=nothing)
    reading = own_reading.read_comparisons(write_rows(tmp_path / "mine.jsonl", [row]))
    assert reading.comparisons[0].conversation is None
    assert reading.notes == []


@pytest.mark.parametrize(
    "known, said", [(0, "nothing is known of users"), (1, "something is known of 1 user")]
)
def test_what_is_known_of_users_is_counted(known, said):
    rows = asked("ada", range(3))
    about_users = {f"user {n}": {"age": "30"} for n in range(known)}
    reading = own_reading.Reading(own_rows.OwnRow, rows, about_users=about_users)
    files = script("prepare").files_to_write(reading, np.arange(3))
    contents = {file.name: file.contents for file in files}
    assert contents[own_files.USERS_FILE] == said
    assert contents[own_files.PAIRS_FILE] == "3 pairs of 1 user"


def test_without_data_prepare_says_what_it_takes(monkeypatch, capsys, tmp_path):
    arguments = ["--model", "unread", "--dir", tmp_path]
    refused(monkeypatch, capsys, script("prepare"), arguments, "--data", "allenai/multipref")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_script_of_tldr_says_where_own_data_go(monkeypatch, capsys, tmp_path, kind):
    row = {"user": "ada", "prompt": "Why?", "chosen": "So.", "rejected": "No."}
    path = write_rows(tmp_path / "data" / "mine.jsonl", [row])
    data = path if kind == "file" else path.parent
    prepare = load_script("RedditTLDR", "prepare")
    arguments = ["--data", data, "--model", "unread", "--dir", tmp_path / "out"]
    refused(monkeypatch, capsys, prepare, arguments, f"python OwnData/prepare.py --data {data}")


# ---- The demo


def test_the_demo_ends_in_a_yes_with_intervals_and_without_a_leak(ran):
    assert "synthetic" in ran.printed["prepare"]
    assert "Yes: the reward is personal." in ran.printed["train_basis"]
    assert "95 % interval" in ran.printed["train_basis"]
    assert len(ran.results["users"] + ran.results["unseen_users"]) == 36  # all of the demo
    for leaks in ran.results["leaks"].values():
        assert leaks["by_prompt"] == leaks["by_answer_in_prompt"] == leaks["by_answers"] == 0


def test_fewer_shots_than_the_demo_has_give_curves(ran, tmp_path):
    folder = ran.copy_to(tmp_path / "own")
    short = dict(K_list=[2], num_shots=[2, 4], trials=2, num_iterations=20, num_questions=2)
    printed(start(ran.folder, "vary_fewshot", "--dir", folder, **short))
    curves = lore.files.load_json(folder / "results" / "vary_fewshot.json")
    assert curves["config"]["seen_share"] is None
    assert (folder / "results" / "vary_fewshot.png").exists()


def test_two_processes_write_the_files_of_one_and_find_the_same(ran, tmp_path):
    arguments = ["--data", ran.data, "--model", ran.model, "--dir", tmp_path]
    first, second = two_processes(ran.folder, "prepare", *arguments)
    assert "distinct conversations to embed" in first
    assert second == ""
    for name in own_files.FILES:
        assert (tmp_path / name).read_bytes() == (ran.folder / name).read_bytes()
    short = dict(K_list=[0, 2], seeds=[0], num_iterations=30, controls=False)
    two_processes(ran.folder, "train_basis", "--dir", tmp_path, **short)
    alone = ran.copy_to(tmp_path / "alone")
    printed(start(ran.folder, "train_basis", "--dir", alone, **short))
    shared, single = results_in(tmp_path), results_in(alone)
    assert shared["users"] == single["users"]
    for fit, other in zip(shared["fits"], single["fits"], strict=True):
        if other["K"]:  # the reference is not trained
            assert fit["training_loss"] == pytest.approx(other["training_loss"], rel=1e-5)


def test_messages_in_three_turns_and_two_languages_go_to_a_report(monkeypatch, model, tmp_path):
    rng = random.Random(2)
    rows = []
    for user, number in itertools.product(("ada", "ben", "cem", "dina"), range(10)):
        history = []
        for turn in range(3):
            prompt = [*history, *messages(f"{user} {number} {turn} {rng.choice(WORDS)}?")]
            chosen, rejected = (f"{' '.join(rng.sample(WORDS, 4))}." for _ in range(2))
            row = {"user_id": user, "context": prompt, "chosen": chosen, "rejected": rejected}
            row |= {"conversation_id": 100 + number, "language": rng.choice(["pt", "en"])}
            rows.append(row)
            history = [*prompt, {"role": "assistant", "content": chosen}]
    results = trained(monkeypatch, model, write_rows(tmp_path / "mine.jsonl", rows), tmp_path)
    assert (tmp_path / "results" / "report.md").exists()
    assert results["leaks"][UNSEEN_TEST]["by_answer_in_prompt"] == 0
    assert results["counts"]["seen users"] == results["counts"]["unseen users"] == 2
