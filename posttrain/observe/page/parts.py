"""What every section of the page is made of."""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.observe.page.markup import Content, Markup, element, joined
from posttrain.observe.page.style import STYLE

POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def document(title: str, header: Markup, sections: Sequence[Markup], footer: str) -> str:
    """A whole page: one file without scripts and without anything from the network."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("title", title),
        element("style", Markup(STYLE)),
    )
    body = element(
        "body",
        element("a", "Skip to the content", href="#content", class_="skip"),
        element("div", header, class_="wrap"),
        element("main", sections, class_="wrap", id="content"),
        element("footer", footer, class_="wrap"),
    )
    return "<!doctype html>\n" + element("html", head, body, lang="en") + "\n"


def section(identifier: str, heading: str, *content: Content) -> Markup:
    """A section of the page."""
    return element("section", element("h2", heading), content, id=identifier)


def absent(text: str) -> Markup:
    """A line that says what is missing."""
    return element("p", text, class_="lead")


def data_table(caption: str, note: str, columns: Sequence[str], rows: Sequence[Sequence[Markup]]) -> Markup:
    """A table with a caption that scrolls sideways on a narrow screen."""
    head = element("tr", [element("th", column, scope="col") for column in columns])
    table = element(
        "table",
        element("caption", element("span", caption), element("span", note, class_="note")),
        element("thead", head),
        element("tbody", [element("tr", row) for row in rows]),
    )
    return element("div", table, class_="scroll", role="region", aria_label=caption, tabindex=0)


def breakable(name: str) -> Markup:
    """A stage's name that may be broken after its slashes."""
    first, *rest = name.split("/")
    return joined(first, [joined("/", element("wbr"), part) for part in rest])
