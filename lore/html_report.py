"""report.html: report.md as one page with its pictures inside, which can be sent as it is.

The page asks for nothing on the network and runs no script. A text of the data is escaped twice:
`lore.tables.markdown_text` makes it plain text in Markdown, and markdown-it and Jinja make plain
text plain in HTML.
"""

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markupsafe import Markup

from lore.files import printable
from lore.tables import Results

TEMPLATE = "report.html.jinja"  # beside this module
PIXELS = 2  # of a picture, in one of the page, so that its text is about as large as the page's
SMALLEST = 0.6  # of this size, on a phone; a picture that is wider yet scrolls


class Section(NamedTuple):
    """A section of the page, as the table of contents names it."""

    heading: str
    anchor: str


def report_html(markdown: str, results: Results, folder: Path) -> str:
    """The page of a report.

    markdown: the text of report.md: a title, the verdict, then sections.
    results: what results.json holds.
    folder: holds the pictures that the text names; one that is missing there is said to be.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.add_render_rule("image", render_picture)
    parser.add_render_rule("table_open", lambda *_: f"{scrolling('table')}<table>\n")
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    tokens = parser.parse(markdown)
    title, lead, body = split_tokens(tokens)

    def render(part: Sequence[Token]) -> Markup:
        return Markup(parser.renderer.render(part, parser.options, {"folder": folder}))

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    versions = [f"{name} {version}" for name, version in results["versions"].items()]
    return environment.get_template(TEMPLATE).render(
        title=title,
        verdict=results["verdict"]["personal"],
        sections=set_anchors(body),
        lead=render(lead),
        body=render(body),
        model=printable(results["config"]["model"] or "not known"),
        seeds=", ".join(map(str, results["seeds"])),
        versions=", ".join(versions),
    )


def split_tokens(tokens: list[Token]) -> tuple[str, list[Token], list[Token]]:
    """The title as a text, what is between it and the first section, and the sections."""
    starts = [i for i, token in enumerate(tokens) if token.tag == "h2" and token.nesting == 1]
    first = starts[0] if starts else len(tokens)
    _, title, _ = tokens[:3]  # the heading's opening, its text and its closing
    return inline_text(title), tokens[3:first], tokens[first:]


def inline_text(token: Token) -> str:
    """The text of a heading or of an image, without emphasis and the like."""
    return "".join(child.content for child in token.children or [])


def set_anchors(tokens: list[Token]) -> list[Section]:
    """Give each section's heading an id, and list the sections."""
    sections = []
    for opening, heading in zip(tokens, tokens[1:]):
        if opening.type == "heading_open" and opening.tag == "h2":
            text = inline_text(heading)
            anchor = re.sub(r"\W+", "-", text.lower()).strip("-")
            opening.attrSet("id", anchor)
            sections.append(Section(text, anchor))
    return sections


def scrolling(name: str) -> str:
    """The opening tag of a box of that class, which can be scrolled by the keyboard too."""
    return f'<div class="{name}" tabindex="0">'


def render_picture(
    renderer: RendererHTML,
    tokens: Sequence[Token],
    index: int,
    options: Any,
    env: dict[str, Any],
) -> str:
    """The picture inside the page. Only a PNG file in the report's own folder is taken."""
    token = tokens[index]
    description = escapeHtml(inline_text(token))
    path = env["folder"] / Path(str(token.attrs["src"])).name
    if path.suffix != ".png" or not path.exists():
        return f'<span class="picture missing">No picture. {description}</span>'
    content = path.read_bytes()
    width = int.from_bytes(content[16:20]) / PIXELS  # a PNG file has its width there
    source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    image = (
        f'<img src="{source}" alt="{description}" width="{width:.0f}" '
        f'style="min-width: {SMALLEST * width:.0f}px">'
    )
    return f'<span class="picture" tabindex="0">{image}</span>'
