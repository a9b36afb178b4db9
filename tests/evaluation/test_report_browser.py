"""The page in a real browser: what only layout, style and scripts can show.

Needs the package playwright and a Chromium: the one that `LAWCAT_CHROMIUM` names, one on the path, or
playwright's own. Skipped without them.
"""

import os
import re
import shutil

import pytest
from report_payload import payloads

from lawcat.evaluation.html_report import html_report

playwright = pytest.importorskip("playwright.sync_api")

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
WIDTHS = (360, 768, 1280)

PLOTS = """() => [...document.querySelectorAll("svg.chart")].map(svg => {
    const box = one => one.getBoundingClientRect();
    const all = selector => [...svg.querySelectorAll(selector)];
    const frame = box(svg);
    const leaves = one => one.left < frame.left - 1 || one.right > frame.right + 1
        || one.top < frame.top - 1 || one.bottom > frame.bottom + 1;
    const ticks = all("text.x:not(.label)").map(box);
    return {
        width: frame.width,
        height: frame.height,
        lines: all(".line.measured .stroke").filter(one => box(one).width > 0).length,
        emptyMarkers: all(".marker").map(box).filter(one => !one.width || !one.height).length,
        textsOutside: all("text").filter(one => leaves(box(one))).map(one => one.textContent),
        touchingTicks: ticks.filter((one, i) => i && one.left < ticks[i - 1].right + 2).length,
        smallestText: Math.min(...all("text").map(one => box(one).height)),
    };
})"""

COLORS = """() => {
    const back = one => {
        for (; one; one = one.parentElement) {
            const color = getComputedStyle(one).backgroundColor;
            if (!/rgba\\(0, 0, 0, 0\\)|transparent/.test(color)) return color;
        }
    };
    const pairs = new Map();
    for (const one of document.querySelectorAll("body *")) {
        const written = [...one.childNodes].some(node => node.nodeType === 3 && node.data.trim());
        if (!written || one.matches("script, style, title, desc, option")) continue;
        const style = getComputedStyle(one);
        const pair = [one.closest("svg") ? style.fill : style.color, back(one)];
        pairs.set(pair.join("|"), [...pair, one.outerHTML.slice(0, 60)]);
    }
    const lines = [...document.querySelectorAll(".measured > .stroke, .published > .stroke")]
        .map(one => [getComputedStyle(one).stroke, back(one)]);
    return {texts: [...pairs.values()], lines};
}"""


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = os.environ.get("LAWCAT_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    with playwright.sync_playwright() as driver:
        try:
            started = driver.chromium.launch(executable_path=found, args=ARGUMENTS)
        except playwright.Error as error:
            pytest.skip(f"no Chromium starts here: {str(error).splitlines()[0]}")
        yield started
        started.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(html_report(payloads()), encoding="utf-8")
    return file.as_uri()


@pytest.fixture
def opened(browser, address):
    """Open the page; at the end nothing may have been complained of or asked for."""
    contexts, complaints, requests = [], [], []

    def open_page(width=1280, scheme="light", script=True):
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, java_script_enabled=script
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert {url for url in requests if url != address and not url.startswith("data:")} == set()


@pytest.mark.parametrize("width", WIDTHS)
def test_no_part_is_wider_than_the_page(opened, width):
    page = opened(width)
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # A table may be wider than its box, and its box then scrolls by itself.
    wide = page.evaluate(
        """() => [...document.querySelectorAll("main *, header *")].filter(one => {
            const box = one.getBoundingClientRect();
            return box.width && box.right > innerWidth + 1 && !one.closest(".scroll, .spoken");
        }).map(one => one.outerHTML.slice(0, 80))"""
    )
    assert wide == []


@pytest.mark.parametrize("width", WIDTHS)
def test_every_plot_is_drawn_and_no_text_is_cut(opened, width):
    page = opened(width)
    plots = page.evaluate(PLOTS)
    assert len(plots) == 11
    for plot in plots:
        assert plot["width"] > 250
        assert plot["height"] > 150
        assert plot["lines"] == 4
        assert (plot["textsOutside"], plot["touchingTicks"], plot["emptyMarkers"]) == ([], 0, 0)
        # The height of a line of text; about 1.2 times its size.
        assert plot["smallestText"] >= 11


def luminance(color):
    channels = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in color]
    return sum(share * value for share, value in zip((0.2126, 0.7152, 0.0722), channels, strict=True))


def contrast(first, second):
    lower, upper = sorted((luminance(first), luminance(second)))
    return (upper + 0.05) / (lower + 0.05)


def parse(color):
    """RGB and opacity, each 0 to 1, of a computed colour."""
    numbers = [float(number) for number in re.findall(r"[\d.]+(?:e-?\d+)?", color.replace("srgb", ""))]
    scale = 1 if color.startswith("color(") else 255
    return [value / scale for value in numbers[:3]], numbers[3] if len(numbers) > 3 else 1.0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_stand_out(opened, scheme):
    page = opened(scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    found = page.evaluate(COLORS)
    assert len(found["texts"]) > 8
    for color, back, element in found["texts"]:
        (text, opacity), (behind, _) = parse(color), parse(back)
        assert opacity == 1
        assert contrast(text, behind) >= 4.5, (element, color, back)
    for color, back in found["lines"]:
        assert contrast(parse(color)[0], parse(back)[0]) >= 3, (color, back)
    paper = parse(page.evaluate("getComputedStyle(document.body).backgroundColor"))[0]
    assert (luminance(paper) < 0.1) == (scheme == "dark")


def test_keyboard_alone_reaches_and_opens(opened):
    page = opened()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("document.activeElement.getBoundingClientRect().top") >= 0
    seen = set()
    for _ in range(200):
        page.keyboard.press("Tab")
        tag = page.evaluate("document.activeElement.tagName.toLowerCase()")
        tag = "nav " + tag if page.evaluate("!!document.activeElement.closest('nav')") else tag
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", tag
        if tag == "summary" and "summary" not in seen:
            opened_by = "document.activeElement.parentElement.open"
            assert page.evaluate(opened_by) is False
            page.keyboard.press("Enter")
            assert page.evaluate(opened_by) is True
        if tag == "button" and "button" not in seen:
            page.keyboard.press("Enter")
            assert page.evaluate("document.activeElement.closest('th').ariaSort") == "ascending"
        seen.add(tag)
        if tag == "summary" and "button" not in seen:
            text = page.evaluate("document.activeElement.textContent")
            if text.startswith("All numbers"):
                page.keyboard.press("Enter")
        if tag == "select":
            break
    assert {"nav a", "summary", "div", "button", "a", "select"} <= seen


def test_filter_shows_what_was_asked_for(opened):
    page = opened()
    count = "[...document.querySelectorAll('.failed-cell')].filter(one => one.checkVisibility()).length"
    assert page.evaluate(count) == 0
    everything = page.locator("#filter output").inner_text()
    assert re.fullmatch(r"[\d,]+ samples on this page", everything)
    page.select_option("select[name=task]", "niah_single_3")
    page.select_option("select[name=length]", "8192")
    assert page.evaluate(count) == 4
    page.select_option("select[name=model]", "LAWCAT student")
    assert page.evaluate(count) == 1
    (cell,) = page.locator(".failed-cell:visible").all()
    assert "8K · LAWCAT student" in cell.inner_text()
    shown = int(page.locator("#filter output").inner_text().split()[0])
    cell.locator("summary").click()
    assert cell.locator("article:visible").count() == shown
    for name in ("model", "task", "length"):
        page.select_option(f"select[name={name}]", "")
    assert page.locator("#filter output").inner_text() == everything
    assert page.locator(".failed-task:visible").count() == 7


def test_sorting_puts_numbers_in_order(opened):
    page = opened()
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    table = page.locator("table.sortable").first
    accuracy = "table => [...table.tBodies[0].rows].map(row => Number(row.cells[2].textContent))"
    before = table.evaluate(accuracy)
    for ascending in (True, False):
        table.locator("th button", has_text="Accuracy").click()
        assert table.evaluate(accuracy) == sorted(before, reverse=not ascending)


def test_answers_of_models_do_nothing(opened):
    page = opened()
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    assert page.evaluate("window.hacked") is None
    assert page.locator("main script, main img").count() == 0
    assert page.get_by_text("<script>window.hacked").count() > 0


def test_without_scripts_all_of_it_is_there(opened):
    page = opened(script=False)
    assert page.locator("svg.chart").count() == 11
    assert page.locator("#filter").is_hidden()
    page.locator("summary", has_text="All numbers").first.click()
    assert page.locator("table.sortable").first.is_visible()
    assert page.locator("table.sortable button").count() == 0
    link = page.locator("p.more a").first
    link.click()
    assert page.locator("#failures-passkey").is_visible()
