"""What a rank gets done in a second: measured on one machine, assumed of another."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """Throughputs of a rank, and of what connects ranks.

    Attributes:
        about: what it is, and whence the numbers are.
        products: float32 operations a second, of products of matrices.
        memory: bytes a second that a product reads.
        elements: numbers a second that element-wise work goes through.
        comparisons: costs of symbols a second that an E-step compares.
        step: seconds that an E-step takes for each input, however few rows: calls, or launches of kernels.
        doubles: float64 operations a second, of factors and of solving with them.
        packing: weights a second that are packed.
        parameters: of the network, a second, that are rounded and judged.
        reading: bytes of a checkpoint a second.
        node: ranks that are near each other.
        near, far: bytes a second that a rank sends to others of its node, and beyond it.
        latency, hop: seconds that a message takes between two ranks, and for each further one.
        symbols: bytes a second that a rank receives by way of the CPU.
    """

    about: str
    products: float
    memory: float
    elements: float
    comparisons: float
    step: float
    doubles: float
    packing: float
    parameters: float
    reading: float
    node: int
    near: float
    far: float
    latency: float
    hop: float
    symbols: float


#: By name, for `sqs plan --machine`.
MACHINES = {
    "cpu": Machine(
        about="ranks of one thread of a Xeon with AVX-512, gloo: measured, but for memory, disk, what joins nodes",
        # Phases of one rank in benchmarks/ranks.json, over their counts.
        products=113e9,
        elements=0.99e9,
        doubles=23.8e9,
        packing=59e6,
        parameters=14.3e6,
        # benchmarks/scaling.py, compiled: 6 to 7 µs, and 4.5 to 6.9 comparisons a nanosecond, beside others' work.
        step=7e-6,
        comparisons=5.5e9,
        # Messages of two ranks in benchmarks/ranks.json, most of which are small: what they had of a processor.
        latency=0.8e-3,
        near=1e9,
        symbols=0.5e9,
        # Assumed: memory that others read, too; a local disk; two ranks a node, 10 Gbit/s between nodes, a ring.
        memory=8e9,
        reading=1e9,
        node=2,
        far=1e9,
        hop=50e-6,
    ),
    "h100": Machine(
        about="ranks of one H100 SXM, eight a node, NCCL: assumed from data sheets, measured nowhere",
        products=40e12,  # 60 % of 67 TFLOP/s in float32
        memory=2.3e12,  # 70 % of 3.35 TB/s
        elements=0.25e12,  # the same, a number read and written with 4 bytes each
        comparisons=50e9,  # five numbers each, by torch's own kernels
        step=60e-6,  # 12 kernels of 5 µs
        doubles=20e12,  # 30 % of 67 TFLOP/s of float64 on tensor cores, as factors are no mere products
        packing=99e6,  # on the host's CPU, as the next one: four threads of the other machine
        parameters=24e6,
        reading=3e9,  # an NVMe disk
        node=8,
        near=300e9,  # two thirds of 450 GB/s of NVLink
        far=40e9,  # 80 % of 400 Gbit/s of InfiniBand
        latency=30e-6,
        hop=2e-6,  # a ring's
        symbols=1e9,  # pickled, and by gloo
    ),
}
