"""Writes results/README.md from the committed records: `python results/readme.py` in the checkout's root.

Every number of the page is computed here; the words around them are written for what the records say today, and a test
compares the page with what this makes of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

import domainbed_sfp as dsfp
from domainbed_sfp.analysis.looks import short_label
from domainbed_sfp.sweep.spec import read_spec, shipped_specs

HERE = Path(__file__).parent


@cache
def records(sweep: str) -> pd.DataFrame:
    return dsfp.read_records(HERE / sweep)


@cache
def table(sweep: str, dataset: str) -> pd.DataFrame:
    return dsfp.table(records(sweep), dataset=dataset)


def tested(frame: pd.DataFrame) -> list[str]:
    return [name[: -len("_std_err")] for name in frame if name.endswith("_std_err") and name != "average_std_err"]


def cell(sweep: str, dataset: str, row: str) -> str:
    """ "93.2 ± 0.5 (98.0)": out of domain with its standard error, in brackets in the training domains."""
    frame = table(sweep, dataset)
    names = tested(frame)
    name = names[0] if len(names) == 1 else "average"
    line = frame.loc[row]
    return f"{line[name]:.1f} ± {line[f'{name}_std_err']:.1f} ({line.in_domain:.1f})"


def grid(sweep: str, datasets: Sequence[str], rows: Sequence[str]) -> list[str]:
    """A table of rows by data sets."""
    standing = dsfp.algorithms().standing
    lines = ["| method | " + " | ".join(datasets) + " |", "|---|" + "--:|" * len(datasets)]
    for row in rows:
        dagger = " †" if standing.get(row.split(" (")[0]) == "reconstruction" else ""
        lines.append(f"| {short_label(row)}{dagger} | " + " | ".join(cell(sweep, one, row) for one in datasets) + " |")
    return lines


def difference(sweep: str, dataset: str, row: str, other: str) -> str:
    """ "9.5 points (6.6 to 12.5, p = .001)": of `row` over `other`, with the interval and a paired t-test."""
    frame = records(sweep)
    one = dsfp.compare(frame[frame.dataset == dataset], row, other).iloc[0]
    p = "p < .001" if one.p_t < 0.001 else f"p = {one.p_t:.2g}".replace("0.", ".")
    return f"{one.difference:.1f} points ({one.low:.1f} to {one.high:.1f}, {p}, {one.pairs} pairs)"


MNIST = ("ColoredMNIST", "FullColoredMNIST", "TexturedMNIST")
FRESH = ("ERM", "Random", "Magnitude", "DCWP", "SFP", "SFPWeighted", "SFPWeighted (channel_score=taylor, removal=none)")
PACS = [f"{name} (sparsity={level})" for level in (0.3, 0.5) for name in
        ("Random", "Magnitude", "Taylor", "MRM", "SparseIRM", "EVIL", "SFP", "SFPWeighted")]  # fmt: skip
HALF, THIRD = "SFP (sparsity=0.5)", "SFP (sparsity=0.3)"


def page() -> str:
    pacs = table("pacs_small", "PACS")
    lost_out = pacs.loc["ERM", "average"] - pacs.loc["Taylor (sparsity=0.5)", "average"]
    lost_in = pacs.loc["ERM", "in_domain"] - pacs.loc["Taylor (sparsity=0.5)", "in_domain"]
    lines = [
        "# Results",
        "",
        "Accuracy in percent ± standard error over trials, out of domain, selection by training-domain validation; in",
        "brackets the same networks on held-out images of the training domains. † reconstructions. Made by",
        "`python results/readme.py`; what was tried on the way stands in [NOTES.md](NOTES.md).",
        "",
        "## Does SFP beat the best pruning baseline at equal sparsity?",
        "",
        "On one of three sets made with a shortcut: against a colour of ten classes SFP is ahead of DCWP by",
        f"{difference('coloured_fresh', 'FullColoredMNIST', 'SFP', 'DCWP')}.",
        f"On photographs it is not shown: {difference('pacs_small', 'PACS', HALF, 'Taylor (sparsity=0.5)')}",
        "over Taylor on PACS, where the thesis claims 9.4.",
        "",
        *grid("coloured_fresh", MNIST, FRESH),
        "",
        "- Half of the channels pruned, five trials that nobody had looked at before methods, defaults and rows were fixed.",
        "- DCWP's 87 on ColoredMNIST is the colour read upside down: in the training domains it is below chance (50).",
        "- A texture is no axis of the input: plain SFP takes nothing out there, risk weights carry.",
        "- Tests: [SFP](coloured_fresh_SFP.md), [SFPWeighted](coloured_fresh_SFPWeighted.md), [PACS](pacs_small_SFP.md).",
        "",
        "## Does anything pruned beat dense ERM on photographs?",
        "",
        f"No: on PACS at 64 px dense ERM has {cell('pacs_small', 'PACS', 'ERM')}, and the best network with half of its",
        f"channels {cell('pacs_small', 'PACS', HALF)} (SFP), with 30 % gone {cell('pacs_small', 'PACS', THIRD)}.",
        "",
        *grid("pacs_small", ["PACS"], ["ERM", *PACS]),
        "",
        "- 64 px, learning rate 1e-3 and BatchNorm in training mode: a regime in which dense ERM itself stays 20 points below",
        "  what 128 px, 1e-4 and frozen BatchNorm give. The table is superseded as soon as `pacs_128` has records.",
        "- Rows at 30 % are partly of other hardware than those at 50 % ([NOTES.md](NOTES.md)).",
        "",
        "## What does pruning cost out of domain, and what in domain?",
        "",
        f"At 64 px half of the channels cost Taylor {lost_out:.1f} points out of domain and {lost_in:.1f} in the training domains.",
        "",
        "- The table is the one above; dense networks have little to lose out of domain in that regime.",
        "- In single tuning runs at 128 px (1e-4, BatchNorm frozen) the loss out of domain is twice that in domain.",
        "",
        "## Does targeting matter, or would any flags do?",
        "",
        "It matters wherever SFP gains anything: with as many samples flagged at random it is a pruning method like the others.",
        "",
        *grid(
            "coloured", MNIST, ["SFP", "SFP (flag_policy=random)", "SFPWeighted", "SFPWeighted (flag_policy=random)"]
        ),
        "",
        "- Trials 0 to 4, on which an earlier version of SFP had been looked at.",
        "- One part changed at a time: [ablations.md](ablations.md).",
        "",
        "## Does it hold when hparams are searched?",
        "",
        "On coloured digits, with eight settings a method chosen on validation images: SFP is ahead of SparseIRM, the best",
        f"baseline, by {difference('coloured_digits_search', 'FullColoredDigits', 'SFP', 'SparseIRM (irm_lambda=1.0)')}.",
        "",
        *grid(
            "coloured_digits_search",
            ["FullColoredDigits"],
            ["ERM", "Random", "Magnitude", "Taylor", "MRM", "SparseIRM (irm_lambda=1.0)", "DCWP", "SFP", "SFPWeighted"],
        ),
        "",
        "- Three trials. [What was chosen](coloured_digits_search_chosen.md), [tests](coloured_digits_search_SFP.md).",
        "",
        "## Does GlobalPru rank channels better than other scores?",
        "",
        f"No: on PACS it is {difference('globalpru_small', 'PACS', 'Taylor', 'GlobalPru')} behind Taylor, and at the level of",
        "random channels.",
        "",
        *grid("globalpru_small", ["PACS"], list(table("globalpru_small", "PACS").index)),
        "",
        "- 64 px, 300 steps; the gates have 60 steps to learn before the vote.",
        "- [Tests](globalpru_small_GlobalPru.md); [how far rankings agree](globalpru_rankings.png).",
        "",
        "## Do bits follow the quality of the input?",
        "",
        "No: DQMQ's bits hardly move with severity, and at equal BitOPs it gains nothing over static allocations.",
        "",
        *grid("quantization_small", ["PACS"], list(table("quantization_small", "PACS").index)),
        "",
        "- Paintings held out, 64 px. [By degradation](quantization_small_degraded.md), [tests](quantization_small_DQMQ_3bit.md).",
        "",
        "## Files and commands",
        "",
        "`sh results/pages.sh` makes all pages and figures anew. Records carry commit, versions and hardware.",
        "",
        *files(),
    ]
    return "\n".join(lines) + "\n"


def files() -> list[str]:
    """The committed sweeps: what they hold, on what they ran, and the command."""
    lines = ["| sweep | rows, trials, runs | hardware | command |", "|---|---|---|---|"]
    for sweep in sorted(path.parent.name for path in HERE.glob("*/sweep.json")):
        frame = records(sweep)
        runs = frame.drop_duplicates("run")
        trials = runs.groupby("row").trial_seed.nunique()
        counts = f"{trials.min()} to {trials.max()}" if trials.min() < trials.max() else f"{trials.min()}"
        spec = f"sweeps/{sweep}.yaml" if sweep in shipped_specs() else "its spec"
        needs_data = not read_spec(sweep).datasets[0].endswith("Digits") if sweep in shipped_specs() else True
        data = "--data_dir DIR " if needs_data else ""
        command = f"`domainbed-sfp sweep launch {spec} {data}--output_dir results/{sweep}`"
        pages = f"[tables]({sweep}.md)" if (HERE / f"{sweep}.md").is_file() else ""
        lines.append(
            f"| {sweep} {pages} | {runs.row.nunique()} rows, {counts} trials, {len(runs)} runs | {hardware(sweep)} | {command} |"
        )
    return lines


def hardware(sweep: str) -> str:
    """The processors and GPUs that the records of a sweep name."""
    found = set()
    for path in (HERE / sweep).glob("*/results.jsonl"):
        with path.open() as file:
            environment: dict[str, Any] = json.loads(file.readline()).get("environment") or {}
        device = str(environment.get("device", "not recorded"))
        found.add(str(environment.get("cpu", device)) if device == "cpu" else device)
    return ", ".join(sorted(found))


if __name__ == "__main__":
    (HERE / "README.md").write_text(page(), encoding="utf-8")
