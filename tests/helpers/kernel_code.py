"""What our Triton kernels become for a GPU that need not be there: their machine code, counted.

    python tests/helpers/kernel_code.py     the tables of docs/benchmarks.md

Triton compiles for any GPU with the ptxas that it brings along, and brings cuobjdump as well.
"""

import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[2] / "sft"))
from finetune.model import expert_kernels, fused_unpacking, kernels, rotary_kernel

WARP = 32
# H100 SXM, data sheet: 132 multiprocessors start 4 instructions of a warp each in a cycle.
STARTED_IN_A_CYCLE = 4
INSTRUCTIONS_PER_SECOND = 132 * STARTED_IN_A_CYCLE * 1.83e9
# Of a multiprocessor's tensor cores, dense in bf16: data sheets of H100 and B200.
FLOPS_IN_A_CYCLE = {90: 4096, 100: 8192}
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
    options: dict[str, int] = field(default_factory=dict)

    @property
    def num_threads(self) -> int:
        return WARP * self.options.get("num_warps", 4)


@dataclass(frozen=True)
class Code:
    """What a kernel was compiled to. instructions: of its loop that multiplies, if it has one."""

    instructions: list[str]
    registers: int
    stack_bytes: int  # that registers are spilled to
    shared_bytes: int

    def per_element(self, kernel: Kernel) -> float:
        """Instructions of a thread for each element. What runs once a row counts with them."""
        return len(self.instructions) * kernel.num_threads / kernel.elements

    def share_of_tensor_time(self, product: Kernel, architecture: int) -> float:
        """The time to start the loop's instructions over that of its products at their peak."""
        cycles = len(self.instructions) * product.num_threads / WARP / STARTED_IN_A_CYCLE
        flops = 2 * fused_unpacking.ROWS * product.elements
        return cycles / (flops / FLOPS_IN_A_CYCLE[architecture])


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
        "rotary",
        rotary_kernel.rotary_kernel,
        {name: "*bf16" for name in ("q", "k", "cos", "sin", "q_out", "k_out")}
        | {"length": "i32"}
        | {f"{x}_{size}": "i32" for x in "qk" for size in ("row", "head", "token")},
        {
            "NUM_QUERIES": 64,
            "QUERIES": 64,
            "NUM_KEYS": 8,
            "KEYS": 8,
            "HALF": 32,
            "COLUMNS": 32,
            "BACKWARDS": False,
        },
        elements=(64 + 8) * 64,
        bytes=2 * (1 + 1),
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

# Grouped GEMMs with 120b's gate_up_proj; an element is a weight of a tile.
PRODUCTS = tuple(
    Kernel(
        name,
        fused_unpacking.grouped_mm_kernel,
        {"x": "*bf16", "blocks": "*u8", "scales": "*u8", "offsets": "*i32", "y": "*bf16"},
        {
            "NUM_EXPERTS": 128,
            "EXPERTS": 128,
            "WIDTH": width,
            "NUM_COLUMNS": num_columns,
            "TRANSPOSE": transpose,
            "ROWS": fused_unpacking.ROWS,
            "COLUMNS": fused_unpacking.COLUMNS,
            "INNER": fused_unpacking.INNER,
        },
        elements=fused_unpacking.COLUMNS * fused_unpacking.INNER,
        bytes=17 / 32,
        options=fused_unpacking.OPTIONS,
    )
    for name, width, num_columns, transpose in (
        ("forward", WIDTH, 2 * WIDTH, True),
        ("backward", 2 * WIDTH, WIDTH, False),
    )
)


def compile_kernel(kernel: Kernel, architecture: int) -> Any:
    """The kernel as Triton compiles it; its `asm` has "ptx" and "cubin"."""
    names = kernel.function.arg_names
    signature = {n: "constexpr" if n in kernel.constants else kernel.types[n] for n in names}
    # All tensors begin at multiples of 16 bytes, as Triton finds out at a call.
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith("*") or name == "num_words" or name[:2] in ("q_", "k_")
    }
    source = ASTSource(
        fn=kernel.function, signature=signature, constexprs=kernel.constants, attrs=attributes
    )
    target = GPUTarget("cuda", architecture, WARP)
    return triton.compile(source, target=target, options=kernel.options)


def machine_code(kernel: Kernel, architecture: int) -> Code:
    compiled = compile_kernel(kernel, architecture)
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(cuobjdump), "-sass", "-res-usage", file.name]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    text = result.stdout + result.stderr
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)(.*);", text)
    if kernel in PRODUCTS:
        lines = multiplying_loop(lines)
    found = [name for _, name, _ in lines]
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found and usage, text
    instructions = [name for name in found if name != "NOP"]  # NOP fills the end of the code
    return Code(
        instructions,
        registers=int(usage[1]),
        stack_bytes=int(usage[2]),
        shared_bytes=compiled.metadata.shared,
    )


def multiplying_loop(lines: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Of all lines (address, instruction, operands), those of the shortest loop with a product."""
    loops = []
    for address, name, operands in lines:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if name.startswith("BRA") and target and int(target[1], 16) < int(address, 16):
            first, last = int(target[1], 16), int(address, 16)
            loops.append([line for line in lines if first <= int(line[0], 16) <= last])
    return min((loop for loop in loops if any("MMA" in line[1] for line in loop)), key=len)


def table_row(kernel: Kernel, architecture: int) -> str:
    code = machine_code(kernel, architecture)
    return (
        f"| `{kernel.name}` | sm_{architecture} | {code.registers} | {code.stack_bytes} "
        f"| {code.per_element(kernel):.1f} | {kernel.bytes:.1f} |"
    )


def product_row(product: Kernel, architecture: int) -> str:
    code = machine_code(product, architecture)
    share = code.share_of_tensor_time(product, architecture)
    return (
        f"| {product.name} | sm_{architecture} | {code.registers} | {code.stack_bytes} "
        f"| {code.per_element(product):.1f} | {share:.0%} |"
    )


if __name__ == "__main__":
    print(
        "| kernel | GPU | registers | spilled bytes | instructions an element | bytes an element |"
    )
    print("|---|---|---|---|---|---|")
    for kernel in KERNELS:
        for architecture in ARCHITECTURES:
            print(table_row(kernel, architecture))
    print()
    print(
        "| product | GPU | registers | spilled bytes | instructions a weight | of the tensor "
        "cores' time |"
    )
    print("|---|---|---|---|---|---|")
    for product in PRODUCTS:
        for architecture in ARCHITECTURES:
            print(product_row(product, architecture))
