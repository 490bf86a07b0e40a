"""What flagged and unflagged samples of a class do differently in a layer: SFP's statistics and directions.

All of this is this project's reconstruction (see `algorithms/sfp`). Statistics are conditional on the class: a
spurious attribute is as frequent among flagged as among unflagged samples, only its agreement with the label differs,
so statistics that pool the classes cannot see it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Averages forget with this factor at every update.
DECAY = 0.97

# A feature whose variance is below this share of its second moment is constant, but for rounding.
CONSTANT = 1e-6

# A feature that has been constant within as many updates is dead: averages take hundreds to forget that it once varied.
DEAD_UPDATES = 10

# How much more than by chance flagged and unflagged samples must differ along a direction.
CHANCE_FACTOR = 3.0


class ConditionalMoments(nn.Module):
    """Running moments of a vector, by class and by flag.

    Args:
        num_classes: K.
        features: D, length of the vectors.
        with_energy: also keep the second moment over all samples, [D, D], which `spurious_directions` needs.
    """

    counts: Tensor
    sums: Tensor
    squares: Tensor
    energy: Tensor
    idle: Tensor

    def __init__(self, num_classes: int, features: int, with_energy: bool = False) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(2, num_classes))
        self.register_buffer("sums", torch.zeros(2, num_classes, features))
        self.register_buffer("squares", torch.zeros(2, num_classes, features))
        self.register_buffer("energy", torch.zeros(features, features) if with_energy else torch.zeros(0))
        # Updates since the feature last differed between samples.
        self.register_buffer("idle", torch.zeros(features))

    @torch.no_grad()
    def update(self, vectors: Tensor, labels: Tensor, flags: Tensor) -> None:
        """Takes in vectors [N, D] with labels [N] and flags [N] (bool)."""
        cells = flags.long() * self.counts.shape[1] + labels
        members = nn.functional.one_hot(cells, self.counts.numel()).to(vectors.dtype)
        for total, values in (
            (self.counts, members.sum(0)),
            (self.sums, members.t() @ vectors),
            (self.squares, members.t() @ vectors.square()),
        ):
            total.mul_(DECAY).add_(values.view_as(total))
        if self.energy.numel():
            self.energy.mul_(DECAY).add_(vectors.t() @ vectors)
        varies = vectors.var(0, correction=0) > CONSTANT * vectors.square().mean(0)
        self.idle.add_(1).masked_fill_(varies, 0)

    def contrast(self) -> tuple[Tensor, Tensor]:
        """(d [K, D], w [K]): d_y = E[z | y, flagged] - E[z | y, unflagged], weighted by n1 n0 / (n1 + n0), which is
        zero for a class seen on one side only."""
        means = self.sums / self.counts.clamp_min(1e-6)[..., None]
        unflagged, flagged = self.counts
        weights = flagged * unflagged / (flagged + unflagged).clamp_min(1e-6)
        return means[1] - means[0], weights

    def class_means(self) -> Tensor:
        """[K', D]: of each class seen on both sides, its mean with flagged and unflagged samples weighing the same, so
        that what agrees with the label in the ones and disagrees in the others cancels."""
        means = self.sums / self.counts.clamp_min(1e-6)[..., None]
        return means.mean(0)[(self.counts > 0).all(0)]

    def within_class_variance(self) -> Tensor:
        """Variance within the cells of class and flag, pooled over them: [D]."""
        means = self.sums / self.counts.clamp_min(1e-6)[..., None]
        spread = (self.squares - self.counts[..., None] * means.square()).sum((0, 1))
        return spread.clamp_min(0) / self.counts.sum().clamp_min(1e-6)

    def within_class_covariance(self) -> Tensor:
        """Covariance within the cells of class and flag, pooled over them: [D, D]; needs `with_energy`."""
        means = self.sums / self.counts.clamp_min(1e-6)[..., None]
        cells = (self.counts[..., None] * means).flatten(0, 1)
        return (self.energy - cells.t() @ means.flatten(0, 1)) / self.counts.sum().clamp_min(1e-6)

    def spuriousness(self) -> Tensor:
        """sum_y w_y d_y^2 / within-class variance, per feature [D]: how well the feature tells flagged from unflagged
        samples of the same class.

        A feature that is constant, as a channel is that never fires or no longer does, tells no class from another
        either: it comes before all others, with the largest finite number.
        """
        difference, weights = self.contrast()
        between = (weights[:, None] * difference.square()).sum(0) / weights.sum().clamp_min(1e-6)
        variance = self.within_class_variance()
        second_moment = self.squares.sum((0, 1)) / self.counts.sum().clamp_min(1e-6)
        # The floor keeps what hardly varies from dividing by next to nothing.
        ratio = between / (variance + 1e-4 * variance.mean() + 1e-12)
        constant = (self._total_variance() <= CONSTANT * second_moment) | (self.idle >= DEAD_UPDATES)
        return ratio.masked_fill(constant, torch.finfo(ratio.dtype).max)

    def _total_variance(self) -> Tensor:
        """Variance over all samples: [D]."""
        count = self.counts.sum().clamp_min(1e-6)
        return self.squares.sum((0, 1)) / count - (self.sums.sum((0, 1)) / count).square()


def spurious_directions(
    moments: ConditionalMoments, rank_fraction: float, keep_energy: float, spare_classes: bool = False
) -> Tensor:
    """Orthonormal directions [k, D] along which flagged and unflagged samples of a class differ most.

    The right singular vectors of the matrix with rows sqrt(w_y) d_y, the first max(1, round(rank_fraction * min(K - 1,
    D))) of them, taken in order of singular value while the layer's input keeps at least `keep_energy` of its energy
    without them: a layer whose inputs are collinear would be wiped out otherwise. Never all D of them, and none along
    which flagged and unflagged samples differ no more than any two halves of a class would (`_beyond_chance`).

    With `spare_classes` the rows d_y are first cleared of the directions in which the class means differ from each
    other: flagged samples may differ from others of their class just in how clearly they show it, and without these
    directions the layer could not tell the classes apart.
    """
    difference, weights = moments.contrast()
    num_classes, features = difference.shape
    rank = min(max(1, round(rank_fraction * min(num_classes - 1, features))), features - 1)
    scale = torch.linalg.matrix_norm(difference)
    if spare_classes:
        means = moments.class_means()
        _, sizes, kept = torch.linalg.svd(means - means.mean(0), full_matrices=False)
        kept = kept[sizes > 1e-6 * sizes.max()] if len(sizes) else kept
        difference = difference - difference @ kept.t() @ kept
    if torch.linalg.matrix_norm(difference) <= 1e-5 * scale:
        return difference.new_zeros(0, features)
    _, values, directions = torch.linalg.svd(weights.sqrt()[:, None] * difference, full_matrices=False)
    total = moments.energy.diagonal().sum()
    accepted: list[Tensor] = []
    removed = torch.zeros_like(total)
    is_clear = _beyond_chance(moments, weights, difference, directions)
    for value, direction, clear in zip(values[:rank], directions[:rank], is_clear.tolist()):
        if not clear:
            break
        removed = removed + direction @ moments.energy @ direction
        if value <= 1e-6 * values[0] or total - removed < keep_energy * total:
            break
        accepted.append(direction)
    return torch.stack(accepted) if accepted else directions.new_zeros(0, features)


def _beyond_chance(moments: ConditionalMoments, weights: Tensor, difference: Tensor, directions: Tensor) -> Tensor:
    """Bool [k]: whether samples with flag and without differ more along a direction than they would by chance.

    Where flags mean nothing, each of the K classes' w_y (d_y p)^2 / (p S p) is a squared standard normal (S: covariance
    within the cells of class and flag); along the best of about r directions in which samples vary, r = (tr S)^2 / tr
    S^2, their sum comes to about (sqrt K + sqrt r)^2. CHANCE_FACTOR times that is asked for. Otherwise a direction is
    taken however little there is to see, and in an input that varies along one line only it is always the right one.
    """
    classes = int((weights > 0).sum())
    within = moments.within_class_covariance()
    told = (weights[:, None] * (difference @ directions.t()).square()).sum(0)
    spread = torch.einsum("kc,cd,kd->k", directions, within, directions)
    size = within.diagonal().sum()
    varying = size.square() / within.square().sum().clamp_min(1e-30)
    return told > CHANCE_FACTOR * (classes**0.5 + varying.sqrt()).square() * spread.clamp_min(1e-6 * size)


def remove_directions(weight: Tensor, directions: Tensor) -> Tensor:
    """W (I - P P^T) over the input channels of a convolution's weight [out, in, kh, kw], or a linear layer's [out, in];
    P^T = `directions` [k, in]."""
    along = torch.einsum("kc,oc...->ok...", directions, weight)
    return weight - torch.einsum("kc,ok...->oc...", directions, along)
