"""The figures of all layers, from those measured at two numbers of layers."""

from typing import Any

from finetune.benchmark.measure import mfu
from finetune.benchmark.options import BenchArguments
from finetune.benchmark.results import TIMES
from finetune.benchmark.synthetic import make_config


def scale(
    args: BenchArguments, path: str, few: dict[str, Any], more: dict[str, Any]
) -> dict[str, Any]:
    """A result whose times are a fixed part plus one a layer; None where either was not measured.

    few, more: two results of one path. With --tiny too they are scaled to the layers of the model.
    """
    config = make_config(args.model)
    num_layers = config.num_hidden_layers
    label = f"{path}, scaled to {num_layers} layers"
    if "tokens_per_sec" not in few or "tokens_per_sec" not in more:
        return {"path": label, "failed": "not measured"}
    steps = (num_layers - few["num_layers"]) / (more["num_layers"] - few["num_layers"])
    times = {
        name: None
        if few[name] is None or more[name] is None
        else few[name] + steps * (more[name] - few[name])
        for name in TIMES
    }
    rate = more["tokens_per_step"] / times["seconds_per_step"]
    return {
        **{name: value for name, value in more.items() if name != "failed"},
        "path": label,
        "num_layers": num_layers,
        "tokens_per_sec": round(rate, 1),
        "mfu": mfu(rate, config, lora=args.use_peft),
        "peak_memory_gib": None,
        **{name: None if value is None else round(value, 4) for name, value in times.items()},
    }
