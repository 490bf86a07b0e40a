"""What the documents show is what works."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from processes import one_after_another

import domainbed_sfp as dsfp
from domainbed_sfp.algorithms import registry
from domainbed_sfp.pruning.groups import ChannelGroup
from domainbed_sfp.sweep import commands
from domainbed_sfp.sweep.spec import SweepSpec, make_jobs, read_spec

ROOT = Path(__file__).parents[1]


def code_blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), flags=re.DOTALL)


def the_algorithm(name: str) -> str:
    """Its code on the page of algorithms."""
    blocks = code_blocks("docs/writing_an_algorithm.md", "python")
    return next(block for block in blocks if f'register("{name}"' in block)


def test_an_algorithm_with_masks_of_its_own_keeps_the_contract(main, tmp_path, monkeypatch):
    """The page's second level; the first is checked on the way from a score to a table."""
    (tmp_path / "example.py").write_text(the_algorithm("CoinFlip"))
    with registry.ALGORITHMS.scope():
        assert "CoinFlip keeps the contract." in main("check", "example.py").stdout
    monkeypatch.delitem(sys.modules, "example")


def test_the_hooks_on_the_page_are_there_and_told():
    """Every hook of the table is a method of the base, with a docstring of its own or of the class above."""
    page = (ROOT / "docs" / "writing_an_algorithm.md").read_text()
    table = page.partition("### Hooks")[2].partition("### State")[0]
    names = {
        name
        for row in table.splitlines()
        if row.startswith("| `")
        for name in re.findall(r"`(\w+)\(", row.split("|")[1])
    }
    assert len(names) > 15
    for name in names:
        owners = [cls for cls in dsfp.ScheduledPruning.__mro__ if name in vars(cls)]
        assert any((getattr(vars(cls)[name], "__doc__", None) or "").strip() for cls in owners), name
    fields = re.findall(r"^\| `(\w+)` \|", page.partition("**`ChannelGroup`**")[2].partition("**A score that")[0], re.M)
    assert fields == [field.name for field in dataclasses.fields(ChannelGroup)]


def test_from_a_score_to_a_table(tmp_path):
    """The page's worked example as an installed package, its commands word for word but for fewer steps and trials, in
    one process that knows the package by its declaration."""
    declared = code_blocks("docs/writing_an_algorithm.md", "toml")[0]
    package, info = tmp_path / "site" / "my_method", tmp_path / "site" / "my_method-1.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").write_text("")
    (package / "largest_weight.py").write_text(the_algorithm("LargestWeight"))
    entry = re.search(r'(\w+) = "([\w.]+)"', declared)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my_method\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[domainbed_sfp.algorithms]\n{entry[1]} = {entry[2]}\n")
    (commands,) = [block for block in code_blocks("docs/writing_an_algorithm.md", "sh") if "collect" in block]
    short = commands.replace("--steps 300", "--steps 12").replace("--n_trials 3", "--n_trials 1")
    lines = [shlex.split(line) for line in short.replace("\\\n", " ").strip().splitlines()]
    assert {line[0] for line in lines} == {"domainbed-sfp"}
    done = one_after_another([line[1:] for line in lines], tmp_path, site=tmp_path / "site")
    assert [one.returncode for one in done] == [0] * 4, done
    assert "LargestWeight keeps the contract." in done[0].stdout
    assert re.search(r"\| LargestWeight .*\|", done[2].stdout)
    assert "LargestWeight" in (tmp_path / "report.html").read_text()


def test_the_python_in_the_documents_runs(tmp_path, monkeypatch):
    """docs/pandas.md, in a folder whose results are the project's."""
    (tmp_path / "results").symlink_to(ROOT / "results")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in code_blocks("docs/pandas.md", "python"):
        exec(block.replace("steps=300", "steps=2"), names)
    assert names["algorithm"].sparsity() > 0.4 and len(names["half"]) > 0


def test_the_examples_in_docstrings_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("analysis.frames", "analysis.figures.notebook", "algorithms"):
        found = doctest.testmod(importlib.import_module(f"domainbed_sfp.{name}"))
        assert found.failed == 0
    # The package of algorithms is called: doctest does not look into its class by itself.
    examples = doctest.DocTestFinder().find(type(dsfp.algorithms).__call__, "algorithms", globs={})
    assert examples and all(doctest.DocTestRunner().run(example).failed == 0 for example in examples)


def test_the_page_of_results_is_what_its_script_makes(monkeypatch):
    spec = importlib.util.spec_from_file_location("readme", ROOT / "results" / "pages" / "readme.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.page() == (ROOT / "results" / "README.md").read_text()


@pytest.mark.parametrize("notebook", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda path: path.stem)
def test_the_notebooks_run(monkeypatch, notebook):
    """Their code, in one process and with few steps of training."""
    monkeypatch.chdir(notebook.parent)
    names: dict[str, object] = {}
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]).replace("steps=60", "steps=4"), names)
    assert "axes" in names or len(names["right"]) > 100


def test_the_data_set_in_the_documents_is_enough():
    from domainbed_sfp.data import base
    from domainbed_sfp.data.sets.folders import ImageFolders

    source = next(block for block in code_blocks("docs/own_data.md", "python") if "@dataset" in block)
    with base.DATASETS.scope():
        exec(source, {"dataset": base.dataset, "ImageFolders": ImageFolders})
        assert base.get_dataset_class("MyPhotos").environment_names() == ["day", "night", "rain"]


@pytest.mark.parametrize("document, rows, trials", [("README.md", 3, {0, 1, 2}), ("docs/sweeps.md", 2, {5, 6, 7})])
def test_the_spec_in_a_document_is_valid(document, rows, trials, tmp_path):
    (tmp_path / "spec.yaml").write_text(code_blocks(document, "yaml")[0])
    spec = read_spec(str(tmp_path / "spec.yaml"))
    jobs = make_jobs(spec, None)
    assert len(spec.algorithms) == rows and {job.trial_seed for job in jobs} == trials


def test_links_of_the_documents_lead_somewhere():
    documents = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "results" / "README.md",
        ROOT / "results" / "NOTES.md",
        *(ROOT / "docs").glob("*.md"),
    ]
    links = [(page, link) for page in documents for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())]
    local = [(page, link) for page, link in links if not link.startswith("http")]
    assert len(local) >= 5
    for page, link in local:
        assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_quickstart_runs_its_sweep_and_says_what_it_shows(main, monkeypatch, tmp_path):
    """The command itself, on a grid cut down to seconds."""
    small = read_spec("quickstart").updated(steps=3, n_trials=1, algorithms=["ERM", "Magnitude"])
    assert isinstance(small, SweepSpec)
    monkeypatch.setattr(commands, "read_spec", lambda name: {"quickstart": small}[name])
    done = main("quickstart", "--jobs", 2)
    assert "2 jobs: 2 done" in done.stdout
    assert "| ERM" in done.stdout and "training-domain" in done.stdout and "FullColoredDigits" in done.stdout
    assert re.search(r"Magnitude is right on \d+ % of them\. A dense network \(ERM\) \d+ %\.", done.stdout)
    assert "<svg" in (tmp_path / "quickstart_output" / "report.html").read_text()


@pytest.mark.parametrize(
    "what, expected", [("algorithms", "Magnitude"), ("datasets", "FullColoredMNIST"), ("sweeps", "paper")]
)
def test_list(main, what, expected):
    assert expected in main("list", what).stdout


def test_list_hparams_follows_the_algorithm(main):
    assert "sparsity" in main("list", "hparams", "--algorithm", "Magnitude", "--dataset", "ColoredMNIST").stdout
    assert "sparsity" not in main("list", "hparams", "--algorithm", "ERM").stdout
    assert "did you mean 'IRM'" in main("list", "hparams", "--algorithm", "IRMM", check=False).stderr


def test_findings_in_the_readme_are_those_of_the_records():
    """Each number of its table of findings, from the sweep that its row names."""
    readme = (ROOT / "README.md").read_text()
    fresh = dsfp.read_records(ROOT / "results" / "coloured_fresh")
    colours = dsfp.table(fresh, dataset="FullColoredMNIST")["10%"].round(1)
    textures = dsfp.table(fresh, dataset="TexturedMNIST")["10%"].round(1)
    shown = (
        f"{colours['SFP']} % of ten coloured digits, dense ERM {colours['ERM']}, the best baseline {colours['DCWP']}"
    )
    assert shown in readme
    shown = f"No ({textures['SFP']}, ERM {textures['ERM']}); weighting unflagged samples does: SFPWeighted"
    assert f"{shown} {textures['SFPWeighted']}, DCWP {textures['DCWP']}" in readme
    photographs = dsfp.read_records(ROOT / "results" / "pacs_128")
    average = dsfp.table(photographs).average.round(1)
    recipe = dsfp.table(dsfp.read_records(ROOT / "results" / "recipe_pacs")).art_painting
    frozen = "freeze_bn=true, lr=0.0001"
    by_layer = recipe[f"ERM ({frozen})"] - recipe[f"Taylor ({frozen}, sparsity=0.5)"]
    shown = f"Taylor {average.Taylor} % over PACS's four domains, dense ERM {average.ERM} (128 px, one trial"
    assert shown in readme and f"every layer costs {by_layer:.0f} points on paintings" in readme
    p = f"{dsfp.compare(photographs, 'SFP', 'Taylor').iloc[0].p_t:.2g}".removeprefix("0")
    shown = f"No: {average.SFP} against Taylor's {average.Taylor} ([p = {p}](results/pacs_128/SFP.md)); SFPAligned †"
    assert f"{shown} {average.SFPAligned}." in readme
    taylor = recipe[f"Taylor ({frozen}, pruning_scope=global, sparsity=0.5)"]
    shown = f"No: {recipe['GlobalPru (pruning_scope=global)']:.1f} on paintings, Taylor {taylor:.1f}, random channels"
    assert f"{shown} {recipe[recipe.index.str.startswith('Random')].max():.1f} at best" in readme


def test_the_methods_in_the_readme_are_those_of_the_registry():
    by_kind: dict[tuple[str, str], list[str]] = {}
    for name, line in dsfp.algorithms().iterrows():
        by_kind.setdefault((line.family, line.standing), []).append(name)
    rows = [f"| {family} | {standing} | {', '.join(names)} |" for (family, standing), names in by_kind.items()]
    expected = "\n".join(["| family | standing | methods |", "|---|---|---|", *rows])
    section = (ROOT / "README.md").read_text().split("<!-- methods")[1].split("-->")[1].split("<!-- end")[0]
    assert section.strip() == expected


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    prose = [line for line in lines if not line.startswith(("|", "![", ">"))]
    assert len(lines) <= 150 and max(map(len, prose)) <= 100
