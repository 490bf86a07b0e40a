"""mkdocs calls this: pages made from the registry, the docstrings, the command line and the committed records."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import domainbed_sfp as dsfp
from domainbed_sfp.algorithms import registry
from domainbed_sfp.cli import main as cli
from domainbed_sfp.training.hparams import hparam_table

RESULTS = Path(__file__).parents[1] / "results"
# Committed sweeps whose rows the pages of methods quote.
SWEEPS = ("coloured_fresh", "coloured_digits", "pacs_small", "globalpru_small", "quantization_small")
# A data set whose defaults the pages show: MNIST-like ones differ in learning rate and batch size alone.
DATASET = "PACS"


def on_config(config: Any) -> Any:
    """Puts a page for every method into the navigation."""
    for entry in config["nav"]:
        if "Methods" in entry:
            entry["Methods"] = ["methods/index.md", *({name: f"methods/{name}.md"} for name in registry.names())]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the generated pages."""
    pages = {"reference/commands.md": _commands(), "methods/index.md": _methods()}
    measured = {sweep: dsfp.read_records(RESULTS / sweep) for sweep in SWEEPS if (RESULTS / sweep).is_dir()}
    for name in registry.names():
        pages[f"methods/{name}.md"] = _method(registry.get(name), measured)
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def _methods() -> str:
    lines = ["# Methods", "", "Every method that is registered; `domainbed-sfp list algorithms` prints the same.", ""]
    lines += ["| method | family | standing | reference |", "|---|---|---|---|"]
    for name in registry.names():
        info = registry.get(name)
        lines.append(f"| [{name}]({name}.md) | {info.family} | {info.standing} | {info.reference} |")
    lines += [
        "",
        "Standing: *reference*, an uncompressed objective or a floor; *published*, built from the paper or its code; "
        "*reconstruction*, where the source does not determine the method: its numbers are not the paper's.",
    ]
    return "\n".join(lines) + "\n"


def _method(info: registry.AlgorithmInfo, measured: dict[str, Any]) -> str:
    module = inspect.getmodule(info.cls)
    about = [inspect.cleandoc(text) for text in (module.__doc__ if module else None, info.cls.__doc__) if text]
    lines = [f"# {info.name}", "", f"*{info.family}; {info.standing}; {info.reference}*", ""]
    lines += ["\n\n".join(_prose(text) for text in about), "", "## Hparams", ""]
    own = hparam_table(info.name, DATASET)
    lines += ["| hparam | default | searched | what it is |", "|---|---|---|---|"]
    for name in sorted(info.hparams):
        hparam = own[name]
        lines.append(f"| `{name}` | {hparam.default} | {'yes' if hparam.sample else ''} | {_cell(hparam.doc)} |")
    if not info.hparams:
        lines.append("| | | | none of its own |")
    if info.retired:
        values = ", ".join(f"`{name}` {value}" for name, value in sorted(info.retired.items()))
        lines += ["", f"Built in, where records of earlier versions name them: {values}."]
    lines += ["", "## Measured", ""]
    for sweep, frame in measured.items():
        if info.name in set(frame.algorithm):
            lines += [f"`results/{sweep}`, test accuracy in percent, training-domain selection:", ""]
            lines += [*_rows(frame, info.name), ""]
    if lines[-1] == "":
        lines.append("Numbers compare rows of one sweep only; protocols, tests and caveats are in `results/README.md`.")
    return "\n".join(lines) + "\n"


def _rows(frame: Any, algorithm: str) -> Iterator[str]:
    yield "| data set | row | average | in the training domains | trials |"
    yield "|---|---|--:|--:|--:|"
    for dataset in sorted(frame.dataset.unique()):
        table = dsfp.table(frame, dataset=dataset)
        chosen = dsfp.select(frame)
        labels = chosen[(chosen.dataset == dataset) & (chosen.algorithm == algorithm)].row.unique()
        for label in labels:
            row = table.loc[label]
            environments = [name[: -len("_std_err")] for name in table if name.endswith("_std_err")]
            known = [row[name] for name in environments if name != "average" and row[name] == row[name]]
            yield f"| {dataset} | {label} | {sum(known) / len(known):.1f} | {row.in_domain:.1f} | {row.trials:.0f} |"


def _prose(text: str) -> str:
    """A docstring as Markdown: what stands indented under `Args:` and its like becomes a block."""
    return text.replace("<", "&lt;")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _commands() -> str:
    lines = ["# Commands", "", "As `domainbed-sfp COMMAND --help` prints them.", ""]
    for name, parser in _parsers(cli.make_parser()):
        lines += [f"## {name}", "", "```text", parser.format_help().rstrip(), "```", ""]
    return "\n".join(lines)


def _parsers(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield name, below
                yield from ((f"{name} {inner}", one) for inner, one in _parsers(below))
