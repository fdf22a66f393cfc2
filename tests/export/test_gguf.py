"""GGUF files hold what was trained: bit for bit on the disk, and as llama.cpp computes with it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from transformers import PreTrainedTokenizerFast

from finetune.errors import UserError
from finetune.export.gguf_adapter import ADAPTER, write_adapter
from finetune.export.gguf_layout import to_ggml_blocks
from finetune.export.gguf_model import MODEL, write_model
from finetune.export.gguf_weights import GgufWeights
from finetune.export.merge import MergedWeights
from finetune.model.loading import load_tokenizer
from finetune.model.mxfp4 import unpack
from helpers.engines import DIFFERENT, SAME, distance, in_llama, in_transformers, load_fp32
from helpers.finished_runs import open_run, peft_model, save_adapter_run
from helpers.llama import post, start_server
from helpers.paths import CONVERSATIONS
from tiny_gpt_oss import conversation_texts, save_tiny_gpt_oss


def write(merged: MergedWeights, output: Path) -> Path:
    tokenizer = load_tokenizer(merged.base.model_id)
    write_model(merged, tokenizer, output, name="tiny")
    return output / MODEL


def show(what: str, p: torch.Tensor, q: torch.Tensor) -> float:
    """Print and return the distance: docs/export-and-serve.md has these figures."""
    print(f"{what}: {distance(p, q):.4f}")
    return distance(p, q)


@pytest.fixture(scope="module")
def exported(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of a trained adapter (`run`) and of one that changes nothing."""
    folder = tmp_path_factory.mktemp("gguf")
    for name, std in (("run", 0.05), ("base", 0.0)):
        save_adapter_run(folder / name, tiny_model, std=std)
        write(open_run(folder / name), folder / name)
    write_adapter(open_run(folder / "run"), folder / "run", name="tiny")
    return folder


def test_ggml_reads_the_published_values() -> None:
    blocks = torch.randint(0, 256, (2, 3, 4, 16), dtype=torch.uint8)
    scales = torch.randint(2, 255, (2, 3, 4), dtype=torch.uint8)  # 0 and 1 are below fp32's range
    data = to_ggml_blocks(blocks, scales).numpy()
    values = torch.from_numpy(dequantize(data, GGMLQuantizationType.MXFP4))
    assert values.equal(unpack(blocks, scales).float())


def test_what_training_did_not_change_keeps_its_bytes(exported: Path) -> None:
    """Experts keep blocks and scales, everything else its values."""
    merged = open_run(exported / "base")
    stored = {t.name: torch.tensor(t.data) for t in GGUFReader(exported / "base" / MODEL).tensors}
    name = "model.layers.1.mlp.experts.gate_up_proj"
    blocks, scales = (merged.base.rows(f"{name}_{kind}") for kind in ("blocks", "scales"))
    assert stored["blk.1.ffn_gate_exps.weight"].equal(
        to_ggml_blocks(blocks[:, ::2], scales[:, ::2])
    )
    assert stored["blk.1.ffn_up_exps.weight"].equal(
        to_ggml_blocks(blocks[:, 1::2], scales[:, 1::2])
    )
    weights = GgufWeights(merged, exported / "base" / MODEL)
    for name in merged.names:
        assert weights.dense(name).equal(merged.base.dense(name)), name


def test_llama_computes_what_transformers_does(exported: Path, tiny_model: Path) -> None:
    """The base, the base with the adapter's file, and the trained model's own file."""
    base, trained = load_fp32(tiny_model), peft_model(tiny_model, exported / "run").eval()
    vocab_size = base.config.vocab_size
    file = exported / "base" / MODEL
    assert show("base", in_llama(file, vocab_size), in_transformers(base)) < SAME
    adapted = in_llama(file, vocab_size, adapter=exported / "run" / ADAPTER)
    assert show("base and adapter", adapted, in_transformers(trained)) < SAME
    assert show("base and adapter, from the base", adapted, in_transformers(base)) > DIFFERENT

    # Of the whole model the experts are MXFP4 again. Its own weights tell what that has cost.
    merged = open_run(exported / "run")
    weights = GgufWeights(merged, exported / "run" / MODEL)
    requantised = load_fp32(tiny_model)
    for name, parameter in requantised.named_parameters():
        parameter.data = weights.dense(name).float()
    in_file = in_llama(exported / "run" / MODEL, vocab_size)
    assert show("model", in_file, in_transformers(requantised)) < SAME
    assert show("model, from the base", in_file, in_transformers(base)) > DIFFERENT
    assert distance(in_file, in_transformers(trained)) < distance(in_file, in_transformers(base))


class ChangedExperts(MergedWeights):
    """The trained weights with other experts in every down_proj: their indices, None for none."""

    order: tuple[int | None, ...]

    def rows(
        self, name: str, *, start: int = 0, stop: int | None = None, device: Any = "cpu"
    ) -> torch.Tensor:
        rows = super().rows(name)
        if name.endswith("experts.down_proj"):
            none = torch.zeros_like(rows[0])
            rows = torch.stack([none if index is None else rows[index] for index in self.order])
        return rows[start:stop]


@pytest.mark.parametrize("order", [(1, 0, 2, 3), (0, None, 2, 3)], ids=["swapped", "missing"])
def test_an_expert_that_is_swapped_or_missing_is_noticed(
    order: tuple[int | None, ...], exported: Path, tiny_model: Path, tmp_path: Path
) -> None:
    merged = open_run(exported / "base")
    changed = ChangedExperts(merged.base, merged.run_weights, merged.targets)
    changed.order = order
    file = write(changed, tmp_path)
    base = load_fp32(tiny_model)
    assert distance(in_llama(file, base.config.vocab_size), in_transformers(base)) > DIFFERENT


class Interrupted(MergedWeights):
    """Weights of which one cannot be read, because the user presses ctrl-c."""

    at = "model.layers.1.self_attn.q_proj.weight"

    def rows(self, name: str, **options: Any) -> torch.Tensor:  # type: ignore[override]
        if name == self.at:
            raise KeyboardInterrupt
        return super().rows(name, **options)


class Counting(MergedWeights):
    """Weights that remember which of them were read."""

    def rows(self, name: str, **options: Any) -> torch.Tensor:  # type: ignore[override]
        self.read = {*getattr(self, "read", set()), name}
        return super().rows(name, **options)


def test_an_interrupted_file_is_gone_on_with(exported: Path, tmp_path: Path) -> None:
    merged = open_run(exported / "run")
    parts = merged.base, merged.run_weights, merged.targets
    with pytest.raises(KeyboardInterrupt):
        write(Interrupted(*parts), tmp_path)
    assert not (tmp_path / MODEL).exists()
    counting = Counting(*parts)
    write(counting, tmp_path)
    assert counting.read == set(merged.names[merged.names.index(Interrupted.at) :])
    assert [file.name for file in tmp_path.iterdir()] == [MODEL]
    assert (tmp_path / MODEL).read_bytes() == (exported / "run" / MODEL).read_bytes()


def test_what_another_export_has_begun_is_not_mixed_in(exported: Path, tmp_path: Path) -> None:
    merged = open_run(exported / "run")
    with pytest.raises(KeyboardInterrupt):
        write(Interrupted(merged.base, merged.run_weights, merged.targets), tmp_path)
    tokenizer = load_tokenizer(merged.base.model_id)
    write_model(merged, tokenizer, tmp_path, name="of another length")
    weights = GgufWeights(merged, tmp_path / MODEL)
    assert weights.dense("lm_head.weight").equal(merged.dense("lm_head.weight"))


def test_a_full_disk_is_noticed_before_a_weight_is_written(exported: Path, tmp_path: Path) -> None:
    merged = open_run(exported / "run")
    tokenizer = load_tokenizer(merged.base.model_id)
    with pytest.raises(UserError, match="the export takes"):
        write_model(merged, tokenizer, tmp_path, name="tiny", free_bytes=lambda folder: 10_000)
    assert not (tmp_path / MODEL).exists()


def test_a_full_disk_is_noticed_before_an_adapter_is_written(
    exported: Path, tmp_path: Path
) -> None:
    merged = open_run(exported / "run")
    size = sum(int(tensor.n_bytes) for tensor in GGUFReader(exported / "run" / ADAPTER).tensors)
    with pytest.raises(UserError, match="the export takes"):
        write_adapter(merged, tmp_path, name="tiny", free_bytes=lambda _: size - 1)
    assert not list(tmp_path.iterdir())
    write_adapter(merged, tmp_path, name="tiny", free_bytes=lambda _: size)


def test_a_line_of_the_journal_that_is_cut_off_names_no_weight(
    exported: Path, tmp_path: Path
) -> None:
    """A name may be the beginning of another one: gate_up_proj of gate_up_proj_bias."""
    merged = open_run(exported / "run")
    with pytest.raises(KeyboardInterrupt):
        write(Interrupted(merged.base, merged.run_weights, merged.targets), tmp_path)
    with open(tmp_path / f".{MODEL}.journal", "a") as journal:
        journal.write(Interrupted.at)
    write(merged, tmp_path)
    assert (tmp_path / MODEL).read_bytes() == (exported / "run" / MODEL).read_bytes()


def test_an_adapter_with_whole_weights_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    save_adapter_run(tmp_path, tiny_model, lora_modules_to_save=["lm_head"])
    with pytest.raises(UserError, match="also trained lm_head.weight as a whole: .*--format gguf"):
        write_adapter(open_run(tmp_path), tmp_path, name="tiny")


TEXTS = (
    "Hello, world! 12345 + 67 = ?",
    "don't  you\u00e9\u0301  \u4f60\u597d \U0001f600\r\n\n\tfor (int i=0;i<10;++i) {}",
    "<|start|>assistant<|channel|>analysis<|message|>Well\u2026<|end|>",
)


@pytest.fixture(scope="module")
def real_vocabulary(
    tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """A server whose model has gpt-oss's own 201,088 tokens."""
    folder = tmp_path_factory.mktemp("vocabulary")
    save_tiny_gpt_oss(folder / "base", [], tokenizer=tokenizer)
    save_adapter_run(folder / "run", folder / "base")
    yield start_server(write(open_run(folder / "run"), folder))


@pytest.mark.parametrize("text", [*TEXTS, *conversation_texts(CONVERSATIONS)[:20]])
def test_text_becomes_the_same_tokens(
    text: str, tokenizer: PreTrainedTokenizerFast, real_vocabulary: Any
) -> None:
    answer = post(real_vocabulary, "/tokenize", {"content": text, "parse_special": True})
    assert answer["tokens"] == tokenizer.encode(text, add_special_tokens=False)
