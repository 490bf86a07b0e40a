"""What the page does in a real browser."""

from __future__ import annotations

import json
import math
import re

import pytest
from browser import Browser, find_browser
from built_pages import CURRENT, peers, rank_of, shown, texts_of
from synthetic_entries import ENVIRONMENTS, METHODS, entry

from domainbed_sfp.leaderboard.documents.entry import Entry
from domainbed_sfp.leaderboard.site import page
from domainbed_sfp.leaderboard.site.board import board_of, family_of

# in the browser -----------------------------------------------------------------------------------------------------

# Rows that are shown, as [data set, rule, name].
SHOWN = """[...document.querySelectorAll("tr.entry")].filter(row => row.checkVisibility()).map(row =>
    [row.closest("section").dataset.dataset, row.closest("section").dataset.rule, row.dataset.name.replace(" †", "")])"""


SETTLE = "new Promise(done => setTimeout(done, 250))"


FIRST = "document.querySelector('section.ranking:not([hidden])')"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    executable = find_browser()
    if executable is None:
        pytest.skip("no Chromium here: the page is not tried in a browser")
    made = Browser(executable, tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.fixture
def opened(browser, built):
    """Opens the page at an address's fragment; afterwards nothing may have gone to the console or the network."""

    def go(fragment: str = "", width: int = 1280, **options) -> Browser:
        browser.resize(width, 900, **options)
        browser.open((built / "index.html").as_uri() + fragment)
        return browser

    yield go
    assert browser.messages == []
    assert {address.partition("#")[0] for address in browser.requests} == {(built / "index.html").as_uri()}


def choose(browser: Browser, name: str, value: str) -> None:
    browser.run(
        f"""(() => {{ const field = document.forms[0].elements[{json.dumps(name)}]; field.value = {json.dumps(value)};
        field.dispatchEvent(new Event("input", {{bubbles: true}})); return {SETTLE}; }})()"""
    )


FILTERS = {
    "dataset": ("OfficeHome", lambda one, rule: one.dataset == "OfficeHome"),
    "track": ("open", lambda one, rule: one.track == "open"),
    "transductive": ("yes", lambda one, rule: one.transductive),
    "family": ("objective", lambda one, rule: family_of(one.algorithm) == "objective"),
    "band": ("60 to 80 %", lambda one, rule: 0.6 <= one.results[rule].costs["sparsity"] < 0.8),
    "tier": ("rerun-verified", lambda one, rule: one.tier == "rerun-verified"),
    "search": ("sfp sparsity=0.5", lambda one, rule: one.algorithm == "SFP" and one.settings["sparsity"] == 0.5),
}


def test_filters_and_search(opened):
    browser = opened()
    assert sorted(browser.run(SHOWN)) == shown()
    for name, (value, keeps) in FILTERS.items():
        choose(browser, name, value)
        wanted = shown(keeps)
        assert sorted(browser.run(SHOWN)) == wanted and wanted, name
        told = browser.run("document.getElementById('count').textContent")
        assert told.startswith(f"{len(wanted)} of {2 * len(CURRENT)} rows shown, in ") and f": {value}" in told
        choose(browser, name, "")
    choose(browser, "rule", "")
    assert sorted(browser.run(SHOWN)) == shown(rule=None)
    choose(browser, "search", "nothing has this name")
    assert browser.run(SHOWN) == [] and browser.run("document.getElementById('nothing').checkVisibility()")
    browser.run("document.querySelector('[type=reset]').click()")
    assert sorted(browser.run(SHOWN)) == shown()


def test_the_address_keeps_the_filters(opened):
    browser = opened("#dataset=PACS&rule=oracle&tier=self-reported&family=unheard-of")
    wanted = shown(lambda one, rule: one.dataset == "PACS" and one.tier == "self-reported", "oracle")
    assert sorted(browser.run(SHOWN)) == wanted
    choose(browser, "search", "sfp")
    assert browser.run("location.hash") == "#dataset=PACS&rule=oracle&tier=self-reported&search=sfp"


@pytest.mark.parametrize(
    "header, key, first",
    [
        ("Method", lambda one, result: one.name.lower(), "ascending"),
        ("Average", lambda one, result: result.average and result.average[0], "descending"),
        ("MACs left", lambda one, result: result.costs["macs"], "ascending"),
        ("Tier", lambda one, result: one.tier, "ascending"),
    ],
)
def test_sorting(opened, header, key, first):
    browser = opened("#dataset=PACS&track=open&tier=records-verified")
    click = f"[...{FIRST}.querySelectorAll('thead button')].find(one => one.textContent === {header!r})"
    others = {"ascending": "descending", "descending": "ascending"}
    found = (one for one in CURRENT if one.dataset == "PACS" and one.track == "open" and one.tier == "records-verified")
    known = {one.name: one for one in found}
    for direction in (first, others[first]):
        browser.run(f"{click}.focus()")
        browser.key("Enter", 13, "\r")
        assert browser.run(f"{click}.closest('th').ariaSort") == direction
        assert browser.run(f"{FIRST}.querySelectorAll('[aria-sort]').length") == 1
        order = browser.run(f"[...{FIRST}.querySelectorAll('tr.entry')].map(row => row.dataset.name.replace(' †', ''))")
        values = [key(known[name], known[name].results["training-domain"]) for name in order]
        given = [value for value in values if value is not None]
        assert sorted(order) == sorted(known)
        assert given == sorted(given, reverse=direction == "descending") == values[: len(given)]  # missing ones last
    follows = (
        f"[...{FIRST}.querySelectorAll('tr.entry')].every(row => row.nextElementSibling.id === row.id + '-detail')"
    )
    assert browser.run(follows)


def test_rows_open_by_mouse_and_keyboard(opened):
    browser = opened("#dataset=PACS&tier=records-verified")
    button, detail = f"{FIRST}.querySelector('tr.entry th button')", f"{FIRST}.querySelector('tr.detail')"
    assert not browser.run(f"{detail}.checkVisibility()")
    browser.run(f"{button}.click()")
    assert browser.run(f"{detail}.checkVisibility() && {button}.ariaExpanded") == "true"
    ranked = next(one for one in CURRENT if one.dataset == "PACS" and one.tier == "records-verified")
    best = next(one for one in peers(ranked, "training-domain") if rank_of(one, "training-domain") == 1)
    text = browser.run(f"{detail}.innerText").replace("\xa0", " ")
    for environment, accuracy in zip(ENVIRONMENTS["PACS"], texts_of(best, "training-domain")):
        assert f"{environment} {accuracy}" in text
    assert best.bundle in text and best.results["training-domain"].cells[0].trials[2].run in text
    browser.run(f"{button}.focus()")
    browser.key("Enter", 13, "\r")
    assert not browser.run(f"{detail}.checkVisibility()")
    browser.run("document.getElementById('expand').click()")
    open_now = "[...document.querySelectorAll('tr.detail')].filter(row => row.checkVisibility()).length"
    assert browser.run(open_now) == len(browser.run(SHOWN))
    assert browser.run("document.getElementById('expand').textContent") == "Collapse all"


def test_earlier_entries_open(opened):
    browser = opened("#dataset=PACS&search=ERM&track=closed")
    browser.run("document.getElementById('expand').click()")
    texts = "[...document.querySelectorAll('details')].filter(one => one.checkVisibility() && one.querySelector('.history'))"
    browser.run(f"{texts}[0].querySelector('summary').click()")
    assert "2025-11-02, self-reported" in browser.run(f"{texts}[0].innerText")


def test_theme(opened):
    ground = "getComputedStyle(document.body).backgroundColor"
    light, dark = "rgb(255, 255, 255)", "rgb(20, 23, 27)"
    browser = opened(dark=True)
    browser.run("localStorage.clear()")
    browser = opened(dark=True)
    seen = [browser.run(ground)]
    for _ in range(3):
        browser.run("document.getElementById('theme').click()")
        seen.append(browser.run(ground))
    assert seen == [dark, light, dark, dark]
    browser.run("document.getElementById('theme').click()")  # light, and remembered
    browser = opened(dark=True)
    assert (browser.run(ground), browser.run("document.getElementById('theme').textContent")) == (light, "Theme: light")
    browser.run("localStorage.clear()")
    assert opened(dark=False).run(ground) == light


def contrast(one: str, two: str) -> float:
    """WCAG 2's contrast of two colours as getComputedStyle tells them."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted((luminance(one), luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_contrast(opened, dark):
    browser = opened(dark=dark)
    colours = browser.run(
        """Object.fromEntries(["text", "quiet", "accent", "line", "ground", "band", "field"].map(name => {
        document.body.style.color = `var(--${name})`; return [name, getComputedStyle(document.body).color]; }))"""
    )
    for ground in ("ground", "band", "field"):
        for name in ("text", "quiet", "accent"):
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
        assert contrast(colours["line"], colours[ground]) >= 3, ground


def on_front(found: list[Entry], cost) -> set[str]:
    """The names that no other beats: neither worse in cost nor accuracy and better in one."""

    def values(one):
        result = one.results["training-domain"]
        return cost(result.costs), -result.average[0]

    names = set()
    for one in found:
        (c, a), others = values(one), [values(other) for other in found]
        if not any(oc <= c and oa <= a and (oc < c or oa < a) for oc, oa in others):
            names.add(one.name)
    return names


COSTS = {
    "macs": lambda costs: costs["macs"],
    "bitops": lambda costs: costs.get("bitops", 1024 * costs["macs"]),
    "parameters": lambda costs: costs["surviving_parameters"],
}


@pytest.mark.parametrize("cost", COSTS)
def test_plot(opened, cost):
    browser = opened(f"#dataset=TerraIncognita&track=closed&transductive=no&tier=records-verified&cost={cost}")
    found = [one for one in CURRENT if one.dataset == "TerraIncognita" and not one.transductive]
    found = [one for one in found if one.tier == "records-verified"]
    labels = browser.run(f"[...{FIRST}.querySelectorAll('.point')].map(point => point.ariaLabel)")
    assert {label.partition(":")[0].removesuffix(" †") for label in labels} == {one.name for one in found}
    front = {label.partition(":")[0].removesuffix(" †") for label in labels if label.endswith(", on the front")}
    assert front == on_front(found, COSTS[cost])
    table = browser.run(
        f"[...{FIRST}.querySelectorAll('figure tbody tr')].map(row => [...row.children].map(cell => cell.textContent))"
    )
    assert {row[0].removesuffix(" †"): row[2] for row in table} == {
        one.name: texts_of(one, "training-domain")[-2] + " %" for one in found
    }
    assert {row[0].removesuffix(" †") for row in table if row[3] == "yes"} == front
    # Positions: the axis is logarithmic in cost, linear in accuracy.
    places = browser.run(
        f"[...{FIRST}.querySelectorAll('.point')].map(point => point.getAttribute('transform').match(/[\\d.]+/g).map(Number))"
    )
    by_name = {one.name: one.results["training-domain"] for one in found}
    costs = [COSTS[cost](by_name[label.partition(":")[0].removesuffix(" †")].costs) for label in labels]
    accuracies = [by_name[label.partition(":")[0].removesuffix(" †")].average[0] for label in labels]
    assert costs == sorted(costs)
    for (x, y), value, accuracy in zip(places, costs, accuracies):
        part = (x - places[0][0]) / (places[-1][0] - places[0][0])
        assert part == pytest.approx(math.log(value / costs[0]) / math.log(costs[-1] / costs[0]), abs=1e-6)
        assert (y < places[0][1]) == (accuracy > accuracies[0])


def test_costs_that_nobody_recomputed_are_marked_in_the_plot(opened):
    marked = f"[...{FIRST}.querySelectorAll('.point')].map(one => one.ariaLabel).filter(one => one.includes('‡'))"
    for cost, names in (("bitops", ["Quantized"]), ("macs", [])):
        browser = opened(f"#dataset=PACS&track=closed&transductive=no&tier=self-reported&cost={cost}")
        labels = browser.run(marked)
        assert [label.partition(":")[0] for label in labels] == names
        assert ("‡ not recomputed" in browser.run(f"{FIRST}.querySelector('figcaption').textContent")) == bool(names)
        cells = browser.run(f"[...{FIRST}.querySelectorAll('figure tbody tr')].map(row => row.children[1].textContent)")
        assert sum("‡" in cell for cell in cells) == len(names)


def test_plot_by_keyboard_and_pointer(opened):
    browser = opened("#dataset=PACS&track=closed&transductive=no")
    browser.run(f"{FIRST}.querySelector('.point').focus()")
    tip = f"{FIRST}.querySelector('.tip')"
    first = browser.run(f"{tip}.textContent")
    browser.key("ArrowRight", 39)
    second = browser.run("document.activeElement.ariaLabel")
    assert browser.run(f"{tip}.textContent").partition("\n")[0] == second.partition(":")[0] != first.partition("\n")[0]
    assert browser.run(f"{FIRST}.querySelectorAll('.point[tabindex=\"0\"]').length") == 1
    browser.key("Escape", 27)
    assert not browser.run(f"{tip}.checkVisibility()")
    browser.key("Enter", 13, "\r")
    row = "document.activeElement.closest('tr.entry')"
    assert browser.run(f"{row}.dataset.name") == second.partition(":")[0]
    assert browser.run(f"{row}.nextElementSibling.checkVisibility()")
    browser.run(f"{FIRST}.querySelector('figure').scrollIntoView()")
    box = browser.run(
        f"(box => [box.x + box.width / 2, box.y + box.height / 2])({FIRST}.querySelector('.point').getBoundingClientRect())"
    )
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
    assert browser.run(f"{tip}.checkVisibility() && {tip}.textContent") == first


def test_plot_follows_the_filters(opened):
    browser = opened("#dataset=PACS&track=closed&transductive=no")
    choose(browser, "band", "93 % and more")
    labels = browser.run(f"[...{FIRST}.querySelectorAll('.point')].map(point => point.ariaLabel.split(':')[0])")
    assert {label.removesuffix(" †") for label in labels} == {
        f"{name} (sparsity=0.95)" for name in ("Magnitude", "Taylor", "SFP")
    }


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_the_page_does_not_scroll_sideways(opened, width):
    browser = opened("#dataset=PACS", width)
    browser.run("document.getElementById('expand').click()")
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    inside = "[...document.querySelectorAll('.inside')].filter(one => one.checkVisibility())"
    assert browser.run(f"{inside}.every(one => one.getBoundingClientRect().right <= innerWidth)")
    # Plot labels stay inside, so that nothing is cut.
    assert browser.run(
        "[...document.querySelectorAll('svg text')].every(one => { const box = one.getBoundingClientRect();"
        " return box.width === 0 || (box.left >= 0 && box.right <= innerWidth); })"
    )


def test_for_screen_readers(opened):
    browser = opened("#rule=")
    problems = browser.run(
        """(() => {
        const all = selector => [...document.querySelectorAll(selector)];
        const ids = all("[id]").map(one => one.id);
        return {
            ids: ids.filter((id, at) => ids.indexOf(id) !== at),
            references: all("[aria-labelledby], [aria-controls]").flatMap(one => [one.getAttribute("aria-labelledby"),
                one.getAttribute("aria-controls")]).filter(id => id && !document.getElementById(id)),
            fields: all("input, select").filter(one => one.labels.length !== 1).map(one => one.name),
            buttons: all("button, [role=button]").filter(one => !(one.textContent.trim() || one.ariaLabel)).length,
            tables: all("table").filter(one => !one.caption?.textContent.trim()).length,
            heads: all("thead > tr > th").filter(one => one.scope !== "col").length
                + all("tbody > tr > th").filter(one => one.scope !== "row").length,
            regions: all("[role=region]").filter(one => !one.hasAttribute("tabindex")).length,
            live: all("#count[role=status]").length !== 1,
            skip: document.querySelector("a").getAttribute("href") !== "#tables",
            language: document.documentElement.lang !== "en",
        }; })()"""
    )
    assert not any(problems.values()), problems


def test_without_scripts_everything_is_there(opened):
    browser = opened()
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser = opened()
        assert sorted(browser.run(SHOWN)) == shown(rule=None)
        assert browser.run("[...document.querySelectorAll('tr.detail')].every(row => row.checkVisibility())")
        assert browser.run(
            "[...document.querySelectorAll('button, select, input')].every(one => !one.checkVisibility())"
        )
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_print(opened, tmp_path):
    browser = opened("#dataset=PACS", dark=True)
    browser.call("Emulation.setEmulatedMedia", media="print")
    try:
        controls = "form select, form input, form button, #theme, .skip, .tip"
        assert browser.run(f"[...document.querySelectorAll('{controls}')].every(one => !one.checkVisibility())")
        assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        lines = "[...document.querySelectorAll('.cells')].filter(one => one.checkVisibility()).length"
        assert browser.run(lines) == len(browser.run(SHOWN))
        heads = f"[...{FIRST}.querySelectorAll('thead th[data-kind]')].map(one => getComputedStyle(one, '::before').content)"
        assert browser.run(heads)[:2] == ['"Rank"', '"Method"']
    finally:
        browser.call("Emulation.setEmulatedMedia", media="")
    browser.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


def test_texts_of_strangers_run_nothing(browser, hostile_board, tmp_path):
    (tmp_path / "index.html").write_text(page.html_text(hostile_board))
    browser.resize(1280, 900)
    browser.open((tmp_path / "index.html").as_uri())
    browser.run("document.getElementById('expand').click()")
    for name in ("family", "tier", "dataset", "search"):
        choose(browser, name, "<b>x")
        choose(browser, name, "")
    browser.run(f"{FIRST}.querySelector('.point').focus()")
    assert browser.messages == []
    assert [address.partition("#")[0] for address in browser.requests] == [(tmp_path / "index.html").as_uri()]
    assert (
        browser.run("document.querySelectorAll('img, script[src], svg[onload], [onerror], [onmouseover]').length") == 0
    )
    text = browser.run("document.body.textContent")
    for one in hostile_board.entries:
        told = [one.name, one.algorithm, one.reference, *one.notes, *one.protocol["environments"]]
        assert all(word in text for word in told)


def test_the_policy_holds_what_escaping_would_let_through(browser, tmp_path):
    """A second wall: even markup that got in could run and load nothing."""
    text = page.html_text(board_of([entry("PACS", METHODS[0])]))
    bad = "<script>window.bad = 1</script><img src='https://example.invalid/x.png' onerror='window.bad = 1'>"
    (tmp_path / "index.html").write_text(text.replace("<main", f"{bad}<main"))
    browser.open((tmp_path / "index.html").as_uri())
    assert browser.run("window.bad") is None and browser.messages
    assert browser.blocked == ["https://example.invalid/x.png"]
    assert browser.run("document.documentElement.className") == "js"  # ours did run
