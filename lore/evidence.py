"""Is a result personal, by how much, and is any of it an artefact?

The parts of this module, in their order:

    Validation   pairs that are held out of the training, to choose the rank and the alpha by
    The basis    what it looks like
    Evidence     all of it, as results.json holds it

What models score that cannot know anybody's tastes is in lore/controls.py, how much of the test
repeats the training in lore/leaks.py, and what is said of all that in lore/verdict.py.
"""

import dataclasses
import itertools
from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from lore.controls import (
    TossedControl,
    exchanged_accuracies,
    longer_answer_accuracies,
    model_per_user_accuracies,
    tossed_control,  # noqa: F401 - the scripts take it from here
)
from lore.intervals import Interval, interval, worst_served
from lore.leaks import leaks_of
from lore.study import Features, Study
from lore.verdict import COLLAPSED, ModelEvidence, UnseenTest, write_verdict
from utils import (
    UNSEEN_TEST,
    Fit,
    InputError,
    accuracy_per_user,
    check_number,
    fits_per_model,
    shared_accuracies,
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
    for name in ("prompts", "texts", "conversations"):
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
    accuracies = shared_accuracies(held_out, [fit.V for fit in fits], [fit.W for fit in fits])
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


# ---- The basis


def describe_basis(fits: list[Fit], reward_head: torch.Tensor) -> dict:
    """What the basis of one model looks like; fits: all its seeds, reward_head: `[d, 1]`.

    Returns, of the kept seed: `columns`; `effective_rank`, the exponential of the entropy of the
    squared singular values of V diag(mean w); `largest_cosine_between_columns` (None for a single
    column) and `largest_cosine_to_head`, absolute; `mean_weight_entropy` over the seen users, of
    the shares that a user's absolute weights have. Entropies are in nats. And
    `angles_between_seeds`, see there.
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
        "mean_weight_entropy": float(entropy(np.abs(w), axis=1).mean()),
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


# ---- Evidence


def evidence(fits: list[Fit], study: Study, tossed: TossedControl | None = None) -> dict:
    """Is it personal, by how much, and is any of it an artefact?

    fits: of all ranks, alphas and seeds. If they have accuracies under VALIDATION, these choose
    the model that the verdict is about. tossed: of `tossed_control`, None if it was not trained.
    Returns `{evidence, chosen, leaks, verdict}` of results.json, plain JSON values; None is what
    is not known. Every process of torchrun must call this: each judges its own users.
    """
    fits_by_model = fits_per_model(fits)
    shared_controls = {
        "longer": interval(longer_answer_accuracies(study)),
        "model_per_user": interval(own_models(fits, study)),
    }
    models = [
        model_evidence(fits_by_model, model, study, tossed, shared_controls)
        for model in fits_by_model
    ]
    chosen = choose(models)
    leaks = leaks_of(study)
    test = UnseenTest(
        users=len(study.test_unseen),
        pairs=study.pair_count("test_unseen"),
        leaks=leaks[UNSEEN_TEST],
        tossed=tossed.interval if tossed else None,
        equal_pairs=study.count_equal_pairs()["test_unseen"],
        everybody_is_seen=study.everybody_is_seen,
        head_is_random=bool(study.provenance.get("demo")),
    )
    return {
        "evidence": [model.entry for model in models],
        "chosen": {
            "K": chosen.entry["K"] if chosen else None,
            "alpha": chosen.entry["alpha"] if chosen else None,
            "by": "validation" if chosen else "none",
        },
        "leaks": leaks,
        "verdict": write_verdict(models, chosen, test),
    }


def own_models(fits: list[Fit], study: Study) -> np.ndarray | None:
    """The accuracy of a model per unseen user about the direction of K = 1, float64 `[N_unseen]`.

    Of several alphas and seeds the fit to keep is taken. None if the sweep has no K = 1.
    """
    pooled = [fit for fit in fits if fit.K == 1]
    if not pooled:
        return None
    return model_per_user_accuracies(study, kept_fit(pooled).V)


def model_evidence(
    fits_by_model: dict[tuple[int, float], list[Fit]],
    model: tuple[int, float],
    study: Study,
    tossed: TossedControl | None,
    shared_controls: dict[str, Interval | None],
) -> ModelEvidence:
    """What is known of one model (K, alpha).

    fits_by_model: of `fits_per_model`. shared_controls: those that are the same for all models.
    """
    K, alpha = model
    fits = fits_by_model[model]
    accuracy = {setting: accuracy_per_user(fits, setting) for setting in fits[0].accuracies}
    is_tossed = tossed is not None and (tossed.K, tossed.alpha) == model
    controls = {
        "mean_weights": None,
        "other_users": None,
        "tossed": tossed.interval if is_tossed else None,
        **shared_controls,
    }
    personal_part = None
    served_worse = None
    if K > 1:
        exchanged = exchanged_accuracies(study.test_unseen, fits)
        personal_part = exchanged.personal_part
        # Rounded, equal accuracies are equal in whatever order they were added up.
        served_worse = float(np.mean(personal_part.round(9) < 0))
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
        "worst_served": worst_served(accuracy[UNSEEN_TEST]),
        "served_worse": served_worse,  # the share of users whom the mean weights serve better
        "basis": describe_basis(fits, study.reward_head),
    }
    return ModelEvidence(entry, personal_part, is_collapsed(fits, study.reward_head))


def differences(
    accuracy: dict[str, np.ndarray], baseline: list[Fit] | None
) -> dict[str, Interval | None]:
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
