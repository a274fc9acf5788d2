"""Shared by the workloads of several operations: dtypes, and suites with devices."""

from dantinox.kernels.workloads.types import Workload

ALL = ("float32", "bfloat16", "float16")
BOTH = ("float32", "bfloat16")
BF16 = ("bfloat16",)
GPU = ("bfloat16", "float16")


def small(kind: type[Workload], suite: str, name: str, **sizes) -> Workload:
    """Make a workload of the tests."""
    return kind(name=name, suites=(suite,), devices=("small",), **sizes)


CPU = {"suites": ("bench",), "devices": ("cpu",)}
H100 = {"suites": ("bench", "aot", "tune"), "devices": ("h100",), "dtypes": BF16}
BIG = {"suites": ("bench", "aot", "tune"), "devices": ("h100", "tpu"), "dtypes": BF16}
AOT = {"suites": ("aot",), "devices": ("h100", "tpu"), "dtypes": GPU}
TPU = {"suites": ("bench", "aot", "tune"), "devices": ("tpu",), "dtypes": BF16}
REGISTERS = {"suites": ("aot",), "devices": ("h100",), "dtypes": GPU}
FEATURES = {"segments": "packed", "window": 256, "softcap": 50.0, "gate": "elementwise"}
BUNDLES = {"suites": ("aot",), "devices": ("tpu",), "dtypes": BF16}
