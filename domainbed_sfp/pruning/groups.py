"""Which channels of a network belong together.

Removing a channel of a convolution touches everything that carries it: the normalization behind it, depthwise
convolutions, the layers that read it, and, across an addition, the other branch. Channels joined by an addition
are a residual stream, which stays whole unless asked.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.networks.introspection import LayerTracer
from domainbed_sfp.pruning.following import Follower


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that live and die together. Parameters are named as `algorithm.named_parameters()` names them.

    name: of the layer that produces them first, such as `featurizer.conv1`.
    channels: how many there are.
    filters: weights [channels, ...] of the convolutions that produce or carry them, and of gates; the producer's first.
    vectors: biases and normalization weights [channels].
    readers: weights [out, channels * k, ...] of the layers that read them, in the order of the network; k numbers of
        each channel, channel by channel, behind a flattened map, else k = 1.
    is_residual: whether additions join several layers that produce them: a residual stream.
    """

    name: str
    channels: int
    filters: tuple[str, ...]
    vectors: tuple[str, ...]
    readers: tuple[str, ...]
    is_residual: bool = False


def channel_groups(
    featurizer: nn.Module, classifier: nn.Module, method: str = "features", residual_streams: bool = False
) -> list[ChannelGroup]:
    """The groups of channels that structured pruning may remove, in the order of the network.

    Args:
        featurizer: the network body; its `method` is traced. Parameter names get the prefix `featurizer.`.
        classifier: reads the features; its first linear layer is the reader of the last channels.
        residual_streams: whether residual streams are among them.

    Raises:
        UserError: if the network cannot be traced, or holds no channel that may be removed.
    """
    graph = _trace(featurizer, method)
    follower = Follower(featurizer, graph)
    for node in graph.nodes:
        follower.visit(node)
    follower.read_output(classifier)
    groups = [
        ChannelGroup(s.name, s.channels or 0, tuple(s.filters), tuple(s.vectors), tuple(s.readers), s.is_residual)
        for s in follower.streams()
        if s.filters and not s.whole and s.readers and (residual_streams or not s.is_residual)
    ]
    if not groups:
        raise UserError(f"{type(featurizer).__name__} has no channels that pruning could remove")
    return groups


def layers_in_order(featurizer: nn.Module, method: str = "features") -> list[str]:
    """The names of the layers of `featurizer`, in the order of their calls. UserError if it cannot be traced."""
    return [str(node.target) for node in _trace(featurizer, method).nodes if node.op == "call_module"]


def _trace(featurizer: nn.Module, method: str) -> fx.Graph:
    try:
        return LayerTracer(method).trace(featurizer)
    except Exception as error:
        raise UserError(
            f"granularity 'channel' needs a network that torch.fx can trace, and {type(featurizer).__name__} is not "
            f"({type(error).__name__}: {error}); choose another backbone or, if the method has it, granularity 'weight'"
        ) from error
