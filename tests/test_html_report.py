"""report.html: one page that is report.md, asks for nothing, and takes texts as texts."""

import base64
import dataclasses
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import matplotlib.figure
import pytest
from test_reading import made_study, swept

from lore.evidence import evidence
from lore.html_report import report_html
from lore.pictures import save_picture
from lore.reading import read_named_model
from lore.results import save_results

pytestmark = pytest.mark.usefixtures("one_thread")

HOSTILE = '<script>alert("1")</script>'
SPITEFUL = (
    "<img src=x onerror=alert(2)> ![p](http://example.org/p.png) [l](javascript:alert(3)) "
    "</style></div> {{ 7 * 7 }} | <b>bold</b> `code` **strong** &amp; http://example.org"
)
VOID = {"meta", "link", "img", "br", "hr"}
TAGS = set(
    "html head meta link title style body div header nav main footer h1 h2 h3 p ul li a strong em "
    "code table thead tbody tr th td span img".split()
)


class Page(HTMLParser):
    """What a page holds: its tags with their attributes, its texts, and the ids of its headings."""

    def __init__(self, html):
        super().__init__()
        self.tags = []  # (name, attributes)
        self.open = []
        self.texts = []
        self.rows = []  # of all tables, as lists of cells
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def attributes(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self):
        return "".join(self.texts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Results of people, texts and answers whose names are programs to a browser."""
    study = made_study(0, users=12)
    texts = {
        part: [[(f"{SPITEFUL} {a}", f"{b} {HOSTILE}") for a, b in user] for user in users]
        for part, users in study.texts.items()
    }
    everybody = [f"{HOSTILE} {i}" for i in range(24)]
    study = dataclasses.replace(
        study,
        title=f"Data {HOSTILE}",
        seen=everybody[:12],
        unseen=everybody[12:],
        texts=texts,
        prompts={"test_unseen": [[f"{SPITEFUL} {i % 9}" for i in range(50)] for _ in range(12)]},
        about_users={
            user: {HOSTILE: HOSTILE * (i % 2) or "no"} for i, user in enumerate(everybody)
        },
        provenance={"model": f"model/{HOSTILE}"},
    )
    fits = swept(study, [0, 1, 3], [0, 1], num_iterations=100)
    findings = evidence(fits, study)
    reading = read_named_model(fits, study, findings)
    path = tmp_path_factory.mktemp("results")
    save_results(path, fits, study, {}, 1.0, findings, reading=reading)
    return path


@pytest.fixture(scope="module")
def html(folder):
    return (folder / "report.html").read_text()


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


# ---- What is on the page


def test_hostile_names_and_texts_are_text(page):
    assert {tag for tag, _ in page.tags} <= TAGS
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    for text in (f"Data {HOSTILE}: is", f"model/{HOSTILE}", f"User {HOSTILE} ", SPITEFUL[:250]):
        assert text in page.text


def test_nothing_is_asked_for_outside_the_page(html, page):
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    style = html.split("<style>")[1].split("</style>")[0]
    assert not re.search(r"url\(|@import|expression|http", style)
    (policy,) = [meta["content"] for meta in page.attributes("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'") and "script" not in policy


def test_pictures_are_inside_and_described(folder, page):
    images = page.attributes("img")
    names = ["directions.png", "accuracy_by_rank.png", "personal_part.png"]
    contents = [base64.b64decode(image["src"].split("base64,")[1]) for image in images]
    assert contents == [(folder / name).read_bytes() for name in names]
    for image, words in zip(images, ("Correlations", "Accuracy by rank", "Personal part by rank")):
        assert image["alt"].startswith(words) and re.search(r"[+\d]\.\d\d", image["alt"])


def test_the_page_is_the_report(folder, page):
    report = (folder / "report.md").read_text()
    headings = re.findall(r"^## (.*)$", report, re.MULTILINE)
    anchors = [a["href"][1:] for a in page.attributes("a")]
    assert len(anchors) == len(set(anchors)) == len(headings)
    assert [h2["id"] for h2 in page.attributes("h2")] == anchors
    rows = [line for line in report.splitlines() if line.startswith("| ") and "---" not in line]
    assert len(page.rows) == len(rows) > 10
    numbers = re.compile(r"\d+\.\d+")
    for cells, line in zip(page.rows, rows):
        assert numbers.findall(" ".join(cells)) == numbers.findall(line)


RESULTS = {
    "verdict": {"personal": "no"},
    "versions": {"python": "3"},
    "config": {"model": None},
    "seeds": [0],
}


def test_a_picture_that_is_not_there_is_said_to_be(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "secret.png").write_bytes(b"\x89PNG secret")
    (tmp_path / "results" / "notes.txt").write_text("notes")
    markdown = "# T\n\nNo.\n\n## A\n\n![A curve](curve.png)\n![B](../secret.png)\n![C](notes.txt)\n"
    page = Page(report_html(markdown, RESULTS, tmp_path / "results"))
    assert page.attributes("img") == []
    for words in ("No picture. A curve", "No picture. B", "No picture. C"):
        assert words in page.text


def test_a_report_without_sections_is_a_page():
    page = Page(report_html("# A *title* & more\n\nNo.\n", RESULTS, None))
    assert "A title & more" in page.text and page.attributes("h2") == []


# ---- In a browser

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
WIDTHS = (390, 1280)  # pixels: a phone, a desktop
LOOK = """
<body>
<script>
const page = %s;
const frames = %s.map(width => {
  const frame = document.createElement("iframe");
  frame.width = width;
  frame.height = 900;
  frame.srcdoc = page;
  document.body.append(frame);
  return frame;
});
window.onload = () => {
  const found = frames.map(frame => {
    const view = frame.contentWindow, root = frame.contentDocument.documentElement;
    const all = selector => [...frame.contentDocument.querySelectorAll(selector)];
    const color = (selector, name) => all(selector).slice(0, 1).map(
      element => view.getComputedStyle(element)[name])[0];
    return {
      overflow: root.scrollWidth - root.clientWidth,
      scrolling: all(".table").filter(box => box.scrollWidth > box.clientWidth).length,
      cut: all(".picture").filter(box => box.scrollWidth > box.clientWidth).length,
      scale: Math.min(...all("img").map(image => image.width / image.naturalWidth)),
      hint: all(".narrow").map(hint => hint.offsetHeight > 0),
      broken: all("img").filter(image => !image.naturalWidth).length,
      asked: view.performance.getEntriesByType("resource").map(entry => entry.name),
      text: color("body", "color"), page: color("body", "backgroundColor"),
      muted: color("footer", "color"), picture: color(".picture", "backgroundColor"),
    };
  });
  document.body.innerHTML = "<pre></pre>";
  document.querySelector("pre").textContent = "found" + JSON.stringify(found) + "end";
};
</script>
"""


def look(html, folder, *options):
    """What a browser makes of a page at each of WIDTHS, and what its console says."""
    script = json.dumps(html).replace("<", "\\u003c")
    (folder / "look.html").write_text(LOOK % (script, list(WIDTHS)))
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
        *("--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", *options),
        f"file://{folder / 'look.html'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    (found,) = re.findall(r"found(\[.*\])end", done.stdout)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(found.replace("&amp;", "&")), console


def contrast(color, other):
    """The contrast ratio of two colours, as WCAG 2 defines it."""

    def luminance(color):
        parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
        red, green, blue = (
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted(map(luminance, (color, other)))
    return (light + 0.05) / (dark + 0.05)


@needs_chromium
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_the_page_fits_a_phone_and_a_desktop_and_is_silent(html, tmp_path, scheme):
    setting = f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}"
    phone_and_desktop, console = look(html, tmp_path, setting)
    assert console == []
    for found in phone_and_desktop:
        assert found["overflow"] == found["broken"] == 0 and found["asked"] == []
        assert contrast(found["text"], found["page"]) > 7
        assert contrast(found["muted"], found["page"]) > 4.5
        assert (contrast("rgb(0, 0, 0)", found["page"]) < 5) == (scheme == "dark")
        assert found["picture"] == "rgb(255, 255, 255)"
    assert phone_and_desktop[0]["scrolling"] >= 5  # of six tables


@needs_chromium
def test_a_phone_shows_whole_pictures_with_legible_text_and_that_tables_scroll(html, tmp_path):
    (phone, desktop), _ = look(html, tmp_path)
    points_per_inch, dots_per_inch = 72, 200
    for found, smallest in ((phone, 7), (desktop, 10)):
        assert found["cut"] == 0
        text = 8 / points_per_inch * dots_per_inch * found["scale"]  # pixels; it has 8 points
        assert text >= smallest
    assert phone["hint"] == [True] and desktop["hint"] == [False]


@needs_chromium
def test_a_picture_that_would_be_too_small_on_a_phone_scrolls(html, folder, tmp_path):
    results = json.loads((folder / "results.json").read_text())
    wide = matplotlib.figure.Figure((12, 3))
    save_picture(tmp_path, "wide", wide)
    page = report_html("# T\n\nNo.\n\n## A\n\n![A](wide.png)\n", results, tmp_path)
    (phone, _), _ = look(page, tmp_path)
    assert phone["cut"] == 1 and phone["overflow"] == 0
    assert phone["scale"] >= 0.3


@needs_chromium
def test_a_page_that_is_too_wide_asks_and_complains_would_be_seen(tmp_path):
    wide = (
        "<body><div style='width: 2000px'>wide</div><img src='http://127.0.0.1:9/a.png'>"
        "<footer></footer><script>console.error('complaint')</script>"
    )
    found, console = look(wide, tmp_path)
    assert all(frame["overflow"] > 0 and frame["broken"] == 1 for frame in found)
    assert all(frame["asked"] == ["http://127.0.0.1:9/a.png"] for frame in found)
    assert any("complaint" in line for line in console)
