"""What a step of LoRA holds in a GPU's memory, counted byte by byte, with no GPU.

    python sft/memory.py gpt-oss-*-lora.yaml                     as the task files have it
    python sft/memory.py --max_length 2048 gpt-oss-20b-lora.yaml

The model in its true shapes, experts.py, PEFT, TRL's loss and AdamW run under torch's
FakeTensorMode, which makes tensors without their bytes; each counts from the operation that makes
it until it is freed. A kernel counts as what it leaves: attention saves q, k, v, its output and the
log of its sums. The peak is that of a second batch, when gradients and AdamW's states are there.
Not counted: CUDA's context, and what its allocator cannot fill.

TRL's fused head never holds the logits: a tile of 4,096 tokens x 32,768 of the vocabulary in bf16
(256 MiB) and the fp32 gradient of the hidden states (47 MB at 4,096 tokens), where all logits of
4,096 tokens would take 1.6 GB in bf16. A head that is trained adds its fp32 gradient, 2.3 GB.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from finetune.command_line import CommandLine


@dataclass
class MemoryArguments:
    """What differs from the task file."""

    max_length: int | None = None
    per_device_train_batch_size: int | None = None
    lora_r: int | None = None
    dequantize: bool | None = field(default=None, metadata={"help": "The base in bf16."})


def command_line() -> CommandLine:
    parser = CommandLine(MemoryArguments, description=__doc__)
    parser.add_argument("tasks", nargs="+", type=Path, help="task files")
    return parser


if __name__ == "__main__":
    arguments, rest = command_line().parse_args_into_dataclasses()  # before imports that take 8 s

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any
from unittest.mock import patch

import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import GptOssConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl import ModelConfig
from trl.trainer.utils import add_fused_lm_head

from finetune.arguments import parse_args
from finetune.benchmark.synthetic import config_of
from finetune.errors import UserError, one_line_errors
from finetune.model.experts import EXPERTS_IMPLEMENTATION, register_experts, use_grouped_lora
from finetune.model.loading import meta_model
from finetune.model.lora import lora_config
from finetune.model.mxfp4 import BLOCK_SIZE, Mxfp4Weight
from finetune.model.weights import restore_buffers
from finetune.task_file import TaskFile


def stored(parameter: Any) -> list[torch.Tensor]:
    """The tensors that hold a parameter."""
    is_packed = isinstance(parameter, Mxfp4Weight)
    return [parameter.blocks, parameter.scales] if is_packed else [parameter]


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations have made and nobody has freed."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.is_paused = False
        self.counted: dict[int, Any] = {}
        for tensor in chain.from_iterable(map(stored, model.parameters())):
            storage = tensor.untyped_storage()
            self.counted[storage._cdata] = storage

    def __torch_dispatch__(  # type: ignore[override]
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, Mxfp4Weight):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.counted or self.is_paused:
            return

        def free(_: Any) -> None:
            self.now -= size
            del self.counted[key]

        self.counted[key] = weakref.ref(storage, free)
        self.now += size
        self.peak = max(self.peak, self.now)

    def as_kernel(self, function: Callable[..., Any], like: Any = None) -> Callable[..., Any]:
        """Of what it makes on the way only the results are counted."""

        def run(*args: Any) -> Any:
            self.is_paused = True
            results = function(*args)
            self.is_paused = False
            return tree_map(torch.clone, results)

        return run


class FlashAttention(torch.autograd.Function):
    """The tensors of flash attention, without their values."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor
    ) -> torch.Tensor:
        out, lse = torch.empty_like(q), torch.empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:4])


def attend(module: Any, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> tuple[Any, None]:
    return FlashAttention.apply(q, k, v, module.sinks).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register("counted", attend)
ALL_MASK_ATTENTION_FUNCTIONS.register("counted", lambda *args, **kwargs: None)


@contextmanager
def kernels_allocate_nothing(live: LiveBytes) -> Iterator[None]:
    """Experts' kernels, the unpacking and the tiles of TRL's loss, as they are on a GPU."""

    def unpack(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return torch.empty(*scales.shape[:-1], scales.shape[-1] * BLOCK_SIZE, dtype=torch.bfloat16)

    def bounds(offsets: torch.Tensor, *, step: int, num_rows: int) -> list[int]:
        """As if every token went to the first experts: no GEMM is larger."""
        return [0] + [num_rows] * -(-len(offsets) // step)

    def no_tile(*args: Any, **kwargs: Any) -> None:
        """Works in place."""

    loss = "trl.kernels.chunked_logprob"
    with ExitStack() as stack:
        for name, replacement in {
            "finetune.model.experts.fused": live.as_kernel,
            "finetune.model.mxfp4.unpack": unpack,
            "finetune.model.mxfp4.bounds": bounds,
            f"{loss}._forward_tile": no_tile,
            f"{loss}._backward_tile": no_tile,
        }.items():
            stack.enter_context(patch(name, replacement))
        yield


def make_model(config: GptOssConfig, lora: ModelConfig) -> Any:
    """gpt-oss with LoRA as train.py makes it, on the meta device."""
    register_experts()
    config._attn_implementation, config._experts_implementation = "counted", EXPERTS_IMPLEMENTATION
    model: Any = meta_model(config)
    with torch.device("meta"):
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        model = get_peft_model(model, lora_config(model, lora))
    use_grouped_lora(model)
    model.get_base_model().activation_checkpointing_enable(
        {"preserve_rng_state": False, "use_reentrant": False}
    )
    model.enable_input_require_grads()
    return model.train()


def without_bytes(parameter: torch.nn.Parameter, *, packed: bool) -> torch.nn.Parameter:
    """Under FakeTensorMode: a parameter of the same shape and dtype; stacks of experts in MXFP4."""
    if not (packed and parameter.ndim == 3):
        values = torch.empty(parameter.shape, dtype=parameter.dtype)
        return torch.nn.Parameter(values, requires_grad=parameter.requires_grad)
    num_experts, inner, out = parameter.shape
    shape = (num_experts, out, inner // BLOCK_SIZE)
    blocks = torch.empty(*shape, BLOCK_SIZE // 2, dtype=torch.uint8)
    weight = Mxfp4Weight(blocks, torch.empty(shape, dtype=torch.uint8))
    return torch.nn.Parameter(weight, requires_grad=False)


def count(
    config: GptOssConfig, lora: ModelConfig, *, max_length: int, batch_size: int, packed: bool
) -> dict[str, int]:
    """Bytes at the peak of a step, by what they hold. packed: the experts in MXFP4."""
    model = make_model(config, lora)
    with FakeTensorMode():
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                module.register_parameter(name, without_bytes(parameter, packed=packed))
        restore_buffers(model, torch.device("cpu"))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)
        ids = torch.zeros(batch_size, max_length, dtype=torch.long)
        live = LiveBytes(model)
        with live, kernels_allocate_nothing(live), torch.autocast("cpu", torch.bfloat16):
            for _ in range(2):
                inputs = {"input_ids": ids, "labels": ids, "position_ids": ids}
                model(**inputs, fused_lm_head=True).loss.backward()
                optimizer.step()

    stacks = sum(t.nbytes for p in model.parameters() if p.ndim == 3 for t in stored(p))
    adapter = sum(parameter.nbytes for parameter in trained)
    others = sum(p.nbytes for p in model.parameters() if p.ndim != 3) - adapter
    return {
        "experts": stacks,
        "other weights, bf16": others,
        "adapter, fp32": adapter,
        "its gradients": adapter,
        "AdamW's states": 2 * adapter,
        "activations, working memory": live.peak - 3 * adapter,
        "peak": stacks + others + adapter + live.peak,
    }


def count_task(path: Path, args: MemoryArguments) -> tuple[str, dict[str, int]]:
    """A title and the bytes of a task file's step. Raises UserError if it cannot be counted."""
    task = TaskFile.read(path)
    config = parse_args([*task.flags, "--use_cpu=true"])
    if not config.model.use_peft or task.is_sharded:
        raise UserError(
            f"{path} {'shards its weights' if task.is_sharded else 'trains all weights'}: only "
            "LoRA beside a base that every GPU holds is counted"
        )
    max_length = args.max_length or config.training.max_length
    if max_length is None:
        raise UserError(f"{path}: the length of a row is not known without --max_length")
    batch_size = args.per_device_train_batch_size or config.training.per_device_train_batch_size
    dequantize = config.run.dequantize if args.dequantize is None else args.dequantize
    lora_r = args.lora_r or config.model.lora_r
    held = count(
        config_of(config.model_id),
        replace(config.model, lora_r=lora_r),
        max_length=max_length,
        batch_size=batch_size,
        packed=not dequantize,
    )
    shape = f"{batch_size} x {max_length} tokens, r={lora_r}"
    return f"{path.stem}\n{shape}\nexperts in {'bf16' if dequantize else 'MXFP4'}", held


def main(args: MemoryArguments, paths: list[Path]) -> None:
    columns = dict(count_task(path, args) for path in paths)
    table = Table("GiB", *columns, title="A GPU's memory, counted")
    for name in next(iter(columns.values())):
        table.add_row(name, *(f"{column[name] / 2**30:.2f}" for column in columns.values()))
    Console(width=120).print(table)


if __name__ == "__main__":
    with one_line_errors():
        main(arguments, rest.tasks)
