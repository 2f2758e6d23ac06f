"""Evidence against float64 loops, closed forms and planted truths."""

import contextlib
import io
import json
import re

import numpy as np
import pytest
import torch
from helpers import call, load_script, planted_basis, planted_pairs, planted_weights

import lore.embedding_files
import lore.evidence
import lore.files
import prism
import utils
from lore.evidence import evidence, exchanged_accuracies, interval, judgement, kept_fit, leaks_of
from utils import SETTINGS, VALIDATION, Fit, Pairs, hold_out, toss

UNSEEN = SETTINGS[3]
d, N = 16, 24
PARTS = "train", "test", "train_unseen", "test_unseen"

pytestmark = pytest.mark.usefixtures("one_thread")


def population(W_seen, W_unseen, pairs=(40, 30, 30, 60), V=None, seed=0):
    """Planted users: {part: features} of seen and unseen ones whose weights are the rows of W."""
    V = planted_basis(d, W_seen.shape[1]) if V is None else V
    parts = {
        part: planted_pairs(V, W, m, seed=10 * seed + i, sampled=True)
        for i, (part, W, m) in enumerate(zip(PARTS, (W_seen, W_seen, W_unseen, W_unseen), pairs))
    }
    return parts | {"seen": list(range(len(W_seen))), "unseen": list(range(len(W_unseen)))}


def tastes(seed=0, N=N):
    return population(
        planted_weights(N, 3, 0.1, seed), planted_weights(N, 3, 0.1, seed + 100), seed=seed
    )


def swept(
    data, K_list=(0, 1, 3), seeds=(0,), V_final=None, num_iterations=150, alpha_list=(0,), **options
):
    """The fits of a short sweep."""
    fits, V_final = [], torch.ones(d, 1) if V_final is None else V_final
    with contextlib.redirect_stdout(io.StringIO()):
        utils.run(
            list(K_list),
            list(alpha_list),
            V_final,
            *(data[part] for part in PARTS),
            len(data["seen"]),
            len(data["unseen"]),
            "cpu",
            seed=list(seeds),
            num_iterations=num_iterations,
            fits=fits,
            **options,
        )
    return fits


def found_of(data, V_final=None, tossed=(), **options):
    V_final = torch.ones(d, 1) if V_final is None else V_final
    return evidence(swept(data, V_final=V_final, **options), data, V_final, tossed)


def entry_of(found, K, alpha=0):
    return next(entry for entry in found["evidence"] if (entry["K"], entry["alpha"]) == (K, alpha))


@pytest.fixture(scope="module")
def data():
    return tastes()


@pytest.fixture(scope="module")
def fits(data):
    return swept(data, seeds=(0, 1))


def random_fit(K, seed, N=N, alpha=0, accuracies=None):
    generator = torch.Generator().manual_seed(seed)
    V, *W = (torch.randn(*shape, generator=generator) for shape in ((d, K), (N, K), (N, K)))
    return Fit(K, alpha, seed, V, *(w.softmax(1) for w in W), 0.0, accuracies or {})


# ---------------------------------------------------------------------------------------------------------------------
# The bootstrap
# ---------------------------------------------------------------------------------------------------------------------


def test_the_interval_is_that_of_plain_means_over_the_users_drawn():
    of_user = np.random.default_rng(1).random(7)
    counts = np.random.default_rng(0).multinomial(7, np.full(7, 1 / 7), lore.evidence.DRAWS)
    draws = [
        np.mean([of_user[i] for i, count in enumerate(draw) for _ in range(count)])
        for draw in counts
    ]
    found = interval(of_user)
    assert [found["low"], found["high"]] == pytest.approx(np.percentile(draws, (2.5, 97.5)))
    assert found["mean"] == pytest.approx(of_user.mean()) and interval(None) is None


def test_intervals_cover_the_planted_mean_in_90_to_99_of_100_one_by_one_and_all_at_once():
    covered, joint = 0, 0
    for repeat in range(100):
        parts = np.random.default_rng(repeat).binomial(50, 0.6, (4, 40)) / 50 - 0.6
        covered += sum(found["low"] <= 0 <= found["high"] for found in map(interval, parts)) / 4
        low, high = intervals_of(
            judged(parts)
        )  # of the row with the largest mean, the first to leave 0 out
        joint += low <= 0
    assert 90 <= covered <= 99
    assert 90 <= joint <= 100  # one side


def test_differences_are_paired_within_a_user():
    level = np.random.default_rng(0).random(30)  # users differ widely, the two models by a constant
    found = interval((level + 0.02) - level, True)
    assert found["low"] == pytest.approx(0.02) and found["high"] == pytest.approx(0.02)
    assert found["p"] < 1e-4


def test_the_signed_rank_p_is_that_of_a_sum_of_ranks():
    differences = np.random.default_rng(3).normal(0.3, 1, 40)
    ranks = np.abs(differences).argsort().argsort() + 1
    statistic = min(ranks[differences > 0].sum(), ranks[differences < 0].sum())
    z = (statistic - 40 * 41 / 4) / (40 * 41 * 81 / 24) ** 0.5
    expected = torch.special.ndtr(torch.tensor(z, dtype=torch.float64)).item() * 2
    assert interval(differences, True)["p"] == pytest.approx(expected)
    assert interval(np.zeros(9), True) == {"mean": 0, "low": 0, "high": 0, "p": 1}
    assert interval(np.array([0.1 + 0.2 - 0.3] * 9), True)["p"] == 1  # equal but for rounding


# ---------------------------------------------------------------------------------------------------------------------
# Controls
# ---------------------------------------------------------------------------------------------------------------------


def plain_exchange(X, fit, i, j):
    """Accuracy of user i's pairs with the weights of user j (None: the mean), pair by pair in float64."""
    V, W = fit.V.double(), fit.W_unseen.double()
    w = sum(W) / len(W) if j is None else W[j]
    return np.mean(
        [float(sum(x.double() @ V[:, k] * w[k] for k in range(len(w)))) > 0 for x in X[i]]
    )


def test_other_users_weights_are_the_mean_over_all_others(data, fits):
    entry, users = entry_of(evidence(fits, data, torch.ones(d, 1)), 3), range(N)
    X = [x[:7] for x in data["test_unseen"]]
    few = dict(data, test_unseen=X)
    entry = entry_of(evidence(fits, few, torch.ones(d, 1)), 3)
    of_seeds = [fit for fit in fits if fit.K == 3]
    expected = np.mean(
        [plain_exchange(X, fit, i, j) for fit in of_seeds for i in users for j in users if j != i]
    )
    assert entry["controls"]["other_users"]["mean"] == pytest.approx(expected, abs=1e-6)
    mean = np.mean([plain_exchange(X, fit, i, None) for fit in of_seeds for i in users])
    assert entry["controls"]["mean_weights"]["mean"] == pytest.approx(mean, abs=1e-6)
    own = np.mean([plain_exchange(X, fit, i, i) for fit in of_seeds for i in users])
    assert entry["personal_part"]["mean"] == pytest.approx(own - mean, abs=1e-6)


def test_pairs_of_a_table_are_exchanged_as_their_matrices():
    table = torch.randn(30, d, generator=torch.Generator().manual_seed(0))
    pairs = [Pairs(table, torch.arange(i, i + 9), torch.arange(i + 12, i + 21)) for i in range(4)]
    fits, dense = [random_fit(5, seed, N=4) for seed in range(2)], [X.dense() for X in pairs]
    np.testing.assert_allclose(exchanged_accuracies(pairs, fits), exchanged_accuracies(dense, fits))
    assert exchanged_accuracies(pairs[:1], [random_fit(2, 0, N=1)])[2] is None  # nobody else


def test_the_personal_part_is_planted_and_found(data):
    found = found_of(data, seeds=(0, 1))
    entry = entry_of(found, 3)
    assert found["verdict"]["personal"] == "yes" and found["verdict"]["text"].startswith(
        "Yes: at K = 3 (alpha 0)"
    )
    assert entry["personal_part"]["low"] > 0.02 and entry["personal_part"]["p"] < 1e-3
    assert entry["controls"]["other_users"]["mean"] < entry["controls"]["mean_weights"]["mean"]
    assert entry["seeds"] == [0, 1] and len(entry["basis"]["angles_between_seeds"]) == 3
    assert max(entry["basis"]["angles_between_seeds"][:2]) < 45  # the planted span, from two starts


def test_the_interval_of_the_personal_part_covers_the_planted_one_in_90_to_99_of_100():
    V, covered = planted_basis(d, 3), 0

    def personal_part(N, pairs, seed):
        """Under the planted models themselves: own weights less the mean weights."""
        W = planted_weights(N, 3, 0.1, seed)
        fit = Fit(3, 0, 0, V, W, W, 0.0)
        own, mean, _ = exchanged_accuracies(planted_pairs(V, W, pairs, seed, sampled=True), [fit])
        return own - mean

    truth = np.mean([personal_part(40, 200, 1000 + i).mean() for i in range(60)])
    for seed in range(100):
        found = interval(personal_part(40, 30, seed))
        covered += found["low"] <= truth <= found["high"]
    assert truth > 0.1
    assert 90 <= covered <= 99


def test_models_of_tossed_pairs_are_at_chance_even_where_all_differences_share_a_direction(data):
    shared = {part: [X + 2 for X in data[part]] for part in PARTS}
    for parts in (data, shared):
        tossed = []
        utils.run(
            [3],
            [0],
            torch.ones(d, 1),
            *(parts[part] for part in PARTS),
            N,
            N,
            "cpu",
            num_iterations=150,
            tossed=tossed,
        )
        found = found_of(dict(data, **parts), tossed=tossed)
        interval = entry_of(found, 3)["controls"]["tossed"]
        assert interval["low"] <= 0.5 <= interval["high"]
        assert entry_of(found, 1)["controls"]["tossed"] is None
        assert "Signs of an artefact: none in these checks." in found["verdict"]["text"]


def test_a_toss_turns_half_of_the_pairs_and_the_same_ones_for_tables_and_matrices():
    table = torch.randn(400, d, generator=torch.Generator().manual_seed(0))
    pairs = Pairs(table, torch.arange(200), torch.arange(200, 400))
    (of_table,), (of_matrix,) = (list(toss([X], 3)) for X in (pairs, pairs.dense()))
    assert torch.equal(of_table.dense(), of_matrix)
    turned = (of_matrix == -pairs.dense()).all(1)
    assert 70 < turned.sum() < 130 and torch.equal(of_matrix[~turned], pairs.dense()[~turned])


def test_the_longer_answer_is_scored_where_lengths_are_known(data, fits):
    longer = {"test_unseen": [np.array([1, 1, -1, 0])] * N}
    found = evidence(fits, dict(data, longer=longer), torch.ones(d, 1))
    assert entry_of(found, 3)["controls"]["longer"] == pytest.approx(
        {"mean": 0.625, "low": 0.625, "high": 0.625}
    )
    assert entry_of(evidence(fits, data, torch.ones(d, 1)), 3)["controls"]["longer"] is None


# ---------------------------------------------------------------------------------------------------------------------
# The basis
# ---------------------------------------------------------------------------------------------------------------------


def test_the_effective_rank_of_a_known_basis():
    V = planted_basis(d, 4, length=1.0)
    fit = random_fit(4, 0)
    for w, expected in (((1, 1, 1, 1), 4), ((1, 1, 0, 0), 2), ((1, 0, 0, 0), 1)):
        fit.V, fit.W = V, torch.tensor([w]) / sum(w)
        basis = lore.evidence.basis_of([fit], V[:, :1])
        assert basis["effective_rank"] == pytest.approx(expected, rel=1e-5)
        assert basis["mean_weight_entropy"] == pytest.approx(np.log(expected), abs=1e-6)
    assert basis["largest_cosine_to_head"] == pytest.approx(1) and basis["columns"] == 4
    assert basis["largest_cosine_between_columns"] == pytest.approx(0, abs=1e-6)


def test_cosines_and_angles_are_those_that_were_planted():
    axes = torch.eye(d)
    turned = [axes[:, :2], torch.stack([axes[:, 0], (axes[:, 1] + axes[:, 2]) / 2**0.5], 1)]
    fits = [random_fit(2, seed) for seed in range(2)]
    for fit, V in zip(fits, turned):
        fit.V = V
    basis = lore.evidence.basis_of(fits, axes[:, :1] + axes[:, 1:2])
    np.testing.assert_allclose(basis["angles_between_seeds"], [0, 45], atol=1e-4)
    assert basis["largest_cosine_to_head"] == pytest.approx(0.5**0.5)


def test_a_basis_pulled_onto_the_head_is_said_to_have_collapsed_with_the_remedy(data):
    head = planted_basis(d, 1, seed=8)
    found = found_of(data, K_list=(0, 2), alpha_list=(0, 1e4), V_final=head, num_iterations=400)
    assert "Collapsed onto the reward head" in found["verdict"]["text"]
    assert (
        "0.99: K = 2 (alpha 10000)." in found["verdict"]["text"]
        and "validation_share" in found["verdict"]["text"]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Leaks, seeds, choice
# ---------------------------------------------------------------------------------------------------------------------


def test_leaks_are_the_share_of_test_pairs_whose_prompt_was_trained_on():
    prompts = {
        "train": [["a", "b"], ["c"]],
        "test": [["c", "x"], ["y", "y"]],
        "train_unseen": [["x"]],
        "test_unseen": [["a", "y"]],
    }
    assert leaks_of(prompts) == {SETTINGS[1]: 0.25, UNSEEN: 0.0}
    assert leaks_of(None) == {SETTINGS[1]: None, UNSEEN: None}


def test_prompts_of_prism_leak_by_their_text_in_whatever_conversation(tmp_path):
    def row(user, seen, split, dialog, text):
        embedding = {
            "chosen_conv_embedding": torch.ones(4),
            "rejected_conv_embedding": torch.zeros(2, 4),
        }
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
                **embedding,
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
    data, _, _ = prism.load_embeddings(tmp_path, "no model")
    assert leaks_of(data["prompts"]) == {SETTINGS[1]: 0.5, UNSEEN: 0.0}  # of two pairs a turn


def test_the_kept_seed_has_the_lowest_loss_or_the_best_validation():
    fits = [random_fit(2, seed) for seed in range(3)]
    for fit, loss in zip(fits, (0.5, 0.3, 0.4)):
        fit.loss = loss
    assert kept_fit(fits).seed == 1
    for fit, accuracy in zip(fits, (0.6, 0.6, 0.7)):
        fit.accuracies = {VALIDATION: np.full(4, accuracy)}
    assert kept_fit(fits).seed == 2


def test_validation_chooses_the_row_and_the_test_columns_do_not(data, fits):
    best_on_test = max(fits, key=lambda fit: fit.accuracies[UNSEEN].mean())
    assert best_on_test.K == 3
    for fit in fits:
        fit.accuracies[VALIDATION] = np.full(N, 0.9 if fit.K == 1 else 0.5)
    found = evidence(fits, data, torch.ones(d, 1))
    for fit in fits:
        del fit.accuracies[VALIDATION]
    assert found["chosen"] == {"K": 1, "alpha": 0, "by": "validation"}
    assert found["verdict"]["personal"] == "no"
    assert entry_of(found, 1)["accuracy"][VALIDATION]["mean"] == pytest.approx(0.9)
    assert evidence(fits, data, torch.ones(d, 1))["chosen"] == {
        "K": None,
        "alpha": None,
        "by": "none",
    }


def test_held_out_prompts_are_held_out_with_all_their_pairs():
    prompts = [["a", "a", "b", "c", "d"], ["a", "b"]]
    first, second = hold_out(prompts, 0.25)
    assert first.sum() == (2 if first[0] else 1) and first[0] == first[1]
    assert second.sum() == 1  # one goes, one stays
    assert all(torch.equal(a, b) for a, b in zip(hold_out(prompts, 0.25), (first, second)))


# ---------------------------------------------------------------------------------------------------------------------
# The verdict
# ---------------------------------------------------------------------------------------------------------------------


def judged(parts):
    """The verdict on rows of given personal parts `[rows, users]`."""
    accuracy = {
        "accuracy": {UNSEEN: {"mean": 0.6}},
        "controls": {"mean_weights": {"mean": 0.6}},
        "alpha": 0,
    }
    return judgement([accuracy | {"K": 2 + i} for i in range(len(parts))], list(np.asarray(parts)))


def intervals_of(judgement):
    """The interval in the first line of a verdict."""
    return [float(end) for end in re.search(r"\[(\S+), (\S+)\]", judgement[2][0]).groups()]


def test_undecided_says_about_how_many_users_would_decide():
    noise = np.random.default_rng(0).normal(0, 0.1, 20)
    noise -= noise.mean()
    verdict, _, lines = judged([0.02 + noise])
    half = 1.96 * noise.std() / 20**0.5
    assert verdict == "undecided"
    users = int(lines[1].split()[1].replace(",", ""))
    assert users == pytest.approx(20 * (half / 0.02) ** 2, rel=0.2)
    assert (
        judged([np.tile(0.02 + noise, users // 20 + 2)])[0] == "yes"
    )  # as many and some more of such users do


def test_small_gains_are_a_no_and_few_users_are_undecided():
    assert judged([np.random.default_rng(0).normal(0, 0.005, 50)])[0] == "no"
    assert judged([np.full(5, 0.2)])[0] == "undecided"
    assert judged([np.full(6, 0.2)])[0] == "yes"


def test_of_several_rows_the_largest_is_named_with_an_interval_wider_than_its_own():
    parts = np.random.default_rng(0).normal([[0.03], [0.05], [-0.05]], 0.05, (3, 40))
    verdict, named, lines = judged(parts)
    (low, high), alone = intervals_of((verdict, named, lines)), interval(parts[1])
    assert verdict == "yes" and named["K"] == 3 and "above 0 at K = 2, 3 (alpha 0)." in lines[1]
    assert low < alone["low"] < alone["high"] < high


def test_every_field_is_there_and_plain_json(data, fits):
    found = json.loads(json.dumps(evidence(fits, data, torch.ones(d, 1)), allow_nan=False))
    assert set(found) == {"evidence", "chosen", "leaks", "verdict"}
    assert [entry["K"] for entry in found["evidence"]] == [0, 1, 3]
    for entry in found["evidence"]:
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


def test_a_share_of_the_prompts_is_held_out_and_scored_but_not_trained_on(data):
    prompts = [[f"{i} {j // 4}" for j in range(40)] for i in range(N)]
    (fit,) = swept(data, K_list=[2], validation_share=0.2, prompts=prompts)
    rows = hold_out(prompts, 0.2)
    assert all(held.sum() == 8 for held in rows)
    rest = dict(data, train=[X[~held] for X, held in zip(data["train"], rows)])
    (alone,) = swept(rest, K_list=[2])
    torch.testing.assert_close(fit.V, alone.V)
    of_held = [
        utils.evaluate_model(X[held], fit.V, w) for X, held, w in zip(data["train"], rows, fit.W)
    ]
    np.testing.assert_allclose(fit.accuracies[VALIDATION], of_held, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong on purpose shows, through the scripts
# ---------------------------------------------------------------------------------------------------------------------

D, WORKERS, PLANTED = 32, 40, planted_basis(32, 3)
CACHE_KERNEL = WORKERS + 4  # two of each file are left out


def write_pickles(folder, wrong=None):
    """TL;DR's embeddings of planted workers, and the mean of their directions as the reward head."""
    weights = planted_weights(CACHE_KERNEL, 3, 0.1)
    if wrong == "rejected side":  # nobody has tastes, and brackets around every rejected answer
        weights = torch.full_like(weights, 1 / 3)
    bracket = (
        torch.zeros(D)
        if wrong != "rejected side"
        else 3
        * torch.nn.functional.normalize(
            torch.randn(D, generator=torch.Generator().manual_seed(1)), dim=0
        )
    )
    files = {}
    for seed, (name, pairs) in enumerate(
        (("tldr_embeddings_train.pkl", 45), ("tldr_embeddings_val.pkl", 60))
    ):
        if wrong == "user ids" and seed == 1:
            weights = weights[
                torch.randperm(CACHE_KERNEL, generator=torch.Generator().manual_seed(2))
            ]
        features = planted_pairs(PLANTED, weights, pairs, seed, sampled=True)
        files[name] = {
            f"w{i:02}": [
                {
                    "text": f"{seed} {i} {j}",
                    "winning_summary": "a" * (1 + j % 3),
                    "losing_summary": "aa",
                    "embeddings": {"winning": [x], "losing": [bracket]},
                }
                for j, x in enumerate(X)
            ]
            for i, X in enumerate(features)
        }
        lore.files.save_torch(folder / name, files[name])
    head = PLANTED.sum(1, keepdim=True)
    if wrong == "reference":
        head = torch.linalg.qr(torch.cat([PLANTED, torch.ones(D, 1)], 1)).Q[:, 3:]
    lore.files.save_tensors(folder / lore.embedding_files.HEAD_FILE, {"reward_head": head})


def ran(monkeypatch, capsys, folder, wrong=None, **constants):
    """What train_basis.py of TL;DR found in these pickles -> (results.json, report.md, what it printed)."""
    write_pickles(folder, wrong)
    script = load_script("RedditTLDR", "train_basis")
    for name, value in {
        "K_list": [0, 1, 3],
        "num_iterations": 150,
        "seeds": [0],
        **constants,
    }.items():
        assert hasattr(script, name)
        monkeypatch.setattr(script, name, value)
    call(monkeypatch, script, "--dir", folder)
    results, report = (
        (folder / "results" / name).read_text() for name in ("results.json", "report.md")
    )
    return json.loads(results), report, capsys.readouterr().out


def test_the_script_finds_planted_tastes_and_prints_the_verdict(monkeypatch, capsys, tmp_path):
    results, report, printed = ran(monkeypatch, capsys, tmp_path)
    assert results["verdict"]["personal"] == "yes" and results["verdict"]["text"] in printed
    entry = entry_of(results, 3)
    assert entry["controls"]["tossed"]["low"] <= 0.5 <= entry["controls"]["tossed"]["high"]
    assert entry["controls"]["longer"]["mean"] == pytest.approx(
        0.5
    )  # a third longer, equal and shorter
    assert results["leaks"] == {SETTINGS[1]: 0.0, UNSEEN: 0.0}
    assert f"**{results['verdict']['text'].splitlines()[0]}**" in report and "report.md" in printed


def test_brackets_on_the_rejected_side_are_one_direction_and_not_personal(
    monkeypatch, capsys, tmp_path
):
    results, report, _ = ran(monkeypatch, capsys, tmp_path, "rejected side")
    assert entry_of(results, 1)["minus_reference"][UNSEEN]["low"] > 0.1
    assert abs(entry_of(results, 3)["personal_part"]["mean"]) < 0.02
    assert results["verdict"]["personal"] != "yes"
    assert "one direction explains the gain over the reference" in report


def test_user_ids_shuffled_between_training_and_test_are_not_personal(
    monkeypatch, capsys, tmp_path
):
    results, _, printed = ran(monkeypatch, capsys, tmp_path, "user ids")
    assert results["verdict"]["personal"] != "yes" and "Yes" not in printed


def test_a_reference_that_is_not_the_head_is_said_to_be_at_chance(monkeypatch, capsys, tmp_path):
    said = "The reference (is at or below|cannot be told from) chance"
    assert re.search(said, ran(monkeypatch, capsys, tmp_path, "reference")[1])
    assert not re.search(said, ran(monkeypatch, capsys, tmp_path)[1])


def test_held_out_posts_choose_the_row_that_is_judged(monkeypatch, capsys, tmp_path):
    results, report, printed = ran(
        monkeypatch, capsys, tmp_path, validation_share=0.2, controls=False
    )
    best = max(results["evidence"], key=lambda entry: entry["accuracy"][VALIDATION]["mean"])
    assert results["chosen"] == {"K": best["K"], "alpha": 0, "by": "validation"}
    assert (
        best["K"] == 3
        and "Validation" in printed
        and "the model, that was chosen by held-out pairs" in report
    )
    assert all(entry["controls"]["tossed"] is None for entry in results["evidence"])


def test_few_users_without_tastes_seldom_give_a_yes():
    """Of six users a plain bootstrap would say yes in about every fifth such data set."""
    yes = 0
    for repeat in range(200):
        parts = np.random.default_rng(repeat).normal(0, 0.1, (5, 6))
        yes += judged(parts)[0] == "yes"
    assert yes <= 14
