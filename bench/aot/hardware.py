"""The accelerators that kernels are compiled for, with the peak rates and sizes that bound them.

Peak rates are dense (no structured sparsity) and come from the vendors' documents:

    a100    NVIDIA A100 datasheet (80 GB SXM) and "CUDA C++ Programming Guide", compute capabilities, 8.0
    h100    NVIDIA H100 datasheet (80 GB SXM) and the same tables, 9.0
    b200    NVIDIA Blackwell HGX B200 datasheet (one of its eight GPUs) and the same tables, 10.0
    rtx4090 "NVIDIA Ada GPU Architecture" whitepaper (tensor cores with float32 accumulation), 8.9
    rtx5090 "NVIDIA RTX Blackwell GPU Architecture" whitepaper, 12.0
    v5e     cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 819 GB/s, 16 GB per chip; one core with four 128 x 128 MXUs
    v6e     cloud.google.com/tpu/docs/v6e: 918 TFLOP/s, 1640 GB/s, 32 GB per chip; one core with two 256 x 256 MXUs
    tpu7x   cloud.google.com/tpu/docs/tpu7x: 2307 TFLOP/s bf16, 7380 GB/s, 192 GB per chip. JAX sees a chip as two
            devices, and a kernel runs on one of them: the figures below are half of a chip's

VMEM sizes and numbers of MXU slots are those in libtpu's dumps.
"""

from dataclasses import dataclass, field

__all__ = ["TARGETS", "Gpu", "Target", "Tpu", "get"]

KIB, MIB, GIB = 2**10, 2**20, 2**30


@dataclass(frozen=True, kw_only=True)
class Target:
    """One accelerator, as JAX sees one device of it."""

    name: str
    kind: str
    """JAX's name of the device."""
    platform: str
    """cuda or tpu."""
    flops: dict[str, float] = field(hash=False)
    """Peak FLOP/s of a matmul by the dtype of its operands."""
    bytes_per_second: float
    memory_bytes: int

    @property
    def machine(self) -> str:
        """The device of `dantinox.kernels.workloads` whose workloads are meant for it."""
        return "h100" if self.platform == "cuda" else "tpu"

    def seconds(self, flops: float, bytes_moved: float, dtype: str) -> float:
        """The roofline: a lower bound on the time of any program that does this work."""
        return max(flops / self.flops[dtype], bytes_moved / self.bytes_per_second)


@dataclass(frozen=True, kw_only=True)
class Gpu(Target):
    """An NVIDIA GPU: the resources of an SM, and the most that a block may use."""

    platform: str = "cuda"
    capability: tuple[int, int]
    num_sms: int
    clock_ghz: float
    l2_bytes: int
    smem_per_sm: int
    smem_per_block: int
    registers_per_sm: int = 65536
    threads_per_sm: int = 2048
    blocks_per_sm: int = 32

    @property
    def arch(self) -> str:
        """The architecture as ptxas names it; the a-variants have wgmma and tcgen05."""
        major, minor = self.capability
        return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


@dataclass(frozen=True, kw_only=True)
class Tpu(Target):
    """A TPU core: the topology to compile for, its VMEM and its matrix units."""

    platform: str = "tpu"
    topology: str
    vmem_bytes: int
    mxus: int


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Gpu(
            name="h100",
            kind="NVIDIA H100 80GB HBM3",
            capability=(9, 0),
            flops={"bfloat16": 989.4e12, "float16": 989.4e12, "float32": 66.9e12},
            bytes_per_second=3.352e12,
            memory_bytes=80 * GIB,
            num_sms=132,
            clock_ghz=1.98,
            l2_bytes=50 * MIB,
            smem_per_sm=228 * KIB,
            smem_per_block=227 * KIB,
        ),
        Gpu(
            name="b200",
            kind="NVIDIA B200",
            capability=(10, 0),
            flops={"bfloat16": 2250e12, "float16": 2250e12, "float32": 75e12},
            bytes_per_second=7.7e12,
            memory_bytes=180 * GIB,
            num_sms=148,
            clock_ghz=1.965,
            l2_bytes=126 * MIB,
            smem_per_sm=228 * KIB,
            smem_per_block=227 * KIB,
        ),
        Gpu(
            name="a100",
            kind="NVIDIA A100-SXM4-80GB",
            capability=(8, 0),
            flops={"bfloat16": 312e12, "float16": 312e12, "float32": 19.5e12},
            bytes_per_second=2.039e12,
            memory_bytes=80 * GIB,
            num_sms=108,
            clock_ghz=1.41,
            l2_bytes=40 * MIB,
            smem_per_sm=164 * KIB,
            smem_per_block=163 * KIB,
        ),
        Gpu(
            name="rtx4090",
            kind="NVIDIA GeForce RTX 4090",
            capability=(8, 9),
            flops={"bfloat16": 165.2e12, "float16": 165.2e12, "float32": 82.6e12},
            bytes_per_second=1.008e12,
            memory_bytes=24 * GIB,
            num_sms=128,
            clock_ghz=2.52,
            l2_bytes=72 * MIB,
            smem_per_sm=100 * KIB,
            smem_per_block=99 * KIB,
            threads_per_sm=1536,
            blocks_per_sm=24,
        ),
        Gpu(
            name="rtx5090",
            kind="NVIDIA GeForce RTX 5090",
            capability=(12, 0),
            flops={"bfloat16": 209.5e12, "float16": 209.5e12, "float32": 104.8e12},
            bytes_per_second=1.792e12,
            memory_bytes=32 * GIB,
            num_sms=170,
            clock_ghz=2.41,
            l2_bytes=96 * MIB,
            smem_per_sm=100 * KIB,
            smem_per_block=99 * KIB,
            threads_per_sm=1536,
            blocks_per_sm=24,
        ),
        Tpu(
            name="v5e",
            kind="TPU v5 lite",
            topology="v5e:1x1",
            flops={"bfloat16": 197e12},
            bytes_per_second=819e9,
            memory_bytes=16 * GIB,
            vmem_bytes=128 * MIB,
            mxus=4,
        ),
        Tpu(
            name="v6e",
            kind="TPU v6 lite",
            topology="v6e:1x1",
            flops={"bfloat16": 918e12},
            bytes_per_second=1640e9,
            memory_bytes=32 * GIB,
            vmem_bytes=128 * MIB,
            mxus=2,
        ),
        Tpu(
            name="tpu7x",
            kind="TPU7x",
            topology="tpu7x:1x1x1",
            flops={"bfloat16": 1153.5e12},
            bytes_per_second=3690e9,
            memory_bytes=96 * GIB,
            vmem_bytes=64 * MIB,
            mxus=2,
        ),
    )
}


def get(name: str) -> Target:
    """Return the target with a name.

    Raises:
        ValueError: there is no such target; the message lists the names.
    """
    if name not in TARGETS:
        raise ValueError(f"target is {name!r}; allowed: {', '.join(TARGETS)}")
    return TARGETS[name]
