"""`domainbed-sfp new` and `domainbed-sfp check`: from an idea to an installed algorithm, and what is wrong with it."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch

from domainbed_sfp.algorithms import registry
from domainbed_sfp.algorithms.base import Algorithm
from domainbed_sfp.algorithms.objectives.erm import ERM
from domainbed_sfp.algorithms.pruning.magnitude import Magnitude
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.hparam import Hparam
from domainbed_sfp.deploy import shrink
from domainbed_sfp.plugins import contract, remedies
from domainbed_sfp.training import hparams


class Lazy(ERM):
    def update(self, minibatches, unlabeled=None):
        return {"loss": 1.0}


class Companionable(ERM):
    """A sample's logits depend on the others of its batch."""

    def predict(self, x):
        return super().predict(x) - super().predict(x).mean(0)


class Shared(ERM):
    """Keeps its learning rate on the class."""

    calls = 0

    def update(self, minibatches, unlabeled=None):
        type(self).calls += 1
        self.optimizer.param_groups[0]["lr"] = 1e-3 / (1 + type(self).calls % 7)
        return super().update(minibatches, unlabeled)


class Forgetful(ERM):
    calls = 0

    def update(self, minibatches, unlabeled=None):
        self.calls += 1
        self.optimizer.param_groups[0]["lr"] = 1e-3 / self.calls
        return super().update(minibatches, unlabeled)


class Uncopyable(ERM):
    def __deepcopy__(self, memo):
        raise TypeError("no copies of me")


class Unseeded(ERM):
    def update(self, minibatches, unlabeled=None):
        values = super().update(minibatches, unlabeled)
        noise = torch.Generator()
        noise.seed()
        with torch.no_grad():
            self.classifier.bias.add_(1e-3 * torch.randn(self.classifier.bias.shape, generator=noise))
        return values


class Fragile(ERM):
    def update(self, minibatches, unlabeled=None):
        spread = torch.cat([y for _, y in minibatches]).float()
        return {**super().update(minibatches, unlabeled), "ratio": 1.0 / spread.std().item()}


class Unmasked(Magnitude):
    def update(self, minibatches, unlabeled=None):
        values = super().update(minibatches, unlabeled)
        with torch.no_grad():
            self.featurizer.conv2.weight.add_(1e-3)
        return values


class Boasting(Magnitude):
    """Says the sparsity it was asked for, whatever its masks are."""

    def masks(self):
        return {name: torch.ones_like(mask) for name, mask in super().masks().items()}


class Overclaiming(Magnitude):
    """Calls channels dead that later layers still read, so that they cannot be taken out."""

    def masks(self):
        return {name: mask for name, mask in super().masks().items() if name != "classifier.weight"}


class Premature(Magnitude):
    """Calls every checkpoint final."""

    def at_final_compression(self):
        return True


class Foretelling(ERM):
    """Says that compression is final later than it is."""

    def final_step(self):
        return 5


class Late(Magnitude):
    """Learns from what the loop evaluates on, once it prunes."""

    def predict(self, x):
        if not self.training and self.sparsity() > 0:
            with torch.no_grad():
                self.classifier.bias.add_(x.mean())
        return super().predict(x)


class Undefined(Magnitude):
    def score(self, minibatches):
        return {name: value * math.nan for name, value in super().score(minibatches).items()}


class Nameless(Magnitude):
    def score(self, minibatches):
        return {f"{name}x": value for name, value in super().score(minibatches).items()}


class Attached(ERM):
    def export(self):
        return self.network.eval()


class Peeking(ERM):
    """Learns from what the loop evaluates on."""

    def predict(self, x):
        if not self.training:
            with torch.no_grad():
                self.classifier.bias.add_(x.mean().nan_to_num())
        return super().predict(x)


BROKEN = [
    ("updates_lower_the_loss", Lazy, {}, "cross-entropy"),
    ("predict_gives_logits", Companionable, {}, "depend on its companions"),
    ("hparams_are_json", ERM, {"pair": Hparam((1, 2))}, "change in JSON"),
    ("deepcopy", Shared, {}, "part ways"),
    ("exact_resume", Forgetful, {}, "continued from step"),
    ("deterministic", Unseeded, {}, "same seed"),
    ("degenerate_batches", Fragile, {}, "ZeroDivisionError"),
    ("masks", Unmasked, {}, "dead weights that are not zero"),
    ("masks", Foretelling, {}, "final_step() says that compression is final from step 5 on"),
    ("masks", Boasting, {}, "sparsity() claims 0.5000, the masks remove 0.0000 of each channel"),
    ("export", Attached, {}, "shares parameters"),
    ("export", Overclaiming, {}, "masked weights of dead channels cannot be taken out"),
    ("never_touches_the_test_environment", Peeking, {}, "poisoned test environment"),
    ("never_touches_the_test_environment", Late, {}, "poisoned test environment"),
    ("masks", Premature, {}, "at_final_compression() was true at sparsity 0.000"),
]


@pytest.fixture
def broken(monkeypatch):
    """Puts a class into the registry as the algorithm Broken, and only one check into the contract."""

    def install(cls, hparams, check):
        parent = registry.get("Magnitude" if issubclass(cls, Magnitude) else "ERM")
        offered = {name: hparam for name, hparam in parent.hparams.items() if name != "granularity"}
        info = registry.AlgorithmInfo("Broken", cls, "pruning", "here", "published", {**offered, **hparams})
        monkeypatch.setitem(registry.ALGORITHMS.entries, "Broken", info)
        monkeypatch.setattr(contract, "CHECKS", {check: contract.CHECKS[check]})

    return install


@pytest.mark.parametrize("check, cls, hparams, words", BROKEN, ids=[f"{case[0]}-{case[1].__name__}" for case in BROKEN])
def test_every_check_finds_what_it_is_for(main, broken, check, cls, hparams, words):
    if cls is Overclaiming and not shrink.is_available():
        pytest.skip("torch-pruning is not installed")
    broken(cls, hparams, check)
    done = main("check", "Broken", check=False)
    assert done.returncode == 1
    assert f"FAILED  {check}" in done.stdout and words in done.stdout
    mend = "mend what raises it first" if cls is Fragile else remedies.MENDS[check]
    assert f"how to mend it: {mend}" in done.stdout
    assert "0 of 1 checks passed, 1 failed." in done.stdout


@pytest.mark.parametrize(
    "check, cls, words", [("deepcopy", Uncopyable, "no copies of me"), ("exact_resume", Forgetful, "continued")]
)
def test_runs_that_checks_share_are_no_reason_to_fail(main, broken, monkeypatch, check, cls, words):
    """What cannot be copied, or continued, is told by the check that is about it alone."""
    names = ("updates_lower_the_loss", "deepcopy", "exact_resume", "deterministic")
    checks = {name: contract.CHECKS[name] for name in names}
    broken(cls, {}, check)
    monkeypatch.setattr(contract, "CHECKS", checks)
    done = main("check", "Broken", check=False).stdout
    assert f"FAILED  {check}" in done and words in done and "3 of 4 checks passed, 1 failed." in done


@pytest.mark.parametrize(
    "cls, words",
    [
        (Undefined, "score() of Undefined is not a number for 64 of 64 units of"),
        (
            Nameless,
            "gives none for 'featurizer.conv1' and one for 'featurizer.conv1x'; did you mean 'featurizer.conv1'?",
        ),
    ],
)
def test_scores_that_are_none_are_told(cls, words):
    algorithm = cls((3, 8, 8), 4, 3, registry_hparams("Magnitude"))
    algorithm.total_steps = contract.STEPS
    with pytest.raises(UserError) as told:
        contract.run(algorithm, 0, contract.STEPS)
    assert words in str(told.value)


@pytest.fixture
def few_checks(monkeypatch):
    """The contract without the checks that train for long."""
    checks = {name: contract.CHECKS[name] for name in ("masks", "export", "deepcopy")}
    return lambda: monkeypatch.setattr(contract, "CHECKS", checks)


def test_an_exception_is_told_once_and_where(main, broken, few_checks):
    broken(Typo, {}, "masks")
    few_checks()
    done = main("check", "Broken", check=False).stdout
    assert done.count("KeyError: 'learningrate'") == 1 and f"{__file__}, line " in done
    assert done.count("the same exception as in masks") == 2 and remedies.MENDS["export"] not in done
    assert "The exception of masks stopped 3 checks: masks, export, deepcopy.\n" in done
    assert done.count("how to mend it: mend what raises it first") == done.count("how to mend it") == 1


@pytest.mark.parametrize(
    "cls, words", [("Counting", "ValueError: step 0 of 2"), ("Asserting", "AssertionError: 3 domains")]
)
def test_an_exception_is_told_once_over_all_granularities(main, broken, few_checks, cls, words):
    """Whatever numbers are in it, and an assertion of the algorithm's own among them."""
    broken(globals()[cls], {"granularity": registry.get("Magnitude").hparams["granularity"]}, "masks")
    few_checks()
    done = main("check", "Broken", check=False).stdout
    assert done.count(words.split(":")[0]) == 1 and words in done and f"{__file__}, line " in done
    assert done.count("the same exception as in masks") == 5 and not any(
        mend in done for mend in remedies.MENDS.values()
    )
    both = ", ".join(f"{check}{variant}" for variant in ("", " with granularity weight") for check in contract.CHECKS)
    assert f"The exception of masks stopped 6 checks: {both}.\n" in done
    report = json.loads(main("check", "Broken", "--json", check=False).stdout)["checks"]
    assert [check["problem"].count("the same exception as in masks") for check in report] == [0, 1, 1, 1, 1, 1]
    assert [check["mend"] is None for check in report] == [False, True, True, True, True, True]


class Counting(Magnitude):
    """Says something else each time."""

    calls = 0

    def update(self, minibatches, unlabeled=None):
        type(self).calls += 1
        raise ValueError(f"step {type(self).calls - 1} of 2")


class Asserting(Magnitude):
    def update(self, minibatches, unlabeled=None):
        assert len(minibatches) == 2, f"{len(minibatches)} domains"
        return super().update(minibatches, unlabeled)


class Typo(ERM):
    def update(self, minibatches, unlabeled=None):
        return {"loss": self.hparams["learningrate"]}


def registry_hparams(name):
    return hparams.resolve_hparams(name, "FullColoredDigits")


class Bare(Algorithm):
    """No more than DomainBed asks for."""

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.layer = torch.nn.Linear(math.prod(input_shape), num_classes)
        self.optimizer = torch.optim.SGD(self.layer.parameters(), lr=0.1)

    def update(self, minibatches, unlabeled=None):
        loss = torch.stack([torch.nn.functional.cross_entropy(self.predict(x), y) for x, y in minibatches]).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.item()}

    def predict(self, x):
        return self.layer(x.flatten(1))


class Misspelt(Magnitude):
    def score(self, minibatches):
        return {"featurizer.conv1": dict(self.named_parameters())["featurizer.conv1.wieght"]}


def test_the_nearest_name_of_a_parameter_is_told(main, broken):
    broken(Misspelt, {}, "masks")
    done = main("check", "Broken", check=False).stdout
    assert "KeyError: 'featurizer.conv1.wieght'; did you mean 'featurizer.conv1.weight'?" in done


METHOD = """
import torch
import domainbed_sfp as dsfp


def spread(group, parameters):
    return parameters[group.filters[0]].flatten(1).std(1, unbiased=False)


@dsfp.register("Spread", family="pruning", reference="here", hparams=dsfp.PRUNING_HPARAMS)
class Spread(dsfp.ScheduledPruning):
    channel_score = staticmethod(spread)
    weight_score = staticmethod(torch.abs)


@dsfp.register("Activation", family="pruning", reference="here", hparams=dsfp.CHANNEL_HPARAMS)
class Activation(dsfp.ScheduledPruning):
    def score(self, minibatches):
        self.predict(torch.cat([x for x, _ in minibatches]))
        return {group.name: torch.rand(group.channels) for group in self.groups}
"""


@pytest.fixture
def method_file(tmp_path):
    """A file of two methods, forgotten afterwards."""
    (tmp_path / "method.py").write_text(METHOD)
    registry.names()
    yield tmp_path / "method.py"
    for name in ("Spread", "Activation"):
        registry.ALGORITHMS.entries.pop(name, None)
        registry.ALGORITHMS._origins.pop(name, None)
    sys.modules.pop("method", None)


def test_a_file_is_checked_at_both_granularities_and_with_warnings(main, method_file, monkeypatch):
    monkeypatch.setattr(contract, "CHECKS", {"masks": contract.CHECKS["masks"]})
    done = main("check", method_file).stdout
    assert "with granularity weight:" in done and "2 of 2 checks passed: Spread keeps the contract." in done
    assert "1 of 1 checks passed: Activation keeps the contract." in done
    (warning,) = [line for line in done.splitlines() if line.startswith("warning")]
    assert "score() moves BatchNorm's statistics (featurizer.bn0.running_mean)" in warning


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "registers no algorithm"),
        ("import a_module_that_is_missing", "ModuleNotFoundError"),
        (None, "there is no file"),
    ],
)
def test_a_file_that_is_none(main, tmp_path, text, words):
    if text is not None:
        (tmp_path / "empty_method.py").write_text(text)
    done = main("check", tmp_path / "empty_method.py", check=False)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_method_without_a_score_for_what_it_offers_is_told():
    class Half(Magnitude):
        weight_score = None

    values = hparams.resolve_hparams("Magnitude", "FullColoredDigits", overrides={"granularity": "weight"})
    algorithm = Half((3, 8, 8), 4, 3, values)
    with pytest.raises(UserError, match=r"Half has no score for granularity 'weight'.*CHANNEL_HPARAMS"):
        algorithm.score([])


def test_an_algorithm_without_export_trains_and_has_a_table(main, broken, tmp_path):
    broken(Bare, {}, "export")
    main("train", "--algorithm", "Broken", "--dataset", "FullColoredDigits", "--steps", 2, "--output_dir", "sweep/run")
    record = json.loads((tmp_path / "sweep" / "run" / "results.jsonl").read_text().splitlines()[-1])
    assert record["exported_bytes"] is None and record["parameters"] > 0
    assert "Broken" in main("collect", "--input_dir", "sweep", "--selection", "training-domain").stdout
    refused = main("export", "sweep/run", "--output", "net", check=False)
    assert refused.returncode == 2 and "algorithm Broken defines no export()" in refused.stderr


def test_every_check_is_broken_by_someone_and_says_what_it_does_and_how_to_mend():
    assert {case[0] for case in BROKEN} == set(contract.CHECKS) == set(remedies.MENDS)
    assert all((check.__doc__ or "").strip() for check in contract.CHECKS.values())


def test_a_report_for_programs(main, broken):
    broken(ERM, {}, "hparams_are_json")
    report = json.loads(main("check", "Broken", "--json").stdout)
    (check,) = report["checks"]
    assert report["algorithm"] == "Broken" and report["passed"] is True
    assert check["check"] == "hparams_are_json" and check["passed"] is True and check["problem"] is None
    assert check["did"] == "Default and random hparams survive JSON, as records need."
    broken(Lazy, {}, "hparams_are_json")
    assert "1 of 1 checks passed: Broken keeps the contract." in main("check", "Broken").stdout
    done = main("check", "Brokn", check=False)
    assert done.returncode == 2 and "did you mean 'Broken'" in done.stderr and "installed package" in done.stderr
