"""What the rows of several operations have in common: dtypes, and purposes with machines."""

from dantinox.kernels.workloads.types import Spec

ALL = ("float32", "bfloat16", "float16")
BOTH = ("float32", "bfloat16")
BF16 = ("bfloat16",)
GPU = ("bfloat16", "float16")


def small(kind: type[Spec], purpose: str, name: str, **sizes) -> Spec:
    return kind(name=name, purposes=(purpose,), machines=("small",), **sizes)


CPU = {"purposes": ("bench",), "machines": ("cpu",)}
H100 = {"purposes": ("bench", "aot", "tune"), "machines": ("h100",), "dtypes": BF16}
BIG = {"purposes": ("bench", "aot", "tune"), "machines": ("h100", "tpu"), "dtypes": BF16}
AOT = {"purposes": ("aot",), "machines": ("h100", "tpu"), "dtypes": GPU}
TPU = {"purposes": ("bench", "aot", "tune"), "machines": ("tpu",), "dtypes": BF16}
REGISTERS = {"purposes": ("aot",), "machines": ("h100",), "dtypes": GPU}
FEATURES = {"segments": "packed", "window": 256, "softcap": 50.0, "gate": "elementwise"}
BUNDLES = {"purposes": ("aot",), "machines": ("tpu",), "dtypes": BF16}
