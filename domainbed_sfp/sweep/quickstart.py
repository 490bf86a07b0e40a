"""The command `quickstart`: a real small sweep that shows what the project is about, its table and its page."""

from __future__ import annotations

from pathlib import Path

from domainbed_sfp.analysis.account import take_account
from domainbed_sfp.analysis.render.html.page import report_page
from domainbed_sfp.analysis.render.markdown import markdown_text
from domainbed_sfp.analysis.report import build_report
from domainbed_sfp.analysis.selection import TRAINING_DOMAIN
from domainbed_sfp.analysis.tables import Table
from domainbed_sfp.core.console import warn
from domainbed_sfp.core.files import write_atomically
from domainbed_sfp.runs.records import load_records
from domainbed_sfp.sweep import commands

PAGE = "report.html"


def run(output_dir: str, slots: int) -> int:
    """Computes the sweep, or what is left of it; returns the exit status."""
    status = commands.launch(commands.read_spec("quickstart"), None, output_dir, slots=slots, ask=False, cache_dir=None)
    if status:
        return status
    runs = load_records(output_dir, warn=print)
    report = build_report(take_account(runs, output_dir, include_incomplete=False), [TRAINING_DOMAIN])
    print(markdown_text(report))
    print(sentence(report.tables[0]))
    page = Path(output_dir) / PAGE
    write_atomically(page, report_page(output_dir, warn))
    print(f"\nFigures, curves and tests: {page}")
    return 0


def sentence(table: Table) -> str:
    """What the table shows, in its own numbers: the best pruned row, the best other one, and the dense network."""
    found = []
    for row in table.measured:
        accuracies = [cell.accuracy for cell in row.cells if cell is not None]
        if accuracies:
            found.append((sum(accuracies) / len(accuracies), row.costs.get("sparsity", 0.0) > 0, row.algorithm))
    pruned = sorted((one for one in found if one[1]), reverse=True)
    dense = [f"a dense network ({name}) {accuracy:.0f} %" for accuracy, is_pruned, name in found if not is_pruned]
    others = [f"the best other pruned network ({name}) has {accuracy:.0f} %" for accuracy, _, name in pruned[1:2]]
    said = (
        f"Where the colours no longer agree with the digits, {pruned[0][2]} is right on {pruned[0][0]:.0f} % of them."
    )
    rest = ", ".join([*others, *dense[:1]])
    return f"{said} {rest[:1].upper()}{rest[1:]}." if rest else said
