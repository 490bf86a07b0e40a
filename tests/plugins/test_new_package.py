"""`domainbed-sfp new`: the package that it writes is installed, tests itself and trains."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from domainbed_sfp.plugins import contract, new
from domainbed_sfp.sweep.spec import read_spec

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "name, message",
    [
        ("my-method", "such as 'my_method'"),
        ("3d", "such as 'd'"),
        ("class", "such as 'class_method'"),
        ("magnitude", "algorithm 'Magnitude' is domainbed_sfp.algorithms.pruning.magnitude.Magnitude; choose another, such as 'my_magnitude'"),
        ("json", "taken by a module of python; choose another, such as 'my_json'"),
        ("torch", "taken by a module of python"),
    ],
)  # fmt: skip
def test_names_that_cannot_be(main, tmp_path, name, message):
    done = main("new", name, check=False)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_way_stays(main, tmp_path):
    (tmp_path / "my_method").mkdir()
    done = main("new", "my_method", check=False)
    assert done.returncode == 2 and "exists" in done.stderr and list((tmp_path / "my_method").iterdir()) == []


@pytest.mark.parametrize("given, package, algorithm", [("my_method", "my_method", "MyMethod"), ("MyMethod", "my_method", "MyMethod"), ("SFP2Net", "sfp2_net", "SFP2Net"), ("tiny", "tiny", "Tiny")])  # fmt: skip
def test_both_names_from_either(given, package, algorithm):
    assert new.names_of(given) == (package, algorithm)


def install(package: Path, site: Path) -> None:
    """By pip where it can build without a network; else as setuptools puts a package under development on the path."""
    # Told by what is installed: to look for the modules would have setuptools warn of a distutils that is loaded.
    versions = {found.name.lower(): found.version for found in metadata.distributions()}
    if "setuptools" not in versions:
        pytest.skip("setuptools is not installed")
    builds = "wheel" in versions or tuple(map(int, versions["setuptools"].split(".")[:2])) >= (70, 1)
    if "pip" in versions and builds:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
        done = subprocess.run([*command, "--target", site, package], capture_output=True, text=True, timeout=200)
    else:
        shutil.copytree(package, site)
        code = "from setuptools import setup; setup()"
        command = [sys.executable, "-c", code, "-q", "egg_info"]
        done = subprocess.run(command, cwd=site, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_a_new_package_installs_tests_itself_and_trains(main, tmp_path):
    """As a user does: written, installed by pip, its test run, a short training, all by its registration alone."""
    main("new", "my_method")
    package, site = tmp_path / "my_method", tmp_path / "site"
    install(package, site)
    paths = os.pathsep.join([str(site), str(ROOT), os.environ.get("PYTHONPATH", "")])
    there = {"env": {**os.environ, "PYTHONPATH": paths}, "capture_output": True, "text": True, "timeout": 250}
    tested = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"], cwd=package, **there
    )
    assert f"{len(contract.CHECKS)} passed" in tested.stdout, tested.stdout + tested.stderr
    train = [
        "train",
        "--dataset",
        "FullColoredDigits",
        "--algorithm",
        "MyMethod",
        "--steps",
        "3",
        "--checkpoint_freq",
        "2",
    ]
    trained = subprocess.run(
        [sys.executable, "-m", "domainbed_sfp", *train, "--skip_model_save", "--output_dir", "out"],
        cwd=tmp_path,
        **there,
    )
    assert trained.returncode == 0, trained.stderr
    last = json.loads((tmp_path / "out" / "results.jsonl").read_text().splitlines()[-1])
    assert last["args"]["algorithm"] == "MyMethod" and last["sparsity"] == 0.5
    assert last["final_compression"] is True


def test_the_sweep_of_a_new_package_is_valid(main, tmp_path):
    main("new", "my_method")
    spec = read_spec(str(tmp_path / "my_method" / "sweep.yaml"))
    assert spec.algorithms[-1] == {"name": "MyMethod", "hparams": {"sparsity": 0.5}}
