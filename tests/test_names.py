"""Names of data and models are plain text in every file, and ranks that are too large are named."""

import csv
import dataclasses
import io
import warnings

import numpy as np
import pandas as pd
import pytest
import studies
import torch
from helpers import random_users
from matplotlib.figure import Figure

import lore.pictures
import utils
from lore.evidence import evidence
from lore.files import load_json, load_tensors
from lore.results import print_results, save_few_shot_curves, save_results
from lore.study import Study
from lore.tables import csv_text, latex_text, markdown_text
from utils import UNSEEN_SETTINGS

pytestmark = pytest.mark.usefixtures("one_thread")

# A name -> how it is written in Markdown, in LaTeX, and in a picture.
NAMES = {
    "pay$x_$day": (r"pay&#36;x\_&#36;day", r"pay\$x\_\$day", "pay$x_$day"),
    "my_50%_q&a": (r"my\_50%\_q&amp;a", r"my\_50\%\_q\&a", "my_50%_q&a"),
    r"\input{a}^^41~#1": (
        r"\\input\{a\}^^41&#126;\#1",
        r"\textbackslash{}input\{a\}\textasciicircum{}\textasciicircum{}41\textasciitilde{}\#1",
        r"\input{a}^^41~#1",
    ),
    "a|b <img src=x> [c](d) *e* `f` ![g]": (
        r"a&#124;b &lt;img src=x&gt; \[c\](d) \*e\* \`f\` \!\[g\]",
        r"a\textbar{}b \textless{}img src=x\textgreater{} [c](d) *e* `f` ![g]",
        "a|b <img src=x> [c](d) *e* `f` ![g]",
    ),
    "a\n# b\x1b[2K": (
        r"a\\n\# b\\x1b\[2K",
        r"a\textbackslash{}n\# b\textbackslash{}x1b[2K",
        r"a\n# b\x1b[2K",
    ),
    "a--b---c": ("a--b---c", "a-{}-b-{}-{}-c", "a--b---c"),
    "数据": ("数据", "数据", r"\u6570\u636e"),  # the picture's font lacks these
    "\udcff": (r"\\udcff", r"\textbackslash{}udcff", r"\udcff"),
    "\u202egnp": (r"\\u202egnp", r"\textbackslash{}u202egnp", r"\u202egnp"),
    "": ("", "", ""),
}

d = 6


def study_of(title: str) -> Study:
    """Three seen users and two unseen ones."""
    counts = [(9, 20, 7), (8, 8, 5), (4, 9), (30, 6)]
    train, test, train_unseen, test_unseen = (
        random_users(pairs, d, seed) for seed, pairs in enumerate(counts)
    )
    return Study(
        title=title,
        seen=["=1+1", "b", "7"],
        unseen=["x", "y"],
        train=train,
        test=test,
        train_unseen=train_unseen,
        test_unseen=test_unseen,
        reward_head=torch.ones(d, 1),
        provenance={"model": title, "identity": {"data": "1"}},
    )


def fits_of(study: Study, K_list) -> list[utils.Fit]:
    return studies.swept(study, K_list, num_iterations=2)


@pytest.fixture(scope="module")
def fits():
    return fits_of(study_of("any"), (0, 2))


CONFIG = {"K_list": [2], "alpha_list": [0], "num_shots": [2, 3], "trials": 2}


class FewShotCurves(list):
    """What `run_few_shot_vary_shots` returns, with accuracies of one half."""

    def __init__(self):
        super().__init__([[0.5, 0.5]] * 4)
        self.rows = [
            {"K": 2, "alpha": 0, "shots": shots} | dict.fromkeys(UNSEEN_SETTINGS, np.full(2, 0.5))
            for shots in CONFIG["num_shots"]
        ]


@pytest.fixture
def titles(monkeypatch):
    """The titles of the figures that are saved from here on."""
    saved = []
    savefig = Figure.savefig

    def watched(figure, *arguments, **options):
        saved.append(figure.get_suptitle())
        savefig(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", watched)
    return saved


# ---- The name of the data


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_is_plain_text_in_every_file_of_results(tmp_path, fits, titles, name):
    in_markdown, in_latex, in_picture = NAMES[name]
    study = study_of(name)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*[gG]lyph")
        save_results(tmp_path, fits, study, {}, 1.0, evidence(fits, study))
        save_few_shot_curves(tmp_path, FewShotCurves(), study, CONFIG)

    report = (tmp_path / "report.md").read_text()
    assert report.splitlines()[0] == f"# {in_markdown}: is the reward personal?"
    assert rf"\caption{{{in_latex}: Unseen" in (tmp_path / "vary_fewshot.tex").read_text()
    assert len(titles) == 6  # three pictures, each as PNG and PDF
    for title in titles:
        assert title.startswith(f"{in_picture}\n3 seen, 2 unseen users (36 test pairs);")
    # What programs read has the name as it is.
    assert load_json(tmp_path / "results.json")["config"]["data"] == name
    assert load_json(tmp_path / "vary_fewshot.json")["config"]["model"] == name
    assert load_tensors(tmp_path / "K_2.safetensors")[1]["users"][0] == "=1+1"


def test_escaped_names_in_markdown_have_no_sign_of_markdown_left():
    signs = "".join(map(chr, range(33, 127)))
    escaped = markdown_text(signs)
    for sign in "*_`[]{}#!":
        assert escaped.count(sign) == escaped.count(f"\\{sign}") + (sign == "#") * 3  # in &#36; ..
    assert not set("<>|~$") & set(escaped)
    assert escaped.count("&") == escaped.count(";") - 1  # those of entities, and the one in `signs`
    assert latex_text("a b.c-1") == markdown_text("a b.c-1") == "a b.c-1"


# ---- Pictures


def test_a_picture_whose_user_asks_for_formulas_and_latex_has_plain_text(tmp_path):
    matplotlib = lore.pictures.import_matplotlib()
    results = studies.described_results(r"$\frac{$")
    point = {"row": "$a_", "column": "%b", "line": "$^$", "x_1$": 2}
    point |= {"mean": 0.5, "low": 0.4, "high": 0.75}
    with matplotlib.rc_context({"text.parse_math": True, "text.usetex": True}):
        figure = lore.pictures.small_multiples(results, [point], "x_1$")
    lore.pictures.save_picture(tmp_path, "a", figure)
    axes = figure.axes[0]
    assert (axes.get_ylabel(), axes.get_title(), figure.get_supxlabel()) == ("$a_", "%b", "x_1$")


def test_characters_are_drawn_if_any_font_that_the_user_names_has_them():
    matplotlib = lore.pictures.import_matplotlib()
    letter, musical_sign = "\u0416", "\U0001d11e"
    shown = {}
    for families in (["cmr10"], ["cmr10", "DejaVu Sans"]):
        figure = Figure()
        figure.suptitle(letter + musical_sign)
        with matplotlib.rc_context({"font.family": families}):
            lore.pictures.escape_missing_glyphs(matplotlib, figure)
        shown[len(families)] = figure.get_suptitle()
    assert shown == {1: r"\u0416\U0001d11e", 2: letter + r"\U0001d11e"}


# ---- CSV


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("=cmd|' /C calc'!A0", "'=cmd|' /C calc'!A0"),
        ("+1 2", "'+1 2"),
        ("-a", "'-a"),
        ("@SUM(1)", "'@SUM(1)"),
        (" =1", "' =1"),
        ("\t=1", r"\t=1"),
        ("-5", "-5"),
        ("+3.5e2", "+3.5e2"),
        ("a=1", "a=1"),
        ("", ""),
        ('a"b,c\r\nd', r'a"b,c\r\nd'),
        ("\udcff", r"\udcff"),
        ("é", "é"),
    ],
    ids=ascii,
)
def test_a_cell_of_a_csv_file_is_a_text_in_one_line_and_no_formula(text, cell):
    users = pd.Series([text, "b"], dtype=object)  # half a surrogate pair is no Arrow string
    frame = pd.DataFrame({"user": users, "weight": [-0.5, 2], "=kept": [True, False]})
    rows = list(csv.reader(io.StringIO(csv_text(frame))))
    assert rows == [["user", "weight", "'=kept"], [cell, "-0.5", "True"], ["b", "2.0", "False"]]
    assert frame.columns[-1] == "=kept"


def test_a_csv_file_has_lists_and_what_is_missing_as_before():
    frame = pd.DataFrame({"seeds": [[0, 1], None], "p": [None, 0.25]})
    assert csv_text(frame) == frame.to_csv(index=False)


# ---- Ranks


@pytest.mark.parametrize(
    ("K_list", "said"),
    [((0, 1, 3), []), ((4,), ["K = 4", "seen users (3)"]), ((5, 7), ["K = 7", "d = 6"])],
)
def test_a_rank_beyond_the_users_or_the_numbers_of_an_embedding_earns_a_remark(
    tmp_path, capsys, K_list, said
):
    study = study_of("any")
    fits = fits_of(study, K_list)
    results = save_results(tmp_path, fits, study, {}, 1.0, evidence(fits, study))
    print_results(results)
    printed = capsys.readouterr().out
    save_few_shot_curves(tmp_path, FewShotCurves(), study, {**CONFIG, "K_list": list(K_list)[-1:]})
    report = (tmp_path / "report.md").read_text()
    for text in (printed, report, capsys.readouterr().out):
        assert ("more directions" in text) == bool(said)
        for words in said:
            assert words in text


def test_one_direction_is_never_too_many(tmp_path, capsys):
    study = dataclasses.replace(study_of("any"), seen=["a"], train=[torch.ones(3, d)])
    study.test = [torch.ones(2, d)]
    fits = fits_of(study, (0, 1))
    print_results(save_results(tmp_path, fits, study, {}, 1.0, evidence(fits, study)))
    assert "more directions" not in capsys.readouterr().out
