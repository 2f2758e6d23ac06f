"""Every sentence of the verdict: data of which it is true, and data of which it must not be."""

import re

import numpy as np
import pytest

from lore.intervals import interval, joint_intervals
from lore.verdict import ModelEvidence, UnseenTest, write_verdict
from utils import UNSEEN_TEST

NO_LEAKS = {
    "by_prompt": 0.0,
    "by_answers": 0.0,
    "by_answer_in_prompt": 0.0,
    "by_features": 0.0,
}
AT_CHANCE = {"mean": 0.52, "low": 0.47, "high": 0.57}
ABOVE_CHANCE = {"mean": 0.66, "low": 0.61, "high": 0.71}
USERS = 40

# Personal parts, float64 [users].
LARGE = np.random.default_rng(0).normal(0.1, 0.05, USERS)
NONE = np.random.default_rng(1).normal(0, 0.005, USERS)
NOISE = np.random.default_rng(2).normal(0, 0.1, USERS)
UNCLEAR = 0.02 + NOISE - NOISE.mean()


def model(K, part=None, alpha=0, accuracy=0.6, collapsed=False, model_per_user=None):
    """The evidence on a model; accuracy: its mean, or its interval."""
    if not isinstance(accuracy, dict):
        accuracy = {"mean": accuracy, "low": accuracy - 0.02, "high": accuracy + 0.02}
    mean_weights = None if part is None else {"mean": accuracy["mean"] - part.mean()}
    entry = {
        "K": K,
        "alpha": alpha,
        "accuracy": {UNSEEN_TEST: accuracy},
        "controls": {
            "mean_weights": mean_weights,
            "model_per_user": model_per_user and {"mean": model_per_user},
        },
    }
    return ModelEvidence(entry, part, collapsed)


def verdict(models, chosen=None, leaks=NO_LEAKS, tossed=AT_CHANCE, users=USERS, equal_pairs=0):
    """("yes", "no" or "undecided", the sentences); chosen: the place of a model."""
    test = UnseenTest(users, 25 * users, NO_LEAKS | leaks, tossed, equal_pairs)
    result = write_verdict(models, None if chosen is None else models[chosen], test)
    sentences = result["text"].splitlines()
    assert 4 <= len(sentences) <= 6
    assert all(re.fullmatch(r"[A-Z].*[.?]", sentence) for sentence in sentences)
    return result["personal"], sentences


def text_of(*arguments, **options):
    return "\n".join(verdict(*arguments, **options)[1])


def answer(part, **options):
    """The answer and the first sentence about one model of this personal part."""
    personal, sentences = verdict([model(2, part)], users=len(part), **options)
    return personal, sentences[0]


# ---- The answer


def test_yes_if_the_personal_part_is_above_0():
    assert answer(LARGE) == ("yes", "Yes: the reward is personal.")
    for part in (NONE, UNCLEAR, -LARGE, LARGE[:5]):
        assert answer(part)[0] != "yes"
        assert "Yes" not in answer(part)[1]


def test_no_if_the_personal_part_is_surely_below_a_point():
    for part in (NONE, -LARGE):
        personal, sentence = answer(part)
        assert personal == "no"
        assert sentence == (
            "No: users' own weights gain less than one point of accuracy over everybody's mean "
            "weights."
        )
    for part in (LARGE, UNCLEAR, NONE[:5]):
        assert answer(part)[0] != "no"
        assert "No" not in answer(part)[1]


def test_no_needs_all_models_and_yes_needs_one():
    assert verdict([model(2, NONE), model(3, UNCLEAR)])[0] == "undecided"
    assert verdict([model(2, NONE), model(3, LARGE)])[0] == "yes"
    assert verdict([model(2, NONE), model(3, NONE)])[0] == "no"


def test_few_users_are_never_an_answer_and_are_said_to_be_few():
    few = "Undecided: 5 unseen users cannot tell, at least 6 are needed."
    for part in (np.full(5, 0.2), np.zeros(5)):
        assert answer(part) == ("undecided", few)
    assert verdict([model(1), model(2, LARGE)], chosen=0, users=5)[1][0] == few
    for part in (np.full(6, 0.2), np.zeros(6), UNCLEAR):
        assert "at least 6" not in answer(part)[1]


def test_undecided_says_about_how_many_users_would_decide():
    noise = NOISE[:20] - NOISE[:20].mean()
    personal, sentence = answer(0.02 + noise)
    assert personal == "undecided"
    assert sentence.startswith("Undecided: 20 unseen users cannot tell, about ")
    assert sentence.endswith(" probably could if the true difference is +0.020.")
    users = users_that_could(sentence)
    # As many as a test needs to be at 5 % with a power of 80 %, after any textbook.
    assert users == pytest.approx(((1.96 + 0.84) * noise.std() / 0.02) ** 2, rel=0.2)
    assert answer(np.tile(0.02 + noise, users // 20 + 2))[0] == "yes"


def users_that_could(sentence):
    """How many users could tell, by the first sentence of an undecided verdict."""
    return int(re.search(r"about ([\d,]+) probably could", sentence)[1].replace(",", ""))


def test_of_several_models_the_median_tells_how_many_users_would_decide():
    noise = NOISE[:20] - NOISE[:20].mean()
    differences = (0.002, 0.012, 0.022)
    models = [model(K, mean + noise) for K, mean in enumerate(differences, 2)]
    sentence = verdict(models, users=20)[1][0]
    assert sentence.endswith("if the true difference is +0.012, the median of the 3 models.")
    by_the_largest = users_that_could(answer(0.022 + noise)[1])
    assert users_that_could(sentence) > 2 * by_the_largest


def test_so_many_users_mostly_do_decide():
    """Five models that are equally good: the one that looks best is not."""
    decided = undecided = 0
    for seed in range(200):
        chance = np.random.default_rng(seed)
        first = verdict_of_draws(chance, users=20)
        if first[0] == "undecided":
            undecided += 1
            decided += verdict_of_draws(chance, users_that_could(first[1][0]))[0] == "yes"
        if undecided == 40:
            break
    assert decided > 0.7 * undecided == 28


def verdict_of_draws(chance, users):
    """The verdict on five models with a true difference of 0.03."""
    parts = 0.03 + 0.1 * chance.standard_normal((5, users))
    return verdict([model(K, part) for K, part in enumerate(parts, 2)], users=users)


@pytest.mark.parametrize("part", [LARGE, NONE, LARGE[:5]])
def test_what_is_decided_or_hopeless_names_no_number_of_users_that_would_decide(part):
    assert "could if" not in answer(part)[1]


@pytest.mark.parametrize("kind", ["by_prompt", "by_answers", "by_features"])
def test_repeats_that_could_be_the_whole_personal_part_leave_it_undecided(kind):
    said = "Undecided: test pairs repeat training pairs, which could explain the whole result."
    low = joint_intervals(LARGE[:, None])[0][0]
    assert 0.05 < low < 0.1
    assert answer(LARGE, leaks={kind: low + 0.01}) == ("undecided", said)
    assert answer(LARGE, leaks={kind: low - 0.01}) == ("yes", "Yes: the reward is personal.")
    assert answer(LARGE, leaks={kind: None})[0] == "yes"
    assert answer(NONE, leaks={kind: 1.0})[0] == "no"


def test_an_alarm_of_the_control_leaves_a_personal_part_undecided():
    personal, sentence = answer(LARGE, tossed=ABOVE_CHANCE)
    assert personal == "undecided"
    assert sentence == (
        "Undecided: a control on randomly flipped choices is above chance, which could explain the "
        "whole result."
    )
    for tossed in (AT_CHANCE, None):
        assert answer(LARGE, tossed=tossed)[0] == "yes"
    assert "repeat" in answer(LARGE, tossed=ABOVE_CHANCE, leaks={"by_answers": 0.9})[1]


def test_if_the_test_repeats_the_training_more_users_are_not_said_to_decide():
    said = "Undecided: 40 unseen users cannot tell, and test pairs repeat training pairs."
    assert answer(UNCLEAR, leaks={"by_answers": 0.5}) == ("undecided", said)
    assert "and a control" in answer(UNCLEAR, tossed=ABOVE_CHANCE)[1]
    for leaks in (NO_LEAKS, {"by_answers": 0.001}):
        assert "repeat" not in answer(UNCLEAR, leaks=leaks)[1]
        assert "could if" in answer(UNCLEAR, leaks=leaks)[1]


def test_if_validation_chose_one_reward_for_everybody_the_answer_is_no():
    models = [model(0), model(1), model(2, LARGE)]
    personal, sentences = verdict(models, chosen=1)
    assert personal == "no"
    assert sentences[0] == (
        "No: validation chose K = 1 (alpha 0), which is one reward for everybody."
    )
    assert "chose" not in verdict(models, chosen=2)[1][0]
    assert "chose" not in verdict(models)[1][0]


def test_if_no_model_has_user_weights_nothing_is_decided():
    personal, sentences = verdict([model(0), model(1)])
    assert personal == "undecided"
    assert sentences[0] == "Undecided: no model with user weights was trained."
    assert "was trained" not in text_of([model(0), model(1), model(2, NONE)])
    assert "was trained" not in text_of([model(0), model(1)], chosen=1)


def test_few_users_without_tastes_seldom_give_a_yes():
    """Of six users a plain bootstrap would say yes in about every fifth such data set."""
    yes = 0
    for repeat in range(200):
        parts = np.random.default_rng(repeat).normal(0, 0.1, (5, 6))
        models = [model(K, part) for K, part in enumerate(parts, 2)]
        yes += verdict(models, users=6)[0] == "yes"
    assert yes <= 14


def test_if_no_model_is_personal_one_is_seldom_named_with_an_interval_above_0():
    above = 0
    for repeat in range(100):
        parts = np.random.default_rng(repeat).binomial(50, 0.6, (4, USERS)) / 50 - 0.6
        low, _ = named_interval([model(K, part) for K, part in enumerate(parts, 2)])
        above += low > 0
    assert above <= 10


# ---- What was tested, and what came out


def result_of(models, **options):
    """The sentence on what came out."""
    return verdict(models, **options)[1][2]


def named_interval(models):
    """The interval of the personal part in the sentence on what came out."""
    ends = re.search(r": (\S+) to (\S+)\)", result_of(models)).groups()
    return [float(end) for end in ends]


def test_users_and_pairs_of_the_test_are_counted():
    assert verdict([model(2, LARGE)])[1][1] == (
        "Tested: 40 unseen users, on their 1,000 test pairs."
    )


@pytest.mark.parametrize("users", [1, 5, USERS])
@pytest.mark.parametrize("part", [0.0, 0.2])
def test_nobody_is_called_unseen_if_everybody_is_seen(users, part):
    test = UnseenTest(users, 25 * users, NO_LEAKS, AT_CHANCE, everybody_is_seen=True)
    sentences = write_verdict([model(2, np.full(users, part))], None, test)["text"].splitlines()
    count = "1 user" if users == 1 else f"{users} users"
    assert sentences[1] == (
        f"Tested: {count}, all of them seen in the training, on their {25 * users:,} test pairs."
    )
    assert "unseen user" not in " ".join(sentences)
    if users < 6:
        assert sentences[0] == f"Undecided: {count} cannot tell, at least 6 are needed."


MANY, FEW = 101, 100  # of 1,000 test pairs


def test_many_pairs_of_equal_sides_are_named_as_the_cause():
    said = (
        "Tested: 40 unseen users, on their 1,000 test pairs; in 101 of these both sides are equal, "
        "so no reward can tell them apart, and they count as wrong."
    )
    for part in (LARGE, NONE, UNCLEAR):
        assert verdict([model(2, part)], equal_pairs=MANY)[1][1] == said
        assert "equal" not in text_of([model(2, part)], equal_pairs=FEW)


def test_many_pairs_of_equal_sides_leave_a_no_undecided_and_a_yes_as_it_is():
    said = "Undecided: too many test pairs are equal on both sides."
    everybody = [model(1), model(2, LARGE)]
    for models, chosen in (([model(2, NONE)], None), (everybody, 0)):
        personal, sentences = verdict(models, chosen, equal_pairs=MANY)
        assert (personal, sentences[0]) == ("undecided", said)
        assert verdict(models, chosen, equal_pairs=FEW)[0] == "no"
    assert verdict([model(2, LARGE)], equal_pairs=MANY)[0] == "yes"
    assert verdict([model(2, NONE[:5])], users=5, equal_pairs=MANY)[1][0] != said


def test_with_many_pairs_of_equal_sides_nothing_is_said_about_chance_or_the_head():
    low = [model(0, accuracy=0.2), model(2, NONE, accuracy=0.3)]
    blamed = text_of(low, equal_pairs=FEW)
    assert (
        "no better than chance" in blamed and "check that it is the model's reward head" in blamed
    )
    text = text_of(low, equal_pairs=MANY)
    assert "the reference (K = 0) 0.200." in text
    assert "chance" not in text and "head" not in text


def test_the_result_is_the_accuracy_under_own_and_mean_weights_and_their_difference():
    sentence = result_of([model(2, LARGE, accuracy=0.7)])
    mean = LARGE.mean()
    low, high = joint_intervals(LARGE[:, None])
    assert sentence == (
        "At K = 2 (alpha 0) the users' own weights predict 0.700 of them right, everybody's mean "
        f"weights {0.7 - mean:.3f}: a difference of {mean:+.3f} (95 % interval: {low[0]:+.3f} to "
        f"{high[0]:+.3f})."
    )


def test_an_interval_that_holds_for_several_models_says_so():
    assert "(95 % interval, for all 2 models at once: " in result_of(
        [model(1), model(2, LARGE), model(3, NONE)]
    )
    for options in (dict(chosen=1), {}):
        models = [model(1), model(2, LARGE)]
        assert "at once" not in result_of(models, **options)
    assert "at once" not in result_of([model(2, LARGE), model(3, NONE)], chosen=0)


def test_few_users_have_no_interval():
    assert "interval" not in result_of([model(2, LARGE[:5])], users=5)
    assert "interval" in result_of([model(2, LARGE[:6])], users=6)


def test_a_choice_by_validation_is_said_and_no_other():
    models = [model(2, NONE), model(3, LARGE)]
    assert "At K = 2 (alpha 0), chosen by validation, " in result_of(models, chosen=0)
    assert "chosen" not in result_of(models)


def test_an_accuracy_no_better_than_chance_is_said_to_be_so():
    for accuracy in (0.4, 0.5):
        sentence = result_of([model(2, LARGE, accuracy=accuracy)])
        assert f"predict {accuracy:.3f} of them right, no better than chance, every" in sentence
    assert "chance" not in result_of([model(2, LARGE, accuracy=0.51)])


def test_the_result_of_one_reward_for_everybody_has_no_own_weights():
    sentence = result_of([model(1, accuracy=0.63), model(2, LARGE)], chosen=0)
    assert (
        sentence == "At K = 1 (alpha 0), chosen by validation, 0.630 of them are predicted right."
    )


def test_of_several_models_the_largest_is_named_with_an_interval_wider_than_its_own():
    parts = np.random.default_rng(0).normal([[0.03], [0.05], [-0.05]], 0.05, (3, USERS))
    models = [model(K, part) for K, part in enumerate(parts, 2)]
    assert result_of(models).startswith("At K = 3 (alpha 0) ")
    alone = interval(parts[1], difference=True)
    low, high = named_interval(models)
    assert low < alone["low"] < alone["high"] < high


def test_a_larger_part_that_is_not_above_0_is_not_named_if_another_is():
    unsure = np.tile([2.0, -1.0], USERS // 2)
    assert unsure.mean() > LARGE.mean()
    assert result_of([model(2, unsure), model(3, LARGE)]).startswith("At K = 3 ")


def test_of_equal_personal_parts_the_smallest_rank_is_named():
    values = np.random.default_rng(0).random(USERS)
    for parts in ([values, values[::-1]], [values[::-1], values]):  # added up in another order
        models = [model(K, part) for K, part in enumerate(parts, 2)]
        assert result_of(models).startswith("At K = 2 ")


def test_one_user_and_one_pair_are_counted_as_one():
    test = UnseenTest(1, 1, NO_LEAKS, AT_CHANCE)
    sentences = write_verdict([model(2, LARGE[:1])], None, test)["text"].splitlines()
    assert sentences[:2] == [
        "Undecided: 1 unseen user cannot tell, at least 6 are needed.",
        "Tested: 1 unseen user, on their 1 test pair.",
    ]


# ---- Comparisons


def comparisons(models, **options):
    """What is compared with, in the sentence on it; empty without one."""
    sentences = [s for s in verdict(models, **options)[1] if s.startswith("For comparison: ")]
    return sentences[0] if sentences else ""


def test_the_result_is_compared_with_what_is_known_without_lore():
    models = [model(0, accuracy=0.55), model(1, accuracy=0.58), model(2, LARGE, model_per_user=0.6)]
    assert comparisons(models) == (
        "For comparison: the reference (K = 0) 0.550; one reward for everybody (K = 1) 0.580; a "
        "model per user 0.600."
    )
    assert "one reward" not in comparisons(models, chosen=1)  # the result itself
    assert comparisons([model(2, LARGE)]) == ""


def test_comparisons_are_of_the_same_alpha():
    models = [
        model(1, accuracy=0.51, alpha=0.1),
        model(2, NONE, alpha=0.1),
        model(1, accuracy=0.58),
        model(2, LARGE),
    ]
    assert "0.580" in comparisons(models)
    assert "0.510" not in comparisons(models)


def test_a_reference_at_chance_is_questioned_and_a_better_one_is_not():
    asked = " chance (check that it is the model's reward head)"
    for low, high, said in (
        (0.48, 0.55, ", which cannot be told from" + asked),
        (0.40, 0.45, ", which is below" + asked),
    ):
        reference = model(0, accuracy={"mean": (low + high) / 2, "low": low, "high": high})
        models = [reference, model(2, LARGE)]
        assert said in comparisons(models)
        few = [reference, model(2, LARGE[:5])]
        assert "chance" not in comparisons(few, users=5)

        test = UnseenTest(USERS, 25 * USERS, NO_LEAKS, AT_CHANCE, head_is_random=True)
        of_stand_in = write_verdict(models, None, test)["text"]
        assert " chance (it is the random head of the demo's stand-in)" in of_stand_in
    assert "chance" not in comparisons([model(0, accuracy=0.55), model(2, LARGE)])


def test_nothing_is_said_of_what_explains_a_gain():
    """K = 1 beats the reference, and K = 2 beats K = 1: no direction explains that alone."""
    models = [model(0, accuracy=0.5), model(1, accuracy=0.6), model(2, UNCLEAR, accuracy=0.83)]
    assert "explains the gain" not in text_of(models)
    assert "same for everybody" not in text_of(models)


# ---- Artefacts


def artefacts(**options):
    """The sentence on artefacts."""
    sentences = [s for s in verdict([model(2, LARGE)], **options)[1] if "artefact" in s]
    assert len(sentences) == 1
    return sentences[0]


def test_only_if_all_was_checked_and_nothing_found_there_are_no_signs():
    assert artefacts() == (
        "Signs of an artefact: none in these checks (repeats by prompt, repeats by answers, "
        "repeats by answer in prompt, repeats by features, randomly flipped choices)."
    )
    for kind in NO_LEAKS:
        assert "none" not in artefacts(leaks={kind: None})
        assert "none" not in artefacts(leaks={kind: 0.0001})
    assert "none" not in artefacts(tossed=None)
    assert "none" not in artefacts(tossed=ABOVE_CHANCE)


def test_repeats_are_named_with_their_shares():
    assert artefacts(leaks={"by_prompt": 0.5, "by_answers": 0.0004}) == (
        "Signs of an artefact: a leak, as test pairs repeat training pairs, 50.0 % by prompt, "
        "under 0.1 % by answers."
    )
    assert "repeat training" not in artefacts()


def test_an_alarm_of_the_control_is_a_sign_and_chance_is_none():
    said = "a model trained on randomly flipped choices predicts 0.660 of others, not 0.5"
    assert artefacts(tossed=ABOVE_CHANCE) == f"Signs of an artefact: {said}."
    both = artefacts(tossed=ABOVE_CHANCE, leaks={"by_features": 1.0})
    assert both.endswith(f"100.0 % by features; {said}.")
    assert "predicts" not in artefacts()


def test_what_was_not_checked_is_named_and_nothing_else():
    assert artefacts(leaks={"by_prompt": None, "by_answers": None}) == (
        "Not checked for signs of an artefact: repeats by prompt, repeats by answers."
    )
    assert artefacts(tossed=None) == (
        "Not checked for signs of an artefact: randomly flipped choices."
    )
    assert artefacts(leaks={"by_prompt": None, "by_features": 0.25}) == (
        "Signs of an artefact: a leak, as test pairs repeat training pairs, 25.0 % by features "
        "(not checked: repeats by prompt)."
    )
    for options in ({}, dict(leaks={"by_prompt": 0.1}), dict(tossed=ABOVE_CHANCE)):
        assert "ot checked" not in artefacts(**options)


def test_people_who_like_long_answers_are_no_artefact():
    assert "longer" not in text_of([model(2, LARGE)])


# ---- What to do next


def next_step(models, **options):
    """The last sentence."""
    sentence = verdict(models, **options)[1][-1]
    assert sentence.startswith("Next: ")
    return sentence.removeprefix("Next: ")


TWO_ALPHAS = [model(1), model(2, LARGE), model(2, LARGE, alpha=0.01)]


def test_a_test_that_repeats_the_training_is_to_be_cleaned_first():
    cleaned = (
        "keep whole conversations, and all copies of a pair, on one side of the split, "
        "and run again."
    )
    for options in (dict(leaks={"by_answers": 0.01}), dict(tossed=ABOVE_CHANCE)):
        for models in ([model(1)], [model(2, LARGE)], TWO_ALPHAS):
            assert next_step(models, **options) == cleaned
    for options in ({}, dict(leaks={"by_answers": 0.009}), dict(leaks={"by_answers": None})):
        assert next_step([model(2, LARGE)], **options) != cleaned


def test_many_pairs_of_equal_sides_are_to_be_left_out_first():
    said = (
        "leave out pairs with equal sides, or mend what makes them equal (the cut to --max_length, "
        "the chat template), and run again."
    )
    for models in ([model(1)], [model(2, LARGE)], TWO_ALPHAS):
        assert next_step(models, equal_pairs=MANY) == said
        assert next_step(models, equal_pairs=FEW) != said


def test_ranks_from_2_on_are_to_be_tried_if_there_are_none():
    assert next_step([model(0), model(1)]) == "put ranks from 2 on into K_list."
    assert "K_list" not in next_step([model(1), model(2, LARGE)])
    assert "K_list" not in next_step([model(1), model(2, LARGE)], chosen=0)


MORE_USERS = ", and collect the choices of more users."


@pytest.mark.parametrize("part, end", [(LARGE, "."), (NONE, "."), (UNCLEAR, MORE_USERS)])
def test_if_one_alpha_was_tried_a_list_of_them_is_named_and_validation(part, end):
    models = [model(0), model(2, part)]
    alphas = "try alpha_list = [0, 0.0001, 0.001, 0.01, 0.1]"
    assert next_step(models) == (
        f"{alphas} with validation_share = 0.2, as only alpha 0 was tried{end}"
    )
    assert next_step(models, chosen=1) == f"{alphas}, as only alpha 0 was tried{end}"
    assert "only alpha 0.1 was" in next_step([model(2, part, alpha=0.1)])
    for options in ({}, dict(chosen=1)):
        assert "alpha_list" not in next_step(TWO_ALPHAS, **options)


def test_if_several_alphas_were_tried_validation_is_to_choose():
    said = "set validation_share = 0.2, so that held-out pairs choose K and alpha."
    assert next_step(TWO_ALPHAS) == said
    assert "validation_share" not in next_step(TWO_ALPHAS, chosen=1)
    unclear = [model(2, UNCLEAR), model(2, UNCLEAR, alpha=0.01)]
    assert next_step(unclear) == said.removesuffix(".") + MORE_USERS


def test_a_basis_that_has_collapsed_needs_smaller_penalties():
    collapsed = [model(K, NONE, alpha=0.01, collapsed=True) for K in (2, 3)]
    said = (
        "try alpha_list = [0, 0.0001, 0.001] with validation_share = 0.2, as the basis has "
        "collapsed onto the reward head at K = 2, 3 (alpha 0.01)."
    )
    assert next_step(collapsed) == said
    assert next_step([model(2, LARGE), *collapsed]) == said
    assert "validation_share" not in next_step(collapsed, chosen=0)
    assert "collapsed" in next_step(collapsed, chosen=0)


def test_collapse_is_not_said_of_what_does_not_need_another_penalty():
    one_direction = model(1, alpha=0.01, collapsed=True)
    without_penalty = model(2, NONE, alpha=0, collapsed=True)
    passed_over = [model(2, LARGE), model(2, NONE, alpha=0.01, collapsed=True)]
    assert "collapsed" not in next_step([one_direction, model(2, LARGE, alpha=0.01)])
    assert "collapsed" not in next_step([without_penalty])
    assert "collapsed" not in next_step(passed_over, chosen=0)


def test_if_all_was_tried_the_chosen_model_is_to_be_used():
    assert next_step(TWO_ALPHAS, chosen=2) == "use K = 2 (alpha 0.01)."
    assert next_step(TWO_ALPHAS, chosen=0) == "use K = 1 (alpha 0)."
    unclear = [model(2, UNCLEAR), model(2, UNCLEAR, alpha=0.01)]
    assert not next_step(unclear, chosen=0).startswith("use")


def test_if_all_was_tried_and_the_answer_is_open_more_users_are_needed():
    models = [model(2, UNCLEAR), model(2, LARGE, alpha=0.01)]
    assert next_step(models, chosen=0) == "collect the choices of more users."
    assert "more users" not in next_step(models, chosen=1)


def test_too_few_users_need_no_other_settings():
    for models in ([model(2, LARGE[:5])], [model(2, LARGE[:5]), model(2, LARGE[:5], alpha=0.01)]):
        assert next_step(models, users=5) == "collect the choices of more users."
        assert next_step(models, users=5, chosen=0) == "collect the choices of more users."
    assert next_step([model(1)], users=5) == "put ranks from 2 on into K_list."


def test_if_all_was_tried_and_nothing_is_personal_the_mean_weights_will_do():
    models = [model(1), model(2, NONE), model(2, LARGE, alpha=0.01)]
    assert next_step(models, chosen=1) == "give everybody the mean weights."
    assert "mean weights" not in next_step(models, chosen=2)
    assert "mean weights" not in next_step(models, chosen=0)
