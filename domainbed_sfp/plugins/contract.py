"""What every algorithm must do, as checks that any registered one can be put through.

The tests run them over the whole registry, algorithms of other packages included; each check raises AssertionError
with what was expected and what happened.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from domainbed_sfp.algorithms import registry
from domainbed_sfp.algorithms.base import Algorithm, final_step_of
from domainbed_sfp.core.errors import did_you_mean
from domainbed_sfp.core.seeds import seed_everything, seed_hash
from domainbed_sfp.data.loaders import Minibatch
from domainbed_sfp.deploy import shrink
from domainbed_sfp.plugins import poisoned_runs
from domainbed_sfp.plugins.easy_batches import BATCH, CLASSES, DOMAINS, INPUT_SHAPE, minibatches
from domainbed_sfp.pruning import costs
from domainbed_sfp.runs import checkpoints, records
from domainbed_sfp.training import hparams

STEPS = 16

# Hparams under which the checks look at an algorithm, beside its defaults.
_variant: ContextVar[Mapping[str, Any]] = ContextVar("variant", default=MappingProxyType({}))


@contextlib.contextmanager
def variant(**overrides: Any) -> Iterator[None]:
    """While it lasts, the checks look at algorithms with these hparams."""
    token = _variant.set(overrides)
    try:
        yield
    finally:
        _variant.reset(token)


def make(name: str, total_steps: int = STEPS, overrides: Mapping[str, Any] | None = None) -> Algorithm:
    """A small instance of algorithm `name` for 8 x 8 images, freshly initialised from seed 0."""
    values = hparams.resolve_hparams(name, "FullColoredDigits", overrides={**_variant.get(), **(overrides or {})})
    seed_everything(0)
    algorithm: Algorithm = registry.get(name).make(INPUT_SHAPE, CLASSES, DOMAINS, values)
    algorithm.total_steps = total_steps
    return algorithm


def run(algorithm: Algorithm, first: int, last: int) -> list[dict[str, float]]:
    """Updates `first` .. `last` - 1, each seeded as the training loop seeds it."""
    logged = []
    for step in range(first, last):
        batches = minibatches(step)
        seed_everything(seed_hash(0, "step", step))
        logged.append(algorithm.update(batches))
    return logged


@dataclass(frozen=True)
class WholeRun:
    """An algorithm after all its updates, to be left as it is; what they logged, (final, sparsity) behind each of them,
    its tensors right after them, and a copy of it from their middle, or what copying raised."""

    algorithm: Algorithm
    logged: list[dict[str, float]]
    compression: list[tuple[bool, float]]
    tensors: dict[str, Tensor]
    twin: Algorithm | Exception


def whole_run(name: str) -> WholeRun:
    """Several checks look at the same run: it is computed once for all that ask in turn."""
    return _whole_run(*_asked(name))


def _asked(name: str) -> tuple[Any, ...]:
    """What decides a run of an algorithm as the checks look at it now."""
    return registry.get(name).cls, name, make, tuple(sorted(_variant.get().items()))


@functools.lru_cache(maxsize=1)
def _whole_run(cls: type[Algorithm], name: str, make: Callable[[str], Algorithm], variant: Any) -> WholeRun:
    algorithm = make(name)
    logged, compression = [], []
    twin: Algorithm | Exception
    for step in range(STEPS):
        if step == STEPS // 2:
            try:
                twin = copy.deepcopy(algorithm)
            except Exception as error:  # told by the check that is about copies
                twin = error
        logged += run(algorithm, step, step + 1)
        compression.append((algorithm.at_final_compression(), algorithm.sparsity()))
    return WholeRun(algorithm, logged, compression, _cloned(algorithm), twin)


# Steps at which the run in parts is saved, and continued in a new object.
STOPS = (STEPS // 3, STEPS - 2)


@functools.lru_cache(maxsize=1)
def _run_in_parts(
    cls: type[Algorithm], name: str, make: Callable[[str], Algorithm], variant: Any
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """A second run, interrupted on the way: what it logs, and its tensors in the end."""
    seed_everything(12_345)
    algorithm, begin = make(name), 0
    logged: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.safetensors"
        for stop in STOPS:
            logged += run(algorithm, begin, stop)
            checkpoints.save_checkpoint(path, algorithm, {"step": stop})
            algorithm, begin = make(name), stop
            assert checkpoints.load_checkpoint(path, algorithm) == {"step": stop}
    logged += run(algorithm, begin, STEPS)
    return logged, _tensors(algorithm)


def check_updates_lower_the_loss(name: str) -> None:
    """Training on easy data brings the cross-entropy on fresh data clearly down."""
    before = _risk(make(name))
    trained = whole_run(name)
    logged = trained.logged
    after = _risk(trained.algorithm)
    assert after < 0.8 * before, f"cross-entropy {before:.3f} before, {after:.3f} after {STEPS} updates"
    for values in logged:
        assert "loss" in values, f"update returns {sorted(values)}, without 'loss'"
        assert all(isinstance(v, (int, float)) and math.isfinite(v) for v in values.values()), f"not numbers: {values}"


def check_predict_gives_logits(name: str) -> None:
    """One finite row of logits per image, whatever the batch size; prediction changes nothing."""
    algorithm = make(name)
    run(algorithm, 0, 2)
    algorithm.eval()
    before = _cloned(algorithm)
    x = torch.cat([x for x, _ in minibatches(99)])
    with torch.no_grad():
        logits = algorithm.predict(x)
        single = algorithm.predict(x[:1])
    assert logits.shape == (len(x), CLASSES) and single.shape == (1, CLASSES), f"{logits.shape}, {single.shape}"
    assert torch.isfinite(logits).all(), "logits are not finite"
    assert torch.allclose(logits[:1], single, atol=1e-4), "a sample's logits depend on its companions"
    for key, value in _tensors(algorithm).items():
        assert torch.equal(value, before[key]), f"predict changes {key}"


def check_hparams_are_json(name: str) -> None:
    """Default and random hparams survive JSON, as records need."""
    for seed in range(20):
        values = hparams.resolve_hparams(name, "FullColoredDigits", seed, 0)
        assert json.loads(json.dumps(values)) == values, f"hparams of seed {seed} change in JSON: {values}"


def check_deepcopy(name: str) -> None:
    """A copy taken in the middle of training goes on alone, exactly as the original does."""
    whole = whole_run(name)
    if isinstance(whole.twin, Exception):
        raise whole.twin
    logged = run(copy.deepcopy(whole.twin), STEPS // 2, STEPS)
    for key, value in _tensors(whole.algorithm).items():
        assert torch.equal(value, whole.tensors[key]), f"training the copy changes the original's {key}"
    assert logged == whole.logged[STEPS // 2 :], "copy and original part ways"


def check_exact_resume(name: str) -> None:
    """Saved at any of several steps and continued in a new object, training ends bit-identical."""
    whole = whole_run(name)
    logged, tensors = _run_in_parts(*_asked(name))
    for begin, end in itertools.pairwise((0, *STOPS, STEPS)):
        assert logged[begin:end] == whole.logged[begin:end], f"continued from step {begin}, the logged numbers differ"
    _assert_same(tensors, whole.tensors, f"continued from step {STOPS[-1]}")


def check_deterministic(name: str) -> None:
    """Made and trained twice from one seed, with other use of the generators in between, it ends bit-identical."""
    first = whole_run(name)
    with contextlib.suppress(Exception):  # it cannot be continued, which is told elsewhere
        logged, tensors = _run_in_parts(*_asked(name))
        _assert_same(tensors, first.tensors, "in a second run")
        if logged == first.logged:
            return  # this was a second run
    # One without interruptions tells whether they are to blame.
    seed_everything(12_345)
    second = make(name)
    assert run(second, 0, STEPS) == first.logged, (
        "with the same seed, the logged numbers differ from one run to the next"
    )
    _assert_same(_tensors(second), first.tensors, "in a second run with the same seed")


def check_degenerate_batches(name: str) -> None:
    """One class only, one sample only, constant images: everything stays finite."""
    x, y = torch.zeros(BATCH, *INPUT_SHAPE), torch.zeros(BATCH, dtype=torch.long)
    aligned = torch.ones(BATCH, dtype=torch.bool)
    for title, count in (("one class and constant images", BATCH), ("one sample", 1)):
        algorithm = make(name)
        for _ in range(3):
            values = algorithm.update([Minibatch(x[:count], y[:count], aligned[:count]) for _ in range(DOMAINS)])
            assert all(math.isfinite(v) for v in values.values()), f"{title}: {values}"
        for key, value in _tensors(algorithm).items():
            assert not value.is_floating_point() or torch.isfinite(value).all(), f"{title}: {key} is not finite"


def check_masks(name: str) -> None:
    """Masks are bool, shaped as their parameters; dead weights are zero; the sparsity claimed is what they remove; the
    run ends at its final compression and, for an algorithm that has the hparam, at the sparsity asked for. Once it says
    that its compression is final, the sparsity stays; where `final_step` says from which step on, so it is."""
    whole = whole_run(name)
    declared = final_step_of(whole.algorithm)
    final: float | None = None
    for step, (is_final, now) in enumerate(whole.compression):
        assert declared is None or (step >= declared) == is_final, (
            f"final_step() says that compression is final from step {declared} on, at_final_compression() was "
            f"{is_final} after step {step}"
        )
        if is_final:
            final = now if final is None else final
            assert abs(now - final) < 1e-6, (
                f"at_final_compression() was true at sparsity {final:.3f}, which is {now:.3f} at step {step}: "
                "checkpoints of both would be candidates for selection"
            )
        else:
            assert final is None, f"at_final_compression() was true, and is false at step {step}"
    algorithm = whole.algorithm
    parameters = dict(algorithm.named_parameters())
    for key, mask in algorithm.masks().items():
        assert key in parameters, f"mask of unknown parameter {key!r}{did_you_mean(key, parameters)}"
        assert mask.dtype == torch.bool and mask.shape == parameters[key].shape, (
            f"{key}: {mask.dtype} {tuple(mask.shape)}"
        )
        assert not parameters[key][~mask].any(), f"{key} has dead weights that are not zero"
        assert mask.any(), f"{key} is wiped out"
    claimed, removed = algorithm.sparsity(), costs.sparsities_of(algorithm, algorithm.masks()) or {"weight": 0.0}
    counts = ", ".join(f"{value:.4f} of each {unit}" for unit, value in removed.items())
    assert any(abs(claimed - value) < 1e-6 for value in removed.values()), (
        f"sparsity() claims {claimed:.4f}, the masks remove {counts}"
    )
    assert algorithm.at_final_compression(), "the run ends before its final compression"
    target = algorithm.hparams.get("sparsity")
    if target is not None:
        assert abs(algorithm.sparsity() - target) < records.SPARSITY_ASKED, (
            f"sparsity {algorithm.sparsity():.3f}, asked for {target}"
        )


def check_export(name: str) -> None:
    """The exported network has the logits of predict, which are those of the masked weights, and shares nothing with
    the algorithm. Where channels are masked and torch-pruning is installed: so has the network without them, and it
    costs what the accounting says."""
    whole = whole_run(name)
    try:
        _check_export(whole.algorithm)
    finally:
        # Others look at it, too.
        with torch.no_grad():
            for key, value in _tensors(whole.algorithm).items():
                value.copy_(whole.tensors[key])
        whole.algorithm.train()


def _check_export(algorithm: Algorithm) -> None:
    algorithm.eval()
    exported = algorithm.export()
    x = torch.cat([x for x, _ in minibatches(99)])
    with torch.no_grad():
        expected = algorithm.predict(x)
        assert torch.allclose(exported(x), expected, atol=1e-4), "logits of the exported network differ"
    if algorithm.masks() and shrink.is_available():
        _check_surgery(algorithm, x, expected)
    with torch.no_grad():
        for key, mask in algorithm.masks().items():
            algorithm.get_parameter(key).mul_(mask)
        assert torch.allclose(exported(x), algorithm.predict(x), atol=1e-4), "logits of the masked weights differ"
        for parameter in algorithm.parameters():
            parameter.zero_()
        assert torch.allclose(exported(x), expected, atol=1e-4), "the exported network shares parameters"


def check_never_touches_the_test_environment(name: str) -> None:
    """With the test environment's images and labels replaced by rubbish, training runs on bit-identically, also behind
    evaluations in its midst. What an algorithm reads of the data set's files on its own is not seen here."""
    clean = poisoned_runs.final_record(name, _variant.get(), poisoned=False)
    try:
        poisoned = poisoned_runs.final_record(name, _variant.get(), poisoned=True)
    except Exception as error:
        raise AssertionError(f"training fails with a poisoned test environment, and not without: {error}") from error
    for key, value in clean.items():
        assert poisoned[key] == value, f"{key} is {poisoned[key]!r} with a poisoned test environment, {value!r} without"


def _check_surgery(algorithm: Algorithm, x: Tensor, expected: Tensor) -> None:
    masks = algorithm.masks()
    pruned, dead = shrink.remove_channels(algorithm.export(), masks, INPUT_SHAPE)
    with torch.no_grad():
        assert torch.allclose(pruned(x), expected, atol=1e-4), "logits differ once dead channels are taken out"
    positions = costs.count_positions(algorithm, INPUT_SHAPE, algorithm.predict)
    claimed = costs.measure_cost(algorithm.deployed_parameters(), positions, masks)
    # Masked single weights stay as zeros, which only the accounting leaves out.
    left = shrink.surviving_masks(masks, dead)
    found = costs.measure_cost(dict(pruned.named_parameters()), costs.count_positions(pruned, INPUT_SHAPE), left)
    names = ("surviving_parameters", "macs")
    told = [(getattr(claimed, key), getattr(found, key)) for key in names]
    assert all(one == other for one, other in told), f"{names}: claimed and found without dead channels {told}"
    if algorithm.granularity == "channel" and algorithm.sparsity():
        zeros = sum(int((~mask).sum()) for mask in left.values())
        assert dead and not zeros, f"{zeros} masked weights of dead channels cannot be taken out"


CHECKS: dict[str, Callable[[str], None]] = {
    check.__name__.removeprefix("check_"): check
    for check in (
        check_updates_lower_the_loss,
        check_predict_gives_logits,
        check_hparams_are_json,
        check_deepcopy,
        check_exact_resume,
        check_deterministic,
        check_degenerate_batches,
        check_masks,
        check_export,
        check_never_touches_the_test_environment,
    )
}


@torch.no_grad()
def _risk(algorithm: Algorithm) -> float:
    algorithm.eval()
    batches = minibatches(1_000)
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    risk = torch.nn.functional.cross_entropy(algorithm.predict(x), y).item()
    algorithm.train()
    return risk


def _tensors(algorithm: Algorithm) -> dict[str, Tensor]:
    return {key: value for key, value in algorithm.state_dict().items() if isinstance(value, Tensor)}


def _cloned(algorithm: Algorithm) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in _tensors(algorithm).items()}


def _assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], when: str) -> None:
    for key, value in found.items():
        assert torch.equal(value, expected[key]), f"{when}, {key} differs"
