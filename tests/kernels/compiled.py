"""The Triton kernels compiled without a GPU: run by test_triton.py.

What a compiler alone can show: registers, spills, shared memory, the width of stores, and the
instructions a full tile takes.  Not speed.
"""

import collections
import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minipeft.double_quant import ABSMAX_BLOCK_SIZE
from minipeft_kernels.triton import nf4

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {"packed": "*u8", "absmax": "*u8", "scale": "*fp32", "offset": "*fp32",
            "codebook": "*fp32", "dynamic": "*fp32"}  # fmt: skip
WEIGHTS = 2 * nf4.TILE // nf4.THREADS  # of a thread
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")


def compile_for(target: GPUTarget, dtype: str, block_size: int = 64, any_count: bool = False):
    """The kernel with double-quantised scales, pointers aligned as torch's are.

    The number of weights is a multiple of 16, as of every matrix, unless `any_count`.
    """
    rows, width = nf4.tile_of(block_size)
    signature = {**POINTERS, "out": f"*{dtype}", "n": "i32"}
    constants = {"NESTED": True, "BLOCK": block_size, "GROUP": ABSMAX_BLOCK_SIZE}
    constants |= {"ROWS": rows, "WIDTH": width}
    multiples = range(len(signature) - any_count)
    source = ASTSource(
        nf4.dequantize_kernel,
        signature | dict.fromkeys(constants, "constexpr"),
        constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in multiples},
    )
    options = {"num_warps": nf4.THREADS // target.warp_size, "enable_fp_fusion": False}
    return triton.compile(source, target=target, options=options)


def sass(cubin: bytes) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Resources, and (predicate, opcode) of every instruction."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run(tool: str, option: str) -> str:
            command = [str(TOOLS / tool), option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        sizes = re.findall(r"\b(REG|STACK|LOCAL):(\d+)", run("cuobjdump", "-res-usage"))
        lines = run("nvdisasm", "-c").splitlines()
    found = [((m[1] or "").strip(), m[2]) for line in lines if (m := INSTRUCTION.match(line))]
    return {name: int(size) for name, size in sizes}, found


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100])
def test_cuda(arch, dtype, capsys):
    kernel = compile_for(GPUTarget("cuda", arch, 32), dtype)
    usage, code = sass(kernel.asm["cubin"])
    # the path of a full tile ends at the first EXIT that always happens
    full = code[: code.index(("", "EXIT")) + 1]
    stores = collections.Counter(name for _, name in code if name.startswith("STG"))
    local = [name for _, name in code if name.startswith(("LDL", "STL"))]
    with capsys.disabled():
        print(
            f"\nsm_{arch} {dtype}: {usage['REG']} registers, {len(local)} spills, "
            f"{kernel.metadata.shared} bytes shared, stores {dict(stores)}, "
            f"{len(full) / WEIGHTS:.1f} instructions a weight"
        )
    assert not local and usage["STACK"] == usage["LOCAL"] == 0
    assert set(stores) == {"STG.E.128"} and ("", "STG.E.128") in full
    assert not any(name.startswith("FFMA") for _, name in code)  # two roundings, not one


@pytest.mark.parametrize(("block_size", "any_count"), [(32, False), (4096, False), (64, True)])
def test_a_full_tile_stores_128_bits_whatever_the_size(block_size, any_count):
    kernel = compile_for(GPUTarget("cuda", 90, 32), "bf16", block_size, any_count)
    usage, code = sass(kernel.asm["cubin"])
    full = code[: code.index(("", "EXIT")) + 1]
    assert usage["STACK"] == 0
    assert [name for _, name in full if name.startswith("STG")] == ["STG.E.128"]


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_rocm(dtype, capfd):
    kernel = compile_for(GPUTarget("hip", "gfx942", 64), dtype)
    text = kernel.asm["amdgcn"]
    fields = r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)"
    numbers = {name: int(value) for name, value in re.findall(fields, text)}
    stores = collections.Counter(re.findall(r"(?:global|buffer)_store_(\w+)", text))
    assert kernel.asm["hsaco"] and not capfd.readouterr().err  # a bad build prints, and goes on
    with capfd.disabled():
        print(
            f"\ngfx942 {dtype}: {numbers['vgpr_count']} registers, "
            f"{numbers['vgpr_spill_count'] + numbers['sgpr_spill_count']} spills, "
            f"{kernel.metadata.shared} bytes shared, stores {dict(stores)}"
        )
    assert numbers["vgpr_spill_count"] == numbers["sgpr_spill_count"] == 0
    assert set(stores) == {"dwordx4"}
    assert not re.search(r"v_(fma|mad|mac|fmac)_f32", text)
