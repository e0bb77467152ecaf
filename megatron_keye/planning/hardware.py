"""Rates of the machines that are planned for, with where each figure comes from, and the time that work takes at them.

Peaks are the makers'; what is reached of them is measured where it says so and assumed elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from megatron_keye.errors import UserError
from megatron_keye.planning.ledger import Sent, Work

GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """Rates of one GPU in FLOP/s, bytes/s and seconds.

    `unhidden`: the share of the time of memory-bound kernels and exchanges that is seen, 1 where kernels are not fused and
    exchanges are waited for, as in our trainer; what a fit to another's run finds.
    """

    name: str
    memory: int  # bytes that a process can have
    matrix: float  # bf16 matrix products
    attention: float  # products inside attention kernels, counted as issued
    scores: float  # the indexer's
    copy: float  # bytes read and written
    nvlink: float  # bytes/s that one GPU sends while it receives as many
    network: float  # the same, by its own network card
    launch: float  # the host's time for one kernel: the device waits where kernels are shorter
    latency: float  # of one collective
    gpus_per_node: int = 8
    unhidden: float = 1.0

    @property
    def peak(self) -> float:
        """bf16, dense: what MFU is counted against (NVIDIA's data sheets)."""
        return 989e12


# H200: data sheet 989 TFLOP/s bf16, 4.8 TB/s; measured on one: 770-800 TFLOP/s on products of 8192^3, copies 4.3 TB/s.
# Attention 325 and the indexer 450 TFLOP/s: assumed of our Triton kernels (a model of their tiles, not yet a measurement).
# NVLink 4: 450 GB/s each way, network 400 Gb/s a GPU; of both 75 % assumed. Launch and latency assumed.
H200 = Hardware(
    "H200", int(139.8 * GIB), 770e12, 325e12, 450e12, 4.3e12, 337e9, 37e9, launch=6e-6, latency=20e-6
)  # fmt: skip
# H100 SXM: data sheet 989 TFLOP/s bf16, 3.35 TB/s; reached shares as on the H200.
H100 = replace(H200, name="H100", memory=int(79.1 * GIB), copy=3.0e12)
MACHINES = {machine.name.lower(): machine for machine in (H100, H200)}


def machine(name: str) -> Hardware:
    if name.lower() not in MACHINES:
        raise UserError(f"machine {name!r} is not known; choose one of {', '.join(MACHINES)}")
    return MACHINES[name.lower()]


def compute_seconds(hw: Hardware, work: Counter[Work]) -> float:
    """Kernels one after another, each as slow as its products or its memory traffic, none faster than it is launched."""
    rates = {"matrix": hw.matrix, "attention": hw.attention, "scores": hw.scores, "memory": hw.matrix}
    seconds = 0.0
    for w, n in work.items():
        moving, computing = max(w.bytes / hw.copy, hw.launch), w.flops / rates[w.kind]
        seconds += n * (computing if computing > moving else hw.unhidden * moving)
    return seconds


# Of `Sent.bytes`, the larger side: what passes a GPU's links, per rank of n. An all-reduce is a scatter and a gather.
PASSES = {"allreduce": 2.0, "send": 1.0, "recv": 0.0, "broadcast": 1.0}


def collective_seconds(
    hw: Hardware, sent: Counter[Sent], place: Callable[[Sent], tuple[int, ...]] = lambda s: s.ranks
) -> float:
    """`place` says which global ranks take part."""
    return sum(n * one_collective(hw, s, place(s)) for s, n in sent.items())


def one_collective(hw: Hardware, sent: Sent, ranks: tuple[int, ...]) -> float:
    nvlink, network = link_bytes(hw, sent, ranks)
    return hw.unhidden * (hw.latency + max(nvlink / hw.nvlink, network / hw.network))


def link_bytes(hw: Hardware, sent: Sent, ranks: tuple[int, ...]) -> tuple[float, float]:
    """Bytes that one rank passes over NVLink and over its network card."""
    nodes = Counter(rank // hw.gpus_per_node for rank in ranks)
    passes, n, local = PASSES.get(sent.what, 1.0), len(ranks), max(nodes.values())
    if sent.what.startswith("alltoall"):  # evenly spread: each rank's share goes to every other
        away = (n - local) / n
        return sent.bytes * (local - 1) / n, sent.bytes * away
    if len(nodes) == 1:
        return passes * sent.bytes * (n - 1) / n, 0.0
    # Through the ranks of a node in turn: each card carries its share of what the other nodes hold.
    return passes * sent.bytes * (n - 1) / n, passes * sent.bytes * (len(nodes) - 1) / len(nodes) / local
