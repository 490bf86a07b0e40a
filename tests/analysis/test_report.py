"""The page of a sweep: it stands alone, says what `collect` says, escapes strangers' text, and works in a browser."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from browser import Browser, find_browser
from runs_on_disk import record, write_run

from domainbed_sfp.analysis.render.html import page, svg
from domainbed_sfp.analysis.render.looks import short_label

needs_browser = pytest.mark.skipif(find_browser() is None, reason="no chromium on the PATH")


class _Page(HTMLParser):
    """Collects the cells of a page's tables, and everything it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.scopes: list[str | None] = []
        self.loads: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag in ("td", "th"):
            self.cells.append("")
            self.scopes.append(attributes.get("scope"))
        if tag in ("script", "link", "img", "iframe"):
            self.loads.append(tag)
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


@pytest.fixture
def sweep(tmp_path):
    """ERM and a reconstruction with an awkward name at half the size, three trials, two environments with awkward
    names; one run has failed."""
    root = tmp_path / "sweep"
    costs = {"parameters": 11_200_000, "dense_macs": 1_800_000_000, "environments": ["50%", "a_b&c"]}
    for env in (0, 1):
        for trial in range(3):
            dense = {"sparsity": 0.0, "surviving_parameters": 11_200_000, "macs": 1_800_000_000}
            records = [
                record(
                    (level + trial / 100,) * 4,
                    step=step,
                    test_envs=(env,),
                    trial_seed=trial,
                    loss=loss,
                    **dense,
                    **costs,
                )
                for step, level, loss in ((0, 0.2, 2.0), (300, 0.6, 0.5))
            ]
            write_run(root, f"erm{env}{trial}", records)
            half = {"sparsity": 0.5, "surviving_parameters": 5_600_000, "macs": 450_000_000}
            ours = record(
                (0.7,) * 4,
                step=300,
                test_envs=(env,),
                trial_seed=trial,
                algorithm="My_<b>",
                standing="reconstruction",
                **half,
                **costs,
            )
            if (env, trial) != (1, 2):
                write_run(root, f"ours{env}{trial}", [ours])
    lost = write_run(root, "ours12", [ours], done=False)
    (lost / "err.txt").write_text("starting\n\nUserError: the loss is <nan> at step 7\n")
    return root


def test_the_page_stands_alone_and_says_what_collect_says(sweep, main):
    text = page.report_page(sweep, print)
    read = _Page()
    read.feed(text)
    assert read.open == []
    assert set(read.loads) == {"link", "script"} and "http:" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https:" not in text
    assert read.cells[:4] == ["Algorithm", "50%", "a_b&c", "Average"]
    assert read.scopes[:10] == ["col"] * 10
    table = main("collect", "--input_dir", sweep, "--selection", "training-domain").stdout
    erm = next(line for line in table.splitlines() if line.startswith("| ERM"))
    assert [cell.strip() for cell in erm.split("|")[1:4]] == read.cells[10:13]
    assert "My_<b> †" in read.cells and "My_<b>" not in text


def test_failures_and_missing_jobs_are_told(sweep):
    text = page.report_page(sweep, print)
    assert "11 runs are finished and counted, 1 are missing, incomplete or failed." in text
    assert "Tiny: My_&lt;b&gt;: 1 job missing" in text
    assert "UserError: the loss is &lt;nan&gt; at step 7" in text


def test_a_sweep_without_a_finished_run_has_a_page(tmp_path):
    write_run(tmp_path, "one", [record((0.5,) * 4)], done=False)
    assert "No table yet: no row has a finished run." in page.report_page(tmp_path, print)


def test_curves_are_means_over_runs(sweep):
    text = page.report_page(sweep, print)
    # ERM's test accuracy after 300 steps: 60, 61 and 62 % in both environments.
    assert "ERM: 61 at step 300" in text and "ERM: 0.5 at step 300" in text


@pytest.mark.parametrize(
    ("label", "short"),
    [
        ("ERM", "ERM"),
        ("SFP (sparsity=0.5)", "SFP 50 %"),
        ("SFP (removal=none, sparsity=0.3)", "SFP 30 % (removal=none)"),
        ("DQMQ (target_bitops=0.2)", "DQMQ (target_bitops=0.2)"),
    ],
)
def test_rows_have_short_names_in_figures(label, short):
    assert short_label(label) == short


def test_an_algorithm_keeps_its_colour_and_its_rows_differ_in_shape():
    looks = svg.looks_of(["SFP (sparsity=0.3)", "ERM", "SFP (sparsity=0.5)"])
    one, two = looks["SFP (sparsity=0.3)"], looks["SFP (sparsity=0.5)"]
    assert one.colour == two.colour != looks["ERM"].colour and one.shape != two.shape


def test_the_command_writes_the_page(sweep, tmp_path, main):
    done = main("report", "--input_dir", sweep, "--output", tmp_path / "report.html")
    assert done.returncode == 0 and (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    lost = main("report", "--input_dir", tmp_path / "nowhere", "--output", tmp_path / "none.html", check=False)
    assert lost.returncode == 2 and "nowhere" in lost.stderr and not (tmp_path / "none.html").exists()


@needs_browser
def test_in_a_browser(sweep, tmp_path):
    target = tmp_path / "report.html"
    target.write_text(page.report_page(sweep, print))
    browser = Browser(find_browser(), tmp_path / "profile")
    try:
        browser.open(target.as_uri())
        shown = "[...document.querySelectorAll('.figures')][0].querySelectorAll('figure:not(.aside)').length"
        assert browser.run(shown) == 1
        # Choosing another axis shows another figure.
        browser.run(
            "const s = document.querySelector('.figures select'); s.selectedIndex = 1; s.dispatchEvent(new Event('change'))"
        )
        assert "Sparsity" in browser.run("document.querySelector('.figures figure:not(.aside) figcaption').textContent")
        # A point that has the focus shows its numbers.
        browser.run("document.querySelector('.figures figure:not(.aside) .point').focus()")
        tip = "getComputedStyle(document.querySelector('.figures figure:not(.aside) .point .tip')).display"
        assert browser.run(tip) != "none"
        assert browser.messages == [] and browser.blocked == []
        assert [one for one in browser.requests if not one.startswith(("file:", "data:"))] == []
    finally:
        browser.close()
