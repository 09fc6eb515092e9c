"""Compiling Triton kernels without a GPU, and what their machine code says."""

import collections
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
LABEL = re.compile(r"(\.L_x_\d+):")
JUMP = re.compile(r"BRA[.\w]*\s+(?:\S+,\s*)?`\((\.L_x_\d+)\)")
# bytes that a program may have of shared memory
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


def compile_for(
    target: GPUTarget, kernel: Any, types: dict[str, str], constants: dict[str, Any],
    *, any_size: tuple[str, ...] = (), **options: Any,
) -> Any:  # fmt: skip
    """The kernel; arguments are aligned or multiples of 16, as torch's are, but for `any_size`."""
    names = list(kernel.arg_names)
    signature = {name: types.get(name, "constexpr") for name in names}
    multiples = [i for i, name in enumerate(names) if name in types and name not in any_size]
    source = ASTSource(
        kernel, signature, {name: constants[name] for name in names if name not in types},
        attrs={(i,): [["tt.divisibility", 16]] for i in multiples},
    )  # fmt: skip
    return triton.compile(source, target=target, options={"enable_fp_fusion": False, **options})


@dataclass
class Code:
    """The machine code of a kernel for NVIDIA: resources, instructions, the main loop's."""

    registers: int
    stack: int
    instructions: list[tuple[str, str]]  # predicate, opcode
    loop: list[str]

    def count(self, start: str) -> int:
        """Instructions of the loop whose name starts so."""
        return sum(name.startswith(start) for name in self.loop)

    @property
    def spills(self) -> int:
        """Loads and stores of registers that did not fit."""
        return sum(name.startswith(("LDL", "STL")) for _, name in self.instructions)


def read(cubin: bytes) -> Code:
    """What the disassembler says."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run(tool: str, option: str) -> str:
            command = [str(TOOLS / tool), option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        sizes = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", run("cuobjdump", "-res-usage")))
        lines = run("nvdisasm", "-c").splitlines()
    labels: dict[str, int] = {}
    span = (0, 0)  # the longest jump back
    for number, line in enumerate(lines):
        if found := LABEL.match(line):
            labels[found[1]] = number
        if (found := JUMP.search(line)) and found[1] in labels:
            span = max(span, (labels[found[1]], number), key=lambda s: s[1] - s[0])
    found = [INSTRUCTION.match(line) for line in lines]
    return Code(
        int(sizes["REG"]), int(sizes["STACK"]) + int(sizes["LOCAL"]),
        [((m[1] or "").strip(), m[2]) for m in found if m],
        [m[2] for m in found[span[0] : span[1] + 1] if m and span[1]],
    )  # fmt: skip


def widths(names: list[str], start: str) -> dict[str, int]:
    """How often each kind of load or store occurs."""
    return dict(collections.Counter(name for name in names if name.startswith(start)))


def amd_resources(text: str) -> dict[str, int]:
    """Registers, spills and bytes of memory for them, of a kernel for AMD."""
    fields = r"\.(vgpr_count|[vs]gpr_spill_count|private_segment_fixed_size):\s+(\d+)"
    return {name: int(value) for name, value in re.findall(fields, text)}
