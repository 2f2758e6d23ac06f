"""Evidence against float64 loops, closed forms and planted truths."""

import dataclasses
import json
import re

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
    random_users,
)

import lore.embedding_files
import lore.evidence
import lore.files
import lore.intervals
import prism
import utils
from lore.evidence import (
    VALIDATION,
    describe_basis,
    evidence,
    exchanged_accuracies,
    hold_out,
    judge_held_out,
    kept_fit,
    longer_answer_accuracies,
    prompt_leaks,
    toss,
    tossed_control,
)
from lore.intervals import interval, joint_intervals
from lore.study import PARTS, Study
from lore.verdict import ModelEvidence, judge
from utils import SEEN_TEST, SETTINGS, UNSEEN_TEST, Fit, Pairs

d = 16
N = 24

pytestmark = pytest.mark.usefixtures("one_thread")


def study_of(features, **known):
    """A study of these features, {part: one entry per user}; known: its further fields."""
    defaults = dict(
        title="planted",
        seen=[f"seen {i}" for i in range(len(features["train"]))],
        unseen=[f"unseen {i}" for i in range(len(features["test_unseen"]))],
        reward_head=torch.ones(features["train"][0].shape[1], 1),
    )
    return Study(**defaults | features | known)


def planted_study(W_seen, W_unseen, seed=0):
    """Users whose weights over a planted basis are the rows of W."""
    V = planted_basis(d, W_seen.shape[1])
    weights = dict(train=W_seen, test=W_seen, train_unseen=W_unseen, test_unseen=W_unseen)
    pairs = dict(train=40, test=30, train_unseen=30, test_unseen=60)
    features = {
        part: planted_pairs(V, weights[part], pairs[part], seed=10 * seed + i, sampled=True)
        for i, part in enumerate(PARTS)
    }
    return study_of(features)


def small_study(counts=(5, 2), **known):
    """A few seen users with so many training pairs each; the other parts do not matter."""
    users = random_users(counts, 4)
    return study_of(dict(train=users, test=users, train_unseen=users, test_unseen=users), **known)


def swept(
    study, K_list=(0, 1, 3), seeds=(0,), alpha_list=(0,), num_iterations=150, regularized=False
):
    """The fits of a short sweep."""
    return utils.sweep(
        list(K_list),
        list(alpha_list),
        study.reward_head,
        *study.features().values(),
        len(study.seen),
        len(study.unseen),
        "cpu",
        seed=list(seeds),
        num_iterations=num_iterations,
        regularized=regularized,
    )


def entry_of(results, K, alpha=0):
    """The entry of one model in what `evidence` returns."""
    return next(
        entry for entry in results["evidence"] if (entry["K"], entry["alpha"]) == (K, alpha)
    )


def random_fit(K, seed, N=N):
    generator = torch.Generator().manual_seed(seed)
    V = torch.randn(d, K, generator=generator)
    W = torch.randn(N, K, generator=generator).softmax(1)
    W_unseen = torch.randn(N, K, generator=generator).softmax(1)
    return Fit(K, 0, seed, V, W, W_unseen, 0.0)


@pytest.fixture(scope="module")
def study():
    """Users with tastes."""
    return planted_study(planted_weights(N, 3, 0.1, seed=0), planted_weights(N, 3, 0.1, seed=100))


@pytest.fixture(scope="module")
def fits(study):
    return swept(study, seeds=(0, 1))


# ---- Intervals


def test_the_interval_is_that_of_plain_means_over_the_users_drawn():
    accuracies = np.random.default_rng(1).random(7)
    counts = np.random.default_rng(0).multinomial(7, np.full(7, 1 / 7), lore.intervals.DRAWS)
    draws = [
        np.mean([accuracies[i] for i, count in enumerate(draw) for _ in range(count)])
        for draw in counts
    ]
    result = interval(accuracies)
    assert [result["low"], result["high"]] == pytest.approx(np.percentile(draws, (2.5, 97.5)))
    assert result["mean"] == pytest.approx(accuracies.mean())
    assert interval(None) is None


def test_intervals_cover_the_planted_mean_in_90_to_99_of_100_one_by_one_and_all_at_once():
    covered = covered_together = none_above = 0
    for repeat in range(100):
        parts = np.random.default_rng(repeat).binomial(50, 0.6, (4, 40)) / 50 - 0.6
        intervals = [interval(part) for part in parts]
        covered += np.mean([found["low"] <= 0 <= found["high"] for found in intervals])
        low, high = joint_intervals(parts.T)
        covered_together += (low <= 0).all() and (high >= 0).all()
        named_low, _ = interval_in(judged(parts))  # if any row is above 0, one of these is named
        none_above += named_low <= 0
    assert 90 <= covered <= 99
    assert 90 <= covered_together <= 99
    assert 90 <= none_above <= 100  # one side


def test_differences_are_paired_within_a_user():
    level = np.random.default_rng(0).random(30)  # users differ widely, the two models by a constant
    result = interval((level + 0.02) - level, difference=True)
    assert result["low"] == pytest.approx(0.02) and result["high"] == pytest.approx(0.02)
    assert result["p"] < 1e-4


def test_the_signed_rank_p_is_that_of_a_sum_of_ranks():
    differences = np.random.default_rng(3).normal(0.3, 1, 40)
    ranks = np.abs(differences).argsort().argsort() + 1
    statistic = min(ranks[differences > 0].sum(), ranks[differences < 0].sum())
    z = (statistic - 40 * 41 / 4) / (40 * 41 * 81 / 24) ** 0.5
    expected = torch.special.ndtr(torch.tensor(z, dtype=torch.float64)).item() * 2
    assert interval(differences, difference=True)["p"] == pytest.approx(expected)
    nothing = interval(np.zeros(9), difference=True)
    assert nothing == {"mean": 0, "low": 0, "high": 0, "p": 1}
    rounding_error = 0.1 + 0.2 - 0.3
    assert interval(np.array([rounding_error] * 9), difference=True)["p"] == 1


# ---- Controls


def plain_exchange(X, fit, i, j):
    """Accuracy of user i's pairs with the weights of user j (None: the mean), in float64 loops."""
    V, W = fit.V.double(), fit.W_unseen.double()
    w = sum(W) / len(W) if j is None else W[j]
    margins = [float(sum(x.double() @ V[:, k] * w[k] for k in range(len(w)))) for x in X[i]]
    return np.mean([margin > 0 for margin in margins])


def test_other_users_weights_are_the_mean_over_all_others(study, fits):
    few_pairs = [X[:7] for X in study.test_unseen]
    entry = entry_of(evidence(fits, dataclasses.replace(study, test_unseen=few_pairs)), 3)
    seeds = [fit for fit in fits if fit.K == 3]
    users = range(N)

    def mean_over_seeds(pairs_of_users):
        return np.mean(
            [plain_exchange(few_pairs, fit, i, j) for fit in seeds for i, j in pairs_of_users]
        )

    others = mean_over_seeds([(i, j) for i in users for j in users if j != i])
    assert entry["controls"]["other_users"]["mean"] == pytest.approx(others, abs=1e-6)
    mean_weights = mean_over_seeds([(i, None) for i in users])
    assert entry["controls"]["mean_weights"]["mean"] == pytest.approx(mean_weights, abs=1e-6)
    own = mean_over_seeds([(i, i) for i in users])
    assert entry["personal_part"]["mean"] == pytest.approx(own - mean_weights, abs=1e-6)


def test_pairs_of_a_table_are_exchanged_as_their_matrices():
    table = torch.randn(30, d, generator=torch.Generator().manual_seed(0))
    pairs = [Pairs(table, torch.arange(i, i + 9), torch.arange(i + 12, i + 21)) for i in range(4)]
    dense = [X.dense() for X in pairs]
    fits = [random_fit(5, seed, N=4) for seed in range(2)]
    from_table = exchanged_accuracies(pairs, fits)
    from_matrices = exchanged_accuracies(dense, fits)
    for name in ("own", "mean", "others", "personal_part"):
        np.testing.assert_allclose(getattr(from_table, name), getattr(from_matrices, name))


def test_a_single_user_has_nobody_to_exchange_weights_with():
    X = random_users([9], d)
    assert exchanged_accuracies(X, [random_fit(2, 0, N=1)]).others is None


def test_the_personal_part_is_planted_and_found(study, fits):
    results = evidence(fits, study)
    entry = entry_of(results, 3)
    assert results["verdict"]["personal"] == "yes"
    assert results["verdict"]["text"].startswith("Yes: at K = 3 (alpha 0)")
    assert entry["personal_part"]["low"] > 0.02 and entry["personal_part"]["p"] < 1e-3
    assert entry["controls"]["other_users"]["mean"] < entry["controls"]["mean_weights"]["mean"]
    assert entry["seeds"] == [0, 1] and len(entry["basis"]["angles_between_seeds"]) == 3
    assert max(entry["basis"]["angles_between_seeds"][:2]) < 45  # the planted span, from two starts


def test_the_interval_of_the_personal_part_covers_the_planted_one_in_90_to_99_of_100():
    V = planted_basis(d, 3)

    def personal_part(users, pairs, seed):
        """Under the planted models themselves."""
        W = planted_weights(users, 3, 0.1, seed)
        features = planted_pairs(V, W, pairs, seed, sampled=True)
        return exchanged_accuracies(features, [Fit(3, 0, 0, V, W, W, 0.0)]).personal_part

    truth = np.mean([personal_part(40, 200, 1000 + i).mean() for i in range(60)])
    covered = 0
    for seed in range(100):
        result = interval(personal_part(40, 30, seed))
        covered += result["low"] <= truth <= result["high"]
    assert truth > 0.1
    assert 90 <= covered <= 99


def test_models_of_tossed_pairs_are_at_chance_even_if_all_differences_share_a_direction(study):
    shared = study_of({part: [X + 2 for X in users] for part, users in study.features().items()})
    for one_study in (study, shared):
        tossed = tossed_control(one_study, [0, 1, 3], [0], [0], 150, "cpu")
        results = evidence(swept(one_study), one_study, tossed)
        control = entry_of(results, 3)["controls"]["tossed"]
        assert control["low"] <= 0.5 <= control["high"]
        assert entry_of(results, 1)["controls"]["tossed"] is None
        text = results["verdict"]["text"]
        assert "Control: a model trained on randomly flipped choices scores 0." in text
        assert "Signs of an artefact: none in these checks." in text


@pytest.mark.parametrize("regularized", [False, True])
def test_the_tossed_control_is_the_largest_rank_with_the_first_alpha_and_seed(study, regularized):
    tossed_study = dataclasses.replace(
        study,
        train=list(toss(study.train, 0)),
        train_unseen=list(toss(study.train_unseen, 1)),
        test_unseen=list(toss(study.test_unseen, 2)),
    )
    (expected,) = swept(
        tossed_study,
        K_list=[3],
        alpha_list=[0.1],
        seeds=[5],
        num_iterations=40,
        regularized=regularized,
    )
    control = tossed_control(study, [1, 3, 2], [0.1, 0], [5, 6], 40, "cpu", regularized=regularized)
    assert (control.K, control.alpha) == (3, 0.1)
    np.testing.assert_array_equal(control.accuracies, expected.accuracies[UNSEEN_TEST])


def test_without_a_rank_above_1_nothing_is_tossed(study):
    assert tossed_control(study, [0, 1], [0], [0], 40, "cpu") is None


def test_the_tossed_control_resumes_from_a_checkpoint_of_its_own(study, tmp_path):
    class CountedCheckpoint(lore.files.TrainingCheckpoint):
        resumed = 0

        def load(self, identity):
            state = super().load(identity)
            self.resumed += state is not None
            return state

    checkpoint = CountedCheckpoint(tmp_path / "tossed.pt")
    first, again = (
        tossed_control(study, [3], [0], [0], 40, "cpu", checkpoint=checkpoint) for _ in range(2)
    )
    assert checkpoint.resumed == 1
    np.testing.assert_array_equal(first.accuracies, again.accuracies)


def test_a_toss_turns_half_of_the_pairs_and_the_same_ones_for_tables_and_matrices():
    table = torch.randn(400, d, generator=torch.Generator().manual_seed(0))
    pairs = Pairs(table, torch.arange(200), torch.arange(200, 400))
    (from_table,) = toss([pairs], 3)
    (from_matrix,) = toss([pairs.dense()], 3)
    assert torch.equal(from_table.dense(), from_matrix)
    turned = (from_matrix == -pairs.dense()).all(1)
    assert 70 < turned.sum() < 130
    assert torch.equal(from_matrix[~turned], pairs.dense()[~turned])


def test_test_pairs_are_tossed_one_user_at_a_time(study):
    features = iter(study.test_unseen)
    next(toss(features))
    assert len(list(features)) == N - 1


def test_the_longer_answer_is_scored_if_texts_are_known(study, fits):
    texts = [("longer", "short"), ("longer", "short"), ("short", "longer"), ("equal", "equal")]
    with_texts = dataclasses.replace(study, texts={"test_unseen": [texts] * N})
    assert longer_answer_accuracies(with_texts).tolist() == [0.625] * N
    results = evidence(fits, with_texts)
    expected = pytest.approx({"mean": 0.625, "low": 0.625, "high": 0.625})
    assert entry_of(results, 3)["controls"]["longer"] == expected
    assert "Control: taking the longer answer scores 0.625" in results["verdict"]["text"]
    assert "Signs of an artefact: taking the longer answer." in results["verdict"]["text"]
    assert entry_of(evidence(fits, study), 3)["controls"]["longer"] is None


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
    assert "Collapsed onto the reward head" in text
    assert "0.99: K = 2 (alpha 10000)." in text and "validation_share" in text


# ---- Leaks


def test_leaks_are_the_share_of_test_pairs_whose_prompt_was_trained_on():
    prompts = {
        "train": [["a", "b"], ["c"]],
        "test": [["c", "x"], ["y", "y"]],
        "train_unseen": [["x"]],
        "test_unseen": [["a", "y"]],
    }
    assert prompt_leaks(small_study(prompts=prompts)) == {SEEN_TEST: 0.25, UNSEEN_TEST: 0.0}
    assert prompt_leaks(small_study()) == {SEEN_TEST: None, UNSEEN_TEST: None}
    only_train = {"train": prompts["train"]}
    assert prompt_leaks(small_study(prompts=only_train)) == {SEEN_TEST: None, UNSEEN_TEST: None}


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
                "chosen_utterance": "yes",
                "rejected_utterance": ["no", "never"],
                "chosen_conv_embedding": torch.ones(4),
                "rejected_conv_embedding": torch.zeros(2, 4),
            },
        }

    train = [row("a", True, "train", "1", "Hello"), row("b", False, "train", "2", "Why?")]
    test = [
        row("a", True, "test", "3", "Hello"),
        row("a", True, "test", "1", "Why?"),
        row("b", False, "test", "2", "How?"),
    ]
    for name, rows in zip(prism.FILES, (train, test)):
        lore.files.save_torch(tmp_path / name, rows)
    lore.files.save_tensors(
        tmp_path / lore.embedding_files.HEAD_FILE, {"reward_head": torch.ones(4, 1)}
    )
    study = prism.load_embeddings(tmp_path, "no model")
    assert prompt_leaks(study) == {SEEN_TEST: 0.5, UNSEEN_TEST: 0.0}  # of two pairs a turn


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


# ---- The verdict


def judged(parts):
    """The judgement of models of given personal parts, `[models, users]`, at K = 2, 3, .."""
    models = []
    for m, part in enumerate(np.asarray(parts)):
        entry = {
            "K": 2 + m,
            "alpha": 0,
            "accuracy": {UNSEEN_TEST: {"mean": 0.6}},
            "controls": {"mean_weights": {"mean": 0.6}},
        }
        models.append(ModelEvidence(entry, part, collapsed=False))
    return judge(models)


def interval_in(judgement):
    """The interval in the first sentence of a judgement."""
    ends = re.search(r"\[(\S+), (\S+)\]", judgement.lines[0]).groups()
    return [float(end) for end in ends]


def test_undecided_says_about_how_many_users_would_decide():
    noise = np.random.default_rng(0).normal(0, 0.1, 20)
    noise -= noise.mean()
    judgement = judged([0.02 + noise])
    assert judgement.personal == "undecided"
    half_width = 1.96 * noise.std() / 20**0.5
    users = int(judgement.lines[1].split()[1].replace(",", ""))
    assert users == pytest.approx(20 * (half_width / 0.02) ** 2, rel=0.2)
    some_more = np.tile(0.02 + noise, users // 20 + 2)
    assert judged([some_more]).personal == "yes"


def test_small_gains_are_a_no_and_few_users_are_undecided():
    assert judged([np.random.default_rng(0).normal(0, 0.005, 50)]).personal == "no"
    assert judged([np.full(5, 0.2)]).personal == "undecided"
    assert judged([np.full(6, 0.2)]).personal == "yes"


def test_of_several_models_the_largest_is_named_with_an_interval_wider_than_its_own():
    parts = np.random.default_rng(0).normal([[0.03], [0.05], [-0.05]], 0.05, (3, 40))
    judgement = judged(parts)
    low, high = interval_in(judgement)
    alone = interval(parts[1])
    assert judgement.personal == "yes" and judgement.entry["K"] == 3
    assert "above 0 at K = 2, 3 (alpha 0)." in judgement.lines[1]
    assert low < alone["low"] < alone["high"] < high


def test_of_equal_personal_parts_the_smallest_rank_is_named():
    values = np.random.default_rng(0).random(30)
    assert judged([values, values[::-1]]).entry["K"] == 2  # added up in another order
    assert judged([values[::-1], values]).entry["K"] == 2


def test_few_users_without_tastes_seldom_give_a_yes():
    """Of six users a plain bootstrap would say yes in about every fifth such data set."""
    yes = 0
    for repeat in range(200):
        parts = np.random.default_rng(repeat).normal(0, 0.1, (5, 6))
        yes += judged(parts).personal == "yes"
    assert yes <= 14


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
            "basis",
        }
        assert set(entry["controls"]) == {"mean_weights", "other_users", "tossed", "longer"}
        for name in ("accuracy", "minus_reference", "minus_pooled"):
            assert set(entry[name]) == set(SETTINGS)


# ---- What is wrong on purpose shows, through the scripts

D = 32
WORKERS = 44  # in the files; two of each file are left out
BASIS = planted_basis(D, 3)


def write_pickles(folder, wrong=None):
    """TL;DR's embeddings of planted workers, and the mean of their directions as the reward head.

    wrong: what is wrong with them, "rejected side", "user ids", "reference" or None.
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
        content = {}
        for i, X in enumerate(workers):
            content[f"w{i:02}"] = [
                {
                    "text": f"{seed} {i} {j}",
                    "winning_summary": "a" * (1 + j % 3),
                    "losing_summary": "aa",
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
    assert results["verdict"]["personal"] == "yes" and results["verdict"]["text"] in printed
    controls = entry_of(results, 3)["controls"]
    assert controls["tossed"]["low"] <= 0.5 <= controls["tossed"]["high"]
    # a third of the chosen answers each is longer, as long, and shorter
    assert controls["longer"]["mean"] == pytest.approx(0.5)
    assert results["leaks"] == {SEEN_TEST: 0.0, UNSEEN_TEST: 0.0}
    assert f"**{results['verdict']['text'].splitlines()[0]}**" in report and "report.md" in printed


def test_brackets_on_the_rejected_side_are_one_direction_and_not_personal(
    monkeypatch, capsys, tmp_path
):
    results, report, _ = train_on_pickles(monkeypatch, capsys, tmp_path, "rejected side")
    assert entry_of(results, 1)["minus_reference"][UNSEEN_TEST]["low"] > 0.1
    assert abs(entry_of(results, 3)["personal_part"]["mean"]) < 0.02
    assert results["verdict"]["personal"] != "yes"
    assert "one direction explains the gain over the reference" in report


def test_user_ids_shuffled_between_training_and_test_are_not_personal(
    monkeypatch, capsys, tmp_path
):
    results, _, printed = train_on_pickles(monkeypatch, capsys, tmp_path, "user ids")
    assert results["verdict"]["personal"] != "yes" and "Yes" not in printed


def test_a_reference_that_is_not_the_head_is_said_to_be_at_chance(monkeypatch, capsys, tmp_path):
    said = "The reference (is at or below|cannot be told from) chance"
    _, report, _ = train_on_pickles(monkeypatch, capsys, tmp_path, "reference")
    assert re.search(said, report)
    _, report, _ = train_on_pickles(monkeypatch, capsys, tmp_path)
    assert not re.search(said, report)


def test_held_out_posts_choose_the_model_that_is_judged(monkeypatch, capsys, tmp_path):
    results, report, printed = train_on_pickles(
        monkeypatch, capsys, tmp_path, validation_share=0.2, controls=False
    )
    best = max(results["evidence"], key=lambda entry: entry["accuracy"][VALIDATION]["mean"])
    assert results["chosen"] == {"K": best["K"], "alpha": 0, "by": "validation"}
    assert best["K"] == 3 and "Validation" in printed
    assert "the model that was chosen by held-out pairs" in report
    assert all(entry["controls"]["tossed"] is None for entry in results["evidence"])
