"""Under which protocol the runs of a table were made, and whether it is one protocol."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from domainbed_sfp.analysis.account import JobKey, number_ranges, steps_of
from domainbed_sfp.analysis.selection import Rule
from domainbed_sfp.core.domainbed_facts import SMALL_IMAGES
from domainbed_sfp.core.version import __version__
from domainbed_sfp.runs.records import PUBLISHED, Run

# Inputs of at most so many pixels get DomainBed's MNIST_CNN from a backbone "auto" (networks.SMALL_IMAGE_SIDE, whose
# module would load torch).
_SMALL_SIDE = 28

# Data sets of such images, for records that do not tell their input's shape. Each run's seed makes them anew: it deals
# the digits out to the environments, flips labels and colours them.
MNIST_LIKE = (
    *SMALL_IMAGES, "FullColoredMNIST", "TexturedMNIST", "ColoredDigits", "RotatedDigits", "FullColoredDigits",
    "TexturedDigits",
)  # fmt: skip

# DomainBed's defaults of the hparams among the conditions. A record that does not have them was made with these.
_USUAL = {"data_augmentation": True, "class_balanced": False, "nonlinear_classifier": False}


@dataclass(frozen=True, slots=True)
class Conditions:
    """What must agree between two rows for a comparison to be fair. `image_size` is in pixels, None if
    unknown."""

    backbone: str
    weights: str
    image_size: int | None
    steps: int
    holdout_fraction: float
    precision: str
    task: str
    # Checkpoints that have records: "all", or "final", those that selection may choose.
    evaluate: str
    data_augmentation: bool
    class_balanced: bool
    nonlinear_classifier: bool
    # PUBLISHED, or what tells images from others under the data set's name, and what is stamped on them.
    data: str
    # Of a file of weights, where records have it.
    weights_hash: str | None


@dataclass(frozen=True, slots=True)
class Protocol:
    """The conditions of a table's runs, the commonest first, and the seeds and commits they cover."""

    conditions: tuple[Conditions, ...]
    counts: tuple[int, ...]
    selection: str
    hparams_seeds: tuple[int, ...]
    trial_seeds: tuple[int, ...]
    commits: tuple[str, ...]
    # `--hparams` that all runs were given, as (name, JSON text), less those the conditions tell.
    overrides: tuple[tuple[str, str], ...]

    def line(self) -> str:
        """The protocol as one sentence."""
        shown = {
            name: "/".join(dict.fromkeys(shown_value(getattr(one, name)) for one in self.conditions))
            for name in Conditions.__slots__
        }
        hashes = shown["weights_hash"]
        parts = [
            f"{self.selection} selection",
            f"{shown['steps']} steps",
            f"backbone {shown['backbone']}",
            f"weights {shown['weights']}" + (f" (hash {hashes})" if hashes != "unknown" else ""),
            *([f"{shown['image_size']} px images"] if shown["image_size"] != "unknown" else []),
            self.effort(),
            f"held-out fraction {shown['holdout_fraction']}",
            f"precision {shown['precision']}",
        ]
        if set(shown["task"].split("/")) != {"domain_generalization"}:
            parts.append(f"task {shown['task']}")
        if shown["evaluate"] != "all":
            parts.append(f"checkpoints evaluated {shown['evaluate']}")
        if shown["data"] != PUBLISHED:
            parts.append(f"data {shown['data']}")
        for name, usual in _USUAL.items():
            if shown[name] != shown_value(usual):
                parts.append(f"{name.replace('_', ' ')} {shown[name]}")
        parts.append(f"commit {', '.join(self.commits) or 'not recorded'}")
        return f"Protocol: {'; '.join(parts)}; collected by domainbed_sfp {__version__}."

    def effort(self) -> str:
        """How many hparams draws and trials the runs cover."""
        draws = (
            "default hparams"
            if self.hparams_seeds == (0,)
            else f"{len(self.hparams_seeds)} hparams draws (seeds {number_ranges(self.hparams_seeds)})"
        )
        if self.overrides:
            draws += " with " + ", ".join(f"{name}={value}" for name, value in self.overrides)
        trials = f"{len(self.trial_seeds)} trial{'' if len(self.trial_seeds) == 1 else 's'}"
        return f"{draws} x {trials} (seeds {number_ranges(self.trial_seeds)})"

    def warnings(self) -> list[str]:
        """One sentence for each condition that is not the same in all runs."""
        found = []
        for name in Conditions.__slots__:
            values: Counter[str] = Counter()
            for one, count in zip(self.conditions, self.counts):
                values[shown_value(getattr(one, name))] += count
            if len(values) > 1:
                told = ", ".join(f"{value} in {count} runs" for value, count in values.most_common())
                found.append(f"Warning: this table mixes protocols, {name.replace('_', ' ')}: {told}.")
        return found

    def as_dict(self) -> dict[str, Any]:
        return {
            "selection": self.selection,
            "conditions": [
                {name: getattr(one, name) for name in Conditions.__slots__} | {"runs": count}
                for one, count in zip(self.conditions, self.counts)
            ],
            "hparams_seeds": list(self.hparams_seeds),
            "trial_seeds": list(self.trial_seeds),
            "commits": list(self.commits),
            "overrides": dict(self.overrides),
            "package": f"domainbed_sfp {__version__}",
        }


def protocol_of(runs: dict[JobKey, Run], rule: Rule) -> Protocol:
    counts = Counter(conditions_of(run) for run in runs.values()).most_common()
    commits = {run.facts["commit"] for run in runs.values() if run.facts.get("commit")}
    return Protocol(
        tuple(conditions for conditions, _ in counts),
        tuple(count for _, count in counts),
        rule.title,
        _sorted(job.hparams_seed for job in runs),
        _sorted(job.trial_seed for job in runs),
        tuple(sorted(_short(str(commit)) for commit in commits)),
        _common_overrides(runs),
    )


def _common_overrides(runs: Iterable[JobKey]) -> tuple[tuple[str, str], ...]:
    told = {"steps", "backbone", "weights", "image_size", "resnet18", "resnet50_augmix", "freeze_bn", *_USUAL}
    given = [{setting for setting in job.method.settings if setting[0] not in told} for job in runs]
    return tuple(sorted(set.intersection(*given))) if given else ()


def conditions_of(run: Run) -> Conditions:
    return Conditions(
        backbone_of(run),
        weights_of(run),
        _image_size(run),
        steps_of(run),
        run.args.get("holdout_fraction", 0.2),
        run.facts.get("precision", "fp32"),
        run.args.get("task", "domain_generalization"),
        run.evaluate,
        **{name: bool(run.hparams.get(name, usual)) for name, usual in _USUAL.items()},
        data=_data(run),
        weights_hash=run.facts.get("weights_digest"),
    )


def _data(run: Run) -> str:
    data = str(run.facts.get("data_digest") or PUBLISHED)
    return f"{data}, stamp {run.hparams['stamp']}" if "stamp" in run.hparams else data


def is_dealt_by_seed(dataset: str) -> bool:
    """Whether a run's seed deals the samples out to the environments and draws what they look like."""
    return dataset in MNIST_LIKE or dataset.startswith("Stamped")


def _image_size(run: Run) -> int | None:
    """Side of the network's input. Only photographs go by the hparam; DomainBed's records do not say their shape."""
    if "input_shape" in run.facts:
        side: int = run.facts["input_shape"][1]
        return side
    if run.dataset in MNIST_LIKE:
        return 28 if run.dataset in SMALL_IMAGES else None
    asked: int | None = run.hparams.get("image_size", 224)
    return asked


def backbone_of(run: Run) -> str:
    """The backbone's identity, in the words of results/published.csv where it has them.

    DomainBed's hparams decide a backbone "auto" (or absent): `resnet50_augmix` wins over `resnet18`. Records
    from before it had `freeze_bn` were always made with batch norm frozen.
    """
    hparams = run.hparams
    backbone: str = hparams.get("backbone", "auto")
    if backbone == "mnist_cnn_bn":
        return "MNIST_CNN (BatchNorm)"
    if backbone == "mnist_cnn" or (backbone == "auto" and _has_small_images(run)):
        return "MNIST_CNN"
    if backbone == "auto":
        chosen = [name for name in ("dinov2", "vit", "resnet50_augmix", "resnet18") if hparams.get(name)]
        backbone = chosen[0] if chosen else "resnet50"
    if backbone in ("dinov2", "vit"):
        return backbone
    details = []
    # The names tell ImageNet weights apart; with others they would claim what is not so.
    pretrained = hparams.get("weights", "imagenet") == "imagenet"
    if backbone == "resnet50_augmix":
        backbone = "resnet50"
        details += ["augmix"] if pretrained else []
    elif backbone == "resnet50":
        details += ["tv V1"] if pretrained else []
    if hparams.get("freeze_bn", "resnet50_augmix" not in hparams):
        details.append("frozen BN")
    return f"{backbone} ({', '.join(details)})" if details else backbone


def weights_of(run: Run) -> str:
    """What training began from: "imagenet", "none", or the name of a file."""
    chosen = str(run.hparams.get("weights", "imagenet"))
    weights = PurePath(chosen).name
    if weights != chosen and weights in ("imagenet", "none"):
        return f"file {weights}"
    # There are none of ImageNet for it: unless a file is named, it begins at random.
    return "none" if weights == "imagenet" and backbone_of(run).startswith("MNIST_CNN") else weights


def _has_small_images(run: Run) -> bool:
    if "input_shape" in run.facts:
        shape: list[int] = run.facts["input_shape"]
        return max(shape[1:]) <= _SMALL_SIDE
    return run.dataset in MNIST_LIKE


def _short(commit: str) -> str:
    """Twelve digits are enough to name a commit; `+changes`, which says that it is not all, stays."""
    digits, plus, rest = commit.partition("+")
    return digits[:12] + plus + rest


def shown_value(value: object) -> str:
    """A condition as readers see it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "unknown" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _sorted(values: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(set(values)))
