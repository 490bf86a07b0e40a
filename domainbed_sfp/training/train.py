"""The training loop: update, evaluate, record, checkpoint, resume.

A run is a pure function of its arguments. Every step is seeded from (seed, step), so that a run continued from a
checkpoint computes what it would have computed without the interruption, to the bit on one machine's CPU.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from domainbed_sfp import networks
from domainbed_sfp.algorithms import registry
from domainbed_sfp.algorithms.base import Algorithm
from domainbed_sfp.core import crashes, locks, provenance
from domainbed_sfp.core.device import choose_device
from domainbed_sfp.core.errors import UserError, check_range, spelled
from domainbed_sfp.core.hparam import parse_overrides, recorded_overrides
from domainbed_sfp.core.seeds import seed_everything, seed_hash
from domainbed_sfp.data import Dataset, dataset_names, get_dataset_class
from domainbed_sfp.data.base import EVALUATION_BATCH
from domainbed_sfp.data.images import degradations
from domainbed_sfp.data.images.augmentation import normalize
from domainbed_sfp.data.loaders import MinibatchLoader
from domainbed_sfp.data.splits import Split, split_environment
from domainbed_sfp.deploy.size import exported_bytes
from domainbed_sfp.networks import introspection
from domainbed_sfp.pruning import accounting
from domainbed_sfp.runs import checkpoints, mask_files, records
from domainbed_sfp.training import hparams

LOCK = "run.lock"
OUT, ERR = "out.txt", "err.txt"
PRECISIONS = ("fp32", "bf16", "auto")
TASKS = ("domain_generalization", "domain_adaptation")
# Which checkpoints are evaluated: all, as DomainBed does, or those that selection may choose.
EVALUATIONS = ("all", "final")

# What asks a run to save and stop. SLURM sends SIGUSR1 before a time limit; Windows does not have it.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))

# Seconds between two lines of progress in a log, and between two states of the one line on a terminal.
LOG_INTERVAL = 30.0
TERMINAL_INTERVAL = 0.5

# Batches from which BatchNorm's statistics are taken before an evaluation, where an algorithm asks for it.
RECALIBRATION_BATCHES = 20

_TOO_FEW = "raise hparam batch_size or image_size, or set freeze_bn"

# Images of a test environment that are evaluated in every degradation and severity.
DEGRADED_SAMPLES = 100

# Arguments that say where things lie, where a run is computed and which files it leaves, not what is computed.
SURROUNDINGS = ("data_dir", "output_dir", "cache_dir", "device", "skip_model_save", "save_model_every_checkpoint")


@dataclass
class TrainArgs:
    """What a run computes; names and defaults are DomainBed's, `precision`, `device` and `cache_dir` are ours.

    hparams is the `--hparams` JSON text; a mapping becomes one. precision: arithmetic of the featurizer, fp32, bf16, or
    auto (bf16 where the hardware has it and the network gains by it). steps and checkpoint_freq: None takes the data
    set's. evaluate: "final" leaves out, and writes no record of, the checkpoints at which the network is not yet
    compressed as far as it will be: they are no candidates for selection. A dense network has none of them. The last
    step is always evaluated.
    """

    data_dir: str | None = None
    dataset: str = "RotatedMNIST"
    algorithm: str = "ERM"
    task: str = "domain_generalization"
    hparams: str | None = None
    hparams_seed: int = 0
    trial_seed: int = 0
    seed: int = 0
    steps: int | None = None
    checkpoint_freq: int | None = None
    test_envs: list[int] = field(default_factory=lambda: [0])
    output_dir: str = "train_output"
    holdout_fraction: float = 0.2
    uda_holdout_fraction: float = 0.0
    skip_model_save: bool = False
    save_model_every_checkpoint: bool = False
    precision: str = "fp32"
    evaluate: str = "all"
    device: str = "auto"
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.hparams, Mapping):
            self.hparams = json.dumps(self.hparams)


class AlreadyRunning(locks.Held):
    """Another process is computing this run."""

    exit_status = 75  # EX_TEMPFAIL: a launcher knows it by this


class Interrupted(Exception):
    """The run was asked to stop and has saved where it is."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number


def train(args: TrainArgs, break_lock: bool = False) -> None:
    """Computes a run, or what is left of it, into `args.output_dir`.

    break_lock: goes on where the lock of a dead machine is in the way, on file systems without flock.

    Writes DomainBed's files: results.jsonl, out.txt, err.txt, model.pkl (unless `skip_model_save`) and, last, done; and
    the final masks, where weights are removed, into masks/.

    Raises:
        UserError: for arguments or data that cannot be used, a directory that holds another run, or a loss that is
            not finite; failure.json says so where training had begun.
        AlreadyRunning: if another process holds the run.
        Interrupted: after SIGTERM, SIGINT or SIGUSR1, with a checkpoint saved.
    """
    overrides = parse_overrides(args.hparams)
    hparams.resolve_hparams(args.algorithm, args.dataset, overrides=overrides)
    check_settings(args)
    checked = hparams.checked_overrides(args.algorithm, args.dataset, overrides)
    if json.dumps(checked) != json.dumps(overrides):
        # Records say 8 samples where 8.0 were asked for: rows of tables are made of what they say.
        args = replace(args, hparams=json.dumps(checked, sort_keys=True))
    output_dir = Path(args.output_dir)
    with _alone(output_dir, break_lock):
        _refuse_other_run(args, output_dir)
        if records.is_done(output_dir):
            print(f"already done: {args.output_dir}")
            return
        (output_dir / records.DONE).unlink(missing_ok=True)
        with _tee(output_dir) as err, _stop_signals() as stop:
            try:
                _Run(args, output_dir, stop).complete()
            except (UserError, Interrupted) as error:
                _note(err, f"{type(error).__name__}: {error}")
                raise
            except OSError as error:
                where = repr(str(error.filename)) if error.filename else f"output_dir {args.output_dir!r}"
                message = f"{where}: {error.strerror or error}; nothing written before is lost"
                raise UserError(message) from error
            except Exception as error:
                _note(err, traceback.format_exc())
                crashes.keep(error, output_dir / ERR)
                raise


@contextmanager
def _alone(output_dir: Path, break_lock: bool) -> Iterator[None]:
    """Makes the folder, and holds the run's lock for the block."""
    lock = output_dir / LOCK
    with ExitStack() as held:
        try:
            new = [folder for folder in (output_dir, *output_dir.parents) if not folder.exists()]
            output_dir.mkdir(parents=True, exist_ok=True)
            if break_lock and (broken := locks.break_lock(lock)):
                print(f"warning: removed the lock {broken.describe()}", file=sys.stderr)
            # A moment's patience: whoever asks for the run's state holds the lock for an instant.
            held.enter_context(locks.hold(lock, 2, "computing this run", "go on with --break_lock"))
        except locks.Held as error:
            raise AlreadyRunning(str(error)) from None
        except OSError as error:
            raise UserError(f"output_dir {str(output_dir)!r} cannot be written: {error.strerror or error}") from error
        try:
            yield
        except UserError:
            held.close()
            _remove_refused(new)
            raise


def _remove_refused(new: list[Path]) -> None:
    """Removes the folders that a run made which was refused before its first step: nothing of it is in them."""
    if new and not any((new[0] / name).exists() for name in (records.CHECKPOINT, records.RESULTS, records.FAILURE)):
        with suppress(OSError):  # something else has been put there
            for name in (OUT, ERR, LOCK):
                (new[0] / name).unlink(missing_ok=True)
            for folder in new:
                folder.rmdir()


def first_record(args: TrainArgs) -> dict[str, Any]:
    """The record of step 0 as `train` makes it, computed anew; of its files only masks are written to
    `args.output_dir`, which must exist. Raises UserError as `train` does."""
    run = _Run(args, Path(args.output_dir), _StopRequest())
    try:
        run.started = time.monotonic()
        run._update()
        return _as_written(run._measure())
    finally:
        run.close()


def measure_model(args: TrainArgs, step: int, state: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a checkpoint from its model's state, without what training measures (losses, times).

    Args:
        args: of the run; masks are written to `args.output_dir`, which must exist.
        step: of the checkpoint.
        state: of the model as it was evaluated then, as `model.pkl` holds it. Weights that its masks remove count as
            removed, whatever they are.

    Raises UserError where the state is not of the run's network.
    """
    with networks.without_weights():
        run = _Run(args, Path(args.output_dir), _StopRequest())
    try:
        try:
            run.algorithm.load_state_dict(state)
        except Exception as error:  # a state from a stranger can be anything
            raise UserError(f"not a state of {args.algorithm} with these hparams: {error}".splitlines()[0]) from None
        with torch.no_grad():
            masks, parameters = run.algorithm.masks(), dict(run.algorithm.named_parameters())
            for name, mask in masks.items():
                parameters[name].mul_(mask.to(parameters[name].dtype))
        run.started, run.step = time.monotonic(), step
        return _as_written(run._measure(prepare=False))
    finally:
        run.close()


def _as_written(record: dict[str, Any]) -> dict[str, Any]:
    """A record as a file has it."""
    return json.loads(json.dumps(record, default=float))


def choose_precision(name: str, device: torch.device, network: torch.nn.Module) -> str:
    """The arithmetic that `name` stands for on this device and network: "fp32" or "bf16"."""
    if name != "auto":
        return name
    if getattr(network, "full_precision", False):
        return "fp32"
    if device.type == "cuda":
        # Since Ampere; torch also says yes to older GPUs, which only emulate it.
        has_bf16 = torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8
        return "bf16" if has_bf16 else "fp32"
    fast = "avx512_bf16" in _cpu_flags() or "amx_bf16" in _cpu_flags()
    return "bf16" if fast and not networks.has_depthwise_convolutions(network) else "fp32"


def check_settings(settings: Any) -> None:
    """Raises UserError where a run's or a sweep's settings cannot be (TrainArgs, SweepSpec and Job have them all)."""
    for name in ("steps", "checkpoint_freq"):
        check_range(f"--{name}", getattr(settings, name), 1)
    for name in ("seed", "hparams_seed", "trial_seed"):
        # What torch takes as a seed; a sweep has counts of seeds instead.
        check_range(f"--{name}", getattr(settings, name, None), -(2**63), 2**64 - 1)
    if not 0 < settings.holdout_fraction < 1:
        raise UserError(f"--holdout_fraction: expected a fraction in (0, 1), got {settings.holdout_fraction}")
    if not 0 <= settings.uda_holdout_fraction < 1:
        raise UserError(f"--uda_holdout_fraction: expected a fraction in [0, 1), got {settings.uda_holdout_fraction}")
    for name, valid in (("task", TASKS), ("precision", PRECISIONS), ("evaluate", EVALUATIONS)):
        if getattr(settings, name) not in valid:
            raise UserError(f"--{name}: expected one of {', '.join(valid)}, got {getattr(settings, name)!r}")


def not_as_published(dataset: str, differences: list[str]) -> str:
    """What a user should know of a data set's files that are not the published ones."""
    return (
        f"{dataset} is not the published data set: {', '.join(differences)}; records and tables say "
        "so, and the leaderboard does not take it"
    )


def check_test_envs(dataset: str, test_envs: list[int], names: list[str]) -> None:
    """Raises UserError unless `test_envs` are distinct environments and leave one to train on."""
    for index in test_envs:
        if not 0 <= index < len(names):
            listed = ", ".join(f"{i} {name}" for i, name in enumerate(names))
            raise UserError(f"--test_envs: {dataset} has no environment {index} (it has {listed})")
    if len(set(test_envs)) != len(test_envs):
        raise UserError(f"--test_envs: {test_envs} names an environment twice")
    if len(test_envs) >= len(names):
        raise UserError(f"--test_envs: {test_envs} leaves no environment of {dataset} to train on")


class _Run:
    """One run while it is being computed."""

    def __init__(self, args: TrainArgs, output_dir: Path, stop: _StopRequest) -> None:
        self.args = args
        self.output_dir = output_dir
        self.stop = stop
        self.device = choose_device(args.device)
        self.hparams = hparams.resolve_hparams(
            args.algorithm, args.dataset, args.hparams_seed, args.trial_seed, parse_overrides(args.hparams)
        )
        self.info = registry.get(args.algorithm)
        self.code = provenance.code_of(self.info.cls)
        self.weights_digest = provenance.weights_digest(self.hparams["weights"])
        dataset_class = get_dataset_class(args.dataset)
        self.n_steps = args.steps or dataset_class.N_STEPS
        self.checkpoint_freq = args.checkpoint_freq or dataset_class.CHECKPOINT_FREQ
        check_test_envs(args.dataset, args.test_envs, dataset_class.environment_names(args.data_dir))
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
        self._print_head()

        # Before images are decoded, which may take an hour.
        dataset_class.check_files(args.data_dir)
        self.data_digest = dataset_class.data_digest(args.data_dir)
        if self.data_digest and (differences := dataset_class.differences(args.data_dir)):
            print(f"warning: {not_as_published(args.dataset, differences)}", file=sys.stderr)
        self.left_out, remarks = dataset_class.inspect(args.data_dir)
        for line in remarks:
            print(line, file=sys.stderr)
        self._refuse_other_data()
        cache_dir = Path(args.cache_dir) if args.cache_dir else None
        self.dataset: Dataset = dataset_class.build(args.data_dir, self.hparams, args.seed, cache_dir)
        self.splits = self._split()
        self.loader, self.unlabeled_loader = self._loaders()

        seed_everything(args.seed)
        domains = len(self.dataset) - len(args.test_envs)
        self.algorithm: Algorithm = self.info.make(
            self.dataset.input_shape, self.dataset.num_classes, domains, self.hparams
        )
        self.algorithm.total_steps = self.n_steps
        self.algorithm.to(self.device)
        self.precision = choose_precision(args.precision, self.device, self.algorithm)
        # What the records call fp32 is not TF32, which torch takes for convolutions on its own.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        channels_last = networks.channels_last_is_faster(self.algorithm, self.device)
        networks.set_precision(self.algorithm, self.precision, channels_last)
        positions = accounting.count_positions(self.algorithm, self.dataset.input_shape, self.algorithm.predict)
        self.positions = positions
        self._refuse_single_samples()

        self.step = 0
        # Set while a step's update is in the weights and its record, if one is due, is not yet made.
        self.update_is_done = False
        self.records: list[dict[str, Any]] = []
        self.printed_columns: list[str] = []
        self.metrics: dict[str, list[float]] = defaultdict(list)
        self.earlier_seconds = 0.0

    def complete(self) -> None:
        """Trains to the end, from the checkpoint if there is one."""
        self.started = time.monotonic()
        self._resume()
        try:
            self._steps()
        except Interrupted as stopped:
            self._save_checkpoint()
            raise Interrupted(
                stopped.signal_number,
                f"stopped at step {self.step} of {self.n_steps}; the same command continues there",
            ) from None
        except UserError as error:
            self._note_failure(str(error))
            raise
        finally:
            self.close()
        self._save_model("model.pkl")
        records.write_atomically(self.output_dir / records.DONE, "done")
        (self.output_dir / records.CHECKPOINT).unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            (self.output_dir / records.FAILURE).unlink()

    def close(self) -> None:
        """Ends the threads that load images."""
        self.loader.close()
        if self.unlabeled_loader:
            self.unlabeled_loader.close()

    def _steps(self) -> None:
        last_line = time.monotonic()
        while self.step < self.n_steps:
            if not self.update_is_done:
                with self.stop.postponed():
                    self._update()
                    self.update_is_done = True
            if self._record_is_due() and not self._is_recorded():
                self._record()
                last_line = time.monotonic()
            elif time.monotonic() - last_line > (TERMINAL_INTERVAL if sys.stderr.isatty() else LOG_INTERVAL):
                last_line = time.monotonic()
                self._print_progress()
            with self.stop.postponed():
                self.step += 1
                self.update_is_done = False
                if self._is_checkpoint(self.step - 1):
                    self._save_checkpoint()

    def _update(self) -> None:
        start = time.perf_counter()
        minibatches = self.loader.minibatches(self.step)
        unlabeled = None
        if self.unlabeled_loader:
            unlabeled = [x for x, _ in self.unlabeled_loader.minibatches(self.step)]
        seed_everything(seed_hash(self.args.seed, "step", self.step))
        try:
            values = self.algorithm.update(minibatches, unlabeled)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(f"{self.args.algorithm} trains BatchNorm on single images here; {_TOO_FEW}") from error
        for name, value in values.items():
            if name == "loss" and not math.isfinite(value):
                raise UserError(
                    f"{self.args.algorithm} diverged: the loss is {value} at step {self.step}; the {len(self.records)} "
                    f"records before it are kept. Lower hparam 'lr' ({self.hparams['lr']:g}) or the weight of a penalty"
                )
            self.metrics[name].append(float(value))
        seconds = time.perf_counter() - start
        self.metrics["step_time"].append(seconds)
        self.metrics["images_per_second"].append(sum(len(y) for _, y in minibatches) / seconds)

    def _note_failure(self, what: str) -> None:
        """Says why the run cannot go on where `sweep status` and `collect` look."""
        failure = {
            "step": self.step,
            "error": what,
            "algorithm": self.args.algorithm,
            "hparams": self.hparams,
            "args": asdict(self.args),
        }
        records.write_atomically(self.output_dir / records.FAILURE, json.dumps(failure, sort_keys=True))

    def _record(self) -> None:
        """Evaluates, and appends the record of this step."""
        buffers = {name: value.clone() for name, value in self.algorithm.named_buffers()}
        try:
            record = self._measure()
            with self.stop.postponed():
                self.records.append(record)
                self.metrics.clear()
                self._print_row(record)
        except Interrupted:
            if not self._is_recorded():
                # The run that continues prepares this evaluation again, and must find what this one found.
                with torch.no_grad():
                    for name, value in self.algorithm.named_buffers():
                        value.copy_(buffers[name])
            raise

    def _measure(self, prepare: bool = True) -> dict[str, Any]:
        """The record of this step. `prepare` is False for a model that was saved as it was evaluated."""
        algorithm, args = self.algorithm, self.args
        record: dict[str, Any] = {"step": self.step, "epoch": self.step / self._steps_per_epoch()}
        record.update({name: float(np.mean(values)) for name, values in self.metrics.items()})
        seed_everything(seed_hash(args.seed, "evaluation", self.step))
        if prepare:
            algorithm.prepare_evaluation(self._recalibration_batches())
        record.update(evaluate(algorithm, self.dataset, self.splits, self.device))
        if self.hparams["degraded_evaluation"] and self.step == self.n_steps - 1:
            for env_i in args.test_envs:
                record[f"env{env_i}_degraded"] = evaluate_degraded(algorithm, self.dataset, env_i, self.device)
        masks = algorithm.masks()
        cost = accounting.measure_cost(algorithm.deployed_parameters(), self.positions, masks)
        record.update(asdict(cost))
        record.update(algorithm.costs())
        record.update(
            exported_bytes=exported_bytes(algorithm),
            sparsity=algorithm.sparsity(),
            final_compression=algorithm.at_final_compression(),
            standing=self.info.standing,
            precision=self.precision,
            environments=[env.name for env in self.dataset.environments],
            input_shape=self.dataset.input_shape,
            data_digest=self.data_digest,
            environment=provenance.fingerprint(self.device),
            commit=provenance.commit(),
            mem_gb=torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else 0.0,
            wall_time=self.earlier_seconds + time.monotonic() - self.started,
            hparams=self.hparams,
            # Where decoded images are kept says nothing about the result.
            args={name: value for name, value in asdict(args).items() if name != "cache_dir"},
        )
        if self.code is not None:
            record["code"] = self.code
        if self.left_out:
            record["left_out"] = self.left_out
        if self.weights_digest is not None:
            record["weights_digest"] = self.weights_digest
        if algorithm.granularity is not None:
            record["granularity"] = algorithm.granularity
        if decisions := algorithm.decisions():
            record["decisions"] = decisions
        if masks and record["final_compression"]:
            record["masks"] = mask_files.keep(self.output_dir / mask_files.FOLDER, masks)
        return record

    def _record_is_due(self) -> bool:
        if not self._is_checkpoint(self.step):
            return False
        is_last = self.step == self.n_steps - 1
        return self.args.evaluate == "all" or is_last or self.algorithm.at_final_compression()

    def _is_recorded(self) -> bool:
        return bool(self.records) and self.records[-1]["step"] == self.step

    def _recalibration_batches(self) -> Iterator[torch.Tensor]:
        """Training images from a stream of their own: what evaluation needs must not move training's."""
        training = [(i, split.in_) for i, split in enumerate(self.splits) if i not in self.args.test_envs]
        loader = MinibatchLoader(
            self.dataset, training, self.hparams["batch_size"], False, self.args.seed, self.device, "recalibration",
            degrade=self.hparams["degrade"],
        )  # fmt: skip
        try:
            for index in range(RECALIBRATION_BATCHES):
                step = self.step * RECALIBRATION_BATCHES + index
                images = [x for x, _ in loader.minibatches(step)]
                yield from images if self.algorithm.domain_by_domain else [torch.cat(images)]
        finally:
            loader.close()

    def _is_checkpoint(self, step: int) -> bool:
        """Whether `step` is one after which the model is evaluated and saved."""
        return step % self.checkpoint_freq == 0 or step == self.n_steps - 1

    def _save_checkpoint(self) -> None:
        """Makes the checkpoint, which holds the records too, and then results.jsonl from it: whatever moment a run
        is killed at, no record is lost and none is written twice."""
        if self.args.save_model_every_checkpoint and not self.update_is_done and self._is_checkpoint(self.step - 1):
            # Before the checkpoint, behind which nobody would make it again.
            self._save_model(f"model_step{self.step - 1}.pkl")
        state = {
            "args": asdict(self.args),
            "data_digest": self.data_digest,
            "code": self.code,
            "weights_digest": self.weights_digest,
            "step": self.step,
            "update_is_done": self.update_is_done,
            "records": self.records,
            "metrics": self.metrics,
            "seconds": self.earlier_seconds + time.monotonic() - self.started,
        }
        checkpoints.save_checkpoint(self.output_dir / records.CHECKPOINT, self.algorithm, state)
        records.write_records(self.output_dir / records.RESULTS, self.records)

    def _resume(self) -> None:
        checkpoint = self.output_dir / records.CHECKPOINT
        if not checkpoint.exists():
            return
        state = checkpoints.load_checkpoint(checkpoint, self.algorithm)
        self.step = state["step"]
        self.update_is_done = state["update_is_done"]
        self.records = state["records"]
        self.metrics.update(state["metrics"])
        self.earlier_seconds = state["seconds"]
        records.write_records(self.output_dir / records.RESULTS, self.records)
        print(f"Continuing at step {self.step} of {self.n_steps}.")

    def _save_model(self, name: str) -> None:
        if self.args.skip_model_save:
            return
        checkpoints.save_model(
            self.output_dir / name,
            {
                "args": asdict(self.args),
                "model_input_shape": self.dataset.input_shape,
                "model_num_classes": self.dataset.num_classes,
                "model_num_domains": len(self.dataset) - len(self.args.test_envs),
                "model_hparams": self.hparams,
                "model_dict": self.algorithm.state_dict(),
            },
        )

    def _refuse_single_samples(self) -> None:
        """BatchNorm has no variance to divide by where a batch is one sample and a channel of it one value."""
        if self.algorithm.images_at_once(self.hparams["batch_size"]) > 1:
            return
        name = introspection.batchnorm_of_one_value(self.algorithm, self.dataset.input_shape, self.algorithm.predict)
        if name is not None:
            raise UserError(f"BatchNorm {name!r} would have one value a channel, which has no variance; {_TOO_FEW}")

    def _split(self) -> list[Split]:
        splits = []
        batch_size = self.hparams["batch_size"]
        for env_i, env in enumerate(self.dataset.environments):
            is_test = env_i in self.args.test_envs
            uda_fraction = self.args.uda_holdout_fraction if is_test else 0.0
            split = split_environment(len(env), env_i, self.args.trial_seed, self.args.holdout_fraction, uda_fraction)
            for part in ("in_", "out"):
                if not len(getattr(split, part)):
                    raise UserError(
                        f"environment {env_i} ({env.name}) has {len(env)} samples: --holdout_fraction "
                        f"{self.args.holdout_fraction} leaves its {part.strip('_')}-split empty"
                    )
            if not is_test and len(split.in_) < batch_size:
                raise UserError(
                    f"environment {env_i} ({env.name}) has {len(split.in_)} training samples, fewer than "
                    f"hparam batch_size {batch_size}; lower batch_size"
                )
            splits.append(split)
        return splits

    def _refuse_other_data(self) -> None:
        """A checkpoint made by another version of an outside algorithm, or on other images, as `Folder` or an
        incomplete copy can hold, must not go on with these."""
        earlier = _checkpoint_of(self.output_dir)
        if earlier and earlier.get("code") != self.code:
            raise UserError(
                f"output_dir {self.args.output_dir!r} holds a run of {self.args.algorithm} by other code (the files of "
                f"its package have hash {earlier.get('code')} there, {self.code} here); choose another --output_dir, "
                "or remove that one"
            )
        if earlier and earlier["data_digest"] != self.data_digest:
            raise UserError(
                f"output_dir {self.args.output_dir!r} holds a run on other images than those in "
                f"--data_dir {self.args.data_dir!r}; choose another --output_dir"
            )

    def _loaders(self) -> tuple[MinibatchLoader, MinibatchLoader | None]:
        args = self.args

        def loader(parts: list[tuple[int, np.ndarray]], stream: str, **images: Any) -> MinibatchLoader:
            batch_size, balanced = self.hparams["batch_size"], self.hparams["class_balanced"]
            return MinibatchLoader(self.dataset, parts, batch_size, balanced, args.seed, self.device, stream, **images)

        training = [(i, split.in_) for i, split in enumerate(self.splits) if i not in args.test_envs]
        labeled = loader(training, "train", degrade=self.hparams["degrade"])
        if args.task == "domain_generalization":
            return labeled, None
        unlabeled = [(i, split.uda) for i, split in enumerate(self.splits) if len(split.uda)]
        if not unlabeled:
            raise UserError("--task domain_adaptation needs unlabelled samples: set --uda_holdout_fraction above 0")
        # The images of test environments are what they are, in DomainBed too.
        return labeled, loader(unlabeled, "uda", augment=False)

    def _steps_per_epoch(self) -> float:
        # DomainBed counts the test environment too.
        return min(len(split.in_) for split in self.splits) / self.hparams["batch_size"]

    def _print_head(self) -> None:
        print("Environment:")
        for name, value in provenance.fingerprint(self.device).items():
            print(f"\t{name}: {value}")
        print("Args:")
        for name, value in sorted(asdict(self.args).items()):
            print(f"\t{name}: {value}")
        print("HParams:")
        for name, value in sorted(self.hparams.items()):
            print(f"\t{name}: {value}", flush=True)

    def _print_row(self, record: Mapping[str, Any]) -> None:
        """One line of numbers per record, under DomainBed's column heads."""
        columns = sorted(name for name, value in record.items() if isinstance(value, (int, float)))
        if isinstance(sys.stderr, _Tee) and sys.stderr.isatty():
            sys.stderr.show("")
        # What a method measures may begin after the first record.
        if columns != self.printed_columns:
            print("  ".join(name.ljust(12)[:12] for name in columns))
            self.printed_columns = columns
        cells = [f"{record[name]:.10f}" if isinstance(record[name], float) else str(record[name]) for name in columns]
        print("  ".join(cell.ljust(12)[:12] for cell in cells), flush=True)

    def _print_progress(self) -> None:
        seconds = float(np.mean(self.metrics["step_time"]))
        left = (self.n_steps - self.step - 1) * seconds
        loss = self.metrics["loss"][-1] if self.metrics.get("loss") else math.nan
        line = (
            f"step {self.step} of {self.n_steps}: loss {loss:.4f}, {seconds:.2f} s a step, "
            f"{left / 60:.0f} min of training left"
        )
        if isinstance(sys.stderr, _Tee) and sys.stderr.isatty():
            sys.stderr.show(line)
        else:
            print(line, file=sys.stderr, flush=True)


@torch.no_grad()
def evaluate(algorithm: Algorithm, dataset: Dataset, splits: list[Split], device: torch.device) -> dict[str, float]:
    """Accuracies of every split, as fractions under DomainBed's names (`env0_in_acc`, ...), and what the algorithm
    measures of an environment's samples (`env0_mean_bits`, ...).

    Held-out splits are evaluated on the plain images. DomainBed augments the held-out splits of training
    environments as well, so its `env*_out_acc` of those are a little lower and noisy.
    """
    algorithm.eval()
    algorithm.measurements()  # of what was predicted before, as for counting its operations, nothing belongs here
    accuracies = {}
    for env_i, split in enumerate(splits):
        batches = dataset.evaluation_batches(env_i, device)
        correct = torch.cat([_is_correct(_predict(algorithm, x), y).cpu() for x, y in batches]).numpy()
        for name, part in (("in", split.in_), ("out", split.out), ("uda", split.uda)):
            if len(part):
                accuracies[f"env{env_i}_{name}_acc"] = float(correct[part].sum() / len(part))
        accuracies.update({f"env{env_i}_{name}": value for name, value in algorithm.measurements().items()})
    algorithm.train()
    return accuracies


def _predict(algorithm: Algorithm, x: torch.Tensor) -> torch.Tensor:
    """Logits of a batch of an evaluation. On a GPU a smaller one is filled up, unless the algorithm measures what it
    sees: cuDNN plans each convolution anew for every batch size."""
    missing = EVALUATION_BATCH - len(x)
    if x.device.type != "cuda" or missing <= 0 or type(algorithm).measurements is not Algorithm.measurements:
        return algorithm.predict(x)
    return algorithm.predict(torch.cat((x, x.new_zeros(missing, *x.shape[1:]))))[: len(x)]


@torch.no_grad()
def evaluate_degraded(
    algorithm: Algorithm, dataset: Dataset, env_i: int, device: torch.device, samples: int = DEGRADED_SAMPLES
) -> list[dict[str, Any]]:
    """How the model does on the same `samples` images of an environment, drawn evenly from all of it, as they
    are and degraded in every way and severity: for each `degradation`, `severity` (0: as they are), `samples`,
    `accuracy` (a fraction), and what the algorithm measures. A description of the finished model: nothing is chosen by
    it."""
    environment = dataset[env_i]
    chosen = np.unique(np.linspace(0, len(environment) - 1, samples).round().astype(int))
    images, y = environment.gather(chosen), environment.labels[torch.from_numpy(chosen)].to(device)
    is_photographic = images.dtype == torch.uint8
    clean = (normalize(images) if is_photographic else images).to(device)
    cases = [("none", 0), *((kind, severity) for kind in degradations.KINDS for severity in degradations.SEVERITIES)]
    algorithm.eval()
    algorithm.measurements()
    results = []
    for kind, severity in cases:
        x = clean
        if severity:
            x = degradations.degraded_copy(clean, kind, severity, is_photographic, seed_hash(kind, severity))
        accuracy = int(_is_correct(algorithm.predict(x), y).sum()) / len(y)
        case = {"degradation": kind, "severity": severity, "samples": len(y), "accuracy": accuracy}
        results.append({**case, **algorithm.measurements()})
    algorithm.train()
    return results


def _is_correct(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """One column means a binary classifier with threshold 0, as in DomainBed."""
    return (logits.squeeze(1) > 0).eq(y) if logits.shape[1] == 1 else logits.argmax(1).eq(y)


def identity_of(args: Mapping[str, Any]) -> dict[str, Any]:
    """What a run computes: a record's `args` without SURROUNDINGS; hparams as values, the data set's numbers of steps
    where none are given, test environments in order."""
    # DomainBed, and earlier versions, evaluate all checkpoints and have no such argument.
    identity: dict[str, Any] = {"evaluate": EVALUATIONS[0]}
    identity.update((name, value) for name, value in args.items() if name not in SURROUNDINGS)
    identity["hparams"] = recorded_overrides(identity.get("hparams"))
    if isinstance(identity.get("test_envs"), list):
        identity["test_envs"] = sorted(identity["test_envs"], key=str)
    if identity.get("dataset") in dataset_names():  # a record of DomainBed's own may have another
        dataset = get_dataset_class(identity["dataset"])
        for name, usual in (("steps", dataset.N_STEPS), ("checkpoint_freq", dataset.CHECKPOINT_FREQ)):
            if name in identity and identity[name] is None:
                identity[name] = usual
    return identity


def _checkpoint_of(output_dir: Path) -> Mapping[str, Any] | None:
    """`args`, `data_digest`, `code` and `weights_digest` of the run whose checkpoint is in the directory."""
    if not (output_dir / records.CHECKPOINT).exists():
        return None
    state = checkpoints.read_state(output_dir / records.CHECKPOINT)
    if "args" in state:
        return state
    return state["records"][-1] if state["records"] else None  # where earlier versions kept them


def _refuse_other_run(args: TrainArgs, output_dir: Path) -> None:
    """Raises UserError if the directory holds a run with other arguments."""
    earlier = _checkpoint_of(output_dir)
    if earlier is None:
        with suppress(FileNotFoundError):
            earlier = next(reversed(list(records.read_records(output_dir, lambda message: None))), None)
    if earlier is None:
        return
    ours, theirs = identity_of(asdict(args)), identity_of(earlier["args"])
    for name in ours:
        # DomainBed's records do not have our flags.
        if name in theirs and theirs[name] != ours[name]:
            raise UserError(
                f"output_dir {args.output_dir!r} holds another run ({name} {spelled(theirs[name], [ours[name]])} "
                f"there, {spelled(ours[name], [theirs[name]])} here); choose another --output_dir, or remove that one"
            )
    weights = ours["hparams"].get("weights")
    here, there = provenance.weights_digest(weights), earlier.get("weights_digest")
    if here and there and here != there:
        raise UserError(
            f"output_dir {args.output_dir!r} holds a run that began from other weights (the file {weights!r} had hash "
            f"{there} then, {here} now); choose another --output_dir, or remove that one"
        )


def _cpu_flags() -> set[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("flags"):
                return set(line.split())
    except OSError:
        pass
    return set()


class _StopRequest:
    """A stop signal as an exception at a moment that loses nothing: at once, or at the end of a `postponed` block.

    The same signal once more kills.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self.is_postponed = False

    def receive(self, number: int, frame: object) -> None:
        """The signal handler."""
        signal.signal(number, signal.SIG_DFL)
        if self.signal_number:  # another one, as SLURM sends when it preempts: the save goes on
            return
        self.signal_number = number
        print(f"{signal.Signals(number).name}: saving and stopping", file=sys.stderr, flush=True)
        if not self.is_postponed:
            self._raise()

    @contextmanager
    def postponed(self) -> Iterator[None]:
        """What must not be cut in two: an update of the weights, a save."""
        self.is_postponed = True
        try:
            yield
        finally:
            self.is_postponed = False
        if self.signal_number:
            self._raise()

    def _raise(self) -> None:
        raise Interrupted(self.signal_number, "stopped before the first step; nothing is lost")


@contextmanager
def _stop_signals() -> Iterator[_StopRequest]:
    """Turns STOP_SIGNALS into a request to stop, where signals can be caught: in the main thread."""
    request = _StopRequest()
    previous = {}
    with suppress(ValueError):
        for number in STOP_SIGNALS:
            previous[number] = signal.signal(number, request.receive)
    try:
        if previous and hasattr(signal, "pthread_sigmask"):
            # Whoever started this run may have held them back until somebody listens (sweep/slurm_task.py does).
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Tee:
    """Writes to two streams, as DomainBed's Tee."""

    def __init__(self, stream: TextIO, file: TextIO) -> None:
        self.stream = stream
        self.file = file
        self.stream_is_gone = False

    def write(self, text: str) -> int:
        with self._stream() as stream:
            stream.write(text)
        return self.file.write(text)

    def flush(self) -> None:
        with self._stream() as stream:
            stream.flush()
        with suppress(OSError):  # a full disk must not hide the error that is being told
            self.file.flush()

    def isatty(self) -> bool:
        return self.stream.isatty()

    def show(self, line: str) -> None:
        """Puts `line` in place of the terminal's current one; the file does not get it."""
        with self._stream() as stream:
            stream.write(f"\r\x1b[K{line}")
            stream.flush()

    @contextmanager
    def _stream(self) -> Iterator[TextIO]:
        """The stream, or none of it: whoever reads it can go away, as a terminal or `| head` does, and the run goes on
        with its files."""
        try:
            yield StringIO() if self.stream_is_gone else self.stream
        except (OSError, ValueError):
            self.stream_is_gone = True


def _note(err: TextIO, text: str) -> None:
    """Writes to err.txt alone: the command line tells the user on its own."""
    with suppress(OSError):
        err.write(text.rstrip() + "\n")
        err.flush()


@contextmanager
def _tee(output_dir: Path) -> Iterator[TextIO]:
    """Standard output and error also go to out.txt and err.txt; yields the latter."""
    stdout, stderr = sys.stdout, sys.stderr
    try:
        out, err = (
            open(output_dir / name, "a", buffering=1, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
            for name in (OUT, ERR)
        )
    except OSError as error:
        raise UserError(f"output_dir {str(output_dir)!r} cannot be written: {error.strerror}") from error
    sys.stdout, sys.stderr = _Tee(stdout, out), _Tee(stderr, err)
    try:
        yield err
    finally:
        sys.stdout, sys.stderr = stdout, stderr
        for file in (out, err):
            with suppress(OSError):
                file.close()
