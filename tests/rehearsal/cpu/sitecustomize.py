"""Lets the accelerate configs run without GPUs. On PYTHONPATH in rehearsals and tests only.

accelerate takes FSDP and DeepSpeed on CPU for plain data parallel without a word. torch's FSDP2 and
DeepSpeed's ZeRO run on CPU with gloo, so it is enough to start gloo and to let accelerate believe
in an accelerator that is the CPU: sharding, checkpoints and resume are then the real ones.

It also makes bf16 quick enough: see bf16_matmul.py beside this file.
"""

import os

os.environ["ACCELERATE_USE_CPU"] = "true"

USE_FSDP = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
USE_DEEPSPEED = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"

if "RANK" in os.environ:
    import torch
    from bf16_matmul import replace_slow_kernels

    library = torch.library.Library("aten", "IMPL")
    replace_slow_kernels(library)

if "RANK" in os.environ and (USE_FSDP or USE_DEEPSPEED):
    from accelerate import state
    from accelerate.utils import DistributedType

    def prepare_backend(
        self: state.PartialState, *args: object, **kwargs: object
    ) -> tuple[str, DistributedType]:
        if USE_FSDP and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        return "gloo", DistributedType.MULTI_NPU

    def set_device(self: state.PartialState) -> None:
        self.device = torch.device("cpu")

    state.PartialState._prepare_backend = prepare_backend
    state.PartialState.set_device = set_device

if "RANK" in os.environ and USE_DEEPSPEED:
    # A process that says it is on CPU is never given to DeepSpeed.
    partial_state_init = state.PartialState.__init__
    parse_flag_from_env = state.parse_flag_from_env

    def init(self: state.PartialState, cpu: bool = False, **kwargs: object) -> None:
        partial_state_init(self, cpu=False, **kwargs)

    def parse_flag(name: str, *default: bool) -> bool:
        return name != "ACCELERATE_USE_CPU" and parse_flag_from_env(name, *default)

    state.PartialState.__init__ = init
    state.parse_flag_from_env = parse_flag
