"""Is a result personal, by how much, and is any of it an artefact?

The parts of this module, in their order:

    Validation   pairs that are held out of the training, to choose the rank and the alpha by
    Controls     what other people's weights, tossed choices and the longer answer would score
    The basis    what it looks like
    Leaks        test prompts that are training prompts too
    Evidence     all of it, as results.json holds it; the sentences are in lore/verdict.py
"""

import dataclasses
import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from lore.files import TrainingCheckpoint
from lore.intervals import DIFFERENCE, INTERVAL, interval  # noqa: F401 - lore/tables.py takes two
from lore.study import Features, Study
from lore.verdict import COLLAPSED, ModelEvidence, write_verdict
from utils import (
    SEEN_TEST,
    UNSEEN_TEST,
    Fit,
    InputError,
    Pairs,
    accuracies_per_user,
    accuracies_under_each,
    accuracy_per_user,
    check_number,
    fits_per_model,
    sweep,
)

VALIDATION = "Validation"  # the setting of held-out training pairs, beside those of SETTINGS


# ---- Validation


def hold_out(study: Study, share: float, seed: int = 0) -> tuple[Study, Features | None]:
    """Hold a share of each seen user's training prompts out of the training.

    If the study knows the groups of its training pairs (conversations), a group takes the place
    of a prompt; if it knows neither groups nor prompts, each pair is a prompt of its own. Of each
    user at least one prompt is held out and at least one stays.
    share: from 0 to 0.9. seed: of the draw.
    Returns the study without these pairs (and what it knows of them), and the pairs, one entry
    per seen user; the study itself and None for a share of 0.
    Raises InputError: a share out of these bounds, a user with training pairs of one prompt only.
    """
    check_number("validation_share", share, 0, 0.9)
    if share == 0:
        return study, None
    generator = np.random.default_rng(seed)
    held = [
        draw_held_out(prompts, share, generator, user)
        for user, prompts in zip(study.seen, prompts_to_draw(study))
    ]
    held_out = [X[rows] for X, rows in zip(study.train, held)]
    return without_training_pairs(study, held), held_out


def prompts_to_draw(study: Study) -> list[Sequence[Hashable]]:
    """For each seen user what tells the prompts of the training pairs apart, one value per pair."""
    if "train" in study.groups:
        return [groups.tolist() for groups in study.groups["train"]]
    if "train" in study.prompts:
        return study.prompts["train"]
    return [range(len(X)) for X in study.train]


def draw_held_out(
    prompts: Sequence[Hashable], share: float, generator: np.random.Generator, user: str
) -> torch.Tensor:
    """Which pairs of one user are held out, bool `[m]`: those of a random share of the prompts."""
    number_of = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    distinct = len(number_of)
    if distinct < 2:
        raise InputError(
            f"validation_share: user {user} has training pairs of one prompt only; "
            "leave this user out"
        )
    count = min(max(1, round(share * distinct)), distinct - 1)
    drawn = generator.permutation(distinct)[:count]
    numbers = [number_of[prompt] for prompt in prompts]
    return torch.from_numpy(np.isin(numbers, drawn))


def without_training_pairs(study: Study, held: list[torch.Tensor]) -> Study:
    """The study without some training pairs of the seen users; held: bool `[m_i]` for each user."""
    kept = [~rows for rows in held]
    changes = {"train": [X[rows] for X, rows in zip(study.train, kept)]}
    for name in ("prompts", "texts"):
        known = getattr(study, name)
        if "train" in known:
            train = [
                list(itertools.compress(values, rows.tolist()))
                for values, rows in zip(known["train"], kept)
            ]
            changes[name] = known | {"train": train}
    if "train" in study.groups:
        # `unique` numbers the groups that are left from 0 without a gap, in their order.
        train = [
            groups[rows].unique(return_inverse=True)[1]
            for groups, rows in zip(study.groups["train"], kept)
        ]
        changes["groups"] = study.groups | {"train": train}
    return dataclasses.replace(study, **changes)


def judge_held_out(fits: list[Fit], held_out: Features | None) -> list[Fit]:
    """The fits with accuracies on the held-out pairs, under VALIDATION.

    held_out: of `hold_out`, one entry per seen user; None: the fits are returned as they are.
    """
    if held_out is None:
        return fits
    accuracies = accuracies_per_user(held_out, [fit.V for fit in fits], [fit.W for fit in fits])
    return [
        dataclasses.replace(fit, accuracies={**fit.accuracies, VALIDATION: held_out_accuracies})
        for fit, held_out_accuracies in zip(fits, accuracies)
    ]


def kept_fit(fits: list[Fit]) -> Fit:
    """The fit to keep of one model's seeds: the best on held-out pairs, of equals the lowest loss.

    Without held-out pairs the lowest loss alone decides.
    """

    def quality(fit: Fit) -> tuple[float, float]:
        accuracy = 0.0
        if VALIDATION in fit.accuracies:
            accuracy = fit.accuracies[VALIDATION].mean()
        return accuracy, -fit.loss

    return max(fits, key=quality)


# ---- Controls, all on the unseen users' unseen prompts


@dataclass
class ExchangedWeights:
    """Accuracy of each unseen user's pairs under different people's weights, float64 `[N]` each."""

    own: np.ndarray
    mean: np.ndarray  # under everyone's mean weights
    others: np.ndarray | None  # the mean over every other user's weights; None for a single user

    @property
    def personal_part(self) -> np.ndarray:
        """How much of the accuracy is due to the weights being the user's own, float64 `[N]`."""
        return self.own - self.mean


def exchanged_accuracies(features: Features, fits: list[Fit]) -> ExchangedWeights:
    """Judge unseen users' pairs by their own weights, by everyone's mean and by other people's.

    features: of each of the N unseen users. fits: all seeds of one model; the accuracies are
    means over them.
    """
    N = len(features)
    accuracies = np.zeros((N, N + 1))
    for fit in fits:
        mean_weights = fit.W_unseen.mean(0, keepdim=True)  # (1, K)
        candidates = torch.cat([fit.W_unseen, mean_weights])  # (N + 1, K)
        accuracies += accuracies_under_each(features, fit.V, candidates)
    accuracies /= len(fits)
    own = accuracies.diagonal()
    others = None
    if N > 1:
        others = (accuracies[:, :N].sum(1) - own) / (N - 1)
    return ExchangedWeights(own, accuracies[:, N], others)


@dataclass
class TossedControl:
    """What a model scores if nobody's choices mean anything, see `tossed_control`."""

    K: int
    alpha: float
    accuracies: np.ndarray  # float64 [N_unseen], on the unseen users' unseen prompts


def tossed_control(
    study: Study,
    K_list: Sequence[int],
    alpha_list: Sequence[float],
    seeds: Sequence[int],
    num_iterations: int,
    device: torch.device | str,
    checkpoint: TrainingCheckpoint | None = None,
    regularized: bool = False,
    threshold: float = 0.0,
) -> TossedControl | None:
    """Train the largest rank of a sweep on pairs whose directions are tossed: it must be at chance.

    The test pairs are tossed too. If they were not, a model could still see on which side of any
    direction their mean lies. The first alpha and the first seed are taken. Other arguments: as
    of `sweep`; the checkpoint must not be the one of the sweep itself.
    Returns None if no rank is above 1. Raises InputError: see `sweep`.
    """
    K = max(K_list)
    if K <= 1:
        return None
    train = list(toss(study.train, seed=0))
    train_unseen = list(toss(study.train_unseen, seed=1))
    # The test pairs are many, so they are tossed and judged one user at a time, further down.
    # `sweep` would need all of them at once; in their place it is given the training pairs.
    (fit,) = sweep(  # one rank, one alpha, one seed: one fit
        [K],
        [alpha_list[0]],
        study.reward_head,
        train,
        train,
        train_unseen,
        train_unseen,
        len(train),
        len(train_unseen),
        device,
        seed=seeds[0],
        num_iterations=num_iterations,
        checkpoint=checkpoint,
        regularized=regularized,
        threshold=threshold,
    )
    test_unseen = toss(study.test_unseen, seed=2)
    accuracies = accuracies_per_user(test_unseen, [fit.V], [fit.W_unseen])  # (1, N_unseen)
    return TossedControl(fit.K, fit.alpha, accuracies[0])


def toss(features: Features, seed: int = 0) -> Iterator[torch.Tensor | Pairs]:
    """Yield the pairs of each user in turn, each pair turned round or not by a seeded coin."""
    coin = torch.Generator().manual_seed(seed)
    for X in features:
        heads = torch.rand(len(X), generator=coin) < 0.5  # (m_i,)
        if isinstance(X, Pairs):
            chosen = X.chosen.where(heads, X.rejected)
            rejected = X.rejected.where(heads, X.chosen)
            yield Pairs(X.embeddings, chosen, rejected)
        else:
            yield X.where(heads[:, None].to(X.device), -X)


def longer_answer_accuracies(study: Study) -> np.ndarray | None:
    """What always taking the longer answer scores on each unseen user's test pairs, float64 `[N]`.

    Equally long answers count half. None if the study does not know the texts.
    """
    if "test_unseen" not in study.texts:
        return None
    accuracies = []
    for texts in study.texts["test_unseen"]:
        signs = [np.sign(len(chosen) - len(rejected)) for chosen, rejected in texts]
        accuracies.append((1 + np.mean(signs)) / 2)
    return np.array(accuracies)


# ---- The basis


def describe_basis(fits: list[Fit], reward_head: torch.Tensor) -> dict:
    """What the basis of one model looks like; fits: all its seeds, reward_head: `[d, 1]`.

    Returns, of the kept seed: `columns`; `effective_rank`, the exponential of the entropy of the
    squared singular values of V diag(mean w); `largest_cosine_between_columns` (None for a single
    column) and `largest_cosine_to_head`, absolute; `mean_weight_entropy` over the seen users.
    Entropies are in nats. And `angles_between_seeds`, see there.
    """
    from scipy.stats import entropy  # here: scipy.stats takes a second to import

    kept = kept_fit(fits)
    V = as_float64(kept.V)  # (d, columns)
    w = as_float64(kept.W)  # (N, columns)
    head = as_float64(reward_head).reshape(-1)  # (d,)
    unit = V / np.linalg.norm(V, axis=0)
    between_columns = np.abs(unit.T @ unit)[np.triu_indices(V.shape[1], 1)]
    to_head = np.abs(unit.T @ head) / np.linalg.norm(head)
    singular_values = np.linalg.svd(V * w.mean(0), compute_uv=False)
    return {
        "columns": V.shape[1],
        "effective_rank": float(np.exp(entropy(singular_values**2))),
        "largest_cosine_between_columns": (
            float(between_columns.max()) if between_columns.size else None
        ),
        "largest_cosine_to_head": float(to_head.max()),
        "mean_weight_entropy": float(entropy(w, axis=1).mean()),
        "angles_between_seeds": angles_between_seeds(fits),
    }


def angles_between_seeds(fits: list[Fit]) -> list[float] | None:
    """The principal angles between the spans of two seeds' bases, in degrees, smallest first.

    Means over all pairs of seeds; None for a single seed, and for the reference. The angles are
    as many as the smallest basis has columns: a threshold may leave each seed another number.
    """
    from scipy.linalg import subspace_angles  # here: scipy.linalg takes a while to import

    bases = [as_float64(fit.V) for fit in fits if fit.K > 0]
    angles = [
        np.degrees(subspace_angles(V, other))[::-1]  # scipy's begin with the largest
        for V, other in itertools.combinations(bases, 2)
    ]
    if not angles:
        return None
    fewest = min(map(len, angles))
    return np.mean([degrees[:fewest] for degrees in angles], 0).tolist()


def is_collapsed(fits: list[Fit], reward_head: torch.Tensor) -> bool:
    """Whether all columns of all seeds of a trained model are the reward head, up to COLLAPSED."""
    if fits[0].K == 0:  # the reference is the reward head by definition
        return False
    for fit in fits:
        cosines = cosine_similarity(fit.V, reward_head.to(fit.V), dim=0).abs()  # (columns,)
        if not (cosines >= COLLAPSED).all():
            return False
    return True


def as_float64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().cpu().numpy()


# ---- Leaks


def prompt_leaks(study: Study) -> dict[str, float | None]:
    """The share of the test pairs whose prompt is one of the training pairs of that group of users.

    Returns a share under SEEN_TEST, of the seen users, and one under UNSEEN_TEST, of the unseen
    users; None if the study does not know the prompts of both parts.
    """
    return {
        SEEN_TEST: share_of_known_prompts(study, "train", "test"),
        UNSEEN_TEST: share_of_known_prompts(study, "train_unseen", "test_unseen"),
    }


def share_of_known_prompts(study: Study, train: str, test: str) -> float | None:
    """The share of the pairs in the part `test` whose prompt is in the part `train`, of anybody."""
    if train not in study.prompts or test not in study.prompts:
        return None
    known = set(itertools.chain.from_iterable(study.prompts[train]))
    tested = itertools.chain.from_iterable(study.prompts[test])
    return float(np.mean([prompt in known for prompt in tested]))


# ---- Evidence


def evidence(fits: list[Fit], study: Study, tossed: TossedControl | None = None) -> dict:
    """Is it personal, by how much, and is any of it an artefact?

    fits: of all ranks, alphas and seeds. If they have accuracies under VALIDATION, these choose
    the model that the verdict is about. tossed: of `tossed_control`, None if it was not trained.
    Returns `{evidence, chosen, leaks, verdict}` of results.json, plain JSON values; None is what
    is not known.
    """
    fits_by_model = fits_per_model(fits)
    longer = interval(longer_answer_accuracies(study))
    models = [
        model_evidence(fits_by_model, model, study, tossed, longer) for model in fits_by_model
    ]
    chosen = choose(models)
    leaks = prompt_leaks(study)
    return {
        "evidence": [model.entry for model in models],
        "chosen": {
            "K": chosen.entry["K"] if chosen else None,
            "alpha": chosen.entry["alpha"] if chosen else None,
            "by": "validation" if chosen else "none",
        },
        "leaks": leaks,
        "verdict": write_verdict(models, chosen, leaks[UNSEEN_TEST], len(study.test_unseen)),
    }


def model_evidence(
    fits_by_model: dict[tuple[int, float], list[Fit]],
    model: tuple[int, float],
    study: Study,
    tossed: TossedControl | None,
    longer: dict[str, float] | None,
) -> ModelEvidence:
    """What is known of one model (K, alpha).

    fits_by_model: of `fits_per_model`. longer: the interval of that control, the same for all.
    """
    K, alpha = model
    fits = fits_by_model[model]
    accuracy = {setting: accuracy_per_user(fits, setting) for setting in fits[0].accuracies}
    is_tossed = tossed is not None and (tossed.K, tossed.alpha) == model
    controls = {
        "mean_weights": None,
        "other_users": None,
        "tossed": interval(tossed.accuracies) if is_tossed else None,
        "longer": longer,
    }
    personal_part = None
    if K > 1:
        exchanged = exchanged_accuracies(study.test_unseen, fits)
        personal_part = exchanged.personal_part
        controls["mean_weights"] = interval(exchanged.mean)
        controls["other_users"] = interval(exchanged.others)
    entry = {
        "K": K,
        "alpha": alpha,
        "seeds": [fit.seed for fit in fits],
        "accuracy": {setting: interval(values) for setting, values in accuracy.items()},
        "minus_reference": differences(accuracy, fits_by_model.get((0, alpha))),
        "minus_pooled": differences(accuracy, fits_by_model.get((1, alpha))),
        "controls": controls,
        "personal_part": interval(personal_part, difference=True),
        "basis": describe_basis(fits, study.reward_head),
    }
    return ModelEvidence(entry, personal_part, is_collapsed(fits, study.reward_head))


def differences(
    accuracy: dict[str, np.ndarray], baseline: list[Fit] | None
) -> dict[str, dict[str, float] | None]:
    """Intervals of how much better each user is served than by a baseline, in each setting.

    accuracy: {setting: float64, one per user}. baseline: all seeds of another model; None: there
    is none.
    """
    if baseline is None:
        return dict.fromkeys(accuracy)
    return {
        setting: interval(values - accuracy_per_user(baseline, setting), difference=True)
        for setting, values in accuracy.items()
    }


def choose(models: list[ModelEvidence]) -> ModelEvidence | None:
    """The model with the best accuracy on held-out pairs, of equals the smallest rank.

    None if no pairs were held out.
    """
    if VALIDATION not in models[0].entry["accuracy"]:
        return None
    return max(
        models, key=lambda model: (model.entry["accuracy"][VALIDATION]["mean"], -model.entry["K"])
    )
