"""Which pairs are the same, and what the test repeats of the training."""

import dataclasses
import hashlib
import itertools
import json
import unicodedata

import pytest
import torch
from helpers import random_users
from studies import small_study, study_of

import lore.embedding_files
import lore.files
import lore.leaks
import prism
from lore.leaks import SKETCH, identities, leaks_of
from lore.normal_forms import prompt_key
from lore.study import PARTS
from utils import SEEN_TEST, UNSEEN_TEST, Pairs

pytestmark = pytest.mark.usefixtures("one_thread")

UNKNOWN = {"by_prompt": None, "by_answers": None, "by_answer_in_prompt": None}


def leaks_by(kind, study):
    """The shares of one kind, of the seen and of the unseen users."""
    leaks = leaks_of(study)
    return leaks[SEEN_TEST][kind], leaks[UNSEEN_TEST][kind]


def wide_users(counts, seed, d=40):
    """Users whose pairs are not alike by chance, as those of a few columns are."""
    return random_users(counts, d, seed)


# ---- Identity


def identity_of(texts):
    (identity,) = identities(small_study(texts={"train": [texts]}), ("train",))["train"]
    return identity


def test_pairs_are_equal_if_their_texts_are_whichever_way_round():
    identity = identity_of([("yes", "no"), ("no", "yes"), ("yes", "never"), ("yes", "no")])
    first, second, third, fourth = identity.keys.tolist()
    assert first == second == fourth != third
    assert identity.turned.tolist() == [True, False, True, True]  # alphabetically "no" is first


def test_texts_are_equal_if_they_look_alike():
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert composed != decomposed
    texts = [(composed, "a b"), (f" {decomposed}\n", "a  b "), ("caf\u200be\u0301", "\ufeffa b")]
    keys = identity_of([*texts, ("cafe", "a b")]).keys.tolist()
    assert keys[0] == keys[1] == keys[2] != keys[3]


def test_texts_that_run_together_alike_are_not_equal():
    identity = identity_of([("ab", "c"), ("a", "bc"), ("abc", "")])
    assert len(set(identity.keys.tolist())) == 3


def test_keys_are_digests_so_all_processes_of_a_training_have_the_same():
    digest = hashlib.blake2b(b"1 ab", digest_size=8).digest()
    assert identity_of([("b", "a")]).keys.tolist() == [int.from_bytes(digest, "little")]


def test_without_texts_pairs_are_equal_if_their_features_are_up_to_sign():
    X = wide_users([6], 0)[0]
    X[0, 0] = 0
    study = study_of(dict.fromkeys(PARTS, [X]) | {"train": [-X.flip(0)]})
    pairs = identities(study, ("train", "test"))
    trained, tested = pairs["train"][0], pairs["test"][0]
    assert tested.keys.tolist() == trained.keys[::-1].tolist()
    assert len(set(tested.keys.tolist())) == 6
    assert (tested.turned != trained.turned[::-1]).all()


def test_features_are_compared_if_texts_of_one_part_are_missing():
    users = wide_users([3], 0)
    study = study_of(dict.fromkeys(PARTS, users), texts={"train": [[("a", "b")] * 3]})
    pairs = identities(study, ("train", "test"))
    assert pairs["train"][0].keys.tolist() == pairs["test"][0].keys.tolist()
    assert len(set(pairs["train"][0].keys.tolist())) == 3


def test_pairs_of_tables_have_the_identity_of_their_matrices(monkeypatch):
    monkeypatch.setattr(lore.leaks, "HASHED_ROWS", 4)  # several slices
    generator = torch.Generator().manual_seed(0)
    tables = [torch.randn(12, 5, generator=generator) for _ in range(2)]
    tables[1][3] = tables[0][3]
    chosen, rejected = torch.randint(12, (2, 5, 9), generator=generator)
    users = [Pairs(tables[i // 3], chosen[i], rejected[i]) for i in range(5)]
    users.insert(2, torch.randn(4, 5, generator=generator))  # a matrix between them
    matrices = [X.dense() if isinstance(X, Pairs) else X for X in users]
    from_tables, from_matrices = (
        identities(study_of(dict.fromkeys(PARTS, features)), ("test",))["test"]
        for features in (users, matrices)
    )
    for table, matrix, X in zip(from_tables, from_matrices, matrices):
        assert table.keys.tolist() == matrix.keys.tolist()
        differ = (X != 0).any(1).numpy()  # two equal sides have no direction
        assert (table.turned == matrix.turned)[differ].all()


# ---- Prompts and conversations


def test_leaks_by_prompt_are_the_share_of_test_pairs_whose_prompt_was_trained_on():
    prompts = {
        "train": [["a", "b"], ["c"]],
        "test": [["c", "x"], ["y", "y"]],
        "train_unseen": [["x"]],
        "test_unseen": [["a", "y"]],
    }
    assert leaks_by("by_prompt", small_study(prompts=prompts)) == (0.25, 0.0)


def test_what_is_not_known_is_none():
    only_train = {"train": [["a"] * 5, ["b"] * 2]}
    for known in ({}, {"prompts": only_train}, {"texts": {"train": [[("a", "b")] * 5] * 2}}):
        for shares in leaks_of(small_study(**known)).values():
            assert shares.items() >= UNKNOWN.items()
            assert shares["by_features"] is not None


def test_a_conversation_leaks_if_the_same_user_was_trained_on_it():
    groups = {
        "train": [torch.tensor([0, 0, 1]), torch.tensor([0])],
        "test": [torch.tensor([1, 2]), torch.tensor([1, 0])],
    }
    study = small_study(groups=groups)
    assert leaks_by("by_prompt", study) == (0.5, None)
    prompts = {"train": [["a", "b", "c"], ["d"]], "test": [["x", "a"], ["x", "x"]]}
    assert leaks_by("by_prompt", dataclasses.replace(study, prompts=prompts)) == (0.75, None)


def test_prompts_of_prism_leak_by_their_text_in_whatever_conversation(tmp_path):
    def row(user, seen, split, dialog, text):
        return {
            "prompt": [{"role": "user", "content": text}],
            "extra_info": {
                "seen": seen,
                "split": split,
                "user_id": user,
                "dialog_id": dialog,
                "pair_format": prism.PAIR_FORMAT,
                "chosen_utterance": f"yes, {text}",
                "rejected_utterance": ["no", "never"],
                "chosen_conv_embedding": torch.ones(4),
                "rejected_conv_embedding": torch.zeros(2, 4),
            },
        }

    train = [row("a", True, "train", "1", "Hello"), row("b", False, "train", "2", "Why?")]
    test = [
        row("a", True, "test", "3", "Hello"),
        row("a", True, "test", "4", "Why?"),
        row("b", False, "test", "5", "How?"),
    ]
    for name, rows in zip(prism.FILES, (train, test)):
        lore.files.save_torch(tmp_path / name, rows)
    lore.files.save_tensors(
        tmp_path / lore.embedding_files.HEAD_FILE, {"reward_head": torch.ones(4, 1)}
    )
    study = prism.load_embeddings(tmp_path, "no model")
    assert leaks_by("by_prompt", study) == (0.5, 0.0)  # of two pairs a turn
    assert leaks_by("by_answers", study) == (0.5, 0.0)


def test_a_conversation_leaks_if_anybody_was_trained_on_it():
    conversations = {
        "train": [["c1", "c2"], ["c3"]],
        "test": [["c3", "c4"], ["c5", "c5"]],
        "train_unseen": [["c4"]],
        "test_unseen": [["c1", "c2"]],
    }
    study = small_study(conversations=conversations)
    assert leaks_by("by_prompt", study) == (0.25, 0.0)
    prompts = {"train": [["a", "b"], ["c"]], "test": [["x", "a"], ["x", "x"]]}
    assert leaks_by("by_prompt", dataclasses.replace(study, prompts=prompts)) == (0.5, 0.0)


def test_conversations_of_prism_that_are_on_both_sides_leak(tmp_path):
    """A user's second turn is in train, the first in the test: its answer is in that prompt."""

    def row(split, turns, chosen):
        prompt = [{"role": "user", "content": "Why is it so?"}]
        for text in turns:
            prompt += [{"role": "assistant", "content": text}, {"role": "user", "content": "And?"}]
        return {
            "prompt": prompt,
            "extra_info": {
                "seen": False,
                "split": split,
                "user_id": "b",
                "dialog_id": "1",
                "pair_format": prism.PAIR_FORMAT,
                "chosen_utterance": chosen,
                "rejected_utterance": ["No idea at all."],
                "chosen_conv_embedding": torch.ones(4),
                "rejected_conv_embedding": torch.zeros(1, 4),
            },
        }

    answer = "It always was."
    seen = row("train", [], "Of another person.")
    seen["extra_info"].update(seen=True, user_id="a", dialog_id="2")
    parts = [row("train", [answer], "That is all.")], [row("test", [], answer)]
    for name, rows in zip(prism.FILES, parts):
        lore.files.save_torch(tmp_path / name, [seen, *rows])
    lore.files.save_tensors(
        tmp_path / lore.embedding_files.HEAD_FILE, {"reward_head": torch.ones(4, 1)}
    )
    study = prism.load_embeddings(tmp_path, "no model")
    assert leaks_by("by_prompt", study) == (1.0, 1.0)  # the seen row is in both files
    assert leaks_by("by_answer_in_prompt", study) == (0.0, 1.0)


# ---- Answers


def messages(*texts):
    """The JSON of the user's and the assistant's messages in turn, as data sets write it."""
    roles = itertools.cycle(("user", "assistant"))
    return json.dumps([{"role": role, "content": text} for role, text in zip(roles, texts)])


def keyed(*texts):
    """The same, as PRISM's studies have it."""
    return prompt_key(json.loads(messages(*texts)))


def transcript(*texts):
    """The same as one plain text, which ends where the assistant is to answer."""
    speakers = itertools.cycle(("Human:", "Assistant:"))
    turns = [f"{speaker} {text}" for speaker, text in zip(speakers, texts)]
    return "\n\n".join([*turns, "Assistant:"])


FORMS = [messages, keyed, transcript, lambda *texts: messages(transcript(*texts))]
forms = pytest.mark.parametrize("form", FORMS, ids=["messages", "key", "text", "one message"])


@forms
def test_an_answer_leaks_if_a_training_prompt_goes_on_with_its_conversation(form):
    prompts = {
        "train": [[form("Why?", "It is so.", "And?")], [form("Who?"), form("How?", "Yes.", "So?")]],
        "test": [[form(" Why?\n")] * 3, [form("How?"), form("Who?")]],
        "train_unseen": [[form("Where?", "At the\u00a0pier.", "When?", "Late.", "Really?")]],
        "test_unseen": [[form("Where?"), form("Where?", "At the pier.", "When?"), form("When?")]],
    }
    texts = {
        "test": [
            [("It  is so.\n", "x"), ("x", "It is so."), ("Is it so.", "x")],
            [("Yes.", "No."), ("Yes.", "No.")],
        ],
        "test_unseen": [[("x", "At the pier."), ("Late.", "x"), ("Late.", "At the pier.")]],
    }
    study = small_study(prompts=prompts, texts=texts)
    assert leaks_by("by_answer_in_prompt", study) == (3 / 5, 2 / 3)


@forms
def test_a_stock_answer_in_other_conversations_is_no_leak(form):
    stock = ["Yes, of course.", "That is a good idea.", "Ask me again later on."]
    asked = [[f"question {user} {n}" for n in range(40)] for user in range(2)]

    def parts(first, last):
        users = [user[first:last] for user in asked]
        first_turns = [[form(question) for question in user] for user in users]
        second_turns = [
            [form(q, stock[n % 3], "And then?") for n, q in enumerate(user)] for user in users
        ]
        return [first + second for first, second in zip(first_turns, second_turns)]

    prompts = {"train": parts(0, 30), "test": parts(30, 40)}
    texts = {"test": [[(stock[n % 3], stock[(n + 1) % 3]) for n in range(20)]] * 2}
    study = small_study(prompts=prompts, texts=texts)
    assert leaks_by("by_answer_in_prompt", study) == (0.0, None)


def test_prompts_that_are_numbers_tell_nothing_of_answers():
    numbers = {part: [[1, 2]] for part in PARTS}
    study = small_study(prompts=numbers, texts={part: [[("a", "b")] * 2] for part in PARTS})
    assert leaks_by("by_answer_in_prompt", study) == (None, None)


def test_answers_leak_under_whatever_prompt_and_either_way_round():
    texts = {
        "train": [[("a", "b"), ("c", "d")], [("e", "f")]],
        "test": [[("b", "a"), ("a", "c")], [("c ", "d"), ("x", "y")]],
        "train_unseen": [[("x", "y")]],
        "test_unseen": [[("a", "b")]],
    }
    prompts = {
        "train": [["1", "2"], ["3"]],
        "test": [["4", "5"], ["6", "7"]],
        "train_unseen": [["8"]],
        "test_unseen": [["9"]],
    }
    study = small_study(texts=texts, prompts=prompts)
    assert leaks_by("by_answers", study) == (0.5, 0.0)
    assert leaks_by("by_prompt", study) == (0.0, 0.0)


# ---- Features


def study_with_test(test, d):
    """A user's training pairs, and test pairs that are made of them; the others do not matter."""
    (X,) = wide_users([12], 0, d)
    (fresh,) = wide_users([4], 1, d)
    others = wide_users([3], 2, d)
    tested = torch.cat([test(X), fresh])
    features = dict(train=[X], test=[tested], train_unseen=others, test_unseen=[fresh])
    return study_of(features)


@pytest.mark.parametrize("d", [40, 2000])  # exact, and by random projections
def test_features_leak_if_they_are_nearly_a_training_pair_or_its_negative(d):
    assert (d > SKETCH) == (d == 2000)

    def at_cosine(cosine):
        def turned(X):
            away = torch.randn(X.shape, generator=torch.Generator().manual_seed(3))
            away -= (away * X).sum(1, keepdim=True) / X.square().sum(1, keepdim=True) * X
            away *= (X.norm(dim=1) / away.norm(dim=1))[:, None]
            return cosine * X + (1 - cosine**2) ** 0.5 * away

        return turned

    for test, share in (
        (lambda X: X, 12 / 16),
        (lambda X: -3 * X[:4], 4 / 8),
        (at_cosine(0.997), 12 / 16),
        (at_cosine(-0.997), 12 / 16),
        (at_cosine(0.96), 0),
    ):
        assert leaks_by("by_features", study_with_test(test, d)) == (share, 0)


def test_the_features_of_another_user_do_not_leak():
    first, second = wide_users([5, 7], 0)
    study = study_of(
        dict(
            train=[first, second],
            test=[second, first],
            train_unseen=[first],
            test_unseen=[torch.cat([second, first])],
        )
    )
    assert leaks_by("by_features", study) == (0, 5 / 12)


def test_pairs_of_two_equal_sides_do_not_leak():
    (X,) = wide_users([5], 0)
    X[2] = 0
    study = study_of(dict.fromkeys(PARTS, [X]))
    assert leaks_by("by_features", study) == (0.8, 0.8)


def test_pairs_of_tables_leak_as_their_matrices():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(60, 300, generator=generator)
    rows = torch.randperm(60, generator=generator)
    train = [Pairs(table, rows[:10], rows[10:20]), Pairs(table, rows[:10], rows[20:30])]
    test = [Pairs(table, rows[15:25], rows[5:15]), Pairs(table, rows[20:30], rows[:10])]
    features = dict(train=train, test=test, train_unseen=train[:1], test_unseen=test[:1])
    dense = {part: [X.dense() for X in users] for part, users in features.items()}
    expected = (5 + 10) / 20, 5 / 10
    assert leaks_by("by_features", study_of(features)) == expected
    assert leaks_by("by_features", study_of(dense)) == expected
