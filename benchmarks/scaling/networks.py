"""The costs of collective operations: interconnects, and formulas in latency and bandwidth.

The formulas are those of Thakur, Rabenseifner and Gropp 2005 (Optimization of collective communication operations in
MPICH, doi:10.1177/1094342005051521), with n ranks, a latency per message and a time per byte:

- all-gather and reduce-scatter in a ring: (n - 1) latency + (n - 1) / n · bytes / bandwidth (sections 4.1 and 4.2);
- all-reduce of a large message: a reduce-scatter and an all-gather (section 4.5, Rabenseifner's, here in rings);
- all-reduce of a small message, by recursive doubling: log2(n) (latency + bytes / bandwidth) (section 4.5);
- all-reduce between many nodes, in two trees, up and down: 2 (log2(n) latency + bytes / bandwidth) (Sanders, Speck and
  Träff 2009, doi:10.1016/j.parco.2009.09.001; NCCL has it).

The arithmetic of a reduction is left out: it is far faster than the network.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from slidescale.engine.errors import ConfigError


@dataclass(frozen=True)
class Link:
    """The connection between a rank and its neighbour.

    Attributes:
        latency: per message, s.
        bandwidth: bytes/s in one direction, per rank.
    """

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Network:
    """Ranks in nodes.

    Attributes:
        per_node: ranks per node.
        inside: between ranks of a node.
        across: between nodes, per rank.
        start: seconds to start any operation.
        measured: links inside a node by operation ("all-reduce", "all-gather", "reduce-scatter"), where each operation
            was measured by itself.
    """

    name: str
    per_node: int
    inside: Link
    across: Link
    start: float = 0.0
    measured: Mapping[str, Link] = field(default_factory=dict)

    def seconds(self, operation: str, ranks: int, size: float) -> float:
        """Compute the seconds of one operation.

        With several nodes, each rank communicates with the ranks of its own number in other nodes. A reduce-scatter
        inside the node comes before that, and an all-gather inside the node comes after it.

        Args:
            operation: "all-reduce", "all-gather" or "reduce-scatter".
            size: bytes of the whole: what is reduced, or is there after the gather.

        Raises:
            ValueError: ranks do not fill their nodes.
        """
        if ranks == 1:
            return 0.0
        inner = min(ranks, self.per_node)
        if ranks % inner:
            raise ValueError(f"{ranks} ranks do not fill nodes of {inner}")
        nodes, link = ranks // inner, self.measured.get(operation, self.inside)
        inside, across = _ring(inner, size, link), _ring(nodes, size / inner, self.across)
        if operation != "all-reduce":
            return self.start + inside + across
        much = 2 * inside + 2 * min(across, _tree(nodes, size / inner, self.across))
        little = _doubling(inner, size, link) + _doubling(nodes, size, self.across)
        return self.start + min(much, little)


def _ring(n: int, size: float, link: Link) -> float:
    """Compute the seconds of an all-gather or a reduce-scatter in a ring."""
    return (n - 1) * link.latency + (n - 1) / n * size / link.bandwidth


def _doubling(n: int, size: float, link: Link) -> float:
    """Compute the seconds of an all-reduce of a small message."""
    return math.ceil(math.log2(n)) * (link.latency + size / link.bandwidth)


def _tree(n: int, size: float, link: Link) -> float:
    """Compute the seconds of a reduction or a broadcast in pieces, which follow each other through two trees."""
    return math.ceil(math.log2(n)) * link.latency + (size / link.bandwidth if n > 1 else 0.0)


# NCCL's own model of its protocol Simple (src/graph/tuning.cc of version 2.2x): seconds to start an operation, and per
# hop of a ring over NVLink, PCIe and a network.
NCCL_START = 8.4e-6
NVLINK_HOP, PCIE_HOP, NETWORK_HOP = 3.4e-6, 5.7e-6, 14e-6

NETWORKS = {
    network.name: network
    for network in (
        # NVIDIA DGX A100 datasheet (2020): 8 GPUs, NVLink 600 GB/s both ways together, 8 × 200 Gb/s InfiniBand.
        Network("dgx-a100", 8, Link(NVLINK_HOP, 300e9), Link(NETWORK_HOP, 25e9), NCCL_START),
        # NVIDIA DGX H100 datasheet (2023): 8 GPUs, NVLink 900 GB/s both ways together, 8 × 400 Gb/s InfiniBand.
        Network("dgx-h100", 8, Link(NVLINK_HOP, 450e9), Link(NETWORK_HOP, 50e9), NCCL_START),
        # NVIDIA DGX B200 datasheet (2024): 8 GPUs, NVLink 1.8 TB/s both ways together, 8 × 400 Gb/s InfiniBand.
        Network("dgx-b200", 8, Link(NVLINK_HOP, 900e9), Link(NETWORK_HOP, 50e9), NCCL_START),
        # A server as many laboratories have (an assumption, not from a data sheet): 8 GPUs on PCIe 4.0 x16 with 32 GB/s
        # each, which share a network card of 100 Gb/s.
        Network("pcie-100g", 8, Link(PCIE_HOP, 32e9), Link(NETWORK_HOP, 12.5e9 / 8), NCCL_START),
    )
}


def find_network(name: str) -> Network:
    """Look up a network by its name, in any case.

    Raises:
        ConfigError: there is none of that name; lists all names.
    """
    if name.lower() in NETWORKS:
        return NETWORKS[name.lower()]
    raise ConfigError(f"--network is {name!r}: must be one of {', '.join(NETWORKS)}")
