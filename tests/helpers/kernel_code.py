"""What our Triton kernels become for a GPU that need not be there: their machine code, counted.

    python tests/helpers/kernel_code.py     the table of docs/benchmarks.md

Triton compiles for any GPU with the ptxas that it brings along, and brings cuobjdump as well.
"""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[2] / "sft"))
from finetune.model import expert_kernels, kernels

WARP = 32
# H100 SXM, data sheet: 132 multiprocessors start 4 instructions of a warp each in a cycle.
INSTRUCTIONS_PER_SECOND = 132 * 4 * 1.83e9
BYTES_PER_SECOND = 3.35e12
WIDTH = 2880  # gpt-oss's hidden and intermediate size
ARCHITECTURES = (90, 100)  # Hopper and Blackwell


@dataclass(frozen=True)
class Kernel:
    """A kernel as gpt-oss calls it.

    types: of its arguments that are known at run time. constants: of the others. elements: that one
    run through the code handles, in all threads of a program. bytes: that it moves for each.
    """

    name: str
    function: Any
    types: dict[str, str]
    constants: dict[str, Any]
    elements: int
    bytes: float


@dataclass(frozen=True)
class Code:
    """What a kernel was compiled to."""

    instructions: list[str]
    registers: int
    stack_bytes: int  # that registers are spilled to

    def per_element(self, kernel: Kernel) -> float:
        """Instructions of a thread for each element. What runs once a row counts with them."""
        threads = WARP * 4
        return len(self.instructions) * threads / kernel.elements


NUMBERS = {name: "*bf16" for name in ("grad", "grad_lora", "result", "d_gate_up", "pairs", "base")}
PAIRS = {name: "*i32" for name in ("gate_up", "lora", "bias")}
INDICES = {name: "*i64" for name in ("expert_ids", "order", "inverse")}
OTHERS = {"weights": "*fp32", "d_weights": "*fp32", "alpha": "fp32", "limit": "fp32"}
TYPES = NUMBERS | PAIRS | INDICES | OTHERS | {"num_rows": "i32", "num_tokens": "i32"}
SWIGLU = {"INTERMEDIATE": WIDTH, "HAS_LORA": True, "HALF": tl.int16, "BLOCK": expert_kernels.BLOCK}
BLOCKS_IN_A_ROW = -(-WIDTH // expert_kernels.BLOCK)
KERNELS = (
    Kernel(
        "swiglu",
        expert_kernels.swiglu_kernel,
        TYPES,
        SWIGLU | {"ROWS": expert_kernels.ROWS},
        elements=expert_kernels.BLOCK,
        bytes=2 * (2 + 2 + 1),
    ),
    Kernel(
        "swiglu_backward",
        expert_kernels.swiglu_backward_kernel,
        TYPES,
        SWIGLU | {"HAS_GRAD_LORA": True},
        elements=expert_kernels.BLOCK * BLOCKS_IN_A_ROW,
        bytes=2 * (2 + 2 + 1 + 1 + 2),
    ),
    Kernel(
        "sum_pairs",
        expert_kernels.sum_pairs_kernel,
        TYPES | {"lora": "*bf16"},
        {
            "WIDTH": WIDTH,
            "TOP_K": 4,
            "HAS_LORA": True,
            "HAS_BASE": True,
            "ROWS": expert_kernels.SUM_ROWS,
            "BLOCK": expert_kernels.SUM_BLOCK,
        },
        elements=expert_kernels.SUM_ROWS * expert_kernels.SUM_BLOCK,
        bytes=2 * (4 + 4 + 1 + 1),
    ),
    Kernel(
        "unpack",
        kernels.unpack_kernel,
        {"words": "*i32", "scales": "*u8", "weights": "*i16", "num_words": "i64"},
        {"WORDS": kernels.WORDS},
        elements=8 * kernels.WORDS,
        bytes=17 / 32 + 2,
    ),
)


def compile_kernel(kernel: Kernel, architecture: int) -> Any:
    """The kernel as Triton compiles it; its `asm` has "ptx" and "cubin"."""
    names = kernel.function.arg_names
    signature = {n: "constexpr" if n in kernel.constants else kernel.types[n] for n in names}
    # All tensors begin at multiples of 16 bytes, as Triton finds out at a call.
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith("*") or name == "num_words"
    }
    source = ASTSource(
        fn=kernel.function, signature=signature, constexprs=kernel.constants, attrs=attributes
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, WARP))


def machine_code(kernel: Kernel, architecture: int) -> Code:
    cubin = compile_kernel(kernel, architecture).asm["cubin"]
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump), "-sass", "-res-usage", file.name]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    text = result.stdout + result.stderr
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", text)
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found and usage, text
    instructions = [name for name in found if name != "NOP"]  # NOP fills the end of the code
    return Code(instructions, registers=int(usage[1]), stack_bytes=int(usage[2]))


def table_row(kernel: Kernel, architecture: int) -> str:
    code = machine_code(kernel, architecture)
    return (
        f"| `{kernel.name}` | sm_{architecture} | {code.registers} | {code.stack_bytes} "
        f"| {code.per_element(kernel):.1f} | {kernel.bytes:.1f} |"
    )


if __name__ == "__main__":
    print(
        "| kernel | GPU | registers | spilled bytes | instructions an element | bytes an element |"
    )
    print("|---|---|---|---|---|---|")
    for kernel in KERNELS:
        for architecture in ARCHITECTURES:
            print(table_row(kernel, architecture))
