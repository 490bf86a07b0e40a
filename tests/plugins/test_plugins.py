"""What other packages bring: networks and data sets through entry points; what `check --backbone` says of a network."""

from __future__ import annotations

import json

import pytest
from processes import one_after_another

CODE = """
import torch
from torch import nn

from domainbed_sfp.data.base import Dataset, Environment, dataset


def small(input_shape, pretrained):
    return nn.Sequential(
        nn.Conv2d(input_shape[0], 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )


def broken(input_shape, pretrained):
    raise RuntimeError("no such thing")


def number(input_shape, pretrained):
    return 3


@dataset("Noise")
class Noise(Dataset):
    '''Three environments of noise whose mean tells the class.'''

    ENVIRONMENTS = ["a", "b", "c"]
    SMALL_IMAGES = True
    N_STEPS = 10

    @classmethod
    def build(cls, data_dir, hparams, seed, cache_dir):
        made = torch.Generator().manual_seed(seed)
        environments = []
        for name in cls.ENVIRONMENTS:
            y = torch.arange(40) % 2
            x = torch.rand(40, 3, 12, 12, generator=made) + y[:, None, None, None]
            environments.append(Environment(name, x, y))
        return cls(environments, 2)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder for PYTHONPATH with an installed package that declares three backbones and a data set."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "their_package.py").write_text(CODE)
    info = folder / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their_package\nVersion: 1.0\n")
    entries = "".join(f"{name} = their_package:{name}\n" for name in ("small", "broken", "number"))
    (info / "entry_points.txt").write_text(
        f"[domainbed_sfp.backbones]\n{entries}[domainbed_sfp.datasets]\nnoise = their_package\n"
    )
    return folder


REFUSED = {
    "broken": "backbone 'broken' (their_package:broken) cannot be made for images of shape (3, 12, 12): RuntimeError",
    "number": "gives a int; expected a torch.nn.Module",
    "smal": "did you mean 'small'?",
}


@pytest.fixture(scope="module")
def done(site, tmp_path_factory):
    """What commands of a process that knows the package tell, by the backbone they use; and the folder of a run."""
    folder = tmp_path_factory.mktemp("done")
    pruned = json.dumps({"backbone": "small", "sparsity": 0.5, "batch_size": 8})
    commands = {
        "small": ("train", "--algorithm", "Taylor", "--dataset", "Noise", "--test_envs", 2, "--steps", 6, "--hparams", pruned,
                  "--output_dir", "run"),
        **{name: ("train", "--dataset", "Noise", "--hparams", json.dumps({"backbone": name, "batch_size": 8}),
                  "--output_dir", "refused") for name in REFUSED},
        "checked": ("check", "--backbone", "small", "--image_size", 16),
    }  # fmt: skip
    told = one_after_another(list(commands.values()), folder, site)
    return dict(zip(commands, told)), folder / "run"


def test_a_network_and_a_data_set_of_another_package_train_and_prune(done):
    told, run = done
    assert told["small"].returncode == 0, told["small"].stderr
    record = json.loads((run / "results.jsonl").read_text().splitlines()[-1])
    # 3 of 6 and 4 of 8 channels are gone.
    assert record["sparsity"] == 0.5 and record["environments"] == ["a", "b", "c"] and record["final_compression"]
    assert record["macs"] == 3 * 3 * 9 * 144 + 4 * 3 * 9 * 100 + 4 * 2


@pytest.mark.parametrize("backbone", REFUSED)
def test_a_network_that_cannot_be_made_is_one_line(done, backbone):
    failed = done[0][backbone]
    assert failed.returncode == 2 and failed.stderr.splitlines()[-1].startswith("error: ")
    assert REFUSED[backbone] in failed.stderr and "Traceback" not in failed.stderr


def test_check_says_what_can_be_pruned_of_a_network(done):
    said = done[0]["checked"]
    assert said.returncode == 0, said.stderr
    assert "small: 8 features of images (3, 16, 16)" in said.stdout
    assert "channels that can be removed: 14 in 2 groups, of 2 layers" in said.stdout
    assert "Taylor (channel): yes" in said.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give an algorithm, or --backbone NAME"),
        (("ERM", "--backbone", "small"), "one of the two"),
        (("--backbone", "small", "--json"), "--json does not go with --backbone"),
    ],
)
def test_check_wants_an_algorithm_or_a_backbone(main, arguments, words):
    failed = main("check", *arguments, check=False)
    assert failed.returncode == 2 and words in failed.stderr
