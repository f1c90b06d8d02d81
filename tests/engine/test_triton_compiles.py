"""The kernels through Triton's real compiler for a Hopper GPU: that takes no GPU, only the ptxas it brings.

The interpreter forgives what the compiler does not (types, shapes, branches), so both are needed.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")

PROGRAM = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from b2batch.engine import triton_attention as kernels

POINTERS = {"out_ptr": "*{out}", "lse_ptr": "*fp32", "parts_ptr": "*fp32", "slopes_ptr": "*fp32",
            "table_ptr": "*i64", "positions_ptr": "*i64"}
COMMON = dict(FIRST_PART=1, FIELDS=8, HEAD_DIM=128, BLOCK_D=128, BLOCK_N=64)


def build(kernel, dtype, out, **constants):
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = POINTERS.get(name, "*" + dtype).format(out=out)
        else:
            signature[name] = "fp32" if name == "scaling" else "i32"
    source = ASTSource(kernel, signature, constexprs={
        (kernel.arg_names.index(name),): value for name, value in constants.items()})
    options = {"num_warps": 4, "num_stages": 3}
    done = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert done.metadata.shared <= 227 * 1024, done.metadata.shared
    print(kernel.__name__, dtype, "ok")


build(kernels._row_kernel, "bf16", "fp32", GROUP=1, HAS_SLOPES=True, NUM_SPLITS=4, **COMMON)
build(kernels._row_kernel, "fp16", "fp16", GROUP=1, HAS_SLOPES=False, NUM_SPLITS=1, **COMMON)
build(kernels._tile_kernel, "bf16", "bf16", GROUP=1, HAS_SLOPES=True, NUM_SPLITS=1, BLOCK_M=64, **COMMON)
build(kernels._tile_kernel, "bf16", "fp32", GROUP=3, HAS_SLOPES=False, NUM_SPLITS=4, BLOCK_M=16, **COMMON)
build(kernels._merge_kernel, "bf16", "bf16", NUM_PARTS=5, BLOCK_P=8, HEAD_DIM=128, BLOCK_D=128)
"""


@pytest.mark.slow
def test_the_kernels_compile_for_a_hopper_gpu() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("ok") == 5
