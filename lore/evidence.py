"""Is a result personal, by how much, and is any of it an artefact?"""

import functools
import itertools

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from utils import (
    SETTINGS,
    UNSEEN_TEST,
    VALIDATION,
    accuracies_per_user,
    accuracy_per_user,
    fits_per_model,
)

DRAWS = 2000  # of the bootstrap over users
NEGLIGIBLE = 0.01  # of accuracy: a personal part that is surely smaller counts as none
FEWEST_USERS = 6  # with fewer no signed-rank test can reach p < 0.05, and an interval says nothing
COLLAPSED = 0.99  # cosine with the reward head from which on a column is that head
INTERVAL, DIFFERENCE = "{mean:.3f} [{low:.3f}, {high:.3f}]", "{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def kept_fit(fits):
    """Of one row's seeds the model to keep: best on held-out pairs where there are any, else of the lowest loss."""
    return max(
        fits, key=lambda fit: (fit.accuracies.get(VALIDATION, np.zeros(1)).mean(), -fit.loss)
    )


@functools.cache
def _resampling(N):
    """Each user's share in the means of DRAWS bootstrap draws of N users, the same for all quantities: `[DRAWS, N]`."""
    return np.random.default_rng(0).multinomial(N, np.full(N, 1 / N), DRAWS) / N


def interval(values, difference=False):
    """The mean over users of float64 `[N]` and its 95 % percentile interval, {mean, low, high}; None for None.
    A difference has p too, of the Wilcoxon signed-rank test that it is symmetric about 0."""
    if values is None:
        return None
    low, high = np.percentile(_resampling(len(values)) @ values, (2.5, 97.5)).tolist()
    found = {"mean": float(np.mean(values)), "low": low, "high": high}
    if difference:
        from scipy.stats import wilcoxon  # here: it takes a second to load

        values = values.round(9)  # whether two users tie must not hang on the order of additions
        found["p"] = float(wilcoxon(values, method="approx").pvalue) if values.any() else 1.0
    return found


def exchanged_accuracies(features, fits):
    """Accuracy of each unseen user's pairs under the user's own weights, everyone's mean weights, and another user's
    weights, as a mean over all others (None if there are none): three float64 `[N]`, means over the fits of a row."""
    N, weights = (
        len(features),
        [torch.cat([fit.W_unseen, fit.W_unseen.mean(0, keepdim=True)]) for fit in fits],
    )
    right = accuracies_per_user(
        features, [fit.V for fit in fits], [w.expand(N, -1, -1) for w in weights]
    ).mean(0)  # (N, N + 1)
    own = right.diagonal()
    return own, right[:, -1], (right[:, :-1].sum(1) - own) / (N - 1) if N > 1 else None


def basis_of(fits, V_final):
    """What the basis of one row looks like: the kept seed's, and the principal angles between the spans of all seeds,
    in degrees, smallest first, means over pairs of seeds. Cosines are absolute, entropies in nats; the effective rank
    is the exponential of the entropy of the squared singular values of V diag(mean w)."""
    from scipy.linalg import subspace_angles
    from scipy.stats import entropy

    kept = kept_fit(fits)
    V, w, head = (tensor.double().cpu().numpy() for tensor in (kept.V, kept.W, V_final.reshape(-1)))
    unit = V / np.linalg.norm(V, axis=0)
    between = np.abs(unit.T @ unit)[np.triu_indices(V.shape[1], 1)]
    angles = [
        np.degrees(subspace_angles(one.V.double().cpu().numpy(), other.V.double().cpu().numpy()))[
            ::-1
        ]
        for one, other in itertools.combinations(fits, 2)
        if kept.K
    ]
    return {
        "columns": V.shape[1],
        "effective_rank": float(
            np.exp(entropy(np.linalg.svd(V * w.mean(0), compute_uv=False) ** 2))
        ),
        "largest_cosine_between_columns": float(between.max()) if between.size else None,
        "largest_cosine_to_head": float(np.abs(unit.T @ head).max() / np.linalg.norm(head)),
        "mean_weight_entropy": float(entropy(w, axis=1).mean()),
        "angles_between_seeds": np.mean(angles, 0).tolist() if angles else None,
    }


def leaks_of(prompts):
    """{setting: share of the test pairs whose prompt stands among the training pairs of the same side; None: unknown}.
    prompts: {part: one list per user of the pairs' prompts, their texts or digests of these}, or None."""
    leaks = dict.fromkeys((SETTINGS[1], UNSEEN_TEST))
    for setting, train, test in zip(leaks, ("train", "train_unseen"), ("test", "test_unseen")):
        if prompts and {train, test} <= prompts.keys():
            known = set().union(*prompts[train])
            leaks[setting] = float(
                np.mean([prompt in known for of_user in prompts[test] for prompt in of_user])
            )
    return leaks


def evidence(fits, data, V_final, tossed=()):
    """Is it personal, by how much, and is any of it an artefact -> {evidence, chosen, leaks, verdict} of results.json.
    fits: list of `Fit`, of all ranks, alphas and seeds; with accuracies under "Validation" these choose the row.
    data: `test_unseen`, `[m_i, d]` or Pairs per unseen user; where known `prompts`, see `leaks_of`, and `longer`,
    {part: one array per user, 1 where the chosen answer is the longer one, -1 where the shorter, else 0}.
    tossed: (K, alpha, accuracies `[N_unseen]`) of models whose pairs' directions were tossed, in training and test."""
    rows, entries, parts = fits_per_model(fits), [], []
    tossed = {(K, alpha): accuracies for K, alpha, accuracies in tossed}
    longer = data.get("longer") and [
        (1 + np.mean(signs)) / 2 for signs in data["longer"]["test_unseen"]
    ]
    for (K, alpha), of_row in rows.items():
        accuracy = {setting: accuracy_per_user(of_row, setting) for setting in of_row[0].accuracies}
        minus = {
            name: {
                setting: interval(
                    accuracy[setting] - accuracy_per_user(rows[other, alpha], setting), True
                )
                if (other, alpha) in rows
                else None
                for setting in accuracy
            }
            for name, other in (("minus_reference", 0), ("minus_pooled", 1))
        }
        own, mean, others = (
            exchanged_accuracies(data["test_unseen"], of_row) if K > 1 else [None] * 3
        )
        parts.append(own - mean if K > 1 else None)
        controls = {
            "mean_weights": mean,
            "other_users": others,
            "tossed": tossed.get((K, alpha)),
            "longer": longer,
        }
        entries.append(
            {
                "K": K,
                "alpha": alpha,
                "seeds": [fit.seed for fit in of_row],
                "accuracy": {setting: interval(values) for setting, values in accuracy.items()},
                **minus,
                "controls": {name: interval(values) for name, values in controls.items()},
                "personal_part": interval(parts[-1], True),
                "basis": basis_of(of_row, V_final),
            }
        )
    best = None
    if VALIDATION in fits[0].accuracies:  # of equals the smallest rank
        best = max(entries, key=lambda entry: (entry["accuracy"][VALIDATION]["mean"], -entry["K"]))
    chosen = {key: best and best[key] for key in ("K", "alpha")} | {
        "by": "validation" if best else "none"
    }
    judged = [
        (entry, part)
        for entry, part in zip(entries, parts)
        if part is not None and best in (None, entry)
    ]
    leaks = leaks_of(data.get("prompts"))
    users = len(data["test_unseen"])
    if judged:
        verdict, named, lines = judgement(*zip(*judged))
    else:
        verdict, named = "no" if users >= FEWEST_USERS else "undecided", best or entries[-1]
        lines = [
            f"{verdict.capitalize()}: {_name(named)} is one reward for everybody, it has no user weights."
        ]
    explained, signs = explanations(entries, named, verdict, leaks[UNSEEN_TEST], users)
    if signs:
        lines[0] += " But see the signs of an artefact below."
    lines += explained
    if collapsed := [
        entry
        for entry, of_row in zip(entries, rows.values())
        if entry["K"]
        and all(
            (cosine_similarity(fit.V, V_final.to(fit.V), 0).abs() >= COLLAPSED).all()
            for fit in of_row
        )
    ]:
        lines += [
            f"Collapsed onto the reward head, all columns within a cosine of {COLLAPSED}: {_name(*collapsed)}. "
            "Put smaller penalties into alpha_list and have validation_share choose."
        ]
    return {
        "evidence": entries,
        "chosen": chosen,
        "leaks": leaks,
        "verdict": {"personal": verdict, "text": "\n".join(lines)},
    }


def judgement(entries, parts):
    """The verdict on rows with user weights -> ("yes" | "no" | "undecided", the row it names, lines of text).
    parts: the unseen users' personal parts, float64 `[N]` of each row. Intervals of several rows hold for all at once:
    half-widths are the 95 % quantile of the largest deviation of any row from its mean, in units of standard errors.
    These are taken from the normal distribution to Student's t, for a bootstrap of few users is too narrow."""
    from scipy.stats import norm, t

    parts, N, rows = np.stack(parts, 1), len(parts[0]), len(entries)  # (N, rows)
    mean, draws = parts.mean(0), _resampling(N) @ parts
    error, freedom = draws.std(0), max(N - 1, 1)
    errors = np.percentile((np.abs(draws - mean) / np.where(error > 0, error, np.inf)).max(1), 95)
    half = (N / freedom) ** 0.5 * t.ppf(norm.cdf(errors), freedom) * error
    low, high = mean - half, mean + half
    above = [entry for entry, end in zip(entries, low) if end > 0]
    i = np.where(low > 0, mean, mean - 2).argmax()  # the largest, of those above 0 if any is
    verdict = (
        "undecided"
        if N < FEWEST_USERS
        else "yes"
        if above
        else "no"
        if high.max() < NEGLIGIBLE
        else "undecided"
    )
    own, others = (
        entries[i]["accuracy"][UNSEEN_TEST]["mean"],
        entries[i]["controls"]["mean_weights"]["mean"],
    )
    lines = [
        f"{verdict.capitalize()}: at {_name(entries[i])} unseen users' own weights predict {own:.3f} of their "
        f"unseen pairs, everybody's mean weights {others:.3f}: a personal part of {mean[i]:+.3f}, with a 95 % "
        f"interval over users of [{low[i]:+.3f}, {high[i]:+.3f}], "
        + (
            f"which holds for all {rows} models at once and is wider than those in the tables."
            if rows > 1
            else "a little wider than in the tables, for the number of users."
        )
    ]
    if rows > 1:
        lines += [
            f"By such intervals the personal part is above 0 at {_name(*above) or 'no rank'}."
        ]
    if own <= 0.5:
        lines += ["But own weights predict no better than chance."]
    if N < FEWEST_USERS:
        lines += [f"{N} unseen users are too few to tell, at least {FEWEST_USERS} are needed."]
    elif verdict == "undecided":  # an interval shrinks with the root of the number of users
        users = N * ((high[i] - low[i]) / 2 / max(mean[i], NEGLIGIBLE - mean[i])) ** 2
        lines += [
            f"About {max(N + 1, float(f'{users:.2g}')):,.0f} unseen users with as many pairs as "
            f"these {N} would decide it."
        ]
    return verdict, entries[i], lines


def explanations(entries, named, verdict, leak, users):
    """Lines on what is the same for everybody, and on what may only look like a preference; the signs of an artefact.
    leak: a share or None; users: how many unseen ones."""
    at, lines = {entry["K"]: entry for entry in entries if entry["alpha"] == named["alpha"]}, []
    if (
        users >= FEWEST_USERS
        and 0 in at
        and (reference := at[0]["accuracy"][UNSEEN_TEST])["low"] <= 0.5
    ):
        is_at = "is at or below" if reference["mean"] <= 0.5 else "cannot be told from"
        lines += [
            f"The reference {is_at} chance (K = 0, {INTERVAL.format(**reference)}): either this vector is not the "
            "model's reward head, or that head knows little of these choices."
        ]
    if 0 in at and 1 in at:
        gain, more = at[1]["minus_reference"][UNSEEN_TEST], named["minus_pooled"][UNSEEN_TEST]
        lines += [
            f"One direction for everybody (K = 1) against the reference: {DIFFERENCE.format(**gain)}"
            + (
                f"; {_name(named)} against K = 1: {DIFFERENCE.format(**more)}."
                if named["K"] > 1
                else "."
            )
        ]
        if gain["low"] > 0 and verdict != "yes" and users >= FEWEST_USERS:
            lines += [
                "So one direction explains the gain over the reference: it is the same for everybody."
            ]
    signs = ["shared prompts"] if leak else []
    for key, name in (
        ("tossed", "trained on choices swapped by a coin"),
        ("longer", "taking the longer answer"),
    ):
        if found := next(filter(None, (entry["controls"][key] for entry in entries)), None):
            lines += [f"Control, {name}: {INTERVAL.format(**found)}; chance is 0.5."]
            signs += [name] if found["low"] > 0.5 and users >= FEWEST_USERS else []
    lines += [
        "Whether test prompts stand among the training prompts is not known."
        if leak is None
        else f"Of the unseen users' test pairs {leak:.1%} have a prompt that stands among their training pairs.",
        f"Signs of an artefact: {'; '.join(signs) or 'none in these checks'}.",
    ]
    return lines, signs


def _name(*entries):
    """`K = 2, 3 (alpha 0) and K = 2 (alpha 0.001)` of the entries."""
    return " and ".join(
        f"K = {', '.join(str(entry['K']) for entry in entries if entry['alpha'] == alpha)} "
        f"(alpha {alpha:g})"
        for alpha in dict.fromkeys(entry["alpha"] for entry in entries)
    )
