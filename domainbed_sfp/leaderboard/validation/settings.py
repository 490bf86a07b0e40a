"""The settings of a run: arguments, hparams, and the fields of records that follow from them."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from typing import Any

from domainbed_sfp.algorithms import registry
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.core.seeds import seed_hash
from domainbed_sfp.leaderboard.bundle import layout as layout
from domainbed_sfp.leaderboard.bundle.places import WEIGHTS, without_places
from domainbed_sfp.leaderboard.documents.parsing import parse
from domainbed_sfp.leaderboard.documents.problems import Problem, shown
from domainbed_sfp.leaderboard.summary import BundleRun
from domainbed_sfp.leaderboard.validation.context import Bundle, records_of
from domainbed_sfp.leaderboard.validation.networks import Expected, Refused, TooLarge, key_of
from domainbed_sfp.runs.settings import RunSettings, check_settings, known_settings
from domainbed_sfp.training import hparams


def check_arguments(bundle: Bundle, run: BundleRun) -> Iterator[Problem]:
    """The seed is DomainBed's hash of what the run is, and `train` takes the arguments."""
    args = run.run.args
    seed = seed_hash(args["dataset"], args["algorithm"], args["test_envs"], args["hparams_seed"], args["trial_seed"])
    if args["seed"] != seed:
        formula = "seed_hash(dataset, algorithm, test_envs, hparams_seed, trial_seed)"
        yield Problem(records_of(run), "line 1.args.seed", f"{seed}, which is {formula}", shown(args["seed"]))
    try:
        check_settings(RunSettings(**known_settings(args)))
    except UserError as error:
        yield Problem(records_of(run), "line 1.args", "settings that `train` takes", str(error))


def check_hparams(bundle: Bundle, run: BundleRun) -> Iterator[Problem]:
    """The hparams are the draw of the run's seeds under the overrides that it declares, and a network can be built by
    them. What that says of the records is kept in `bundle.expected`."""
    file, args = records_of(run), run.run.args
    try:
        overrides = _overrides(args["hparams"])
    except ValueError as error:
        bundle.unfit.add(run.name)
        yield Problem(file, "line 1.args.hparams", "a JSON object as text", f"{shown(args['hparams'])} ({error})")
        return
    yield from _places(file, overrides, run.run.hparams)
    try:
        info = registry.get(args["algorithm"])
    except UserError as error:
        bundle.cannot(f"hparams, masks and costs of {args['algorithm']}: {error}; install the package that has it")
        return
    try:
        own = info.current(run.run.hparams)
    except UserError as error:
        bundle.cannot(f"hparams, masks and costs of {args['algorithm']}: {error}")
        return
    try:
        drawn = hparams.resolve_hparams(
            args["algorithm"], args["dataset"], args["hparams_seed"], args["trial_seed"], overrides
        )
    except Exception as error:  # values from a stranger can be anything
        bundle.unfit.add(run.name)
        yield Problem(file, "line 1.args.hparams", _in_ranges(run), str(error))
        return
    # Of an hparam that did not exist yet, what runs did then, whatever the default is now.
    drawn.update({name: own[name] for name in own.keys() - run.run.hparams.keys() - overrides.keys()})
    differing = list(_differing(bundle, run, drawn, own, overrides))
    yield from differing
    if not differing:
        yield from _expect(bundle, run)


def check_fields(bundle: Bundle, run: BundleRun) -> Iterator[Problem]:
    """The fields of records that follow from arguments, hparams and the algorithm's registration."""
    first, file, expected = run.records[0], records_of(run), bundle.expected.get(run.name)
    granularity, said_by = run.run.hparams.get("granularity"), "as in hparams"
    if granularity is None and run.run.algorithm in registry.names():
        granularity, said_by = getattr(registry.get(run.run.algorithm).cls, "granularity", None), "as of the method"
    if first.get("granularity") != granularity:
        words = "no such field" if granularity is None else f"{shown(granularity)}, {said_by}"
        yield Problem(file, "line 1.granularity", words, shown(first.get("granularity")))
    if (asked := run.run.args["precision"]) not in ("auto", first["precision"]):
        yield Problem(file, "line 1.precision", f"{shown(asked)}, as in args", shown(first["precision"]))
    if expected and first.get("decisions", expected.decisions) != expected.decisions:
        words = f"{shown(expected.decisions)}, as {run.run.algorithm} decides it"
        yield Problem(file, "line 1.decisions", words, shown(first["decisions"]))
    yield from _devices(run)
    weights = run.run.hparams.get("weights")
    if "weights_digest" in first and weights in WEIGHTS:
        words = f"no such field with weights {weights}"
        yield Problem(file, "line 1.weights_digest", words, shown(first["weights_digest"]))
    if run.run.algorithm in registry.names():
        standing = registry.get(run.run.algorithm).standing
        if first["standing"] != standing:
            yield Problem(file, "line 1.standing", f"{shown(standing)}, as registered", shown(first["standing"]))
    if expected and (expected.code is None) != ("code" not in first):
        words = (
            f"no such field: {run.run.algorithm} is this project's own"
            if expected.code is None
            else f"the hash of the package that has {run.run.algorithm}"
        )
        yield Problem(file, "line 1.code", words, shown(first.get("code")) if "code" in first else "nothing")


def _devices(run: BundleRun) -> Iterator[Problem]:
    """A record says of its machine what it was asked for; "auto" asks for nothing."""
    for number, record in enumerate(run.records, start=1):
        asked, found = record["args"]["device"], record["environment"].get("device")
        if found is not None and asked != "auto" and (asked == "cpu") != (found == "cpu"):
            words = f"{'cpu' if asked == 'cpu' else 'the name of a GPU'}, as in args.device"
            yield Problem(records_of(run), f"line {number}.environment.device", words, shown(found))
            return


def _overrides(text: str | None) -> dict[str, Any]:
    overrides = parse((text or "{}").encode())
    if not isinstance(overrides, dict):
        raise ValueError("it is no object")
    return overrides


def _places(file: str, overrides: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[Problem]:
    """Paths of a machine among hparams."""
    for where, values in (("args.hparams", overrides), ("hparams", own)):
        for name, plain in without_places(values).items():
            if plain != values[name]:
                words = f"{shown(plain)}, no path of a machine"
                yield Problem(file, f"line 1.{where}.{name}", words, shown(values[name]))


def _in_ranges(run: BundleRun) -> str:
    return f"hparams of {run.run.algorithm}, in their ranges"


def _differing(
    bundle: Bundle,
    run: BundleRun,
    drawn: Mapping[str, Any],
    own: Mapping[str, Any],
    overrides: Mapping[str, Any],
) -> Iterator[Problem]:
    args = run.run.args
    seeds = f"the draw of hparams_seed {args['hparams_seed']} and trial_seed {args['trial_seed']}"
    for name in sorted({*drawn, *own}):
        there, found = drawn.get(name), own.get(name)
        # 64.0 is no batch size, and neither is true.
        if there != found or type(there) is not type(found):
            source = "args.hparams" if name in overrides else seeds
            expected = f"{shown(there)}, {source}" if name in drawn else "no such hparam"
            told = "nothing" if found is None else shown(found)
            yield Problem(records_of(run), f"line 1.hparams.{name}", expected, told)
            if _kind(there) != _kind(found):
                bundle.unfit.add(run.name)


def _kind(value: Any) -> type:
    """Of an hparam: whole numbers count as numbers."""
    return float if type(value) is int else type(value)


def _expect(bundle: Bundle, run: BundleRun) -> Iterator[Problem]:
    """Builds the run's network, or finds one of the same settings among the earlier ones."""
    key = key_of(run)
    if key not in bundle.by_settings:
        bundle.by_settings[key] = yield from _expectation(bundle, run)
    if (expected := bundle.by_settings[key]) is not None:
        bundle.expected[run.name] = expected


def _expectation(bundle: Bundle, run: BundleRun) -> Generator[Problem, None, Expected | None]:
    try:
        return bundle.network_of(run).expected()
    except TooLarge as error:
        words = f"a network of at most {layout.MOST_PARAMETERS:,} parameters"
        yield Problem(records_of(run), "line 1.hparams.backbone", words, str(error))
    except Refused as error:
        bundle.unfit.add(run.name)
        yield Problem(records_of(run), "line 1.args.hparams", _in_ranges(run), str(error))
    except Exception as error:  # an optional package that is not here, or what a stranger's class raises
        reason = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        bundle.cannot(f"masks and costs of {run.run.algorithm}: its network cannot be built here ({reason})")
    return None
