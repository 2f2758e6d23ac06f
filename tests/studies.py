"""Studies of planted users, for the tests of what surrounds a training."""

import dataclasses

import torch
from helpers import planted_basis, planted_pairs, planted_weights, random_users

import utils
from lore.study import PARTS, Study

d = 16
N = 24  # users, as many seen as unseen
PAIRS = dict(train=40, test=30, train_unseen=30, test_unseen=60)  # of each user


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
    features = {
        part: planted_pairs(V, weights[part], PAIRS[part], seed=10 * seed + i, sampled=True)
        for i, part in enumerate(PARTS)
    }
    return study_of(features)


def study_with_tastes():
    """Users who each weigh three directions in a way of their own."""
    return planted_study(planted_weights(N, 3, 0.1, seed=0), planted_weights(N, 3, 0.1, seed=100))


def study_without_tastes(seed=0):
    """Users who all choose by the same direction."""
    equal = torch.full((N, 3), 1 / 3)
    return planted_study(equal, equal, seed)


def described_results(title, users=(3, 2), pairs=36, seeds=1):
    """What the titles of pictures take from results.json; users: seen, unseen."""
    seen, unseen = users
    return {
        "config": {"data": title},
        "counts": {"seen users": seen, "unseen users": unseen, "test unseen pairs": pairs},
        "users": [f"seen {i}" for i in range(seen)],
        "unseen_users": [f"unseen {i}" for i in range(unseen)],
        "seeds": list(range(seeds)),
    }


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
    """A basis and weights that were not trained on anything."""
    generator = torch.Generator().manual_seed(seed)
    V = torch.randn(d, K, generator=generator)
    W = torch.randn(N, K, generator=generator).softmax(1)
    W_unseen = torch.randn(N, K, generator=generator).softmax(1)
    return utils.Fit(K, 0, seed, V, W, W_unseen, 0.0)


OTHER_PROMPT = 0.3  # how far another prompt moves a pair; a number of a pair is usually 1


def with_repeats(study, share, kind="features", seed=0):
    """The study with a share of each unseen user's test pairs replaced by few shots of this user.

    The test parts are cut to as many pairs as there are few shots. kind: what of it shows,
    "prompt": prompts and texts are known, and repeated pairs have both;
    "answers": both are known, and repeated pairs have the answers under another prompt;
    "features": neither is known.
    """
    generator = torch.Generator().manual_seed(seed)
    test_unseen = []
    for few_shots, X in zip(study.train_unseen, study.test_unseen):
        repeated = few_shots[: round(share * len(few_shots))]
        if kind == "answers":
            moved = torch.randn(repeated.shape, generator=generator)
            repeated = repeated + OTHER_PROMPT * moved
        test_unseen.append(torch.cat([repeated, X[len(repeated) : len(few_shots)]]))
    study = dataclasses.replace(study, test_unseen=test_unseen)
    if kind == "features":
        return study

    names = {part: names_of_pairs(users, part) for part, users in study.features().items()}
    questions = {part: [list(user) for user in users] for part, users in names.items()}
    for user, few_shots in enumerate(names["train_unseen"]):
        count = round(share * len(few_shots))
        names["test_unseen"][user][:count] = few_shots[:count]
        mark = " ?!" if kind == "answers" else ""
        questions["test_unseen"][user][:count] = [name + mark for name in few_shots[:count]]
    texts = {
        part: [[(f"{name} chosen", f"{name} rejected") for name in user] for user in users]
        for part, users in names.items()
    }
    return dataclasses.replace(study, prompts=questions, texts=texts)


def names_of_pairs(users, part):
    """For each user a text per pair, no two of which are equal."""
    return [[f"{part} {user} {pair}" for pair in range(len(X))] for user, X in enumerate(users)]
