"""Lets the accelerate configs run without GPUs. On PYTHONPATH in rehearsals and tests only.

accelerate takes FSDP on CPU for plain data parallel without a word. torch's FSDP2 itself runs on
CPU with gloo, so it is enough to start gloo and to let accelerate believe in an accelerator that is
the CPU: sharding, checkpoints and resume are then the real ones.
"""

import os

os.environ["ACCELERATE_USE_CPU"] = "true"

if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and "RANK" in os.environ:
    import torch
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    def prepare_backend(self: PartialState, *args: object, **kwargs: object) -> tuple[str, str]:
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        return "gloo", DistributedType.MULTI_NPU

    def set_device(self: PartialState) -> None:
        self.device = torch.device("cpu")

    PartialState._prepare_backend = prepare_backend
    PartialState.set_device = set_device
