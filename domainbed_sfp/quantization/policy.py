"""Which bit-width a layer takes for a sample: a small network that looks at the layer's input."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What a policy chooses from.
WIDTHS = (2, 3, 4, 5, 6, 8)

HIDDEN_UNITS = 16
# Bounds of log sigma: a policy narrower or wider than these no longer learns from what it draws.
LOG_SIGMA_RANGE = (-2.0, 1.5)

# Running statistics of the pooled input take this share of a batch's. Beyond the reach, in standard deviations,
# training tells nothing of what to choose.
STATISTICS_MOMENTUM = 0.1
STATISTICS_REACH = 5.0
# Added to a variance: so much of the squared mean, and so much outright. A channel that varies less is as good as
# constant, and its rounding errors must not decide anything.
VARIANCE_FLOOR = (1e-6, 1e-10)


@dataclass(frozen=True)
class Choice:
    """What a policy decided for N samples.

    index: int64 [N], positions in WIDTHS. mean: [N], mu in bits, without the shift. log_probabilities: [N, widths].
    coefficient: [N], ones that carry the gradient of the choice, or None where nothing is learned.
    """

    index: Tensor
    mean: Tensor
    log_probabilities: Tensor
    coefficient: Tensor | None


class Policy(nn.Module):
    """P(b) ~ exp(-(b - mu)^2 / 2 sigma^2) over WIDTHS; (mu, log sigma) of a layer's pooled input by two linear layers.

    The input is cut off from the gradient: the policy reads features and does not shape them. Pooled features hardly
    differ from sample to sample beside their mean; they are therefore standardised, by running statistics of the
    training batches. The output layer starts at zero, so that all samples begin at mu = `start` and sigma = 1, unless
    `begin` says otherwise.

    Args:
        features: channels of the layer's input.
        reads_input: False gives the same network a constant input: one distribution for all samples.
        channels_last: whether channels come last in the layer's input, as a linear layer has them.
    """

    pooled_mean: Tensor
    pooled_variance: Tensor
    start: Tensor
    shift: Tensor
    allowed: Tensor
    bits: Tensor

    def __init__(self, features: int, reads_input: bool = True, channels_last: bool = False) -> None:
        super().__init__()
        self.channels_last = channels_last
        self.features = features
        self.reads_input = reads_input
        self.hidden = nn.Linear(features, HIDDEN_UNITS)
        self.output = nn.Linear(HIDDEN_UNITS, 2)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        self.register_buffer("pooled_mean", torch.zeros(features))
        # All zero until the first batch has come.
        self.register_buffer("pooled_variance", torch.zeros(features))
        self.register_buffer("bits", torch.tensor([float(b) for b in WIDTHS]), persistent=False)
        self.register_buffer("start", torch.tensor(8.0))
        # Of evaluation alone, found by calibration: what is added to mu, and the widths that are stored.
        self.register_buffer("shift", torch.tensor(0.0))
        self.register_buffer("allowed", torch.ones(len(WIDTHS), dtype=torch.bool))

    @torch.no_grad()
    def begin(self, mean: float, sigma: float) -> None:
        """Puts all samples at this distribution."""
        self.start.fill_(mean)
        self.output.bias.copy_(torch.tensor([0.0, math.log(sigma)]))

    def distribution(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """mu [N] and log sigma [N] for a layer's input [N, C, H, W] or [N, C]; with `channels_last`, [N, ..., C]."""
        read = (
            self._standardised(self._pooled(x)) if self.reads_input else torch.ones(1, self.features, device=x.device)
        )
        with torch.autocast(x.device.type, enabled=False):  # bf16 would round the widths, and many would tie
            mean, log_sigma = self.output(F.relu(self.hidden(read))).unbind(1)
        mean, log_sigma = self.start + mean, _Bounded.apply(log_sigma)
        return mean.expand(len(x)), log_sigma.expand(len(x))

    def _pooled(self, x: Tensor) -> Tensor:
        x = x.detach().float()
        if x.dim() == 2:
            return x
        return x.flatten(1, -2).mean(1) if self.channels_last else x.flatten(2).mean(2)

    def _standardised(self, pooled: Tensor) -> Tensor:
        relative, outright = VARIANCE_FLOOR
        variance = self.pooled_variance + relative * self.pooled_mean.square() + outright
        scale = torch.where(self.pooled_variance.any(), variance, 1.0).rsqrt()
        return ((pooled - self.pooled_mean) * scale).clamp(-STATISTICS_REACH, STATISTICS_REACH)

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        """Takes a training batch into the running statistics, the first one whole."""
        if len(x) > 1:
            variance, mean = torch.var_mean(self._pooled(x), 0)
            share = torch.where(self.pooled_variance.any(), STATISTICS_MOMENTUM, 1.0)
            self.pooled_mean.lerp_(mean, share)
            self.pooled_variance.lerp_(variance, share)

    def sample(self, x: Tensor, independent: bool = False) -> Choice:
        """Draws a width for every sample, with `common_uniforms` or independently; see `straight_through`.

        Of training steps alone: the running statistics follow x.
        """
        if self.reads_input:
            self._follow(x)
        mean, log_sigma = self.distribution(x)
        logs = log_probabilities(mean, log_sigma, self.bits)
        uniforms = torch.rand(len(x), device=x.device) if independent else common_uniforms(len(x), x.device)
        index, coefficient = straight_through(logs, uniforms)
        return Choice(index, mean, logs, coefficient)

    def settled(self, x: Tensor, shift: float) -> Choice:
        """The width nearest to mu + `shift`, of all there are, and no gradient for the policy.

        Of training steps alone: the running statistics follow x.
        """
        if self.reads_input:
            self._follow(x)
        return _nearest(self._undecided(x), self.bits, shift)

    def most_probable(self, x: Tensor) -> Choice:
        """The width nearest to mu + shift, which is the likeliest whatever sigma is; the lower of two equally near."""
        return self.nearest(self._undecided(x))

    def nearest(self, choice: Choice) -> Choice:
        """What `most_probable` would choose from the distribution of `choice`."""
        return _nearest(choice, self.bits.masked_fill(~self.allowed, torch.inf), self.shift)

    def _undecided(self, x: Tensor) -> Choice:
        mean, log_sigma = self.distribution(x)
        return Choice(torch.empty(0), mean, log_probabilities(mean, log_sigma, self.bits), None)


def _nearest(choice: Choice, widths: Tensor, shift: float | Tensor) -> Choice:
    """The widths nearest to the means of `choice` + shift, the lower of two that are equally near."""
    distance = (widths - (choice.mean.detach() + shift)[:, None]).abs()
    return Choice(distance.argmin(1), choice.mean, choice.log_probabilities, None)


class _Bounded(torch.autograd.Function):
    """log sigma clamped to its range. Beyond a bound, gradients whose descent leads back pass; none would under a plain
    clamp, and the budget, which is cheaper the narrower the policy, leads out."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        ctx.save_for_backward(values)
        return values.clamp(*LOG_SIGMA_RANGE)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (values,) = ctx.saved_tensors
        (gradient,) = gradients
        low, high = LOG_SIGMA_RANGE
        leads_out = ((values <= low) & (gradient > 0)) | ((values >= high) & (gradient < 0))
        return gradient.masked_fill(leads_out, 0.0)


def log_probabilities(mean: Tensor, log_sigma: Tensor, bits: Tensor) -> Tensor:
    """log P [N, K] of the widths `bits` [K] under the discretised Gaussians of mean and log sigma [N]."""
    return (-(((bits - mean[:, None]) / log_sigma.exp()[:, None]) ** 2) / 2).log_softmax(1)


def common_uniforms(count: int, device: torch.device) -> Tensor:
    """Numbers [count], each uniform on [0, 1), of only two values: a random half has u, the other 1 - u.

    Samples whose distributions are alike then draw the same width (common random numbers), so that a batch goes through
    a layer in two or three groups and not in one for every width there is; of two opposite draws one is rarely much
    like the other (antithetic variates). The draws of a batch depend on each other, each for itself has the
    distribution it should, and so has its gradient.
    """
    u = torch.rand((), device=device)
    return torch.where(torch.randperm(count, device=device) < count // 2, u, 1 - u)


def straight_through(logs: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """A draw k ~ P for each row of log P [N, K], and a coefficient [N] of value 1 that carries its gradient.

    uniforms: [N]; k is the first whose cumulative probability exceeds the row's number.

    The usual straight-through Gumbel estimator computes every branch and puts a one-hot vector in front of them that
    has the gradient of a relaxed sample y; that pays for all K branches. Only the drawn branch is computed here, so
    only the derivative of the loss by the coefficient of the drawn k is known. Two things follow.

    1. The coefficient must multiply the branch's quantization *error*, not its output. In sum_j y_j out_j what all
       branches share cancels, because the y_j sum to one. With one branch alone it would not cancel, and the policy
       would learn whether larger outputs help. So out_k counts as out + coefficient * (out_k - out), out being the
       result without quantization.
    2. The gradient of the coefficient is d log P(k), not dy_k. With r_k the derivative by the coefficient, E[r_k d log
       P(k)] = sum_k r_k dP(k): the gradient of the expected loss, exactly, as far as the loss is linear in the errors.
       E[r_k dy_k] over the drawn k alone is far from it: for six widths about a quarter of it at temperature 1, which
       doubling makes a half, and at low temperature, where the doubled one approaches it, its variance is many times as
       large. So no relaxation temperature is left. The tests enumerate the expectation.
    """
    cumulative = logs.detach().exp().cumsum(1)
    index = (cumulative[:, :-1] <= uniforms[:, None]).sum(1)
    drawn = logs.gather(1, index[:, None]).squeeze(1)
    return index, 1 + drawn - drawn.detach()


def reinforce(log_probability: Tensor, reward: Tensor) -> Tensor:
    """The loss whose gradient is REINFORCE's (Williams 1992) for log P(choices) [N] and rewards [N].

    The baseline of a sample is the mean reward of the *others*, which leaves the estimator unbiased where choices are
    independent; with a single sample there is none.
    """
    reward = reward.detach()
    if len(reward) > 1:
        reward = (reward - reward.mean()) * (len(reward) / (len(reward) - 1))
    return -(reward * log_probability).mean()
