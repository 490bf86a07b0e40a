"""Writes results/README.md from the committed records: `python results/pages/readme.py` in the checkout's root.

Every number is computed here; the words around them stand in readme.jinja and are written for what the records say
today. A test compares the page with what this makes of them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined

import domainbed_sfp as dsfp
from domainbed_sfp.analysis.render.grids import daggered
from domainbed_sfp.analysis.render.looks import algorithm_of, short_label
from domainbed_sfp.analysis.significance import paired_test
from domainbed_sfp.runs.packed import run_folders
from domainbed_sfp.runs.records import read_records
from domainbed_sfp.sweep.spec import read_spec, shipped_specs

HERE = Path(__file__).parent

# How a row of `recipe_pacs` is called on the page: BatchNorm frozen with rate 1e-4, and learning with rate 3e-4.
FROZEN, LEARNING = "freeze_bn=true, lr=0.0001", "freeze_bn=false, lr=0.0003"
RECIPE: dict[str, tuple[str | None, str | None]] = {
    "ERM": (f"ERM ({FROZEN})", f"ERM ({LEARNING})"),
    "SFPAligned, from .5 of the run": ("SFPAligned", None),
    "SFP": ("SFP", None),
    "Taylor": (
        f"Taylor ({FROZEN}, pruning_scope=global, sparsity=0.5)",
        f"Taylor ({LEARNING}, pruning_scope=global, sparsity=0.5)",
    ),
    "Taylor, from .5 of the run": (f"Taylor ({FROZEN}, prune_start=0.5, pruning_scope=global, sparsity=0.5)", None),
    "Taylor, 70 % of the channels": (f"Taylor ({FROZEN}, pruning_scope=global, sparsity=0.7)", None),
    "GlobalPru": ("GlobalPru (pruning_scope=global)", None),
    "GlobalPru, no rank loss": ("GlobalPru (pruning_scope=global, rank_weight=0.0)", None),
    "EVIL": (f"EVIL ({FROZEN}, pruning_scope=global)", f"EVIL ({LEARNING}, pruning_scope=global)"),
    "Magnitude": (f"Magnitude ({FROZEN})", f"Magnitude ({LEARNING})"),
    "MRM": (f"MRM ({FROZEN})", f"MRM ({LEARNING})"),
    "SparseIRM": (f"SparseIRM ({FROZEN})", f"SparseIRM ({LEARNING})"),
    "Random": (f"Random ({FROZEN})", f"Random ({LEARNING})"),
    "DCWP": (f"DCWP ({FROZEN})", f"DCWP ({LEARNING})"),
    "DCWP, stages of 40, 20 and 40 %": (None, f"DCWP ({LEARNING}, mask_end=0.6, mask_start=0.4)"),
    "GlobalPru, by layer": ("GlobalPru", None),
    "Taylor, by layer": (f"Taylor ({FROZEN}, sparsity=0.5)", None),
    "EVIL, by layer": (f"EVIL ({FROZEN})", f"EVIL ({LEARNING})"),
}
RESULTS = HERE.parent


@cache
def records(sweep: str) -> pd.DataFrame:
    return dsfp.read_records(RESULTS / sweep)


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


def shown(row: str) -> str:
    """A row's short name, with a dagger behind that of a reconstruction."""
    return daggered(short_label(row), dsfp.algorithms().standing.get(algorithm_of(row)))


def grid(sweep: str, datasets: Sequence[str], rows: Sequence[str]) -> str:
    """A table of rows by data sets."""
    lines = ["| method | " + " | ".join(datasets) + " |", "|---|" + "--:|" * len(datasets)]
    for row in rows:
        lines.append(f"| {shown(row)} | " + " | ".join(cell(sweep, one, row) for one in datasets) + " |")
    return "\n".join(lines)


def difference(sweep: str, dataset: str, row: str, other: str) -> str:
    """ "9.5 points (6.6 to 12.5, p = .001)": of `row` over `other`, with the interval and a paired t-test."""
    frame = records(sweep)
    one = dsfp.compare(frame[frame.dataset == dataset], row, other).iloc[0]
    p = "p < .001" if one.p_t < 0.001 else f"p = {one.p_t:.2g}".replace("0.", ".")
    return f"{one.difference:.1f} points ({one.low:.1f} to {one.high:.1f}, {p}, {one.pairs} pairs)"


def rows(sweep: str, dataset: str, part: str) -> list[str]:
    """The rows of a table whose names hold `part`, but for those of settings that are no method's own."""
    return [row for row in table(sweep, dataset).index if part in row and "channel_score" not in row]


def runs(sweep: str) -> int:
    """How many runs a sweep has."""
    return records(sweep).run.nunique()


def benchmark(name: str) -> Any:
    """The script of that name in benchmarks/, as a module."""
    specification = importlib.util.spec_from_file_location(name, RESULTS.parent / f"benchmarks/{name}.py")
    assert specification is not None and specification.loader is not None
    bench = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(bench)
    return bench


@cache
def at_once() -> dict[tuple[str, str, float, str], dict[str, Any]]:
    """What benchmarks/one_shot.py found on PACS, by method, scope, share removed and reconstruction."""
    return {
        tuple(line["case"]): line for line in benchmark("one_shot").read(RESULTS / "benchmarks/one_shot_pacs.jsonl")
    }


def pruned(method: str, scope: str, sparsity: float, reconstruction: str, when: str = "finetuned") -> str:
    """ "70.0 (88.2)": out of domain, in brackets in domain, of a case of `at_once`."""
    found = at_once()[method, scope, sparsity, reconstruction][when]
    return f"{found['out_of_domain']:.1f} ({found['in_domain']:.1f})"


def lost(sweep: str, dataset: str, row: str, dense: str) -> str:
    """What a single run on one test environment loses against another."""
    frame = table(sweep, dataset)
    (name,) = tested(frame)
    fall = frame.loc[dense] - frame.loc[row]
    return f"{fall[name]:.1f} points out of domain and {fall.in_domain:.1f} in the training domains"


def single(sweep: str, dataset: str, row: str) -> str:
    """ "53.4 (76.8)": a single run, out of domain and in brackets in the training domains."""
    line = table(sweep, dataset).loc[row]
    (name,) = tested(table(sweep, dataset))
    return f"{line[name]:.1f} ({line.in_domain:.1f})"


def apart(sweep: str, dataset: str, row: str, other: str) -> str:
    """ "2.2 points": by how much a single run is ahead of another, out of domain."""
    frame = table(sweep, dataset)
    (name,) = tested(frame)
    return f"{frame.loc[row, name] - frame.loc[other, name]:.1f} points"


def alone(sweep: str, dataset: str) -> str:
    """A table of the rows that have a run, on one test environment, with the MACs they leave."""
    frame = table(sweep, dataset)
    (name,) = tested(frame)
    lines = ["| method | out of domain | in domain | MACs |", "|---|--:|--:|--:|"]
    for row, line in frame.iterrows():
        if line.trials:
            share = line.macs / line.dense_macs
            lines.append(f"| {short_label(str(row))} | {line[name]:.1f} | {line.in_domain:.1f} | {share:.0%} |")
    return "\n".join(lines)


def by_environment(sweep: str, dataset: str) -> str:
    """A table of the rows that have a run, by test environment (X: none yet), with the MACs they leave. A single trial
    has no standard error."""
    frame = table(sweep, dataset)
    names = [*tested(frame), "average", "in_domain"]
    heads = ["method", *(name.replace("_", " ") for name in names), "MACs", "trials"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * (len(heads) - 1)]
    for row, line in frame.iterrows():
        if not line.trials:
            continue
        cells = [shown(str(row)), *(_with_error(line, name) for name in names)]
        lines.append("| " + " | ".join([*cells, f"{line.macs / line.dense_macs:.0%}", f"{line.trials:.0f}"]) + " |")
    return "\n".join(lines)


def _with_error(line: pd.Series, name: str) -> str:
    if pd.isna(line[name]):
        return "X"
    error = line.get(f"{name}_std_err")
    return f"{line[name]:.1f}" if error is None or pd.isna(error) else f"{line[name]:.1f} ± {error:.1f}"


def both_ways(sweep: str, dataset: str) -> str:
    """The rows of RECIPE, single runs on one test environment: accuracy as in `single`, and the MACs that are left."""
    frame = table(sweep, dataset)
    lines = ["| method | BatchNorm frozen, 1e-4 | learning, 3e-4 | MACs |", "|---|--:|--:|--:|"]
    for label, ways in RECIPE.items():
        cells = ["" if row is None else single(sweep, dataset, row) for row in ways]
        line = frame.loc[ways[0] or ways[1]]
        lines.append(f"| {label} | {cells[0]} | {cells[1]} | {line.macs / line.dense_macs:.0%} |")
    return "\n".join(lines)


def recipe(label: str, learning: bool = False) -> str:
    """The row of `recipe_pacs` that the page calls so."""
    row = RECIPE[label][learning]
    assert row is not None, label
    return row


def premise() -> dict[str, Any]:
    """What benchmarks/allocations.py found on the coloured digits, for the page's sentence."""
    bench = benchmark("allocations")
    cases, names, accuracies = bench.table_of(bench.read(RESULTS / "benchmarks/allocations_digits.jsonl"))
    means = accuracies.mean(0)
    single = int(means.mean(0).argmax())
    gained = paired_test(bench.held_out_gains(accuracies, bench.groupings(cases)["degradation and severity"]).tolist())
    return {
        "allocations": len(names),
        "single": names[single],
        "best": int((means.argmax(1) == single).sum()),
        "cases": len(cases),
        "seeds": len(accuracies),
        "gain": f"{gained.difference:.1f} points ({gained.interval.low:.1f} to {gained.interval.high:.1f})",
    }


def page() -> str:
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string((HERE / "readme.jinja").read_text(encoding="utf-8"))
    mnist = ("ColoredMNIST", "FullColoredMNIST", "TexturedMNIST")
    tools = {
        "alone": alone, "apart": apart, "both_ways": both_ways, "by_environment": by_environment, "cell": cell,
        "difference": difference, "files": files, "grid": grid, "lost": lost, "pruned": pruned,
        "rows": rows, "runs": runs, "single": single,
    }  # fmt: skip
    return template.render(mnist=mnist, premise=premise(), recipe=recipe, **tools)


def files() -> str:
    """The committed sweeps: what they hold, on what they ran, and the command."""
    lines = ["| sweep | rows, trials, runs | hardware | command |", "|---|---|---|---|"]
    for sweep in sorted(path.parent.name for path in RESULTS.glob("*/sweep.json")):
        frame = records(sweep)
        runs = frame.drop_duplicates("run")
        trials = runs.groupby("row").trial_seed.nunique()
        counts = f"{trials.min()} to {trials.max()}" if trials.min() < trials.max() else f"{trials.min()}"
        spec = f"sweeps/{sweep}.yaml" if sweep in shipped_specs() else "its spec"
        needs_data = not read_spec(sweep).datasets[0].endswith("Digits") if sweep in shipped_specs() else True
        data = "--data_dir DIR " if needs_data else ""
        command = f"`domainbed-sfp sweep launch {spec} {data}--output_dir results/{sweep}`"
        name = f"[{sweep}]({sweep}/README.md)" if (RESULTS / sweep / "README.md").is_file() else sweep
        held = f"{runs.row.nunique()} rows, {counts} trials, {len(runs)} runs"
        lines.append(f"| {name} | {held} | {hardware(sweep)} | {command} |")
    return "\n".join(lines)


def hardware(sweep: str) -> str:
    """The processors and GPUs that the records of a sweep name."""
    found = set()
    for folder in run_folders(RESULTS / sweep, print):
        environment: dict[str, Any] = next(read_records(folder, print)).get("environment") or {}
        device = str(environment.get("device", "not recorded"))
        found.add(str(environment.get("cpu", device)) if device == "cpu" else device)
    return ", ".join(sorted(found))


if __name__ == "__main__":
    (RESULTS / "README.md").write_text(page(), encoding="utf-8")
