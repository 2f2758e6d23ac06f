"""What report.md and the picture say of the directions, and which model they are about."""

import dataclasses
import itertools
import json
import re

import matplotlib.colors
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.patches import Rectangle
from studies import described_results
from test_reading import made_study, swept

import lore.reading
from lore.evidence import evidence, hold_out, judge_held_out
from lore.pictures import SHOWN_DIRECTIONS, draw_reading
from lore.reading import ATTRIBUTES, read_directions, read_named_model, weights_table
from lore.report_directions import SHOWN_EXAMPLES, directions_section, tastes_sentence
from lore.results import save_results

pytestmark = pytest.mark.usefixtures("one_thread")

USERS = 10


@pytest.fixture(scope="module")
def study():
    return made_study(0, users=USERS)


@pytest.fixture(scope="module")
def fits(study):
    return swept(study, [0, 1, 2, 3], [0, 1], num_iterations=60)


@pytest.fixture(scope="module")
def findings(fits, study):
    return evidence(fits, study)


# ---- The model that is read


def named_in(text):
    """The K and alpha of the verdict's sentence on the result."""
    K, alpha = re.search(r"^At K = (\d+) \(alpha (.+?)\)", text, re.MULTILINE).groups()
    return int(K), float(alpha)


def test_the_verdict_names_the_model_that_its_text_is_about(findings):
    verdict = findings["verdict"]
    assert (verdict["K"], verdict["alpha"]) == named_in(verdict["text"])
    assert verdict["K"] >= 2


def test_with_validation_the_model_is_the_chosen_one(study):
    to_train, held_out = hold_out(study, 0.25)
    fits = judge_held_out(swept(to_train, [0, 1, 2], num_iterations=20), held_out)
    found = evidence(fits, study)
    assert found["chosen"]["by"] == "validation"
    named = found["verdict"]["K"], found["verdict"]["alpha"]
    assert named == (found["chosen"]["K"], found["chosen"]["alpha"])


def test_p_holds_for_all_models_among_which_the_test_pairs_have_picked(fits, study, findings):
    model = findings["verdict"]["K"], 0
    personal = [fit for fit in fits if fit.K in (2, 3)]
    expected = read_directions(personal, study, model)
    assert read_named_model(fits, study, findings) == expected
    chosen = findings | {"chosen": {"K": 3, "alpha": 0, "by": "validation"}}
    chosen["verdict"] = findings["verdict"] | {"K": 3}
    alone = read_named_model(fits, study, chosen)
    assert alone == read_directions([fit for fit in fits if fit.K == 3], study, (3, 0))
    assert alone["attributes"]["threshold"] < expected["attributes"]["threshold"]


def test_a_sweep_without_user_weights_has_nothing_to_compare(study, tmp_path):
    fits = swept(study, [0, 1], num_iterations=2)
    found = evidence(fits, study)
    reading = read_named_model(fits, study, found)
    save_results(tmp_path, fits, study, {}, 1.0, found, reading=reading)
    report = (tmp_path / "report.md").read_text()
    assert "one direction for everybody, so there is nothing to compare" in report
    assert "directions.png" not in report


def test_if_users_differ_in_no_attribute_there_is_no_picture(fits, study, tmp_path):
    numbers = itertools.count(10_000)  # as texts they differ in nothing that is counted
    same = {
        part: [[(str(next(numbers)), str(next(numbers))) for _ in user] for user in users]
        for part, users in study.texts.items()
    }
    same = dataclasses.replace(study, texts=same)
    found = evidence(fits, same)
    reading = read_named_model(fits, same, found)
    save_results(tmp_path, fits, same, {}, 1.0, found, reading=reading)
    report = (tmp_path / "report.md").read_text()
    assert "No correlation of weights and attributes can be told from chance." in report
    assert "directions.png" not in report and "must be above" not in report
    assert not list(tmp_path.glob("directions.*"))


def test_an_error_of_the_reading_costs_no_result(
    fits, study, findings, tmp_path, monkeypatch, capsys
):
    save_results(
        tmp_path, fits, study, {}, 1.0, findings, reading=read_named_model(fits, study, findings)
    )
    assert (tmp_path / "reading.json").exists() and (tmp_path / "directions.png").exists()

    def fails(*_):
        raise ValueError("cannot\x1b[2K read")

    monkeypatch.setattr(lore.reading, "read_directions", fails)
    capsys.readouterr()
    reading = read_named_model(fits, study, findings)
    assert r"could not be read (ValueError: cannot\x1b[2K read)" in capsys.readouterr().out
    save_results(tmp_path, fits, study, {}, 2.0, findings, reading=reading)
    assert json.loads((tmp_path / "results.json").read_text())["seconds"] == 2
    assert "The directions were not read." in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "reading.json").exists() and not list(tmp_path.glob("directions.*"))
    assert (tmp_path / "weights.csv").exists()


# ---- The files


def test_the_files_hold_the_reading_and_everybodys_weights(fits, study, findings, tmp_path):
    study = dataclasses.replace(
        study, seen=["=1+1", *study.seen[1:]], about_users={"=1+1": {"age": 33}}
    )
    reading = read_named_model(fits, study, findings)
    save_results(tmp_path, fits, study, {}, 1.0, findings, reading=reading)
    assert json.loads((tmp_path / "reading.json").read_text()) == reading
    model = findings["verdict"]["K"], 0
    expected = weights_table(fits, study, model)
    expected.loc[0, "user"] = "'=1+1"  # no formula in a spreadsheet
    written = pd.read_csv(tmp_path / "weights.csv")
    pd.testing.assert_frame_equal(written, expected, check_dtype=False)
    assert len(written) == 2 * USERS and written["about_age"].dropna().tolist() == [33]


# ---- The section, on a reading by hand


def column(number, attributes=(), unseen=4, examples=0):
    """attributes: (name, correlation, phrase), and behind these the names of its alternatives."""
    return {
        "column": number,
        "weigh_most": {
            "unseen": unseen,
            "unseen_accuracy": 0.75 if unseen else None,
            "seen": 0,
            "seen_accuracy": None,
        },
        "attributes": [
            {
                "attribute": name,
                "correlation": r,
                "p": 0.004,
                "with": [{"attribute": other, "correlation": r} for other in others],
                "share_of_its_users": 0.91 if r > 0 else 0.09,
                "share_of_others": 0.3 if r > 0 else 0.7,
                "phrase": phrase,
                "text": f"{phrase}, correlation {r:+.2f}, p 0.004",
            }
            for name, r, phrase, *others in attributes
        ],
        "known": [],
        "examples": [
            {
                "prompt": f"prompt {number} {i}",
                "preferred": f"good {number} {i}",
                "other": f"bad {number} {i}",
                "column_score": 1.0,
                "everybody_score": -1.0,
                "user": "u_1",
                "user_agrees": i % 2 == 0,
            }
            for i in range(examples)
        ],
        "found_again": [{"seed": 1, "column": 0, "correlation": 0.987}],
    }


def reading_of(*columns, users=15, notes=("A note.",), attributes=True):
    names = ["length", "questions", "code"]
    table = {
        "names": names,
        "correlation": [[0.9, -0.5, 0] for _ in columns],
        "p": [[0.004, 0.3, 1] for _ in columns],
        "threshold": 0.8,
        "users": users,
    }
    return {
        "K": len(columns),
        "alpha": 0.5,
        "seed": 2,
        "users": users,
        "pairs": 150,
        "notes": list(notes),
        "attributes": table if attributes else None,
        "known": None,
        "columns": list(columns),
    }


TASTES = [
    column(0, [("length", 0.9, "longer texts")], examples=5),
    column(1, [("questions", -0.85, "fewer questions")], unseen=6, examples=5),
    column(2, unseen=0),
]


def results_of(personal, unseen=("unseen 0",)):
    """What a report says of the study: its verdict, and whether everybody is seen."""
    users = {"users": ["seen 0"], "unseen_users": list(unseen)}
    return {"verdict": {"personal": personal}, **users}


EVERYBODY_IS_SEEN = dict(unseen=["seen 0"])


def section(reading, personal="yes", **users):
    return directions_section(results_of(personal, **users), reading)


def first_line(*columns):
    return section(reading_of(*columns)).split("\n\n")[1]


def test_the_first_line_says_what_people_differ_in():
    first, second = section(reading_of(*TASTES)).split("\n\n")[1:3]
    assert first == (
        "**What some choose more often than others, as far as it was found: longer texts (column "
        "0); fewer questions (column 1).**"
    )
    assert "K = 3, alpha 0.5, seed 2" in second


def test_the_first_line_and_the_table_name_all_that_cannot_be_told_apart():
    unclear = ("length", 0.9, "longer texts", "words", "questions")
    columns = (
        column(0, [unclear, ("code", -0.8, "less code")]),
        column(1, [("emoji", 0.8, "more emoji", "digits")]),
    )
    said = "longer texts, more words or more questions, and less code"
    assert f": {said} (column 0); more emoji or more digits (column 1).**" in first_line(*columns)
    assert f"| 0 | {said.replace(', and', ',')} | 4 |" in section(reading_of(*columns))
    assert "4 of 15 unseen users chose " + said in tastes_sentence(
        results_of("yes"), reading_of(*columns)
    )


LONG, SHORT = ("length", 0.9, "longer texts"), ("length", -0.9, "shorter texts")


def test_columns_that_go_with_the_same_are_named_together_with_what_others_choose():
    line = first_line(column(0, [(*LONG, "words")]), column(1), column(2, [(*LONG, "code")]))
    assert line.endswith(
        ": longer texts, more words or more code (columns 0, 2), while others choose shorter "
        "texts.**"
    )
    assert "(columns 0, 1), while others choose longer texts.**" in first_line(
        column(0, [SHORT]), column(1, [SHORT])
    )
    assert "while" not in first_line(column(0, [LONG]), column(1, [SHORT]))


def test_others_are_not_said_to_choose_the_contrary_if_they_do_not():
    alike = [column(0, [LONG]), column(1, [LONG])]
    for share in (0.5, None):
        alike[0]["attributes"][0]["share_of_others"] = share
        assert first_line(*alike).endswith(": longer texts (columns 0, 1).**")


# ---- The sentence beside the verdict


def test_the_sentence_says_how_many_people_like_what():
    columns = [*TASTES, column(3, [("length", 0.8, "longer texts")], unseen=1)]
    assert tastes_sentence(results_of("yes"), reading_of(*columns)) == (
        "More often than the others, 5 of 15 unseen users chose longer texts; 6 chose fewer "
        "questions."
    )
    everybody = tastes_sentence(results_of("yes", **EVERYBODY_IS_SEEN), reading_of(*columns))
    assert "5 of 15 users chose longer texts" in everybody


def test_there_is_no_sentence_if_nothing_is_personal_or_found():
    for personal in ("no", "undecided"):
        assert tastes_sentence(results_of(personal), reading_of(*TASTES)) == ""
    assert tastes_sentence(results_of("yes"), None) == ""
    assert tastes_sentence(results_of("yes"), reading_of(column(0), column(1))) == ""


@pytest.mark.parametrize("own, others", [(0.3, 0.4), (None, 0.4), (0.9, None)])
def test_nobody_is_said_to_like_what_they_did_not_choose_more_often(own, others):
    unlike = column(0, [LONG])
    unlike["attributes"][0] |= {"share_of_its_users": own, "share_of_others": others}
    assert tastes_sentence(results_of("yes"), reading_of(unlike)) == ""
    both = tastes_sentence(results_of("yes"), reading_of(unlike, TASTES[1]))
    assert both == "More often than the others, 6 of 15 unseen users chose fewer questions."
    nobody = column(0, [LONG], unseen=0)
    assert tastes_sentence(results_of("yes"), reading_of(nobody)) == ""


# ---- Further lines of the section


@pytest.mark.parametrize("personal", ["no", "undecided"])
def test_under_another_verdict_nothing_is_known_to_be_personal(personal):
    first = section(reading_of(*TASTES), personal).split("\n\n")[1]
    assert f"“{personal}”" in first and "nothing that is known to be personal" in first
    assert "more often than others" not in section(reading_of(*TASTES), personal)
    assert "xamples" not in section(reading_of(*TASTES), personal)


def test_personal_rewards_without_a_finding_are_said_to_be_untold():
    text = section(reading_of(column(0), column(1)))
    said = "unseen users cannot tell in which attribute of texts they differ"
    assert f"15 {said}" in text
    seen = section(reading_of(column(0), column(1)), **EVERYBODY_IS_SEEN)
    assert f"15 {said.removeprefix('unseen ')}" in seen
    assert "No correlation of weights and attributes can be told from chance." in text


def test_a_finding_has_its_shares_and_the_attributes_without_a_difference_are_named():
    text = section(reading_of(*TASTES))
    assert (
        "- **Column 1** goes with fewer questions, correlation -0.85, p 0.004; those who weigh it "
        "most choose fewer questions in 91 % of the pairs that differ in this, the others in 30 %."
        in text
    )
    assert "or all users choose them alike: code." in text
    assert "Told from chance: column 0 with length +0.90, column 1 with questions -0.85.]" in text


def test_without_texts_or_with_few_people_the_note_says_so_and_there_is_no_picture():
    note = "5 unseen users cannot tell what weights go with: 6 are needed."
    text = section(reading_of(column(0), column(1), notes=[note], attributes=False))
    assert note in text
    assert "more often than others" not in text and "told from chance" not in text
    assert "directions.png" not in text and "Examples" not in text
    assert "| 0 | - | 4 | 0.750 | 0 | - | 0.99 |" in text


def test_columns_with_examples_have_them_in_the_report():
    text = section(reading_of(*TASTES))
    assert "Shown are" not in text
    assert re.findall(r"^### Examples of column (\d)", text, re.MULTILINE) == ["0", "1"]
    assert text.count("**The column prefers** good 1") == SHOWN_EXAMPLES
    assert r"User u\_1 chose as the column does." in text
    assert r"User u\_1 chose the other one." in text


def test_of_many_columns_the_six_with_most_users_have_examples():
    columns = [column(k, unseen=k, examples=1) for k in range(1, 10)]
    for number, entry in enumerate(columns):
        entry["column"] = number
    shown = re.findall(r"Examples of column (\d)", section(reading_of(*columns)))
    assert shown == ["3", "4", "5", "6", "7", "8"]
    assert "Shown are the 6 columns that most users weigh most." in section(reading_of(*columns))


def test_answers_that_weights_go_with_are_listed():
    reading = reading_of(*TASTES)
    reading["known"] = {"names": ["age", "country: <b>"], "users": 30}
    expected = "with what is known of them: age, country: &lt;b&gt;. No correlation can be told"
    assert expected in section(reading)
    many = reading | {"known": {"names": list("abcdef"), "users": 30}}
    assert "with what is known of them: 6 facts about each." in section(many)
    columns = [dict(entry) for entry in reading["columns"]]
    columns[1]["known"] = [{"text": "country: <b>, correlation +0.40, p 0.01"}]
    text = section(reading | {"columns": columns})
    assert "- **Column 1** goes with country: &lt;b&gt;, correlation +0.40, p 0.01." in text
    assert "weights of 30 people" in text


# ---- The picture

RESULTS = described_results("Data", users=(3, 15))


def random_reading(columns, seed=0):
    chance = np.random.default_rng(seed)
    reading = reading_of(*(column(k, unseen=int(chance.integers(9))) for k in range(columns)))
    shape = columns, len(ATTRIBUTES)
    correlation = chance.uniform(-0.95, 0.95, shape)
    correlation[:, 3] = 0  # an attribute in which nobody differs
    reading["attributes"] |= {
        "names": list(ATTRIBUTES),
        "correlation": correlation.tolist(),
        "p": chance.choice([0.01, 0.5], shape).tolist(),
    }
    return reading


def drawn(reading):
    """The picture, its axes, and its frames and hatched fields as sets of (column, attribute)."""
    figure = draw_reading(RESULTS, reading)
    axes = figure.axes[0]
    fields = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    places = {False: set(), True: set()}
    for field in fields:
        x, y = field.get_xy()
        places[bool(field.get_hatch())].add((round(x + 0.5), round(y + 0.5)))
    return figure, axes, places[False], places[True]


def test_a_field_has_its_number_a_frame_if_found_and_hatching_below_0():
    reading = random_reading(5)
    _, axes, framed, hatched = drawn(reading)
    names = [name for name in ATTRIBUTES if name != ATTRIBUTES[3]]
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    correlation = np.delete(reading["attributes"]["correlation"], 3, axis=1)
    p = np.delete(reading["attributes"]["p"], 3, axis=1)
    assert framed == {(k, j) for k, j in np.argwhere(p < 0.05).tolist()}
    assert hatched == {(k, j) for k, j in np.argwhere(correlation.round(2) < 0).tolist()}
    numbers = {text.get_position(): float(text.get_text().replace("−", "-")) for text in axes.texts}
    assert numbers == {
        (k, j): pytest.approx(value, abs=0.0051) for (k, j), value in np.ndenumerate(correlation)
    }
    bold = {text.get_position() for text in axes.texts if text.get_fontweight() == "bold"}
    assert bold == framed


def luminance(color):
    """The relative luminance of WCAG 2, which is also what is left of a colour in grey."""
    parts = np.array(matplotlib.colors.to_rgb(color))
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_the_colours_mean_the_same_in_every_picture():
    weak = random_reading(5)
    table = weak["attributes"]
    table["correlation"] = (0.1 * np.array(table["correlation"])).tolist()
    for reading in (weak, random_reading(5)):
        _, axes, _, _ = drawn(reading)
        assert axes.images[0].get_clim() == (-1, 1)


def test_every_number_is_legible_on_its_field():
    reading = random_reading(12, seed=1)
    _, axes, _, _ = drawn(reading)
    (image,) = axes.images
    values = np.array(image.get_array())
    for text in axes.texts:
        k, j = text.get_position()
        field = luminance(image.cmap(image.norm(values[j, k])))
        dark, light = sorted([field, luminance(text.get_color())])
        assert (light + 0.05) / (dark + 0.05) > 3


def test_of_many_columns_those_that_most_users_weigh_most_are_drawn():
    reading = random_reading(40)
    users = [entry["weigh_most"]["unseen"] for entry in reading["columns"]]
    figure, axes, _, _ = drawn(reading)
    labels = [label.get_text() for label in axes.get_xticklabels()]
    shown = [int(re.match(r"(\d+)\n", label)[1]) for label in labels]
    assert len(shown) == SHOWN_DIRECTIONS and shown == sorted(shown)
    others = set(range(40)) - set(shown)
    assert min(users[k] for k in shown) >= max(users[k] for k in others)
    assert "12 of 40 columns" in figure.get_suptitle()


def test_the_labels_of_many_attributes_and_columns_do_not_overlap():
    figure, axes, _, _ = drawn(random_reading(12))
    figure.draw_without_rendering()
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        boxes = [label.get_window_extent() for label in labels]
        for box, following in zip(boxes, boxes[1:]):
            assert not box.overlaps(following)
        assert all(figure.bbox.contains(*corner) for box in boxes for corner in box.corners())


def test_the_picture_of_the_made_data_names_data_model_and_users(fits, study, findings, tmp_path):
    reading = read_named_model(fits, study, findings)
    torch.manual_seed(0)
    results = save_results(tmp_path, fits, study, {}, 1.0, findings, reading=reading)
    title = draw_reading(results, reading).get_suptitle()
    assert title.startswith(
        f"made; K = {reading['K']}, alpha 0\n10 seen, 10 unseen users (500 test pairs)\n"
    )
    assert "p < 0.05" in title
    assert (tmp_path / "directions.png").read_bytes().startswith(b"\x89PNG")
