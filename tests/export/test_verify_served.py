"""sft/verify_served.py asks a real llama.cpp server over loopback, and says what answers."""

import itertools
import json
import random
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader

from finetune.errors import UserError
from finetune.export.gguf_adapter import ADAPTER, write_adapter
from finetune.export.gguf_model import MODEL, write_model
from finetune.export.merge import MergedWeights
from finetune.export.served_client import Client, token_id
from finetune.export.served_reference import FILE, Place, identity_of, read_reference
from finetune.export.served_scaling import measured_scaling, scaling_problem
from finetune.export.served_verdict import Compared, align, judge, judge_places
from finetune.model.loading import load_tokenizer
from finetune.model.weights import BaseWeights
from helpers.finished_runs import open_run, save_adapter_run, with_other_weights
from helpers.llama import start_server
from helpers.paths import CONVERSATIONS
from tiny_gpt_oss import conversation_texts, save_tiny_gpt_oss
from verify_served import VerifyArguments, load_reference, verify

AS_TRAINED = "served as trained"


class WithoutExperts(MergedWeights):
    """The run without what it trained of its experts."""

    def __init__(self, merged: MergedWeights) -> None:
        targets = {n: t for n, t in merged.targets.items() if ".experts." not in n}
        super().__init__(merged.base, merged.run_weights, merged.targets)
        self.targets = targets


@pytest.fixture(scope="module")
def files(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, and beside it GGUF files: of the base, of its adapter, and of others."""
    folder = tmp_path_factory.mktemp("served")
    save_adapter_run(folder / "none", tiny_model, std=0.0)
    write_whole(open_run(folder / "none"), folder / "none")
    save_adapter_run(folder / "run", tiny_model)
    merged = open_run(folder / "run")
    write_adapter(merged, folder, name="run")
    (folder / "without").mkdir()
    write_adapter(WithoutExperts(merged), folder / "without", name="without")
    save_adapter_run(folder / "other", tiny_model, seed=1)
    write_adapter(open_run(folder / "other"), folder / "other", name="other")
    return folder


def write_whole(merged: MergedWeights, folder: Path) -> None:
    write_model(merged, load_tokenizer(merged.base.model_id), folder, name="tiny")


def verdict(files: Path, *, model: str = "none", **options: Any) -> Any:
    """What verify_served.py says of a server with this model and adapter."""
    server = start_server(files / model / MODEL, **options)
    return verify(server.listening_address, files / "run", VerifyArguments(max_error=0.01))


def test_the_right_adapter_is_served_as_trained(files: Path, capsys: Any) -> None:
    found = verdict(files, adapter=files / ADAPTER)
    assert found.ok and found.text == AS_TRAINED
    # The trained model is computed in bf16 here; its rounding alone is about 0.001.
    assert found.rows["distance from the trained model"] < 0.003
    printed = capsys.readouterr().out
    assert AS_TRAINED in printed and "distance from the base" in printed
    # The second call needs no model: what the first one computed is kept.
    assert verdict(files, adapter=files / ADAPTER).ok
    assert "running the trained model" not in capsys.readouterr().out


def test_an_adapter_that_is_not_applied_is_named(files: Path) -> None:
    found = verdict(files)
    assert found.ok is False and "what was trained is not applied" in found.text


def test_an_adapter_without_its_experts_is_named(files: Path) -> None:
    found = verdict(files, adapter=files / "without" / ADAPTER)
    assert found.ok is False and "without its experts" in found.text


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_an_adapter_with_another_scaling_is_named(files: Path, scale: float) -> None:
    found = verdict(files, adapter=files / ADAPTER, scale=scale)
    assert found.ok is False and "scaled wrongly" in found.text, found


def test_another_runs_adapter_is_named(files: Path) -> None:
    found = verdict(files, adapter=files / "other" / ADAPTER)
    assert found.ok is False and "another run" in found.text


def test_another_base_is_named(files: Path) -> None:
    texts = conversation_texts(CONVERSATIONS)
    base = save_tiny_gpt_oss(files / "another-base", texts, seed=7)
    save_adapter_run(files / "another", base, std=0.0)
    write_whole(open_run(files / "another"), files / "another")
    found = verdict(files, model="another", adapter=files / ADAPTER)
    assert found.ok is False and "another base model" in found.text


def test_a_model_quantised_too_far_is_named(files: Path, tmp_path: Path) -> None:
    """The experts' FP4 codes without their last bit: half as many values."""
    data = bytearray((files / "none" / MODEL).read_bytes())
    for tensor in GGUFReader(files / "none" / MODEL).tensors:
        if "_exps.weight" in tensor.name:
            for offset in range(0, tensor.n_bytes, 17):
                for byte in range(offset + 1, offset + 17):
                    data[tensor.data_offset + byte] &= 0xEE
    (files / "coarse").mkdir()
    (files / "coarse" / MODEL).write_bytes(data)
    found = verdict(files, model="coarse", adapter=files / ADAPTER)
    assert found.ok is False and "quantised too far" in found.text, found


def test_another_chat_template_is_named(files: Path) -> None:
    template = "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}{% endfor %}"
    found = verdict(files, adapter=files / ADAPTER, chat_template=template)
    assert found.ok is False and "chat template differs" in found.text


def test_a_replica_that_lacks_the_adapter_is_named(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers one request in twenty, too few for the distance over all places."""
    base = start_server(files / "none" / MODEL)
    of_base = Client(base.listening_address, key=None, model=None, preferred="run")
    ask, numbers = Client.next_log_probs, itertools.count()

    def one_of_two(client: Client, *args: Any) -> dict[int, float]:
        return ask(of_base if next(numbers) % 20 == 0 else client, *args)

    monkeypatch.setattr(Client, "next_log_probs", one_of_two)
    found = verdict(files, adapter=files / ADAPTER)
    assert found.ok is False and "the base answers at" in found.text


def test_a_few_answers_are_too_few(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask, numbers = Client.next_log_probs, itertools.count()

    def sometimes(client: Client, *args: Any) -> dict[int, float]:
        return ask(client, *args) if next(numbers) % 8 == 0 else {}

    monkeypatch.setattr(Client, "next_log_probs", sometimes)
    found = verdict(files, adapter=files / ADAPTER)
    # Of the 8 some may be without: llama.cpp's gives none where what it samples ends the text.
    assert found.ok is None and re.search("answers at [4-8] of 64 places", found.text), found


def test_the_reference_of_other_weights_is_not_used(
    files: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """A run that was trained again has the same record, and other weights."""
    server = start_server(files / "none" / MODEL, adapter=files / ADAPTER)
    arguments = VerifyArguments(max_error=0.01)
    folder = tmp_path / "run"
    shutil.copytree(files / "run", folder)
    assert verify(server.listening_address, folder, arguments).ok
    save_adapter_run(folder, tiny_model, seed=1)
    assert not verify(server.listening_address, folder, arguments).ok


def test_the_reference_of_another_base_is_another(
    files: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """--base may give any folder for a model of the hub."""
    merged = open_run(files / "run")
    other = BaseWeights(str(with_other_weights(tiny_model, tmp_path)))
    on_other = MergedWeights(other, merged.run_weights, merged.targets)
    one, another = (identity_of(m, num_examples=1, num_places=1) for m in (merged, on_other))
    assert one != another


@pytest.mark.parametrize(
    "options",
    [{"max_error": float("nan")}, {"max_error": -1.0}, {"num_places": 0}, {"num_examples": 0}],
)
def test_numbers_that_compare_nothing_are_refused(options: dict[str, Any], files: Path) -> None:
    with pytest.raises(UserError, match="--(max_error|num_examples)"):
        verify("http://localhost:1", files / "run", VerifyArguments(**options))


@pytest.mark.parametrize("places", [[], [{"tokens": [1], "candidates": [1], "log_probs": {}}]])
def test_a_damaged_reference_is_computed_anew(places: list[Any], tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps({"identity": {}, "places": places}))
    assert read_reference(tmp_path, {}) is None


def test_places_beyond_the_servers_context_are_left_out(files: Path, capsys: Any) -> None:
    found = verdict(files, adapter=files / ADAPTER, context=256)
    assert found.ok and found.text == AS_TRAINED
    printed = capsys.readouterr().out
    assert "of 64 places left out: " in printed and "/v1/completions answers 400" in printed
    assert "exceeds the available context size" in printed


def test_a_server_that_is_not_there_is_one_line(files: Path) -> None:
    with pytest.raises(UserError, match="cannot be reached .* is it serving"):
        verify("http://127.0.0.1:9", files / "run", VerifyArguments())


def test_a_wrong_key_is_one_line(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start_server(files / "none" / MODEL, adapter=files / ADAPTER, key="secret")
    monkeypatch.setenv("API_KEY", "another")
    with pytest.raises(UserError, match="wants another key: export API_KEY"):
        verify(server.listening_address, files / "run", VerifyArguments())
    monkeypatch.setenv("API_KEY", "secret")
    assert verify(server.listening_address, files / "run", VerifyArguments()).ok


Served = list[dict[int, float]]
SERVERS: dict[str, dict[str, Any]] = {
    "right": {},
    "base": {"adapter": None},
    "requantised": {"model": "run", "adapter": None},
    "weaker": {"scale": 0.85},
    "stronger": {"scale": 1.2},
}


@pytest.fixture(scope="module")
def places(files: Path) -> list[Place]:
    """Many places, for subsets of them."""
    arguments = VerifyArguments(num_places=150)
    return load_reference(files / "run", open_run(files / "run"), arguments).places


@pytest.fixture(scope="module")
def answers(files: Path, places: list[Place]) -> dict[str, Served]:
    """What right and wrong servers say at these places: SERVERS says how each is made."""
    merged = open_run(files / "run")
    write_whole(merged, files / "run")
    tokenizer = load_tokenizer(merged.base.model_id)
    served = {}
    for name, options in SERVERS.items():
        options = {"adapter": files / ADAPTER} | options
        server = start_server(files / options.pop("model", "none") / MODEL, **options)
        client = Client(server.listening_address, key=None, model=None, preferred="run")
        served[name] = [client.next_log_probs(place.tokens, tokenizer) for place in places]
    return served


def test_a_scaling_that_is_a_little_off_is_told(
    places: list[Place], answers: dict[str, Served]
) -> None:
    """The distances alone let it pass."""
    for name in ("weaker", "stronger"):
        assert judge(align(places, answers[name])).ok, name
        found = judge_places(places, answers[name], max_error=None)
        assert found.ok is False and "of the adapter is applied" in found.text, name
        assert abs(float(found.text.split()[0]) - SERVERS[name]["scale"]) < 0.1, found.text


def test_no_choice_of_places_makes_a_scaling_look_wrong(
    places: list[Place], answers: dict[str, Served]
) -> None:
    for seed in range(100):
        some = random.Random(seed).sample(range(len(places)), 20)
        for name in ("right", "requantised"):
            given = [answers[name][index] for index in some]
            assert scaling_problem([places[index] for index in some], given) is None, (name, seed)


def test_a_scaling_is_measured_with_its_error() -> None:
    """On made-up places, whose numbers share an error, the error is how much the results vary."""
    results = []
    for seed in range(200):
        draw = random.Random(seed)
        sums = []
        for _ in range(64):
            direction, shared = [draw.gauss(0, 1) for _ in range(20)], draw.gauss(0, 0.3)
            square = sum(d * d for d in direction)
            sums.append((-0.2 * square + shared * square, square))
        results.append(measured_scaling(sums))
    scalings, errors = zip(*results, strict=True)
    assert abs(statistics.mean(scalings) - 0.8) < 0.01
    assert statistics.mean(errors) == pytest.approx(statistics.stdev(scalings), rel=0.2)


@pytest.mark.parametrize("seed", range(100))
def test_no_choice_of_values_raises_a_false_alarm(
    seed: int, places: list[Place], answers: dict[str, Served]
) -> None:
    for name in ("right", "base"):
        compared = align(places, answers[name])
        generator = torch.Generator().manual_seed(seed)
        some = torch.randperm(len(compared.server), generator=generator)[:600]
        models = {model: values[some] for model, values in compared.models.items()}
        assert judge(Compared(compared.server[some], models)).ok == (name == "right")


def test_there_is_no_false_alarm() -> None:
    """100 adapters, and an engine that is off by as much as llama.cpp was measured to be, and more.

    The log-probabilities are made up here; those of the tests above are a server's.
    """
    for seed in range(100):
        draws = torch.randn(5, 64 * 20, generator=torch.Generator().manual_seed(seed)).double()
        base, trained = 3 * draws[0], 3 * draws[0] + 0.2 * draws[1]
        models = {"trained": trained, "base": base, "without_experts": trained + 0.1 * draws[2]}
        assert judge(Compared(trained + 0.02 * draws[3], models)).text == AS_TRAINED
        assert not judge(Compared(base + 0.02 * draws[4], models)).ok


def test_tokens_are_found_by_id_or_by_text(tiny_model: Path) -> None:
    """As vLLM names them when asked to, and as SGLang does."""
    tokenizer = load_tokenizer(str(tiny_model))
    assert token_id("token_id:17", tokenizer) == 17
    (rice,) = tokenizer.encode("a")
    assert token_id("a", tokenizer) == rice
    assert token_id("\ufffd\ufffd", tokenizer) is None


def test_only_what_both_name_is_compared() -> None:
    place = Place([1], [5, 6, 7], {"trained": [-1.0, -2.0, -3.0], "base": [-2.0, -1.0, -3.0]})
    compared = align([place], [{6: -1.5, 7: -2.5, 99: -0.1}])
    assert compared.server.tolist() == [-1.5, -2.5]
    assert compared.models["base"].tolist() == [-1.0, -3.0]
    assert judge(compared).ok is None  # two are too few
