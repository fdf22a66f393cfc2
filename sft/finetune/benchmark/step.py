"""What a step of a task takes on each GPU at least, on paper.

    step = count_step(task, parse_task(task))
    step.seconds, step.tokens_per_sec

The microbatches' forward and backward are counted operation by operation (op_count.py). Moving
weights and gradients between GPUs, FSDP2's copies and the optimizer follow from the numbers of
parameters (traffic.py). What moves travels while a layer computes, so that a step takes the longer
of the two sums.

A collective of B bytes over W GPUs moves B (W - 1) / W through every GPU's link. Between nodes,
NCCL's rings share all network cards of a node, so the time there is B over the sum of the cards'
bandwidths (the "bus bandwidth" of nccl-tests).
"""

from dataclasses import dataclass

from finetune.arguments import Config
from finetune.benchmark.gpus import NETWORK, REACHED_LINKS, Gpu, gpu_named
from finetune.benchmark.op_count import Cost, count_microbatch
from finetune.benchmark.synthetic import MEAN_LENGTH, config_of
from finetune.benchmark.traffic import (
    bytes_between_gpus,
    bytes_copied,
    bytes_of_optimizer,
    count_parameters,
)
from finetune.errors import UserError
from finetune.model.flops import PEAK_FLOPS, flops_per_token
from finetune.task_file import TaskFile

COPIES_PART = "FSDP2's copies of weights and gradients"
MOVING = "moving between GPUs"


@dataclass(frozen=True)
class Step:
    """An optimizer step on each GPU; times are in seconds and lower bounds.

    tokens: of a microbatch. parts: what one costs. optimizer, moving: of the complete step.
    flops_per_token: as MFU counts them.
    """

    gpu: Gpu
    tokens: int
    accumulation: int
    parts: dict[str, Cost]
    optimizer: float
    moving: float
    flops_per_token: float

    @property
    def microbatch(self) -> Cost:
        return sum(self.parts.values(), Cost())

    def seconds_of(self, part: str) -> float:
        """Of a microbatch; 0 for a part that this step does not have."""
        return self.parts.get(part, Cost()).seconds

    @property
    def computing(self) -> float:
        return self.accumulation * self.microbatch.seconds + self.optimizer

    @property
    def seconds(self) -> float:
        return max(self.computing, self.moving)

    @property
    def tokens_per_sec(self) -> float:
        """Of each GPU, at most."""
        return self.accumulation * self.tokens / self.seconds

    @property
    def mfu(self) -> float:
        """At most, as a share of the data sheet's peak."""
        return self.tokens_per_sec * self.flops_per_token / PEAK_FLOPS[self.gpu.name]

    @property
    def bound(self) -> str:
        """Moving, if that takes longer than all else, or the part that takes longest."""
        if self.moving > self.computing:
            return MOVING
        return max(self.parts, key=self.seconds_of)


def count_step(
    task: TaskFile, config: Config, *, gpu: Gpu | None = None, unpacks_in_product: bool = False
) -> Step:
    """The step of a task with the flags of config, on its own GPU or another one.

    unpacks_in_product: how a base in MXFP4 is unpacked, which training chooses at its start.

    Raises UserError if the length of a row or the speed of the GPU is not known. Takes seconds.
    """
    gpu = gpu or gpu_named(task.accelerator)
    parts = count_parts(task, config, gpu, unpacks_in_product=unpacks_in_product)
    return step_of(task, config, gpu, parts)


def count_parts(
    task: TaskFile, config: Config, gpu: Gpu, *, unpacks_in_product: bool = False
) -> dict[str, Cost]:
    """What a microbatch costs, by part; the same on any number of these GPUs. Takes seconds.

    Raises UserError if the length of a row is not known.
    """
    training = config.training
    if training.max_length is None:
        raise UserError(f"{task.name}: the length of a row is not known without --max_length")
    return count_microbatch(
        config_of(config.model_id),
        config.model,
        gpu,
        max_length=training.max_length,
        batch_size=training.per_device_train_batch_size,
        packed=not config.run.dequantize,
        context=min(MEAN_LENGTH, training.max_length),
        activation_checkpointing=training.activation_checkpointing,
        unpacks_in_product=unpacks_in_product,
    )


def step_of(task: TaskFile, config: Config, gpu: Gpu, parts: dict[str, Cost]) -> Step:
    """The step whose microbatches cost `parts`, with what the number of GPUs adds to it."""
    training, lora = config.training, config.model.use_peft
    assert training.max_length is not None  # count_parts has checked it
    model = config_of(config.model_id)
    parameters = count_parameters(model, config.model)
    shards = task.num_gpus if task.is_sharded else 1
    if task.is_sharded:
        copied = bytes_copied(parameters, lora=lora)
        parts = parts | {COPIES_PART: Cost(bytes=copied, seconds=copied / gpu.bandwidth)}
    links = min(gpu.nvlink, NETWORK) if task.num_nodes > 1 else gpu.nvlink
    moved = bytes_between_gpus(parameters, sharded=task.is_sharded, lora=lora)
    # FSDP2 gathers the weights and reduces the gradients of each microbatch, DDP of each step.
    times = training.gradient_accumulation_steps if task.is_sharded else 1
    share = (task.num_gpus - 1) / task.num_gpus
    return Step(
        gpu=gpu,
        tokens=training.max_length * training.per_device_train_batch_size,
        accumulation=training.gradient_accumulation_steps,
        parts=parts,
        optimizer=bytes_of_optimizer(parameters, lora=lora) / shards / gpu.bandwidth,
        moving=times * moved * share / (links * REACHED_LINKS),
        flops_per_token=flops_per_token(model, context=MEAN_LENGTH, lora=lora),
    )
