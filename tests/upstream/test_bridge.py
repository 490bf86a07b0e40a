"""The bridge into a small made checkout of DomainBed."""

from __future__ import annotations

import json
import shlex
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
from made_checkout import NOT_DOMAINBEDS

from domainbed_sfp.algorithms import registry
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.training import hparams
from domainbed_sfp.upstream import bridge as upstream
from domainbed_sfp.upstream.checkout import REQUIREMENTS, find_checkout, opened
from domainbed_sfp.upstream.launcher import SlotLauncher, job_command
from domainbed_sfp.upstream.registration import own_table, register_hparams, stand_in

# The modules that the bridge touches, as small as they can be: DomainBed's names, none of its code.
MADE_CHECKOUT = {
    "__init__.py": "",
    "algorithms.py": """
        ALGORITHMS = ["ERM", "DANN"]

        class ERM:
            total_steps = "theirs"

        class DANN:
            pass
    """,
    "command_launchers.py": """
        import subprocess

        def run_one_by_one(commands):
            for command in commands:
                print("launching", command)
                subprocess.call(command, shell=True)

        def show(commands):
            for command in commands:
                print("would launch", command)

        REGISTRY = {"local": run_one_by_one, "dummy": show}
    """,
    "datasets.py": """
        DATASETS = ["RotatedMNIST", "SVIRO"]

        class RotatedMNIST:
            N_STEPS = 77

        class SVIRO:
            N_STEPS = 5001
    """,
    "hparams_registry.py": """
        def _hparams(algorithm, dataset, random_seed):
            return {"theirs": (1, random_seed)}

        def default_hparams(algorithm, dataset):
            return {name: pair[0] for name, pair in _hparams(algorithm, dataset, 0).items()}

        def random_hparams(algorithm, dataset, seed):
            return {name: pair[1] for name, pair in _hparams(algorithm, dataset, seed).items()}
    """,
    "scripts/__init__.py": "",
    # Notes what a training run finds.
    "scripts/train.py": """
        import argparse, copy, json, os, pickle, sys
        from domainbed import algorithms, hparams_registry

        if __name__ == "__main__":
            parser = argparse.ArgumentParser()
            parser.add_argument("--dataset", default="RotatedMNIST")
            parser.add_argument("--algorithm", default="ERM")
            parser.add_argument("--hparams")
            parser.add_argument("--steps", type=int)
            parser.add_argument("--output_dir", default="noted")
            args = parser.parse_args()
            chosen = vars(algorithms)[args.algorithm]
            values = hparams_registry.default_hparams(args.algorithm, args.dataset)
            values.update(json.loads(args.hparams or "{}"))
            noted = {"hparams": values, "total_steps": chosen.total_steps, "program": sys.argv[0],
                     "order": algorithms.ALGORITHMS}
            if args.algorithm not in ("ERM", "DANN"):
                made = chosen((3, 28, 28), 2, 2, values)
                copies = [made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))]
                noted["copies"] = [[type(one).__name__, one.total_steps] for one in copies]
            os.makedirs(args.output_dir, exist_ok=True)
            with open(os.path.join(args.output_dir, "noted.json"), "w") as file:
                json.dump(noted, file)
    """,
    "scripts/sweep.py": """
        import argparse, shlex
        from domainbed import command_launchers

        parser = argparse.ArgumentParser()
        parser.add_argument("action")
        parser.add_argument("--algorithms", nargs="+")
        parser.add_argument("--datasets", nargs="+")
        parser.add_argument("--command_launcher")
        parser.add_argument("--hparams")
        args = parser.parse_args()
        command_launchers.REGISTRY[args.command_launcher]([
            f"python -m domainbed.scripts.train --algorithm {name} --hparams {shlex.quote(args.hparams)} "
            f"--output_dir 'out of {name}'" for name in args.algorithms
        ])
    """,
    "scripts/collect_results.py": "import imageio_of_domainbed\n",
}


@pytest.fixture
def made_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made checkout; the current directory is another one."""
    root = tmp_path / "a checkout"
    for name, text in MADE_CHECKOUT.items():
        file = root / "domainbed" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    return root


def noted(folder: str = "noted") -> dict:
    return json.loads((Path(folder) / "noted.json").read_text())


def files_below(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


# On a made checkout: registration ---------------------------------------------------------------------------


def test_train_finds_our_algorithm_and_its_hparams(made_root: Path) -> None:
    assert upstream.run(str(made_root), "train", ["--algorithm", "Magnitude", "--steps", "12"]) == 0
    seen = noted()
    expected = hparams.resolve_hparams("Magnitude", "RotatedMNIST")
    for name in NOT_DOMAINBEDS:
        del expected[name]
    assert seen["hparams"] == expected
    assert seen["total_steps"] == 12
    assert seen["copies"] == [["Magnitude", 12]] * 3
    assert seen["program"].endswith("train.py")
    assert seen["order"][:2] == ["ERM", "DANN"]
    assert {"Magnitude", "Random", "VREx"} <= set(seen["order"][2:])


def test_a_leading_double_dash_and_the_data_sets_own_steps(made_root: Path) -> None:
    upstream.run(str(made_root), "train", ["--", "--algorithm", "Random"])
    assert noted()["total_steps"] == 77


def test_what_the_checkout_has_stays_its_own(made_root: Path) -> None:
    upstream.run(str(made_root), "train", ["--algorithm", "ERM", "--hparams", '{"anything": 1}'])
    seen = noted()
    assert seen["total_steps"] == "theirs"
    assert seen["hparams"] == {"theirs": 1, "anything": 1}
    assert seen["order"].count("ERM") == 1


def test_an_objective_chosen_in_hparams_brings_its_hparams(made_root: Path) -> None:
    upstream.run(str(made_root), "train", ["--algorithm", "Magnitude", "--hparams", '{"objective": "VREx"}'])
    assert noted()["hparams"]["vrex_lambda"] == 10.0


def test_random_hparams_are_our_draws(made_root: Path) -> None:
    with opened(made_root) as checkout:
        register_hparams(checkout, ["Magnitude"], {})
        for dataset in ("Debug28", "SVIRO", "PACS"):
            drawn = checkout.hparams_registry.random_hparams("Magnitude", dataset, 123)
            table = hparams.hparam_table("Magnitude", stand_in(dataset))
            assert drawn == {n: h.draw(n, 123) for n, h in table.items() if n not in NOT_DOMAINBEDS}
            json.dumps(drawn)
        assert checkout.hparams_registry.random_hparams("DANN", "PACS", 5) == {"theirs": 5}


def test_batch_sizes_follow_domainbeds_rule_of_small_images() -> None:
    small, large = ("Debug28", "ColoredMNIST"), ("Debug224", "SVIRO", "WILDSCamelyon", "SpawriousO2O_easy")
    sizes = {n: own_table("Magnitude", n, {})["batch_size"].default for n in (*small, *large)}
    assert list(sizes.values()) == [64, 64, 32, 32, 32, 32]


def test_nothing_is_left_behind(made_root: Path) -> None:
    before = files_below(made_root), sys.path[:], sys.argv[:], sys.dont_write_bytecode
    upstream.run(str(made_root), "train", ["--algorithm", "Magnitude"])
    assert before == (files_below(made_root), sys.path, sys.argv, sys.dont_write_bytecode)
    assert "domainbed" not in sys.modules
    assert registry.get("Magnitude").cls.total_steps == 5001


# On a made checkout: launchers ------------------------------------------------------------------------------


def test_every_launcher_gets_commands_through_the_bridge(made_root: Path, capsys: pytest.CaptureFixture) -> None:
    hparams_text = '{"sparsity": 0.7}'
    upstream.run(
        str(made_root),
        "sweep",
        [
            "launch",
            "--command_launcher",
            "dummy",
            "--algorithms",
            "ERM",
            "Magnitude",
            "--hparams",
            hparams_text,
        ],
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    words = shlex.split(lines[1].removeprefix("would launch "))
    bridge = [
        sys.executable,
        "-m",
        "domainbed_sfp",
        "upstream",
        "--domainbed_root",
        str(made_root),
        "--",
        "train",
    ]
    assert words[:8] == bridge
    assert words[8:] == [
        "--algorithm",
        "Magnitude",
        "--hparams",
        hparams_text,
        "--output_dir",
        "out of Magnitude",
    ]


def test_child_processes_know_our_algorithms(made_root: Path, capfd: pytest.CaptureFixture) -> None:
    arguments = ["launch", "--command_launcher", "slots", "--algorithms", "Random"]
    assert upstream.run("../a checkout", "sweep", [*arguments, "--hparams", '{"sparsity": 0.7}'], slots=2) == 0
    assert "1 jobs done, 0 failed" in capfd.readouterr().out
    assert noted("out of Random")["hparams"]["sparsity"] == 0.7
    assert not any("__pycache__" in name for name in files_below(made_root))


def test_slots_reports_failures_and_keeps_going(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    python = shlex.quote(sys.executable)
    there = tmp_path / "there"
    launcher = SlotLauncher(2)
    launcher(
        [
            f"{python} -c 'import sys; print(\"out of luck\", file=sys.stderr); sys.exit(3)'",
            f"{python} -c 'import pathlib, sys; pathlib.Path(sys.argv[1]).touch()' {shlex.quote(str(there))}",
        ]
    )
    told = capsys.readouterr()
    assert there.exists()
    assert len(launcher.failures) == 1
    assert "failed with exit status 3" in told.out
    assert "1 jobs done, 1 failed" in told.out
    assert "    out of luck" in told.err


def test_a_sweep_with_failed_jobs_has_status_1(made_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("domainbed_sfp.upstream.launcher.job_command", lambda command, root: "false")
    arguments = ["launch", "--command_launcher", "slots", "--algorithms", "Magnitude", "--hparams", "{}"]
    assert upstream.run(str(made_root), "sweep", arguments) == 1


def test_a_command_of_another_form_is_refused() -> None:
    with pytest.raises(UserError, match=r"starts jobs by 'bash run.sh'"):
        job_command("bash run.sh", Path("/checkout"))


# On a made checkout: bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "arguments", "told"),
    [
        ("trian", [], "unknown script of DomainBed 'trian'; did you mean 'train'?"),
        ("train", ["--algorithm", "Magnitud"], "unknown algorithm 'Magnitud'; did you mean 'Magnitude'?"),
        ("train", ["--algorithm", "DANNN"], "did you mean 'DANN'?"),
        ("train", ["--algorithm", "Foo"], "comes as an installed package, which `domainbed-sfp new` writes"),
        ("train", ["--dataset", "SVIR"], "unknown data set of DomainBed 'SVIR'; did you mean 'SVIRO'?"),
        ("train", ["--hparams", "{lr: 1}"], "--hparams is not valid JSON"),
        ("train", ["--algorithm", "Random", "--hparams", '{"sparsty": 1}'], "did you mean 'sparsity'?"),
        ("train", ["--algorithm", "Random", "--hparams", '{"image_size": 64}'], "'image_size' has no effect"),
        ("train", ["--algorithm", "DQMQ", "--hparams", '{"degrade": 0.2}'], "'degrade' has no effect"),
        ("sweep", ["launch", "--algorithms", "ERM", "Randm"], "did you mean 'Random'?"),
        ("sweep", ["launch", "--command_launcher", "slotz"], "did you mean 'slots'?"),
    ],
)
def test_bad_arguments_are_told_in_one_line(made_root: Path, script: str, arguments: list[str], told: str) -> None:
    with pytest.raises(UserError) as caught:
        upstream.run(str(made_root), script, arguments)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files_below(Path.cwd()) == []


def test_flags_it_cannot_read_are_left_to_domainbeds_parser(made_root: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        upstream.run(str(made_root), "train", ["--steps", "many"])
    assert "--steps: invalid int value: 'many'" in capsys.readouterr().err


def test_a_folder_that_is_no_checkout(made_root: Path, tmp_path: Path) -> None:
    for given, told in (
        (None, "--domainbed_root or in DOMAINBED_ROOT"),
        (str(tmp_path / "nowhere"), "there is no folder"),
        (str(tmp_path), f"did you mean {str(made_root)!r}?"),
        (str(made_root / "domainbed"), f"did you mean {str(made_root)!r}?"),
        (str(tmp_path / "elsewhere"), "no domainbed/scripts/train.py in it"),
    ):
        with pytest.raises(UserError) as caught:
            find_checkout(given)
        assert told in str(caught.value)


def test_an_incomplete_checkout(made_root: Path) -> None:
    (made_root / "domainbed" / "hparams_registry.py").unlink()
    with pytest.raises(UserError, match=r"is incomplete: No module named 'domainbed.hparams_registry'"):
        upstream.run(str(made_root), "train", [])


def test_missing_requirements_are_all_named(made_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in REQUIREMENTS:
        monkeypatch.setitem(sys.modules, name, None)
    file = made_root / "domainbed" / "datasets.py"
    file.write_text("import wilds.datasets\n" + file.read_text())
    with pytest.raises(UserError) as caught:
        upstream.run(str(made_root), "train", [])
    assert str(caught.value) == (
        "DomainBed needs modules that are not installed: "
        "backpack, gdown, imageio, parameterized, timm, tqdm, wilds; pip install 'domainbed_sfp[upstream]'"
    )


def test_a_requirement_that_only_a_script_has(made_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REQUIREMENTS, "imageio_of_domainbed", "imageio_of_domainbed")
    with pytest.raises(UserError, match=r"not installed: .*imageio_of_domainbed"):
        upstream.run(str(made_root), "collect_results", [])


def test_another_domainbed_in_the_way(made_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = ModuleType("domainbed.algorithms")
    other.__file__ = "/elsewhere/domainbed/algorithms.py"
    monkeypatch.setitem(sys.modules, "domainbed.algorithms", other)
    with pytest.raises(UserError, match=r"imported from /elsewhere/domainbed/algorithms.py before"):
        upstream.run(str(made_root), "train", [])
