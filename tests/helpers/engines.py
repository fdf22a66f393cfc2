"""What each engine computes with each exported format: log-probabilities of the next token.

    PYTHONPATH=sft:tests python tests/helpers/engines.py RUN

exports a run of a tiny model in every format and prints a table of how far each engine is from the
trained model. `make test` prints it for runs that it has trained.

transformers and PEFT load the formats that they know. OpenAI's reference is given the weights that
the files hold, MXFP4 as its own code unpacks it and GGUF as the gguf package does. llama.cpp loads
GGUF. All of them compute in fp32, but llama.cpp, which rounds what goes into its products.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import GptOssForCausalLM, Mxfp4Config

from export import ExportArguments, export
from finetune.export.gguf_adapter import ADAPTER
from finetune.export.gguf_model import MODEL, write_model
from finetune.export.gguf_weights import GgufWeights
from finetune.export.merge import MergedWeights
from finetune.export.record import Format
from finetune.export.source import find_run_weights
from finetune.model.loading import load_config, load_tokenizer
from helpers.finished_runs import open_run, save_adapter_run
from helpers.llama import log_probs, start_server
from helpers.openai_reference import read_mxfp4, reference_model
from helpers.tensors import load_shards

# Past the tiny model's sliding window of 32 tokens, so that both kinds of layers are told apart.
NUM_TOKENS, POSITIONS = 120, range(7, 120, 8)
# llama.cpp rounds what goes into its products to 8 bits or bf16. Its mean distance from fp32, in
# nats, stays below the first of these; whatever is wrong with a file moves it beyond the second.
SAME, DIFFERENT = 0.002, 0.01
GGUF = ("gguf", "gguf-adapter")
PROPERTY = "engines"  # under which a test records its rows for the table of `make test`


def some_tokens(vocab_size: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(10, vocab_size, (NUM_TOKENS,), generator=generator).tolist()


@torch.no_grad()
def in_transformers(model: Any) -> torch.Tensor:
    """The log-probabilities after POSITIONS: (positions, vocabulary)."""
    tokens = torch.tensor([some_tokens(model.config.vocab_size)])
    return model(input_ids=tokens).logits[0, list(POSITIONS)].log_softmax(-1)


def in_llama(model: Path, vocab_size: int, *, adapter: Path | None = None) -> torch.Tensor:
    server = start_server(model, adapter=adapter)
    return log_probs(server, some_tokens(vocab_size), positions=POSITIONS, vocab_size=vocab_size)


@torch.no_grad()
def in_reference(base: Path, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    config = load_config(str(base))
    model = reference_model(config, weights)
    return model(torch.tensor(some_tokens(config.vocab_size)))[list(POSITIONS)].log_softmax(-1)


def distance(p: torch.Tensor, q: torch.Tensor) -> float:
    """The mean |log p - log q| over all tokens of the vocabulary and all positions."""
    return float((p - q).abs().mean())


def load_fp32(folder: Path) -> Any:
    """Whole weights, in MXFP4 or not, as transformers loads them."""
    is_packed = "quantization_config" in (folder / "config.json").read_text()
    return GptOssForCausalLM.from_pretrained(
        folder,
        quantization_config=Mxfp4Config(dequantize=True) if is_packed else None,
        dtype=torch.float32,
    ).eval()


def load_export(folder: Path, base: Path) -> Any:
    """A format that transformers knows, or PEFT."""
    if (folder / "adapter_config.json").exists():
        return PeftModel.from_pretrained(load_fp32(base), folder).eval()
    return load_fp32(folder)


def weights_in(folder: Path, merged: MergedWeights, *, form: Format) -> dict[str, torch.Tensor]:
    """All weights that a format makes, in fp32, by the names of GptOssForCausalLM."""
    if form == "adapter":
        return load_export(folder, merged.base.folder).merge_and_unload().state_dict()
    if form == "bf16":
        return {name: weight.float() for name, weight in load_shards(folder).items()}
    if form == "mxfp4":
        stored = load_shards(folder)
        return {
            name: read_mxfp4(folder, name).float().transpose(1, 2)
            if merged.is_experts(name)
            else stored[name].float()
            for name in merged.names
        }
    files = GgufWeights(merged, folder / (MODEL if form == "gguf" else ADAPTER))
    if form == "gguf":
        return {name: files.dense(name).float() for name in merged.names}
    weights = {name: merged.base.dense(name).float() for name in merged.names}
    for name in merged.targets:  # not files.dense, which rounds to bf16
        weights[name] += files.joined(name, files.delta, 0, None)
    return weights


def compare_engines(
    output: Path, merged: MergedWeights, base_gguf: Path, *, forms: tuple[Format, ...]
) -> list[dict[str, Any]]:
    """Load each format in each engine that loads it; a row of distances from the trained model for
    each format, and one for the base.

    output: holds a folder for each format. Fails if an engine computes something else with a format
    than transformers does with the same weights.
    """
    base = merged.base.folder
    final = merged.run_weights.folder
    trained = in_transformers(load_export(final, base))
    untrained = in_transformers(load_fp32(base))
    rows = [{"format": "the base", "transformers": distance(untrained, trained)}]
    for form in forms:
        weights = weights_in(output / form, merged, form=form)
        if form in GGUF:
            model = load_fp32(base)
            model.load_state_dict(weights)
        else:
            model = load_export(output / form, base)
        engines = {"transformers": in_transformers(model)}
        engines["reference"] = in_reference(base, weights)
        assert distance(engines["reference"], engines["transformers"]) < 1e-5, form
        if form in GGUF:
            file = output / form / MODEL if form == "gguf" else base_gguf
            adapter = output / form / ADAPTER if form == "gguf-adapter" else None
            engines["llama.cpp"] = in_llama(file, model.config.vocab_size, adapter=adapter)
            assert distance(engines["llama.cpp"], engines["transformers"]) < SAME, form
        rows.append({"format": form} | {n: distance(p, trained) for n, p in engines.items()})
    return rows


def rows_of_run(
    run: str, run_dir: Path, output: Path, forms: tuple[Format, ...]
) -> list[dict[str, Any]]:
    """The rows of compare_engines for the table. run: what they are called in it."""
    merged = open_run(run_dir)
    base = merged.base.folder
    save_adapter_run(output / "base", base, std=0.0)
    write_model(open_run(output / "base"), load_tokenizer(str(base)), output / "base", name="base")
    rows = compare_engines(output, merged, output / "base" / MODEL, forms=forms)
    return [{"run": run} | row for row in rows]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The lines of a Markdown table. rows: compare_engines', with the run's name under `run`."""
    columns = ("transformers", "reference", "llama.cpp")
    lines = ["| run | format | transformers | OpenAI's reference | llama.cpp |", "|---" * 5 + "|"]
    for row in rows:
        cells = [f"{row[name]:.4f}" if name in row else "" for name in columns]
        lines.append(f"| {row['run']} | {row['format']} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    run_dir = Path(sys.argv[1])
    forms: tuple[Format, ...] = ("bf16", "mxfp4", "gguf")
    if find_run_weights(run_dir).is_adapter:
        forms = ("adapter", *forms, "gguf-adapter")
    with tempfile.TemporaryDirectory() as folder:
        for form in forms:
            output = Path(folder) / form
            export(run_dir, ExportArguments(format=form, output=output, verify=False))
        rows = rows_of_run(run_dir.name, run_dir, Path(folder), forms)
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
