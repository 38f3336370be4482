"""The pages that a run leaves, in a real browser: at a desk and on a phone, by mouse and by keyboard."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from posttrain.observe.compare import write_comparison
from posttrain.observe.report import write_report
from tests.browser_kit import Page, browser
from tests.observe_kit import finished_run, recipe, traces, write_run
from tests.test_report import partial_run

CHROMIUM = browser()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")

DESK, PHONE = (1280, 800), (390, 844)
SIZES = pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
KINDS = ["finished", "failed", "not started", "compared", "many domains"]
FOCUSABLE = "a[href], summary, [tabindex='0']"

CONTRASTS = """(() => {
  const channels = (text) => {
    const found = text.match(/[\\d.]+/g).map(Number);
    return text.startsWith("color(") ? [...found.slice(0, 3).map((x) => 255 * x), found[3] ?? 1]
      : [...found.slice(0, 3), found[3] ?? 1];
  };
  const luminance = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((c) => c / 255).map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = channels(getComputedStyle(node).backgroundColor);
      if (colour[3] === 1) return colour;
    }
    return [255, 255, 255, 1];
  };
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, parent = node.parentElement;
    if (!node.textContent.trim() || !parent.checkVisibility() || parent.closest("title, .skip")) continue;
    const style = getComputedStyle(parent);
    const ink = channels(parent instanceof SVGElement ? style.fill : style.color);
    const [light, dark] = [luminance(ink), luminance(behind(parent))].sort((a, b) => b - a);
    const ratio = (light + 0.05) / (dark + 0.05);
    const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.6 && style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5)) poor.push(`${ratio.toFixed(2)}: ${node.textContent.trim().slice(0, 40)}`);
  }
  return poor;
})()"""
"""Texts whose contrast is below what WCAG 2.2 asks for at level AA."""

TOO_WIDE = """[...document.querySelectorAll("body *")].filter((node) => {
  const box = node.getBoundingClientRect();
  return box.width && box.right > innerWidth + 1 && !node.closest(".scroll, .skip");
}).map((node) => `${node.tagName}.${node.className} ends at ${node.getBoundingClientRect().right}`)"""

FOCUSED = """(() => {
  const node = document.activeElement, style = getComputedStyle(node), box = node.getBoundingClientRect();
  return node === document.body ? null : {
    index: [...document.querySelectorAll("FOCUSABLE")].indexOf(node),
    ring: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 1,
    seen: box.bottom > 0 && box.top < innerHeight && box.right > 0 && box.left < innerWidth,
  };
})()""".replace("FOCUSABLE", FOCUSABLE)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("pages")
    many = tuple(f"a-domain-with-a-long-name-{number}" for number in range(9))
    runs = {
        "finished": write_run(directory / "tiny-v4", finished_run(), traced=traces()),
        "failed": write_run(directory / "failed", partial_run()),
        "not started": write_run(directory / "empty", []),
        "many domains": write_run(directory / "many", finished_run(many), recipe(many), traces(many)),
    }
    found = {kind: write_report(run) for kind, run in runs.items()}
    other = write_run(directory / "other", finished_run(seed=1), recipe(base={"kind": "sft", "steps": 60}))
    return {**found, "compared": write_comparison([runs["finished"], other])[1]}


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    assert CHROMIUM is not None
    with Page(CHROMIUM) as page:
        yield page


@SIZES
@pytest.mark.parametrize("kind", KINDS)
def test_the_browser_has_nothing_to_complain_of_and_nothing_is_wider_than_the_window(
    page: Page, pages: dict[str, Path], kind: str, size: tuple[int, int]
) -> None:
    page.open(pages[kind], *size)
    assert page.run("innerWidth") == size[0]
    assert page.run("document.documentElement.scrollWidth") <= size[0]
    assert page.run(TOO_WIDE) == []
    assert page.run("performance.getEntriesByType('resource').map((one) => one.name)") == []
    assert page.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_text_stands_out_from_what_is_behind_it(
    page: Page, pages: dict[str, Path], kind: str, scheme: str
) -> None:
    page.open(pages[kind], *DESK, scheme)
    page.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.run(CONTRASTS) == []


@SIZES
@pytest.mark.parametrize("kind", ["finished", "compared"])
def test_the_keyboard_reaches_everything_in_order_with_a_ring_around_it(
    page: Page, pages: dict[str, Path], kind: str, size: tuple[int, int]
) -> None:
    page.open(pages[kind], *size)
    page.run("document.documentElement.style.scrollBehavior = 'auto'")
    expected = page.run(
        f'[...document.querySelectorAll("{FOCUSABLE}")].map((node, index) => [node.checkVisibility(), index])'
        ".filter(([visible]) => visible).map(([, index]) => index)"
    )
    assert len(expected) > 5
    reached = []
    for _ in expected:
        page.press("Tab")
        focused = page.run(FOCUSED)
        assert focused and focused["ring"] and focused["seen"], f"{focused} after {reached}"
        reached.append(focused["index"])
    assert reached == expected


def test_a_link_leads_to_its_section_and_a_summary_opens_by_keyboard(page: Page, pages: dict[str, Path]) -> None:
    page.open(pages["finished"], *DESK)
    page.press("Tab")
    assert page.run("document.activeElement.textContent") == "Skip to the content"
    page.press("Enter")
    assert page.run("location.hash") == "#content"
    page.run("document.querySelector('#reproduce summary').focus()")
    assert page.run("document.querySelector('#reproduce details').open") is False
    page.press("Enter")
    assert page.run("document.querySelector('#reproduce details').open") is True


@pytest.mark.parametrize("kind", KINDS)
def test_a_screen_reader_finds_landmarks_headings_and_names(page: Page, pages: dict[str, Path], kind: str) -> None:
    page.open(pages[kind], *DESK)
    nodes = [node for node in page.call("Accessibility.getFullAXTree")["nodes"] if not node.get("ignored")]

    def of_role(role: str) -> list[dict[str, Any]]:
        return [node for node in nodes if node.get("role", {}).get("value") == role]

    for landmark in ("banner", "navigation", "main", "contentinfo"):
        assert len(of_role(landmark)) == 1, landmark
    for role in ("image", "table", "link", "heading", "region"):
        assert all(len(node.get("name", {}).get("value", "")) > 1 for node in of_role(role)), role
    headings = [
        next(one["value"]["value"] for one in node["properties"] if one["name"] == "level")
        for node in of_role("heading")
    ]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(below - above <= 1 for above, below in itertools.pairwise(headings))
