"""What an algorithm is: DomainBed's contract, and what compression adds to it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from domainbed_sfp import networks
from domainbed_sfp.algorithms import registry

Minibatches = Sequence[tuple[Tensor, Tensor]]


class Algorithm(nn.Module):
    """A domain generalization algorithm, usable in our training loop and in DomainBed's.

    Args:
        input_shape: (channels, height, width) of one sample.
        num_classes: number of classes.
        num_domains: number of training environments.
        hparams: the run's hyperparameters.

    Everything that must survive an interruption lives in parameters, buffers, optimizers that are attributes, or
    the JSON-safe value of `get_extra_state`.
    """

    # Steps of the run, from which schedules take their fractions. The training loop sets the run's own number;
    # DomainBed's default holds where nobody does.
    total_steps: int = 5001

    # What masks remove, "weight" or "channel", where no hparam of that name says it; None for a method without masks.
    granularity: str | None = None

    # True for a method that learns from unlabelled images of the test environment: the leaderboard ranks it apart.
    transductive: bool = False

    @property
    def domain_by_domain(self) -> bool:
        """Whether training runs the network on one environment at a time. `prepare_evaluation` then has batches of one
        environment each, as its BatchNorm has seen them, and otherwise of all."""
        return False

    def images_at_once(self, batch_size: int) -> int:
        """How many images the network is trained on at once, for minibatches of `batch_size` an environment."""
        return batch_size if self.domain_by_domain else batch_size * self.num_domains

    def __init__(
        self, input_shape: tuple[int, ...], num_classes: int, num_domains: int, hparams: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.input_shape = tuple(input_shape)
        self.num_classes = num_classes
        self.num_domains = num_domains
        self.hparams = dict(hparams)
        self.granularity = self.hparams.get("granularity", self.granularity)

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        """One training step on a list of (x [N, C, H, W], y [N]) per environment; returns numbers to log."""
        raise TypeError(f"{type(self).__name__} does not define update(minibatches, unlabeled=None)")

    def predict(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] for images [N, C, H, W]."""
        raise TypeError(f"{type(self).__name__} does not define predict(x)")

    def prepare_evaluation(self, batches: Iterable[Tensor]) -> None:
        """Called in training mode before each evaluation with training images (an iterable of [N, C, H, W], read only
        if it is iterated). Does nothing by default; what it changes must be buffers, which an evaluation that is
        interrupted and made again finds as they were. DomainBed's own loop does not call it."""

    def measurements(self) -> dict[str, float]:
        """What the algorithm has measured of the samples that `predict` has seen in evaluation mode since the last
        call; recorded for each environment as `env{i}_NAME`. Nothing by default."""
        return {}

    def decisions(self) -> dict[str, str]:
        """What hparams that leave it open came to, by their names: a field of the records. Nothing by default."""
        return {}

    def costs(self) -> dict[str, float]:
        """Costs beyond parameters and MACs, of the model as it would be deployed: fields of a record. None by
        default."""
        return {}

    def deployed_parameters(self) -> dict[str, Tensor]:
        """Parameters of the network that `predict` runs, by name: what its cost is counted from. Auxiliary networks and
        gates of the training are not among them."""
        return dict(self.named_parameters())

    def masks(self) -> dict[str, Tensor]:
        """Which weights are alive: bool tensors by parameter name. Empty where nothing is compressed."""
        return {}

    def sparsity(self) -> float:
        """Fraction removed, counted in the method's own units (weights or channels)."""
        return 0.0

    def at_final_compression(self) -> bool:
        """True once the model is as small as it will be: only then a checkpoint is a candidate for selection."""
        return True

    def final_step(self) -> int | None:
        """The step of the first record at final compression, as hparams and `total_steps` decide it before training;
        None where only training can tell. What overrides `at_final_compression` says it too (see `final_step_of`)."""
        return 0

    def export(self) -> nn.Module:
        """A plain network with the logits of `predict`, in evaluation mode and detached from this object.

        Where channels are masked it is nn.Sequential(featurizer, classifier): `deploy.shrink` takes them out of that.
        """
        raise TypeError(f"{type(self).__name__} does not define export()")


def final_step_of(algorithm: Algorithm) -> int | None:
    """What `final_step` says, unless a class further down has its own `at_final_compression` and none of it: None."""
    for owner in type(algorithm).__mro__:
        if "final_step" in vars(owner):
            return algorithm.final_step()
        if "at_final_compression" in vars(owner):
            return None
    return None


class Objective(nn.Module):
    """A training objective: turns minibatches into a loss. Its state, if any, is in buffers."""

    # Whether it runs the network on one environment at a time: BatchNorm then sees no differences between environments.
    domain_by_domain = False
    # Whether it mixes environments' samples with each other into batches of the size of one.
    mixes_environments = False

    def __init__(self, hparams: Mapping[str, Any], num_domains: int) -> None:
        super().__init__()
        self.hparams = dict(hparams)
        self.num_domains = num_domains

    def loss(self, algorithm: ObjectiveAlgorithm, minibatches: Minibatches) -> tuple[Tensor, dict[str, float]]:
        """The loss to minimise and the numbers to log; `loss` among them."""
        raise TypeError(f"{type(self).__name__} does not define loss(algorithm, minibatches)")

    def wants_fresh_optimizer(self) -> bool:
        """True where this step's jump in gradient magnitude would mislead the optimizer's statistics."""
        return False

    def finish_step(self) -> None:
        """Called after the optimizer's step."""


class ObjectiveAlgorithm(Algorithm):
    """A featurizer and a classifier trained with an objective by Adam.

    `featurizer`, `classifier`, `network` and `optimizer` are DomainBed's attributes, under its names. The objective
    is the class attribute `objective_name`, or the hparam `objective` where a subclass leaves that open.
    """

    objective_name: str | None = None

    @property
    def domain_by_domain(self) -> bool:
        return self.objective.domain_by_domain

    def images_at_once(self, batch_size: int) -> int:
        return batch_size if self.objective.mixes_environments else super().images_at_once(batch_size)

    def __init__(
        self, input_shape: tuple[int, ...], num_classes: int, num_domains: int, hparams: Mapping[str, Any]
    ) -> None:
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.featurizer = networks.make_featurizer(self.input_shape, self.hparams)
        self.classifier = networks.make_classifier(
            self.featurizer.n_outputs, num_classes, self.hparams["nonlinear_classifier"]
        )
        self.network = nn.Sequential(self.featurizer, self.classifier)
        self.change_network()
        self.optimizer = self.make_optimizer()
        info = registry.get_objective(self.objective_name or self.hparams["objective"])
        self.objective: Objective = info.cls(self.hparams, num_domains)

    def change_network(self) -> None:
        """Called once featurizer and classifier are made, before the optimizer is: a method may add layers here."""

    def make_optimizer(self) -> torch.optim.Optimizer:
        """A new Adam over the network's parameters, as DomainBed's ERM makes it."""
        return torch.optim.Adam(
            self.network.parameters(), lr=self.hparams["lr"], weight_decay=self.hparams["weight_decay"]
        )

    def update(self, minibatches: Minibatches, unlabeled: Sequence[Tensor] | None = None) -> dict[str, float]:
        loss, metrics = self.compute_loss(minibatches)
        if self.objective.wants_fresh_optimizer():
            self.optimizer = self.make_optimizer()
        self.optimizer.zero_grad()
        loss.backward()
        self.after_backward()
        self.optimizer.step()
        self.objective.finish_step()
        return metrics

    def compute_loss(self, minibatches: Minibatches) -> tuple[Tensor, dict[str, float]]:
        """The loss of a step and the numbers to log: the objective's. A method may add to it."""
        return self.objective.loss(self, minibatches)

    def features(self, x: Tensor) -> Tensor:
        """Features [N, D] of images, as `classify` takes them."""
        return self.featurizer(x)

    def classify(self, features: Tensor) -> Tensor:
        """Logits [N, num_classes] of features."""
        return self.classifier(features)

    def after_backward(self) -> None:
        """Called between backward and the optimizer's step, where gradients can be read or changed."""

    def predict(self, x: Tensor) -> Tensor:
        return self.network(x)

    def deployed_parameters(self) -> dict[str, Tensor]:
        return {
            name: value for name, value in self.named_parameters() if name.startswith(("featurizer.", "classifier."))
        }

    def export(self) -> nn.Module:
        return copy.deepcopy(self.network).eval()


class AnnealedObjective(Objective):
    """An objective whose penalty weighs 1 until a given step and `lambda` afterwards; Adam restarts there."""

    weight_hparam: str
    anneal_hparam: str
    update_count: Tensor

    def __init__(self, hparams: Mapping[str, Any], num_domains: int) -> None:
        super().__init__(hparams, num_domains)
        self.register_buffer("update_count", torch.tensor([0]))

    def penalty_weight(self) -> float:
        annealed = int(self.update_count) >= self.hparams[self.anneal_hparam]
        return self.hparams[self.weight_hparam] if annealed else 1.0

    def wants_fresh_optimizer(self) -> bool:
        return int(self.update_count) == self.hparams[self.anneal_hparam]

    def finish_step(self) -> None:
        self.update_count += 1


def split_logits(logits: Tensor, minibatches: Minibatches) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits of the concatenated minibatches, cut into (logits, labels) per environment."""
    for part, (_, y) in zip(logits.split([len(x) for x, _ in minibatches]), minibatches):
        yield part, y
