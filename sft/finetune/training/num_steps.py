"""How many optimizer steps a run takes, and a warning where they are few."""

import math

from datasets import Dataset
from trl import SFTConfig, pack_dataset

from finetune.data.dataset import count_tokens

FEW_STEPS = 20


def sequences_per_step(training_args: SFTConfig, *, num_gpus: int) -> int:
    """The rows, or packed rows, of one optimizer step, on all GPUs together."""
    return (
        training_args.per_device_train_batch_size
        * training_args.gradient_accumulation_steps
        * num_gpus
    )


def num_training_steps(num_sequences: int, training_args: SFTConfig, *, num_gpus: int) -> int:
    """The optimizer steps of a run: --max_steps, or those of --num_train_epochs."""
    if training_args.max_steps > 0:
        return training_args.max_steps
    epoch = math.ceil(num_sequences / sequences_per_step(training_args, num_gpus=num_gpus))
    return math.ceil(training_args.num_train_epochs * epoch)


def sequences_of(rows: Dataset, training_args: SFTConfig) -> Dataset:
    """The rows that the trainer batches: packed, if the run packs. Millions take minutes."""
    if training_args.packing and training_args.max_length:
        return pack_dataset(rows, training_args.max_length, training_args.packing_strategy)
    return rows


def few_steps_of(rows: Dataset, training_args: SFTConfig, *, num_gpus: int) -> str | None:
    """The warning for a run on these rows of input_ids, or None."""
    num_sequences, max_length = len(rows), training_args.max_length
    if training_args.packing and max_length:
        # Packing takes long. No sequence is more than full, so that there are
        # at least this many; only where they would be few is it worth to count them.
        num_sequences = count_tokens(rows) // max_length
        if few_steps(num_training_steps(num_sequences, training_args, num_gpus=num_gpus)):
            num_sequences = len(sequences_of(rows, training_args))
    return few_steps(num_training_steps(num_sequences, training_args, num_gpus=num_gpus))


def few_steps(num_steps: int) -> str | None:
    """The warning for a run of so many optimizer steps, or None."""
    if num_steps >= FEW_STEPS:
        return None
    return (
        f"only {num_steps} optimizer steps, and fewer than {FEW_STEPS} teach little: raise "
        "--num_train_epochs, or lower GLOBAL_BATCH_SIZE"
    )
