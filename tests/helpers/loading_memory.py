"""Measure how much memory each rank takes to load a model; the page cache does not count.

    accelerate launch --config_file sft/fsdp2.yaml tests/helpers/loading_memory.py MODEL HOW FILE

HOW is `recipe` or `stock`: transformers' from_pretrained, with its option to save memory under
FSDP. FILE receives a list with "peak" and "after", in bytes, of each rank.
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
    """The resident memory of this process that is not backed by a file."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


class Peak(threading.Thread):
    """Reads the memory of this process every so many seconds and keeps the highest value."""

    def __init__(self, *, seconds: float = 0.001) -> None:
        super().__init__(daemon=True)
        self.seconds = seconds
        self.before = self.highest = anonymous_bytes()
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(self.seconds):
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
    # Ends at once: a thread of torch 2.13.0's gloo that frees gathered tensors while Python shuts
    # down aborts the process.
    os._exit(0)


if __name__ == "__main__":
    main()
