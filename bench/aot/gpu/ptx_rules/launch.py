"""Read how the host launches a Mosaic GPU kernel: its grid, its shared memory and its tensor maps.

The PTX has none of them. XLA's dump of the optimized program has the module that Mosaic GPU passes to its runtime, as
MLIR bytecode: its host function makes each tensor map from constants.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MODULE = re.compile(r'custom_call_target="mosaic_gpu_v2".*?module = "((?:[^"\\]|\\.)*)"')
_ESCAPE = re.compile(rb"\\([0-9A-Fa-f]{2}|.)", re.DOTALL)
_ELEMENT_BITS = {0: 4, 1: 8, 2: 16, 3: 32, 4: 64, 5: 16, 6: 32, 7: 16, 8: 2, 9: 32, 10: 64}  # by Mosaic's code
_NO_SWIZZLE = 16  # Mosaic's code; the others are bytes


@dataclass(frozen=True)
class TensorMap:
    """A tensor map, as far as it says what one TMA instruction copies.

    Attributes:
        bytes: of a box; elements outside the array count, since TMA fills them with zeros.
        swizzle: bytes of the swizzle pattern, 0 without one.
    """

    bytes: int
    swizzle: int


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel.

    Attributes:
        name: of the entry function.
        grid: blocks along x, y, z.
        threads: per block.
        smem_bytes: of dynamic shared memory.
        tensor_maps: by their offset in the parameter that holds them.
    """

    name: str
    grid: tuple[int, int, int]
    threads: int
    smem_bytes: int
    tensor_maps: dict[int, TensorMap]


def read_all(dumps: Path) -> list[Launch]:
    """Read the launches of all Mosaic GPU kernels of the program in a folder of dumps; this imports jax."""
    texts = [path.read_text("utf-8") for path in sorted(dumps.glob("*gpu_after_optimizations.txt"))]
    modules = dict.fromkeys(module for text in texts for module in _MODULE.findall(text))
    return [_read(_unescape(module)) for module in modules]


def _unescape(text: str) -> bytes:
    def byte(match: re.Match[bytes]) -> bytes:
        return bytes([int(match[1], 16)]) if len(match[1]) == 2 else match[1]

    return _ESCAPE.sub(byte, text.encode("latin1"))


def _read(bytecode: bytes) -> Launch:
    from jax._src.interpreters import mlir
    from jax._src.lib import mosaic_gpu_dialect
    from jax._src.lib.mlir import ir

    context = mlir.make_ir_context()
    context.allow_unregistered_dialects = True
    mosaic_gpu_dialect.register_dialect(context)
    with context:
        module = ir.Module.parse(bytecode)
        functions = [op for op in module.body.operations if len(op.regions) and len(op.regions[0].blocks)]
        return _read_host_function(functions[-1])


def _read_host_function(function: Any) -> Launch:
    """Follow the constants of the host function to the tensor maps and to the launch."""
    constants: dict[Any, int] = {}
    offsets: dict[Any, tuple[Any, int]] = {}  # of a pointer: the allocation that it points into, and where
    arrays: dict[Any, dict[int, Any]] = {}
    maps: dict[int, TensorMap] = {}
    for op in (operation.operation for operation in function.regions[0].blocks[0].operations):
        kind = op.name.removeprefix("stable_mosaic_gpu.")
        if kind in ("arith.constant", "llvm.mlir.constant") and str(op.results[0].type) in ("i32", "i64", "index"):
            constants[op.results[0]] = int(str(op.attributes["value"]).split(":")[0])
        elif kind == "llvm.getelementptr" and len(op.operands) == 1:
            index = re.search(r": (-?\d+)", str(op.attributes["rawConstantIndices"]))
            offsets[op.results[0]] = (op.operands[0], int(index[1]) if index else 0)
        elif kind == "llvm.store" and op.operands[1] in offsets:
            base, index = offsets[op.operands[1]]
            arrays.setdefault(base, {})[index] = op.operands[0]
        elif kind == "func.call" and "mosaic_gpu_init_tma_desc" in str(op.attributes["callee"]):
            target, _, dtype, _, _, _, swizzle, box = op.operands
            elements = math.prod(constants[value] for value in arrays[box].values())
            code = constants[swizzle]
            maps[offsets[target][1]] = TensorMap(
                elements * _ELEMENT_BITS[constants[dtype]] // 8, 0 if code == _NO_SWIZZLE else code
            )
        elif kind == "gpu.launch":
            sizes = [constants[value] for value in op.operands if value in constants]
            name = str(function.attributes["sym_name"]).strip('"')
            x, y, z = sizes[:3]
            return Launch(f"{name}_kernel", (x, y, z), math.prod(sizes[3:6]), sizes[6], maps)
    raise ValueError("the module of a Mosaic GPU kernel launches nothing")
