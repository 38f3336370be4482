"""What every section of the page is made of."""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.observe.page.markup import Content, Markup, element, joined


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
