"""Which samples seem to rest on a spurious attribute: those of low loss.

Why a loss below the domain's mean flags them. If an attribute predicts the label with probability p_s in a domain and
the invariant features do with p_i < p_s, a model trained for a while rests on the attribute: its loss is near -log p_s
where attribute and label agree and far above where they do not. The mean loss lies between and separates them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_sfp.algorithms.base import Minibatches
from domainbed_sfp.core.errors import UserError

# A flagged share outside this range gives no contrast between flagged and unflagged samples.
CONTRAST = (0.05, 0.98)
# What is kept of each domain, its mean losses under the reference and its flagged share, forgets with this factor.
DECAY = 0.97


class Flags(nn.Module):
    """Flags samples by their loss under the reference, and keeps what is needed of earlier ones.

    Args:
        domains, classes: how many training domains and classes there are.
        hparams: `flag_policy`, `flag_kappa` and `flag_threshold` are read.
    """

    loss_sums: Tensor
    loss_counts: Tensor
    flag_counts: Tensor

    def __init__(self, domains: int, classes: int, hparams: Mapping[str, Any]) -> None:
        super().__init__()
        self.policy: str = hparams["flag_policy"]
        self.kappa: float = hparams["flag_kappa"]
        self.by_class = hparams["flag_threshold"] == "class"
        # Decayed sums over the samples of a domain and class: losses, samples, flagged samples.
        for name in ("loss_sums", "loss_counts", "flag_counts"):
            self.register_buffer(name, torch.zeros(domains, classes))
        self.warned: set[int] = set()

    @torch.no_grad()
    def flag(self, logits: Tensor, minibatches: Minibatches) -> tuple[list[Tensor], dict[str, float]]:
        """(bool [N] per domain, numbers to log) from the reference's logits [sum of N, K] of all samples.

        Raises UserError for the policy "oracle" where the data set does not know its aligned samples.
        """
        flags, metrics = [], {}
        for domain, (part, batch) in enumerate(zip(logits.split([len(y) for _, y in minibatches]), minibatches)):
            losses = F.cross_entropy(part, batch[1], reduction="none")
            members = F.one_hot(batch[1], self.loss_sums.shape[1]).to(losses.dtype)
            _follow(self.loss_sums[domain], losses @ members)
            _follow(self.loss_counts[domain], members.sum(0))
            thresholds = self.thresholds(domain)[batch[1]]
            truth: Tensor | None = getattr(batch, "aligned", None)
            flagged = self._chosen(losses < thresholds, truth)
            _follow(self.flag_counts[domain], flagged.to(losses.dtype) @ members)
            flags.append(flagged)
            metrics[f"flagged_domain{domain}"] = flagged.float().mean().item()
            metrics[f"flag_threshold_domain{domain}"] = thresholds.mean().item()
            if truth is not None:
                metrics.update(_quality(flagged, truth.to(flagged.device), domain))
        return flags, metrics

    def thresholds(self, domain: int) -> Tensor:
        """[K]: below which loss a sample of the domain and class is flagged, kappa times the mean loss of the domain
        (or of the class in it; a class not seen yet has the domain's)."""
        sums, counts = self.loss_sums[domain], self.loss_counts[domain]
        means = (sums.sum() / counts.sum()).expand_as(sums)
        if self.by_class:
            means = torch.where(counts > 0, sums / counts.clamp_min(1e-12), means)
        return self.kappa * means

    def has_contrast(self) -> Tensor:
        """Bool [D]: whether a domain has both flagged and unflagged samples, by its share of flagged ones of late."""
        shares = self._shares()
        return (shares >= CONTRAST[0]) & (shares <= CONTRAST[1])

    def warn_without_contrast(self, step: int) -> None:
        """Warns, once for each, of domains that have no contrast."""
        for domain, useful in enumerate(self.has_contrast().tolist()):
            if not useful and domain not in self.warned:
                self.warned.add(domain)
                warnings.warn(
                    f"SFP, step {step}: {float(self._shares()[domain]):.0%} of the samples of training domain {domain} "
                    "are flagged, which gives no contrast; statistics leave it out wherever that is so (told once)",
                    stacklevel=3,
                )

    def check_contrast(self) -> None:
        """Raises UserError where no domain has contrast."""
        if not self.has_contrast().any():
            raise UserError(
                f"SFP finds no contrast in any domain: the share of flagged samples is outside [{CONTRAST[0]}, "
                f"{CONTRAST[1]}] everywhere (flag_policy {self.policy!r}, flag_kappa {self.kappa}); train longer "
                "before pruning (prune_start) or change flag_kappa"
            )

    def _chosen(self, low: Tensor, truth: Tensor | None) -> Tensor:
        """What the policy flags, of samples whose loss is low: bool [N]."""
        if self.policy == "random":
            return low[torch.randperm(len(low)).to(low.device)]
        if self.policy == "loss":
            return low
        if truth is None:
            raise UserError("flag_policy 'oracle' needs a data set that knows its aligned samples")
        return truth.to(low.device)

    def _shares(self) -> Tensor:
        return self.flag_counts.sum(1) / self.loss_counts.sum(1)  # of nothing: nan, which is in no range


def _follow(total: Tensor, latest: Tensor) -> None:
    total.mul_(DECAY).add_(latest)


def _quality(flagged: Tensor, truth: Tensor, domain: int) -> dict[str, float]:
    """Precision and recall of the flags, where they are defined."""
    hits, metrics = (flagged & truth).sum().item(), {}
    if flagged.any():
        metrics[f"flag_precision_domain{domain}"] = hits / flagged.sum().item()
    if truth.any():
        metrics[f"flag_recall_domain{domain}"] = hits / truth.sum().item()
    return metrics
