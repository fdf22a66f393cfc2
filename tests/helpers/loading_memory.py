"""How much memory, in bytes and page cache left out, each rank takes to load a model.

accelerate launch --config_file sft/fsdp2.yaml tests/helpers/loading_memory.py MODEL HOW FILE

HOW: recipe, or stock: transformers' from_pretrained, told to be sparing with memory under FSDP.
"""

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, parse_flag_from_env
from transformers import GptOssForCausalLM, Mxfp4Config

from finetune.model.loading import load_model
from finetune.model.weights import BaseWeights, shard_and_fill


def anonymous_bytes() -> int:
    """Of this process: what no file backs."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


class Peak(threading.Thread):
    """Looks every millisecond."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.highest = anonymous_bytes()
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.001):
            self.highest = max(self.highest, anonymous_bytes())

    def stop(self) -> dict[str, int]:
        self.ended.set()
        self.join()
        return {"peak": self.highest - self.before, "after": anonymous_bytes() - self.before}


def main() -> None:
    model_id, how, file = sys.argv[1:]
    accelerator = Accelerator()
    torch.ones(1).sum().item()
    accelerator.wait_for_everyone()
    peak = Peak()
    peak.start()
    model: Any
    if how == "stock":
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"
        model = GptOssForCausalLM.from_pretrained(
            model_id, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
        )
    else:
        weights, sharded = BaseWeights(model_id), parse_flag_from_env("ACCELERATE_USE_FSDP")
        model = load_model(weights, attn_implementation="eager", dequantize=sharded)
        if sharded:
            shard_and_fill(accelerator, model, weights)
    accelerator.wait_for_everyone()
    figures = gather_object([peak.stop()])
    if accelerator.is_main_process:
        Path(file).write_text(json.dumps(figures))
    accelerator.wait_for_everyone()
    # torch 2.13.0's gloo aborts where a thread lets go of gathered tensors while Python is ending.
    os._exit(0)


if __name__ == "__main__":
    main()
