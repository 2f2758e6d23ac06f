"""Evidence: validation, what a basis looks like, and all of it together on planted truths."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from helpers import (
    call,
    input_error,
    load_script,
    planted_basis,
    planted_pairs,
    planted_weights,
)
from studies import (
    N,
    d,
    entry_of,
    random_fit,
    small_study,
    study_of,
    study_with_tastes,
    study_without_tastes,
    swept,
    with_repeats,
)

import lore.embedding_files
import lore.files
import utils
from lore.controls import TossedControl, exchanged_accuracies, tossed_control
from lore.evidence import (
    VALIDATION,
    describe_basis,
    evidence,
    hold_out,
    judge_held_out,
    kept_fit,
)
from lore.intervals import interval, worst_served
from lore.leaks import leaks_of
from lore.study import PARTS
from utils import SEEN_TEST, SETTINGS, UNSEEN_TEST, Pairs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def study():
    """Users with tastes."""
    return study_with_tastes()


@pytest.fixture(scope="module")
def fits(study):
    return swept(study, seeds=(0, 1))


# ---- Seeds and validation


def test_the_kept_seed_has_the_lowest_loss_or_the_best_validation():
    fits = [random_fit(2, seed) for seed in range(3)]
    for fit, loss in zip(fits, (0.5, 0.3, 0.4)):
        fit.loss = loss
    assert kept_fit(fits).seed == 1
    for fit, accuracy in zip(fits, (0.6, 0.6, 0.7)):
        fit.accuracies = {VALIDATION: np.full(4, accuracy)}
    assert kept_fit(fits).seed == 2
    fits[2].accuracies = {VALIDATION: np.full(4, 0.6)}
    assert kept_fit(fits).seed == 1  # of equals the lowest loss


def test_validation_chooses_the_model_and_the_test_columns_do_not(study, fits):
    best_on_test = max(fits, key=lambda fit: fit.accuracies[UNSEEN_TEST].mean())
    assert best_on_test.K == 3
    validated = [
        dataclasses.replace(
            fit,
            accuracies=fit.accuracies | {VALIDATION: np.full(N, 0.9 if fit.K == 1 else 0.5)},
        )
        for fit in fits
    ]
    results = evidence(validated, study)
    assert results["chosen"] == {"K": 1, "alpha": 0, "by": "validation"}
    assert results["verdict"]["personal"] == "no"
    assert entry_of(results, 1)["accuracy"][VALIDATION]["mean"] == pytest.approx(0.9)
    assert evidence(fits, study)["chosen"] == {"K": None, "alpha": None, "by": "none"}


def held_rows(study, kept_study):
    """Which training pairs of each user were held out: bool `[m_i]`; all pairs are distinct."""
    rows = []
    for X, kept in zip(study.train, kept_study.train):
        is_kept = (X[:, None] == kept).all(2).any(1)  # (m_i,)
        rows.append(~is_kept)
    return rows


def test_held_out_prompts_are_held_out_with_all_their_pairs():
    study = small_study(prompts={"train": [["a", "a", "b", "c", "d"], ["a", "b"]]})
    kept, held_out = hold_out(study, 0.25)
    first, second = held_rows(study, kept)
    assert first.sum() == (2 if first[0] else 1) and first[0] == first[1]
    assert second.sum() == 1  # one goes, one stays
    for X, rows, held in zip(study.train, (first, second), held_out):
        assert torch.equal(X[rows], held)
    again, _ = hold_out(study, 0.25)
    assert all(torch.equal(a, b) for a, b in zip(again.train, kept.train))


@pytest.mark.parametrize(
    "prompts",
    [
        [(0,), (0,), (0, 1), (2,), (3,)],  # of several lengths
        [(0, 1), (0, 1), (1, 0), (2, 2), (3, 3)],  # each number is in several
        [("user", "a"), ("user", "a"), ("user", "b"), ("user", "c"), ("user", "d")],
        [(("user", "a"),), (("user", "a"),), (("user", "a"), ("user", "b")), (), ((),)],
        [1, 1.0, "1", None, (1,)],
    ],
    ids=repr,
)
def test_prompts_may_be_tuples(prompts):
    """They are held out as the same prompts are that are told apart by texts."""
    number_of = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    texts = [f"prompt {number_of[prompt]}" for prompt in prompts]
    found = small_study([5] * 20, prompts={"train": [prompts] * 20})
    expected = small_study([5] * 20, prompts={"train": [texts] * 20})
    kept, held_out = hold_out(found, 0.5)
    kept_of_texts, _ = hold_out(expected, 0.5)
    rows = held_rows(found, kept)
    assert all(map(torch.equal, rows, held_rows(expected, kept_of_texts)))
    assert all(held[0] == held[1] for held in rows)
    for user, held in enumerate(rows):
        stay = (~held).nonzero().flatten().tolist()
        assert kept.prompts["train"][user] == [prompts[pair] for pair in stay]
        assert torch.equal(held_out[user], found.train[user][held])


def test_conversations_are_held_out_whole_whatever_their_prompts():
    groups = torch.tensor([0, 0, 1, 1, 1, 2])
    study = small_study(
        [6] * 20,
        groups={"train": [groups] * 20},
        prompts={"train": [["a", "b", "a", "c", "d", "a"]] * 20},
    )
    held = held_rows(study, hold_out(study, 0.3)[0])
    for rows in held:
        assert len(groups[rows].unique()) == 1
        assert not set(groups[rows].tolist()) & set(groups[~rows].tolist())
    assert len({tuple(rows.tolist()) for rows in held}) == 3  # each conversation of somebody


def test_if_neither_prompts_nor_groups_are_known_every_pair_is_drawn_by_itself():
    study = small_study([10] * 20, prompts={"test": [["a"] * 10] * 20})
    held = torch.stack(held_rows(study, hold_out(study, 0.3)[0]))
    assert (held.sum(1) == 3).all()
    assert held.any(0).all()


def test_what_is_known_of_the_training_pairs_is_cut_with_them():
    counts = [7, 6]
    prompts = [[f"{user} {pair // 2}" for pair in range(m)] for user, m in enumerate(counts)]
    texts = [[(f"{user} {pair}", "no") for pair in range(m)] for user, m in enumerate(counts)]
    groups = [torch.arange(m) // 2 for m in counts]
    study = small_study(
        counts,
        prompts={"train": prompts, "test": prompts},
        texts={"train": texts, "test_unseen": texts},
        groups={"train": groups, "train_unseen": groups},
    )
    kept, _ = hold_out(study, 0.5)
    for user, rows in enumerate(held_rows(study, kept)):
        stay = (~rows).nonzero().flatten().tolist()
        assert len(stay) < counts[user]
        assert kept.prompts["train"][user] == [prompts[user][pair] for pair in stay]
        assert kept.texts["train"][user] == [texts[user][pair] for pair in stay]
        numbers = kept.groups["train"][user]
        assert numbers.dtype == torch.int64
        assert numbers.unique().tolist() == list(range(len(numbers.unique())))  # without a gap
        same_group = groups[user][stay][:, None] == groups[user][stay]
        assert torch.equal(numbers[:, None] == numbers, same_group)
    assert kept.prompts["test"] is prompts and kept.texts["test_unseen"] is texts
    assert kept.groups["train_unseen"] is groups
    assert study.prompts["train"] is prompts and len(study.train[0]) == 7  # the study is as it was


def test_pairs_of_a_table_are_held_out_as_their_matrices():
    table = torch.randn(30, d, generator=torch.Generator().manual_seed(0))
    pairs = [Pairs(table, torch.arange(i, i + 9), torch.arange(i + 12, i + 21)) for i in range(4)]
    dense = [X.dense() for X in pairs]
    from_table, from_matrices = (
        hold_out(study_of(dict.fromkeys(PARTS, users)), 0.3) for users in (pairs, dense)
    )
    for X, Y in zip(from_table[0].train + from_table[1], from_matrices[0].train + from_matrices[1]):
        assert torch.equal(X.dense(), Y)


def test_a_share_of_0_holds_nothing_out(fits):
    study = small_study()
    kept, held_out = hold_out(study, 0)
    assert kept is study and held_out is None
    assert judge_held_out(fits, held_out) is fits


def test_who_cannot_hold_anything_out_is_named():
    study = small_study(prompts={"train": [["a", "b", "b", "b", "b"], ["a", "a"]]})
    with input_error("validation_share", "seen 1", "one prompt only", "leave this user out"):
        hold_out(study, 0.2)
    for share in (-0.1, 0.95, "0.2", None):
        with input_error("validation_share", repr(share), "0.9"):
            hold_out(small_study(), share)


def test_a_share_of_the_prompts_is_held_out_and_scored_but_not_trained_on(study):
    prompts = [[f"{i} {j // 4}" for j in range(40)] for i in range(N)]
    study = dataclasses.replace(study, prompts={"train": prompts})
    kept, held_out = hold_out(study, 0.2)
    held = held_rows(study, kept)
    assert all(rows.sum() == 8 for rows in held)
    rest = dataclasses.replace(study, train=[X[~rows] for X, rows in zip(study.train, held)])
    (alone,) = swept(rest, K_list=[2])
    (fit,) = judge_held_out(swept(kept, K_list=[2]), held_out)
    torch.testing.assert_close(fit.V, alone.V)
    expected = [
        utils.evaluate_model(X[rows], fit.V, w) for X, rows, w in zip(study.train, held, fit.W)
    ]
    np.testing.assert_allclose(fit.accuracies[VALIDATION], expected, atol=1e-6)
    assert list(fit.accuracies) == [*SETTINGS, VALIDATION]


# ---- The basis


def test_the_effective_rank_of_a_known_basis():
    V = planted_basis(d, 4, length=1.0)
    fit = random_fit(4, 0)
    fit.V = V
    for w, expected in (((1, 1, 1, 1), 4), ((1, 1, 0, 0), 2), ((1, 0, 0, 0), 1)):
        fit.W = torch.tensor([w]) / sum(w)
        basis = describe_basis([fit], V[:, :1])
        assert basis["effective_rank"] == pytest.approx(expected, rel=1e-5)
        assert basis["mean_weight_entropy"] == pytest.approx(np.log(expected), abs=1e-6)
    assert basis["largest_cosine_to_head"] == pytest.approx(1) and basis["columns"] == 4
    assert basis["largest_cosine_between_columns"] == pytest.approx(0, abs=1e-6)


def test_cosines_and_angles_are_those_that_were_planted():
    axes = torch.eye(d)
    fits = [random_fit(2, seed) for seed in range(2)]
    fits[0].V = axes[:, :2]
    fits[1].V = torch.stack([axes[:, 0], (axes[:, 1] + axes[:, 2]) / 2**0.5], 1)
    basis = describe_basis(fits, axes[:, :1] + axes[:, 1:2])
    np.testing.assert_allclose(basis["angles_between_seeds"], [0, 45], atol=1e-4)
    assert basis["largest_cosine_to_head"] == pytest.approx(0.5**0.5)


def test_angles_are_compared_of_seeds_that_kept_different_numbers_of_columns():
    axes = torch.eye(d)
    fits = [random_fit(3, seed) for seed in range(3)]
    fits[0].V = axes[:, :3]
    fits[1].V = axes[:, 1:4]
    fits[2].V = axes[:, 1:3]
    angles = describe_basis(fits, axes[:, :1])["angles_between_seeds"]
    np.testing.assert_allclose(angles, [0, 0], atol=1e-4)


def test_a_basis_pulled_onto_the_head_is_said_to_have_collapsed_with_the_remedy(study):
    study = dataclasses.replace(study, reward_head=planted_basis(d, 1, seed=8))
    fits = swept(study, K_list=(0, 2), alpha_list=(0, 1e4), num_iterations=400)
    text = evidence(fits, study)["verdict"]["text"]
    assert "the basis has collapsed onto the reward head at K = 2 (alpha 10000)." in text
    assert "try alpha_list = [0, 0.0001, 0.001, 0.01, 0.1] with validation_share = 0.2" in text


# ---- Evidence


def test_the_personal_part_is_planted_and_found(study, fits):
    results = evidence(fits, study)
    entry = entry_of(results, 3)
    assert results["verdict"]["personal"] == "yes"
    assert results["verdict"]["text"].startswith("Yes: the reward is personal.")
    assert "At K = 3 (alpha 0) the users' own weights" in results["verdict"]["text"]
    assert entry["personal_part"]["low"] > 0.02
    assert entry["personal_part"]["p"] < 1e-3
    assert entry["controls"]["other_users"]["mean"] < entry["controls"]["mean_weights"]["mean"]
    assert entry["seeds"] == [0, 1]
    assert len(entry["basis"]["angles_between_seeds"]) == 3
    assert max(entry["basis"]["angles_between_seeds"][:2]) < 45  # the planted span, from two starts


def test_without_tastes_nothing_personal_is_found():
    study = study_without_tastes()
    results = evidence(swept(study), study)
    assert results["verdict"]["personal"] != "yes"
    assert abs(entry_of(results, 3)["personal_part"]["mean"]) < 0.02


def test_what_is_said_of_exchanged_weights_is_their_mean_over_seeds(study, fits):
    entry = entry_of(evidence(fits, study), 3)
    exchanged = exchanged_accuracies(study.test_unseen, [fit for fit in fits if fit.K == 3])
    assert entry["controls"]["mean_weights"] == interval(exchanged.mean)
    assert entry["controls"]["other_users"] == interval(exchanged.others)
    assert entry["personal_part"] == interval(exchanged.own - exchanged.mean, difference=True)
    assert entry["served_worse"] == np.mean(exchanged.own < exchanged.mean)


def test_the_worst_served_are_those_of_the_unseen_users_unseen_prompts(study, fits):
    results = evidence(fits, study)
    for K in (0, 1, 3):
        accuracies = np.mean([fit.accuracies[UNSEEN_TEST] for fit in fits if fit.K == K], 0)
        assert entry_of(results, K)["worst_served"] == worst_served(accuracies)


def test_one_reward_for_everybody_serves_nobody_worse_than_the_mean_weights(study, fits):
    results = evidence(fits, study)
    assert entry_of(results, 1)["served_worse"] is None
    assert entry_of(results, 1)["personal_part"] is None


def test_users_without_tastes_are_as_often_served_worse_as_better():
    study = study_without_tastes()
    fits = swept(study, K_list=[3])
    (fit,) = fits
    fit.W_unseen = torch.full_like(fit.W_unseen, 1 / 3)
    assert entry_of(evidence(fits, study), 3)["served_worse"] == 0  # equal is not worse


def test_the_tossed_control_is_under_its_model_and_in_the_verdict(study, fits):
    control = TossedControl(3, 0, np.full(N, 0.7), deviation=0.01)
    results = evidence(fits, study, control)
    expected = {"mean": 0.7, "low": 0.7 - 0.026, "high": 0.7 + 0.026}
    assert entry_of(results, 3)["controls"]["tossed"] == pytest.approx(expected)
    assert entry_of(results, 1)["controls"]["tossed"] is None
    assert "predicts 0.700 of others, not 0.5" in results["verdict"]["text"]
    assert (
        "Not checked for signs of an artefact: repeats by prompt, repeats by answers, repeats by "
        "answer in prompt, randomly " in (evidence(fits, study)["verdict"]["text"])
    )


def test_the_longer_answer_is_described_and_is_no_alarm(study, fits):
    texts = [
        [(f"{user} {pair} longer", f"{user} {pair}") for pair in range(60)] for user in range(N)
    ]
    with_texts = dataclasses.replace(study, texts={"test_unseen": texts})
    results = evidence(fits, with_texts)
    for K in (0, 1, 3):
        longer = entry_of(results, K)["controls"]["longer"]
        assert longer == pytest.approx({"mean": 1, "low": 1, "high": 1})
    assert "longer" not in results["verdict"]["text"]
    assert entry_of(evidence(fits, study), 3)["controls"]["longer"] is None


def test_a_model_per_user_is_compared_if_there_is_a_pooled_direction(study, fits):
    results = evidence(fits, study)
    own = entry_of(results, 3)["controls"]["model_per_user"]
    assert own["mean"] > entry_of(results, 1)["accuracy"][UNSEEN_TEST]["mean"]
    assert entry_of(results, 1)["controls"]["model_per_user"] == own
    assert f"a model per user {own['mean']:.3f}" in results["verdict"]["text"]
    without = evidence([fit for fit in fits if fit.K != 1], study)
    assert entry_of(without, 3)["controls"]["model_per_user"] is None
    assert "model per user" not in without["verdict"]["text"]


@pytest.mark.parametrize("kind", ["prompt", "answers", "features"])
@pytest.mark.parametrize("share", [0.2, 1.0])
def test_a_leak_without_tastes_is_no_yes_and_is_said(kind, share):
    """Of "answers" every comparison was asked twice, with "?" and with " ?!"."""
    study = with_repeats(study_without_tastes(), share, kind)
    control = tossed_control(study, [5], [0], [0], 150, "cpu")
    results = evidence(swept(study), study, control)
    assert results["leaks"] == leaks_of(study)
    leaks = results["leaks"][UNSEEN_TEST]
    assert leaks[f"by_{kind}"] == pytest.approx(share)
    if kind == "answers":
        assert leaks["by_prompt"] == 0
    assert results["verdict"]["personal"] != "yes"
    text = results["verdict"]["text"]
    assert "Signs of an artefact: a leak, as test pairs repeat training pairs, " in text
    assert f"{100 * share:.1f} % by {kind}" in text
    assert "none in these checks" not in text
    assert text.endswith("copies of a pair, on one side of the split, and run again.")


def test_without_a_leak_all_checks_are_said_to_find_nothing():
    study = with_repeats(study_without_tastes(), 0, "answers")
    control = tossed_control(study, [5], [0], [0], 150, "cpu")
    text = evidence(swept(study), study, control)["verdict"]["text"]
    assert "Signs of an artefact: none in these checks (" in text


def test_every_field_is_there_and_plain_json(study, fits):
    results = json.loads(json.dumps(evidence(fits, study), allow_nan=False))
    assert set(results) == {"evidence", "chosen", "leaks", "verdict"}
    assert [entry["K"] for entry in results["evidence"]] == [0, 1, 3]
    for entry in results["evidence"]:
        assert set(entry) == {
            "K",
            "alpha",
            "seeds",
            "accuracy",
            "minus_reference",
            "minus_pooled",
            "controls",
            "personal_part",
            "worst_served",
            "served_worse",
            "basis",
        }
        assert set(entry["controls"]) == {
            "mean_weights",
            "other_users",
            "tossed",
            "longer",
            "model_per_user",
        }
        for name in ("accuracy", "minus_reference", "minus_pooled"):
            assert set(entry[name]) == set(SETTINGS)
    for shares in results["leaks"].values():
        assert set(shares) == {"by_prompt", "by_answers", "by_answer_in_prompt", "by_features"}
    assert len(results["verdict"]["text"].splitlines()) <= 6


# ---- What is wrong on purpose shows, through the scripts

D = 32
WORKERS = 44  # in the files; two of each file are left out
BASIS = planted_basis(D, 3)


def write_pickles(folder, wrong=None):
    """TL;DR's embeddings of planted workers, and the mean of their directions as the reward head.

    wrong: what is wrong with them, "rejected side", "user ids", "reference", "equal sides" or None.
    """
    weights = planted_weights(WORKERS, 3, 0.1)
    losing = torch.zeros(D)
    if wrong == "rejected side":  # nobody has tastes, and brackets around every rejected answer
        weights = torch.full_like(weights, 1 / 3)
        bracket = torch.randn(D, generator=torch.Generator().manual_seed(1))
        losing = 3 * bracket / bracket.norm()
    files = (("tldr_embeddings_train.pkl", 45), ("tldr_embeddings_val.pkl", 60))
    for seed, (name, pairs) in enumerate(files):
        if wrong == "user ids" and seed == 1:
            shuffled = torch.randperm(WORKERS, generator=torch.Generator().manual_seed(2))
            weights = weights[shuffled]
        workers = planted_pairs(BASIS, weights, pairs, seed, sampled=True)
        if wrong == "equal sides":
            workers = [0 * X for X in workers]
        content = {}
        for i, X in enumerate(workers):
            content[f"w{i:02}"] = [
                {
                    "text": f"{seed} {i} {j}",
                    "winning_summary": f"{seed} {i} {j} " + "a" * (1 + j % 3),
                    "losing_summary": f"{seed} {i} {j} bb",
                    "embeddings": {"winning": [x], "losing": [losing]},
                }
                for j, x in enumerate(X)
            ]
        lore.files.save_torch(folder / name, content)
    head = BASIS.sum(1, keepdim=True)
    if wrong == "reference":  # orthogonal to all that anybody likes
        head = torch.linalg.qr(torch.cat([BASIS, torch.ones(D, 1)], 1)).Q[:, 3:]
    lore.files.save_tensors(folder / lore.embedding_files.HEAD_FILE, {"reward_head": head})


def train_on_pickles(monkeypatch, capsys, folder, wrong=None, **constants):
    """Run TL;DR's train_basis.py -> (results.json, the text of report.md, what it printed)."""
    write_pickles(folder, wrong)
    script = load_script("RedditTLDR", "train_basis")
    short = {"K_list": [0, 1, 3], "num_iterations": 150, "seeds": [0]}
    for name, value in (short | constants).items():
        assert hasattr(script, name)
        monkeypatch.setattr(script, name, value)
    call(monkeypatch, script, "--dir", folder)
    results = json.loads((folder / "results" / "results.json").read_text())
    report = (folder / "results" / "report.md").read_text()
    return results, report, capsys.readouterr().out


def test_the_script_finds_planted_tastes_and_prints_the_verdict(monkeypatch, capsys, tmp_path):
    results, report, printed = train_on_pickles(monkeypatch, capsys, tmp_path)
    assert results["verdict"]["personal"] == "yes"
    assert results["verdict"]["text"] in printed
    controls = entry_of(results, 3)["controls"]
    assert controls["tossed"]["low"] <= 0.5 <= controls["tossed"]["high"]
    # a third of the chosen answers each is longer, as long, and shorter
    assert controls["longer"]["mean"] == pytest.approx(0.5)
    nothing = {
        "by_prompt": 0.0,
        "by_answers": 0.0,
        "by_answer_in_prompt": 0.0,
        "by_features": 0.0,
    }
    assert results["leaks"] == {SEEN_TEST: nothing, UNSEEN_TEST: nothing}
    assert "Signs of an artefact: none in these checks (" in printed
    assert f"**{results['verdict']['text'].splitlines()[0]}**" in report
    assert "report.md" in printed


def test_brackets_on_the_rejected_side_are_one_direction_and_not_personal(
    monkeypatch, capsys, tmp_path
):
    results, report, _ = train_on_pickles(monkeypatch, capsys, tmp_path, "rejected side")
    assert entry_of(results, 1)["minus_reference"][UNSEEN_TEST]["low"] > 0.1
    assert abs(entry_of(results, 3)["personal_part"]["mean"]) < 0.02
    assert results["verdict"]["personal"] != "yes"
    assert "the same for everybody" not in report  # nothing is said of what explains the gain


def test_user_ids_shuffled_between_training_and_test_are_not_personal(
    monkeypatch, capsys, tmp_path
):
    results, _, printed = train_on_pickles(monkeypatch, capsys, tmp_path, "user ids")
    assert results["verdict"]["personal"] != "yes" and "Yes" not in printed


def test_a_reference_that_is_not_the_head_is_said_to_be_at_chance(monkeypatch, capsys, tmp_path):
    said = "chance (check that it is the model's reward head)"
    _, report, _ = train_on_pickles(monkeypatch, capsys, tmp_path, "reference")
    assert said in report
    _, report, _ = train_on_pickles(monkeypatch, capsys, tmp_path)
    assert said not in report


def test_pairs_that_no_reward_can_tell_apart_are_named_and_not_the_head(
    monkeypatch, capsys, tmp_path
):
    results, report, _ = train_on_pickles(monkeypatch, capsys, tmp_path, "equal sides")
    assert results["verdict"]["personal"] == "undecided"
    assert "are equal on both sides" in report
    assert "check that it is the model's reward head" not in report
    assert "no better than chance" not in report


def test_held_out_posts_choose_the_model_that_is_judged(monkeypatch, capsys, tmp_path):
    results, report, printed = train_on_pickles(
        monkeypatch, capsys, tmp_path, validation_share=0.2, controls=False
    )
    best = max(results["evidence"], key=lambda entry: entry["accuracy"][VALIDATION]["mean"])
    assert results["chosen"] == {
        "K": best["K"],
        "alpha": 0,
        "by": "validation",
        "file": "K_3.safetensors",
    }
    assert best["K"] == 3 and "Validation" in printed
    assert "about one model (chosen by validation: K = 3, alpha 0, " in report
    assert "* chosen by validation: K = 3, alpha 0, " in printed
    held_out = results["counts"]["validation pairs"]
    assert 0 < held_out < results["counts"]["train pairs"] / 3
    assert all(entry["controls"]["tossed"] is None for entry in results["evidence"])
