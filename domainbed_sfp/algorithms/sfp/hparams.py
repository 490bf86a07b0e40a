"""What can be set of SFP, and what is decided where it is left open."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from domainbed_sfp.algorithms.pruning.scheduled import PRUNING_HPARAMS
from domainbed_sfp.core.hparam import NOT_NEGATIVE, POSITIVE, Hparam, Range, one_of
from domainbed_sfp.networks import SMALL_IMAGE_SIDE

# A layer's input keeps this share of its energy: one whose channels are collinear would be wiped out otherwise.
REMOVAL_ENERGY = 0.2
# Steps between two updates of flags and statistics: only directions and scores are made of them, and these move slowly.
STATISTICS_EVERY = 4
# Fraction of the run between two renewals of the directions: 50 steps of a thousand.
REFRESH = 0.05

HPARAMS = {
    **{name: PRUNING_HPARAMS[name] for name in ("sparsity", "pruning_scope", "prune_start", "prune_end")},
    "flag_policy": Hparam(
        "loss",
        doc="loss: below the threshold; random: as many at random; oracle: the truth",
        valid=one_of("loss", "random", "oracle"),
    ),
    "flag_kappa": Hparam(
        1.0, lambda r: r.choice([0.75, 1.0]), "flagged below kappa times the domain's mean loss", valid=POSITIVE
    ),
    "flag_threshold": Hparam(
        "environment",
        doc="mean loss of the environment, or of each class in it (class)",
        valid=one_of("environment", "class"),
    ),
    "removal": Hparam(
        "hard", doc="hard: project weights; soft: penalise the projection; none", valid=one_of("hard", "soft", "none")
    ),
    "removal_layers": Hparam(
        "auto",
        doc="first, last (quarter), all; auto: first, or last where pretrained",
        valid=one_of("auto", "first", "last", "all"),
    ),
    "removal_rank": Hparam(
        0.6,
        lambda r: r.choice([0.4, 0.6, 0.8]),
        "share of the possible directions removed: of one less than there are classes, or of the layer's inputs where "
        "those are fewer, but never of all inputs (of three colours 1 or 2)",
        valid=Range("a share in (0, 1]", lambda value: 0 < value <= 1),
    ),
    "removal_vectors": Hparam(
        "auto",
        doc="what directions are found among: relative (a layer's channel means, of length 1), absolute (as they are); "
        "auto: the first where images are not normalised (digits) and nothing is pretrained, else the second",
        valid=one_of("auto", "relative", "absolute"),
    ),
    "removal_strength": Hparam(10.0, lambda r: 10 ** r.uniform(0, 3), "weight of the soft penalty", valid=NOT_NEGATIVE),
    "channel_score": Hparam(
        "auto",
        doc="class_conditional; taylor; unflagged: what a channel does for unflagged samples; auto: the first, or the "
        "second where pretrained",
        valid=one_of("auto", "class_conditional", "taylor", "unflagged"),
    ),
    "risk_weight": Hparam(1.0, doc="weight of unflagged samples in the risk; 1 weighs all alike", valid=POSITIVE),
}

# What earlier records name: the one value that it has now.
RETIRED = {
    "granularity": "channel",
    "objective": "ERM",
    "prune_residual_streams": False,
    "removal_energy": REMOVAL_ENERGY,
    "removal_spares": "nothing",
    "statistics_every": STATISTICS_EVERY,
    "refresh": REFRESH,
    "reconstruction": "none",
}


def choices(hparams: Mapping[str, Any], is_pretrained: bool, image_size: int) -> dict[str, str]:
    """What the hparams `removal_layers`, `removal_vectors` and `channel_score` are where they say "auto", for images of
    `image_size` pixels a side; what else they say stays.

    Of a pretrained network the last layers: taking directions out of all of them costs what it knows (25 points on
    PACS). And Taylor's score: the contrast alone takes channels that it cannot do without (15 points there, in domain).

    How much ink a digit has differs between flagged and unflagged samples, too, and would tilt directions away from an
    axis of colour: vectors are relative. Behind many layers lengths are part of what a pretrained network knows, and
    photographs are normalised: their origin is grey, and scaling would tell light from dark all the more.
    """
    is_raw = image_size <= SMALL_IMAGE_SIDE
    usual = {
        "removal_layers": "last" if is_pretrained else "first",
        "removal_vectors": "relative" if is_raw and not is_pretrained else "absolute",
        "channel_score": "taylor" if is_pretrained else "class_conditional",
    }
    return {name: value if hparams[name] == "auto" else hparams[name] for name, value in usual.items()}
