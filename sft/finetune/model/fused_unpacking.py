"""Grouped GEMM with weights that are unpacked from MXFP4 on their way into the product, in Triton.

mxfp4.py unpacks a stack of experts to bf16, writes it to memory and reads it again. Here each
program reads the packed bytes of its tile, unpacks them in registers and multiplies at once: a
quarter of the traffic, no copy of the stack, and nothing that the host has to wait for. In return
every tile of rows unpacks its weights again. Whether that is faster depends on the GPU and on the
rows of an expert: unpacking_probe.py finds out before training.

A program computes ROWS rows of one expert by COLUMNS columns. The tensor cores take 2 * ROWS FLOPs
for a weight, and unpacking it a fixed number of instructions: by tests/model/test_kernel_code.py
those take less time than the tensor cores do, which can work for one program while another unpacks.
"""

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
ROWS, COLUMNS, INNER = 128, 128, 64  # of a program's tile, and of the products that it adds up
OPTIONS = {"num_warps": 8, "num_stages": 3}  # two programs fit a multiprocessor of H100


@triton.jit
def unpack_tile(bytes, scales, NUM_ROWS: tl.constexpr, NUM_BYTES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of bytes (R, B) and scales (R, B / 16) the weights in bf16: (R, 2 B). Exact."""
    byte = bytes.to(tl.int32)
    # FP4 (E2M1) has 1 bit of sign, 2 of exponent and 1 of mantissa. Both values of a byte are put
    # where bf16 has its sign, its lowest bits of exponent and its highest of mantissa, the first
    # value into the lower half of 32 bits. A product shifts to both halves at once; the mask takes
    # the bits that belong there. bf16's bias is 127 and FP4's 1: this is the value times 2 ** -126.
    signs = (byte * (1 << 12 | 1 << 24)) & -0x7FFF8000
    values = ((byte * (1 << 6 | 1 << 18)) & 0x01C001C0) | signs
    if INTERPRETED:
        # Triton 3.7.1's interpreter takes the bits of bf16 for integers, in products of tensors and
        # of matrices. So it gets fp32, of which bf16 is the upper half.
        first = (values << 16).to(tl.float32, bitcast=True)
        second = (values & -0x10000).to(tl.float32, bitcast=True)
    else:
        first = values.to(tl.int16).to(tl.bfloat16, bitcast=True)
        second = (values >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    blocks = tl.reshape(tl.join(first, second), (NUM_ROWS, NUM_BYTES // 16, 32))
    # 2 ** (scale - 127) in fp32; the smallest one has no implicit leading 1.
    scales = scales.to(tl.int32)
    powers = tl.where(scales == 0, 1 << 22, scales << 23).to(tl.float32, bitcast=True)[:, :, None]
    # Both products are exact, also where they are subnormal. In bf16 a GPU computes two at once.
    factor = tl.full((), 2.0**126, tl.float32)
    blocks = blocks * factor.to(blocks.dtype) * powers.to(blocks.dtype)
    return tl.reshape(blocks, (NUM_ROWS, 2 * NUM_BYTES))


@triton.jit
def tile_of_program(  # type: ignore[no-untyped-def]
    offsets, tile, NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr
):
    """The expert of a tile of rows, the tile's first row, and the end of the expert's rows.

    Every expert's rows begin a new tile. EXPERTS: NUM_EXPERTS, up to a power of two. Beyond the
    last tile, the expert is EXPERTS.
    """
    experts = tl.arange(0, EXPERTS)
    inside = experts < NUM_EXPERTS
    ends = tl.load(offsets + experts, mask=inside, other=0)
    starts = tl.load(offsets + experts - 1, mask=inside & (experts > 0), other=0)
    last_tiles = tl.cumsum(tl.where(inside, (ends - starts + ROWS - 1) // ROWS, 0), 0)
    is_before = last_tiles <= tile
    expert = tl.sum(is_before.to(tl.int32), 0)
    tiles_before = tl.max(tl.where(is_before, last_tiles, 0), 0)
    start = tl.sum(tl.where(experts == expert, starts, 0), 0)
    end = tl.sum(tl.where(experts == expert, ends, 0), 0)
    return expert, start + (tile - tiles_before) * ROWS, end


@triton.jit
def load_tile(  # type: ignore[no-untyped-def]
    packed,
    inner,
    column,
    WIDTH: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    SHARING: tl.constexpr,
):
    """What is stored for the tile of an expert that begins at `inner` and `column`; 0 outside.

    packed: bytes or scales of the expert. SHARING: how many weights share one, 2 or 32. Returns
    (COLUMNS, INNER / SHARING) if TRANSPOSE, else (INNER, COLUMNS / SHARING).
    """
    num_lines: tl.constexpr = NUM_COLUMNS if TRANSPOSE else WIDTH
    line_size: tl.constexpr = (WIDTH if TRANSPOSE else NUM_COLUMNS) // SHARING
    if TRANSPOSE:
        lines = column + tl.arange(0, COLUMNS)
        places = inner // SHARING + tl.arange(0, INNER // SHARING)
    else:
        lines = inner + tl.arange(0, INNER)
        places = column // SHARING + tl.arange(0, COLUMNS // SHARING)
    inside = (lines < num_lines)[:, None] & (places < line_size)[None, :]
    return tl.load(packed + lines[:, None] * line_size + places[None, :], mask=inside, other=0)


@triton.jit
def grouped_mm_kernel(  # type: ignore[no-untyped-def]
    x,
    blocks,
    scales,
    offsets,
    y,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """y (S, NUM_COLUMNS) is x (S, WIDTH) times the weights of each row's expert.

    Those are stored as (NUM_COLUMNS, WIDTH) if TRANSPOSE, else as (WIDTH, NUM_COLUMNS).
    """
    # Neighbouring programs have neighbouring columns of the same rows.
    column_tiles: tl.constexpr = (NUM_COLUMNS + COLUMNS - 1) // COLUMNS
    tile, column = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles * COLUMNS
    expert, start, end = tile_of_program(offsets, tile, NUM_EXPERTS, EXPERTS, ROWS)
    if expert >= NUM_EXPERTS:  # as many programs are started as there can be tiles
        return
    # 64 bits: a stack of 120b, and the rows of a long context, have more than 2 ** 31 numbers.
    rows, columns = start.to(tl.int64) + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    blocks += expert.to(tl.int64) * (WIDTH * NUM_COLUMNS // 2)
    scales += expert.to(tl.int64) * (WIDTH * NUM_COLUMNS // 32)
    lines: tl.constexpr = COLUMNS if TRANSPOSE else INNER
    line_bytes: tl.constexpr = INNER // 2 if TRANSPOSE else COLUMNS // 2
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    # Scales are too small to be copied in the background, as the compiler does with x and bytes:
    # those of the next tile are read before this one is computed.
    next_scales = load_tile(
        scales, 0, column, WIDTH, NUM_COLUMNS, TRANSPOSE, COLUMNS, INNER, SHARING=32
    )
    for first in range(0, WIDTH, INNER):
        inner = first + tl.arange(0, INNER)
        inside = (rows < end)[:, None] & (inner < WIDTH)[None, :]
        some = tl.load(x + rows[:, None] * WIDTH + inner[None, :], mask=inside, other=0)
        bytes = load_tile(
            blocks, first, column, WIDTH, NUM_COLUMNS, TRANSPOSE, COLUMNS, INNER, SHARING=2
        )
        these_scales = next_scales
        next_scales = load_tile(
            scales, first + INNER, column, WIDTH, NUM_COLUMNS, TRANSPOSE, COLUMNS, INNER, SHARING=32
        )
        weights = unpack_tile(bytes, these_scales, lines, line_bytes)
        some = some.to(weights.dtype)
        total = tl.dot(some, tl.trans(weights) if TRANSPOSE else weights, total)
    inside = (rows < end)[:, None] & (columns < NUM_COLUMNS)[None, :]
    tl.store(y + rows[:, None] * NUM_COLUMNS + columns[None, :], total.to(tl.bfloat16), mask=inside)


def packed_grouped_mm(
    x: torch.Tensor,
    blocks: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    *,
    transpose: bool,
) -> torch.Tensor:
    """mxfp4.packed_grouped_mm, as one kernel."""
    num_experts, out, groups = scales.shape
    width, num_columns = (32 * groups, out) if transpose else (out, 32 * groups)
    y = x.new_empty(len(x), num_columns)
    num_tiles = triton.cdiv(len(x), ROWS) + min(num_experts, len(x))
    grouped_mm_kernel[(num_tiles * triton.cdiv(num_columns, COLUMNS),)](
        x.contiguous(),
        blocks.contiguous(),
        scales.contiguous(),
        offsets,
        y,
        NUM_EXPERTS=num_experts,
        EXPERTS=triton.next_power_of_2(num_experts),
        WIDTH=width,
        NUM_COLUMNS=num_columns,
        TRANSPOSE=transpose,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        INNER=INNER,
        **OPTIONS,
    )
    return y
