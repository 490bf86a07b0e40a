"""Ways to a better row, and what validation says of them; honest bundles of every family pass."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from submission_bundles import (
    DATASET,
    FAMILIES,
    IN,
    Change,
    claims,
    each,
    fields,
    files,
    inside,
    make,
    masked,
    overrides,
    read,
    register_strangers,
    resubmitted,
    tampered,
    write,
)

from domainbed_sfp.algorithms import registry
from domainbed_sfp.leaderboard import names, validation

LAST, FIRST = slice(-1, None), slice(0, 1)
ONE = slice(0, 1)
RESULTS = f"datasets/{DATASET}/results"
PROTOCOL = f"datasets/{DATASET}/protocol"


@pytest.fixture(scope="module", autouse=True)
def _strangers():
    """Algorithms of a plug-in, for these tests alone."""
    with registry.ALGORITHMS.scope():
        register_strangers()
        yield


@pytest.fixture(scope="session")
def bundle_of(tmp_path_factory, worker_id):
    """The honest bundle of a family, made when it is first asked for, once for all of pytest's workers."""
    base = tmp_path_factory.getbasetemp()
    root = (base if worker_id == "master" else base.parent) / "families"
    root.mkdir(exist_ok=True)

    def of(family: str) -> Path:
        folder = root / family.replace(" ", "_")
        with FileLock(f"{folder}.lock"):
            return folder / "bundle" if (folder / "bundle").exists() else make(folder, family)

    return of


@pytest.mark.parametrize("family", FAMILIES)
def test_honest_bundles_pass(bundle_of, family):
    outcome = validation.validate(bundle_of(family))
    assert outcome.problems == [] and outcome.tier == "records-verified"
    assert outcome.submission["transductive"] == (family in ("adapted", "transductive"))


# What an honest but clumsy author may do --------------------------------------------------------------------------------


def rewritten(folder: Path) -> None:
    """Other spacing and another order of fields."""
    document = json.loads((folder / "submission.json").read_text())
    (folder / "submission.json").write_text(json.dumps(dict(reversed(document.items())), indent=7))
    for file in files(folder):
        lines = [json.dumps(dict(reversed(record.items())), separators=(",", ":")) for record in read(file)]
        file.write_text("".join(line + "\n" for line in lines))


HONEST = {
    "other spacing": ("grid", rewritten),
    "a metric that is not finite": ("dense", each(lambda record: record.update(penalty=None))),
    "a metric of its own": ("dense", fields(my_metric=-3, another=1.5)),
    "on other machines": ("grid", resubmitted(each(lambda r: r["environment"].update(cpu="other"), run=ONE))),
    "files of other names": ("channels", resubmitted(lambda folder: files(folder)[0].rename(folder / "records/x.jsonl"))),
    "no times": ("dense", fields(step_time=None, images_per_second=None, mem_gb=None)),
    "its algorithm's name and all settings": ("channels", claims("name", "Magnitude (sparsity=0.5, batch_size=16)")),
    "its protocol in its name": ("channels", claims("name", "Magnitude (steps=6, checkpoint_freq=2)")),
    "a name of its own": ("channels", claims("name", "Gradual shrinking (sparsity=0.5)")),
}  # fmt: skip


@pytest.mark.parametrize("kind", HONEST)
def test_what_an_honest_author_may_do(bundle_of, tmp_path, kind):
    family, change = HONEST[kind]
    outcome = validation.validate(tampered(bundle_of(family), tmp_path / "b", change))
    assert [problem.line() for problem in outcome.problems] == []


# Tampering: family, change, words of the field that is told, and of what is expected there ------------------------------

Table = dict[str, tuple[str, Change, str, str]]

TYPES: Table = {
    "accuracy 1": ("dense", fields(LAST, env0_in_acc=1), "env0_in_acc", "a number with a decimal point"),
    "accuracy true": ("dense", fields(LAST, env0_in_acc=True), "env0_in_acc", "a number with a decimal point"),
    "accuracy as text": ("dense", fields(LAST, env0_in_acc="0.9"), "env0_in_acc", "a number with a decimal point"),
    "accuracy in percent": ("dense", fields(LAST, env0_out_acc=97.5), "env0_out_acc", "at most 1"),
    "accuracy below 0": ("dense", fields(LAST, env1_in_acc=-0.5), "env1_in_acc", "at least 0"),
    "no accuracy": ("dense", fields(LAST, env2_in_acc=None), "env2_in_acc", "an accuracy"),
    "one environment more": ("dense", fields(env3_in_acc=0.5), "env3_in_acc", "no such field"),
    "sparsity 0": ("dense", fields(sparsity=0), "sparsity", "a number with a decimal point"),
    "epoch 0": ("dense", fields(FIRST, epoch=0), "epoch", "a number with a decimal point"),
    "step 5.0": ("dense", fields(LAST, step=5.0), "step", "a whole number"),
    "step true": ("dense", fields(slice(0, 1), step=True), "step", "a whole number"),
    "parameters 1.5": ("dense", fields(parameters=1.5), "parameters", "a whole number"),
    "macs below 0": ("dense", fields(macs=-1), "macs", "at least 0"),
    "a flag that is 1": ("dense", fields(final_compression=1), "final_compression", "true or false"),
    "batch size 16.0": ("dense", inside("hparams", batch_size=16.0), "hparams.batch_size", "16, args.hparams"),
    "batch size true": ("dense", inside("hparams", batch_size=True), "hparams.batch_size", "16, args.hparams"),
    "augmentation 1": ("dense", inside("hparams", data_augmentation=1), "hparams.data_augmentation", "true, the draw"),
    "image size 8.0": ("dense", inside("hparams", image_size=8.0), "hparams.image_size", "8, the draw"),
    "lr as text": ("dense", inside("hparams", lr="0.001"), "hparams.lr", "0.001, the draw"),
    "a list of lr": ("dense", inside("hparams", lr=[0.001]), "hparams.lr", "a number or text or true or false"),
    "hparam of 400 digits": ("dense", inside("hparams", batch_size=10**399), "line 1", "a JSON object"),
    "the same declared": ("dense", inside("args", hparams=f'{{"batch_size": {10**399}}}'), "args.hparams", "a JSON"),
    "macs of 400 digits": ("dense", fields(macs=10**399), "line 1", "a JSON object"),
    "a loss beyond all": ("dense", lambda f: _replace(f, '"loss": ', '"loss": 1e999, "x": '), "line 1", "a JSON object"),
    "wall time below 0": ("dense", fields(wall_time=-1.0), "wall_time", "at least 0"),
    "time that runs back": ("dense", fields(LAST, wall_time=0.0), "wall_time", "that of the line before"),
    "step time below 0": ("dense", fields(step_time=-1.0), "step_time", "at least 0"),
    "speed below 0": ("dense", fields(images_per_second=-1.0), "images_per_second", "at least 0"),
    "memory below 0": ("dense", fields(mem_gb=-1.0), "mem_gb", "at least 0"),
    "seed 0.0": ("dense", inside("args", trial_seed=0.0), "args.trial_seed", "a whole number"),
    "steps as text": ("dense", inside("args", steps="6"), "args.steps", "a whole number or null"),
    "environment true": ("dense", inside("args", test_envs=[True]), "args.test_envs[0]", "a whole number"),
    "an unknown argument": ("dense", inside("args", cheat=1), "args.cheat", "no such field"),
    "no arguments": ("dense", fields(args=None), "args", "a value"),
    "shape of floats": ("dense", fields(input_shape=[3, 8.0, 8]), "input_shape[1]", "a whole number"),
    "a metric that is a list": ("dense", fields(metric=[1]), "metric", "a number or null"),
    "a claim without its point": ("grid", claims(f"{RESULTS}/oracle/cells/0/std_err", 1), "std_err", "from the records"),
    "exported bytes 1.5": ("channels", fields(exported_bytes=1.5), "exported_bytes", "a whole number or null"),
    "bit operations as text": ("quantized", fields(bitops="1"), "bitops", "a number or null"),
}  # fmt: skip

FIELDS: Table = {
    "bf16 for fp32": ("dense", fields(precision="bf16"), "precision", '"fp32", as in args'),
    "another granularity": ("channels", fields(granularity="weight"), "granularity", '"channel", as in hparams'),
    "no granularity": ("channels", fields(granularity=None), "granularity", '"channel", as in hparams'),
    "granularity of what has none": ("dense", fields(granularity="channel"), "granularity", "no such field"),
    "code of its own": ("dense", fields(code="0123456789ab"), "code", "no such field: ERM is this project's own"),
    "a stranger without code": ("stranger", fields(code=None), "code", "the hash of the package that has FullBloom"),
    "weights without a file": ("dense", fields(weights_digest="0123456789ab"), "weights_digest", "no such field"),
    "a better standing": ("channels", fields(standing="reference"), "standing", '"published", as registered'),
    "other images": ("dense", fields(data_digest="mine"), "data_digest", "null"),
    "a GPU that was none": ("dense", inside("args", device="cuda:0"), "environment.device", "the name of a GPU, as in arg"),
    "smaller images": ("dense", fields(input_shape=[3, 4, 4]), "input_shape", "[3, 8, 8]"),
    "environments renamed": ("dense", fields(environments=["a", "b", "c"]), "environments", "95%"),
    "another epoch": ("dense", fields(LAST, epoch=7.0), "epoch", "0.1"),
    "a chosen seed": ("dense", inside("args", seed=7), "args.seed", "which is seed_hash("),
    "a learning rate not drawn": ("grid", inside("hparams", slice(1, 2), lr=0.005), "hparams.lr", "the draw of hparams"),
    "one overridden": ("grid", overrides(slice(1, 2), lr=0.005), "args.hparams", "as in records/"),
    "an unknown hparam": ("dense", overrides(cheat=1), "args.hparams", "hparams of ERM"),
    "an hparam out of range": ("channels", overrides(sparsity=1.5), "args.hparams", "hparams of Magnitude"),
    "an end before the start": ("channels", overrides(prune_start=0.9), "args.hparams", "hparams of Magnitude"),
    "nothing held out": ("dense", inside("args", holdout_fraction=0.0), "args.holdout_fraction", "more than 0"),
    "other splits": ("dense", inside("args", holdout_fraction=0.3), "env0_in_acc", "a multiple of 1/"),
    "adapted, said not to be": ("adapted", inside("args", task="domain_generalization"), "task", "domain_generalization"),
    "seen, said not to be": ("transductive", claims("transductive", False), "transductive", "true"),
    "an accuracy no split gives": ("dense", fields(LAST, env0_in_acc=0.5001), "env0_in_acc", f"a multiple of 1/{IN}"),
    "splits that lie apart": ("dense", fields(LAST, env0_in_acc=1.0, env0_out_acc=0.0), "env0_in_acc", "unseen samples"),
    "more left than there was": ("dense", fields(surviving_parameters=10**9), "surviving_parameters", "at most param"),
}  # fmt: skip

FINAL: Table = {
    "final from the beginning": ("channels", fields(final_compression=True), "final_compression", "from step 5 on"),
    "never final": ("channels", fields(final_compression=False), "final_compression", "true: Magnitude is at its final"),
    "final where the test is best": ("dense", fields(slice(1, 2), final_compression=False), "final_compression", "true:"),
    "borrowed masks": ("channels", lambda folder: _borrow(folder), "final_compression", "false: Magnitude is at"),
    "gates called final": ("gates", fields(final_compression=True), "final_compression", "false: SparseIRM"),
    "mask stage called final": ("MRM", fields(FIRST, final_compression=True), "final_compression", "false: MRM"),
    "bits called final": ("quantized", fields(final_compression=True), "final_compression", "false: UniformQuant"),
    "widths called final": ("learned widths", fields(FIRST, final_compression=True), "final_compression", "false: Static"),
    "exchange called final": ("EVIL", fields(FIRST, final_compression=True), "final_compression", "false: EVIL"),
    "final and not again": (
        "stranger", fields(slice(1, 2), final_compression=True, masks="0" * 64), "line 3.final_compression", "true: it was"
    ),
    "a stranger never final": ("stranger", fields(final_compression=False), "final_compression", "true in one record"),
    "bad checkpoints left out": ("final only", lambda f: write(files(f)[0], read(files(f)[0])[1:]), "line 1.step", "4 (every"),
    "masks before the end": ("channels", fields(FIRST, masks="0" * 64), "line 1.masks", "no such field before final"),
    "other masks at the end": ("before training", fields(LAST, masks="0" * 64), "masks", "as in line 1"),
    "thinner at the end": ("before training", fields(LAST, sparsity=0.6), "sparsity", "as in line 1"),
    "cheaper at the end": ("before training", fields(LAST, macs=10), "macs", "as in line 1"),
    "another network at the end": ("dense", fields(LAST, dense_macs=7, macs=7), "dense_macs", "as in line 1"),
}  # fmt: skip


def _borrow(folder: Path) -> None:
    """The dense network of step 0, accurate and with the masks of the last step."""
    for file in files(folder):
        records = read(file)
        for record in records:
            taken = ("masks", "sparsity", "macs", "surviving_parameters", "final_compression", "exported_bytes")
            record.update({name: records[-1][name] for name in taken})
        write(file, records)


def _dead(masks: dict[str, torch.Tensor], name: str, count: int) -> None:
    """Masks so many single weights more."""
    alive = masks[name].flatten().nonzero().flatten()[:count]
    masks[name].view(-1)[alive] = False


def _kill(masks: dict[str, torch.Tensor], layer: str, reader: str, count: int, revive: bool = False) -> None:
    """Takes out so many channels more of one of MNIST_CNN's convolutions, or puts them back."""
    filters = masks[f"featurizer.{layer}.weight"]
    for channel in (filters.flatten(1).any(1) != revive).nonzero().flatten()[:count].tolist():
        filters[channel] = revive
        norm = {"conv1": "bn0", "conv2": "bn1", "conv3": "bn2"}[layer]
        for name in (f"featurizer.{layer}.bias", f"featurizer.{norm}.weight", f"featurizer.{norm}.bias"):
            masks[name][channel] = revive
        alive = masks[f"featurizer.{reader}.weight"].flatten(1).any(1)
        masks[f"featurizer.{reader}.weight"][alive, channel] = revive


def _moved(masks: dict[str, torch.Tensor]) -> None:
    """The same number of channels, from layers where they cost more."""
    _kill(masks, "conv2", "conv3", 4)
    _kill(masks, "conv1", "conv2", 4, revive=True)


def _all_but_one(masks: dict[str, torch.Tensor]) -> None:
    for name, shape in (("featurizer.conv1.weight", (64, 3, 3, 3)), ("featurizer.conv2.weight", (128, 64, 3, 3))):
        masks[name] = torch.zeros(shape, dtype=torch.bool)
        masks[name][0] = True


CONV2, HEAD = "featurizer.conv2.weight", "classifier.weight"

MASKS: Table = {
    "dense as 98 % sparse": (
        "dense", masked(_all_but_one, slice(None)), "mask featurizer.conv", "a parameter that is masked by ERM"
    ),
    "single weights beside channels": ("channels", masked(lambda m: _dead(m, CONV2, 99)), f"mask {CONV2}", "masked weights"),
    "a masked bias of the classifier": (
        "channels", masked(lambda m: m.update({"classifier.bias": torch.arange(10) > 3})), "mask classifier.bias",
        "a parameter that is masked by Magnitude",
    ),
    "a masked classifier": (
        "weights", masked(lambda m: m.update({HEAD: torch.rand(10, 128) > 0.5})), f"mask {HEAD}", "a parameter that is masked"
    ),
    "a mask left out": ("channels", masked(lambda m: m.pop(HEAD)), f"mask {HEAD}", "one, as Magnitude masks this"),
    "a mask of another shape": ("weights", masked(lambda m: m.update({CONV2: m[CONV2][:5]})), f"mask {CONV2}", "of shape"),
    "a layer wiped out": ("weights", masked(lambda m: m[CONV2].zero_()), f"mask {CONV2}", "something that lives"),
    "dead channels that are read": ("channels", masked(lambda m: m[HEAD].fill_(True)), f"mask {HEAD}", "masked weights"),
    "living norms of dead channels": (
        "channels", masked(lambda m: m["featurizer.bn1.bias"].fill_(True)), "mask featurizer.bn1.bias", "masked weights"
    ),
    "a channel more": ("channels", masked(lambda m: _kill(m, "conv1", "conv2", 1)), "sparsity", "0.5, by the hparams"),
    "dearer channels": ("channels", masked(_moved), "units of", "removed, by the hparams"),
    "a weight more": ("weights", masked(lambda m: _dead(m, CONV2, 1)), "sparsity", "0.5, by the hparams"),
    "dearer weights": (
        "weights", masked(lambda m: (_dead(m, CONV2, 50), m["featurizer.conv3.weight"].view(-1)[:99].fill_(True))), "units",
        "removed, by the hparams",
    ),
    "a gate more": ("gates", masked(lambda m: _dead(m, CONV2, 9000)), "sparsity", "0.5, by the hparams"),
    "an exchange that drops more": ("EVIL", masked(lambda m: _dead(m, CONV2, 9000)), "sparsity", "0.5, by the hparams"),
    "a weight not grown": ("grown", masked(lambda m: _dead(m, CONV2, 9000)), "sparsity", "by the hparams"),
    "single weights beside gates": ("gates of channels", masked(lambda m: _dead(m, CONV2, 9)), "mask", "masked weights"),
    "channels where nothing goes": (
        "nothing removed", masked(lambda m: _kill(m, "conv1", "conv2", 60)), "sparsity", "0, by the hparams"
    ),
    "no masks named": ("channels", fields(masks=None), "line 4.masks", "the digest of its masks"),
    "a mask missing": ("channels", lambda f: [one.unlink() for one in (f / "masks").iterdir()], "", "the masks of records"),
    "masks that nobody names": (
        "channels", lambda f: [shutil.copy(one, f / "masks" / f"{'0' * 64}.safetensors") for one in (f / "masks").glob("*")],
        "", "masks of a checkpoint that a selection rule chooses",
    ),
    "masks under another name": ("channels", fields(LAST, masks="0" * 64), "", "the masks of records"),
    "masks cut short": ("channels", lambda f: _rewrite(f, lambda data: data[:-9]), "", "masks, one bit a weight"),
    "pickled masks": ("channels", lambda f: _rewrite(f, pickle.dumps), "", "masks, one bit a weight"),
    "sparser than its masks": ("stranger", resubmitted(fields(LAST, sparsity=0.54)), "sparsity", "0.5 of the channels"),
    "cheaper than its masks": ("channels", resubmitted(fields(LAST, macs=9)), "macs", "by masks/"),
    "fewer weights than its masks": ("channels", resubmitted(fields(LAST, surviving_parameters=9)), "surviving", "by masks/"),
    "smaller than it is exported": ("channels", resubmitted(fields(exported_bytes=9)), "exported_bytes", "by masks/"),
    "larger before": ("channels", resubmitted(fields(parameters=10**6)), "parameters", "by masks/"),
    "dearer before": ("channels", resubmitted(fields(dense_macs=10**8)), "dense_macs", "by masks/"),
    "cheap from the beginning": ("dense", resubmitted(fields(dense_macs=9, macs=9)), "dense_macs", "by records/"),
    "dense and sparse": ("dense", resubmitted(fields(sparsity=0.5)), "sparsity", "0, by the hparams"),
}  # fmt: skip


def _rewrite(folder: Path, change) -> None:
    for file in (folder / "masks").iterdir():
        file.write_bytes(change(file.read_bytes()))


def _replace(folder: Path, old: str, new: str) -> None:
    for file in files(folder):
        file.write_text(file.read_text().replace(old, new))


BITS: Table = {
    "bit operations of what has none": ("dense", resubmitted(fields(bitops=1.0)), "bitops", "ERM quantizes nothing"),
    "of its environments": ("dense", resubmitted(fields(env0_bitops=1.0)), "env0_bitops", "ERM quantizes nothing"),
    "bits of its environments": ("channels", fields(env1_mean_bits=2.0), "env1_mean_bits", "quantizes nothing"),
    "of the width of all": ("channels", fields(bitops_8bit=9.0), "bitops_8bit", "quantizes nothing"),
    "of a stranger": ("stranger", fields(mean_bits=2.0), "mean_bits", "FullBloom quantizes nothing"),
    "less than its width": ("quantized", resubmitted(fields(LAST, bitops=1.0)), "bitops", "by UniformQuant's layers"),
    "of an environment": ("quantized", resubmitted(fields(LAST, env0_bitops=1.0)), "env0_bitops", "UniformQuant's"),
    "an environment left out": ("quantized", resubmitted(fields(env0_bitops=None)), "env0_bitops", "a number, as"),
    "an environment of null": ("quantized", each(lambda r: r.update(env0_bitops=None)), "env0_bitops", "a number, as"),
    "an environment too many": ("quantized", fields(env7_bitops=1.0), "env7_bitops", "no such field"),
    "fewer bits": ("quantized", resubmitted(fields(LAST, mean_bits=2.0)), "mean_bits", "3.0, by UniformQuant"),
    "fewer bits before": ("quantized", fields(FIRST, mean_bits=3.0), "mean_bits", "8.0, by UniformQuant"),
    "more at 8 bits": ("quantized", resubmitted(fields(bitops_8bit=1e12)), "bitops_8bit", "by UniformQuant's layers"),
    "smaller than its integers": ("quantized", resubmitted(fields(LAST, exported_bytes=9)), "exported_bytes", "by records/"),
    "less than 2 bits": ("learned widths", resubmitted(fields(LAST, env0_bitops=1.0)), "env0_bitops", "from "),
    "bits below 2": ("learned widths", resubmitted(fields(LAST, env0_mean_bits=1.0)), "env0_mean_bits", "from 2.0 to 8.0"),
    "smaller than 2 bits": ("learned widths", resubmitted(fields(LAST, exported_bytes=9)), "exported_bytes", "from "),
    "sparse and quantized": ("quantized", resubmitted(fields(sparsity=0.9)), "sparsity", "0, by the hparams"),
}  # fmt: skip


def _copied(folder: Path, to: int = 2) -> None:
    """One run's records stand for another's too."""
    source, target = read(files(folder)[0]), read(files(folder)[to])
    write(
        files(folder)[to],
        [{**one, "args": other["args"], "hparams": other["hparams"]} for one, other in zip(source, target)],
    )


GRID: Table = {
    "a run left out": ("grid", resubmitted(lambda f: files(f)[3].unlink()), "the grid", "a run with test_envs [0]"),
    "a trial left out": (
        "grid", resubmitted(lambda f: [one.unlink() for one in files(f)[:2]]), "trial_seeds", "[0]: all from 0 on"
    ),
    "a draw left out": ("grid", resubmitted(lambda f: [one.unlink() for one in files(f)[::2]]), "hparams_seeds", "[0]: all"),
    "a run twice": ("grid", lambda f: shutil.copy(files(f)[0], f / "records/zz.jsonl"), "args", "a job that no other"),
    "a run twice by capitals": (
        "grid", lambda f: [shutil.copy(files(f)[0], f / "records" / name) for name in ("zz.jsonl", "ZZ.jsonl")], "",
        "differs from records/ZZ.jsonl by more than capitals",
    ),
    "larger batches than there are samples": ("dense", overrides(batch_size=481), "hparams.batch_size", "at most 480"),
    "a draw copied": ("grid", resubmitted(lambda folder: _copied(folder, 1)), "loss", "numbers of its own"),
    "a trial copied": ("grid", resubmitted(_copied), "accuracies", "numbers of its own"),
    "a record left out": ("dense", lambda f: write(files(f)[0], read(files(f)[0])[::2]), "line 2.step", "2 (every 2"),
    "a record twice": ("dense", lambda f: write(files(f)[0], read(files(f)[0])[:1] * 2), "line 2.step", "2 (every 2"),
    "records in another order": ("dense", lambda f: write(files(f)[0], read(files(f)[0])[::-1]), "line 1.step", "0 (every"),
    "another number of steps": ("grid", inside("args", ONE, steps=7), "protocol, steps", " as in records/"),
    "two algorithms": ("grid", inside("args", ONE, algorithm="Random"), "args.algorithm", "as in records/"),
    "environments the other way round": ("dense", inside("args", test_envs=[1, 0]), "args.test_envs", "rising numbers"),
    "all environments": ("dense", inside("args", test_envs=[0, 1]), "grid", "a run with test_envs"),
    "an unknown data set": ("dense", inside("args", dataset="Mine"), "args.dataset", "a registered data set"),
    "no runs": ("dense", lambda f: files(f)[0].unlink(), "", "a file of records for each run"),
    "an empty run": ("dense", lambda f: files(f)[0].write_text(""), "", "records, one a line"),
    "a line without end": ("dense", lambda f: files(f)[0].write_text(files(f)[0].read_text()[:-1]), "line 4", "a line that"),
    "a name twice": ("dense", lambda f: _replace(f, '"step": 0', '"step": 9, "step": 0'), "line 1", "a JSON object"),
}  # fmt: skip

CLAIMS: Table = {
    "a better accuracy": ("grid", claims(f"{RESULTS}/oracle/cells/0/accuracy", 99.0), "accuracy", "from the records"),
    "a smaller error": ("grid", claims(f"{RESULTS}/oracle/cells/0/std_err", 0.001), "std_err", "from the records"),
    "another step": ("grid", claims(f"{RESULTS}/oracle/cells/0/trials/0/step", 0), "trials[0].step", "from the records"),
    "an average": ("dense", claims(f"{RESULTS}/oracle/average", {"accuracy": 99.0, "std_err": None}), "average", "null"),
    "fewer MACs": ("dense", claims(f"{RESULTS}/oracle/costs/macs", 1.0), "costs.macs", "from the records"),
    "no rule but one": ("dense", claims(f"{RESULTS}/training-domain", ...), "training-domain", ""),
    "longer training": ("dense", claims(f"{PROTOCOL}/steps", 5000), "protocol.steps", "6"),
    "ImageNet": ("dense", claims(f"{PROTOCOL}/weights", "imagenet"), "protocol.weights", '"none"'),
    "more trials": ("dense", claims(f"{PROTOCOL}/trial_seeds", [0, 1]), "grid", "trial_seed 1"),
    "other settings": ("channels", claims("settings/sparsity", 0.9), "settings.sparsity", "no such field"),
    "another algorithm": ("channels", claims("algorithm", "SFP"), "algorithm", '"Magnitude"'),
    "a better standing": ("channels", claims("standing", "reference"), "standing", '"published"'),
    "another reference": ("channels", claims("reference", "mine"), "reference", "Zhu"),
    "a newer package": ("dense", claims("package", "domainbed_sfp 99"), "package", "domainbed_sfp 0"),
    "another commit": ("dense", claims("commit", "1234567"), "commit", ""),
    "other machines": ("dense", claims("environments", []), "environments", ""),
    "a field more": ("dense", claims("rank", 1), "rank", "no such field"),
}  # fmt: skip

NAMES = {
    "ERM(ours)": "algorithm ERM", "ERM+": "algorithm ERM", "ERM.": "algorithm ERM", "ERM": "algorithm ERM",
    "S FP": "algorithm SFP", "5FP": "algorithm SFP", "sfp (kappa=2)": "algorithm SFP", "SFP2": "algorithm SFP",
    "New SFP": "algorithm SFP", "SFP-plus": "algorithm SFP", "lRM": "algorithm IRM", "Rig-L": "algorithm RigL",
    "VR3x": "algorithm VREx", "Magnitude+": "alone or with settings", "magnitude": "alone or with settings",
    "Magnitude (ours)": "settings behind Magnitude", "Magnitude (sparsity=0.9)": "sparsity=0.5",
    "Mine (sparsity=0.9)": "sparsity=0.5", "Mine (speed=9)": "speed is none of them", "\u0415RM": "letters a to z",
    "\uff33FP": "letters a to z", "SFP\n": "letters a to z", "../SFP": "letters a to z", "": "letters a to z",
    " SFP": "letters a to z", "S\u200bFP": "letters a to z",
}  # fmt: skip

ALL: Table = {
    f"{title}: {kind}": row
    for title, table in {
        "types": TYPES, "fields": FIELDS, "final": FINAL, "masks": MASKS, "bits": BITS, "grid": GRID, "claims": CLAIMS,
        "names": {repr(name): ("channels", claims("name", name), "name", words) for name, words in NAMES.items()},
    }.items()
    for kind, row in table.items()
}  # fmt: skip


@pytest.mark.parametrize("kind", ALL)
def test_what_is_tampered_with_is_refused(bundle_of, tmp_path, kind):
    """And why is told where it is, in words short enough to read, without a traceback."""
    family, change, field, words = ALL[kind]
    outcome = validation.validate(tampered(bundle_of(family), tmp_path / "b", change))
    told = [problem.line() for problem in outcome.problems]
    assert outcome.tier is None
    assert any(field in one.field and words in one.expected for one in outcome.problems), told
    assert all(len(one.expected) < 500 and len(one.found) < 500 for one in outcome.problems), told


def test_the_table_is_long():
    assert len(ALL) >= 120


@given(st.sampled_from(registry.names()), st.integers(0, 2**31))
@settings(deadline=None)
def test_spacing_capitals_and_dress_do_not_make_a_name_another(name, seed):
    draw = random.Random(seed)
    letters = [
        draw.choice((letter.upper(), letter.lower())) + draw.choice(("", "", " ", ".", "-", "'")) for letter in name
    ]
    dress = ("", "+", ".", " (ours)", "(x=1)", " 2", " v2", "-plus", ", tuned", " by others")
    other = "".join(letters) + draw.choice(dress)
    assert names.resembled(other, registry.names()) == name
    assert names.wrong_name(other, "Mine", [*registry.names(), "Mine"], {}) is not None


@pytest.mark.parametrize("name", ["Gradual shrinking", "My pruner", "Baseline 3", "Ours", "Less is more", "A1"])
def test_names_of_ones_own(name):
    assert names.wrong_name(name, "Magnitude", registry.names(), {}) is None


def test_a_report_for_programs_also_where_nothing_is_validated(main, bundle_of, tmp_path):
    done = main("leaderboard", "validate", tmp_path / "none", "--json", check=False)
    (problem,) = json.loads(done.stdout)["problems"]
    assert done.returncode == 2 and "is no folder" in problem["found"] and "is no folder" in done.stderr
    folder = tampered(bundle_of("dense"), tmp_path / "b", fields(LAST, env0_in_acc=1))
    done = main("leaderboard", "validate", folder, "--json", check=False)
    problem = json.loads(done.stdout)["problems"][0]
    assert done.returncode == 1 and problem["file"].startswith("records/") and problem["field"] == "line 4.env0_in_acc"
    assert (problem["expected"], problem["found"]) == ("a number with a decimal point", "1")
