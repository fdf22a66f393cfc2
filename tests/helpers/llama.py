"""llama.cpp, as the package xllamacpp brings it: load a GGUF file and ask for log-probabilities."""

import json
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import torch
import xllamacpp


def start_server(
    model: Path,
    *,
    adapter: Path | None = None,
    scale: float = 1.0,
    key: str | None = None,
    chat_template: str | None = None,
    host: str | None = None,
    port: int = 0,
    name: str | None = None,
    context: int = 1024,
) -> xllamacpp.Server:
    """llama.cpp's server with this model, on a free port of loopback. It ends with the object.

    host: the address to listen on instead. name: of the model, in requests. context: how many
    tokens a prompt and its answer may have.
    """
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.warmup = context, 1, False
    params.fit_params = False  # it would load the model twice, to measure what fits
    params.cpuparams.n_threads = 2
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), scale)]
    if key is not None:
        params.api_keys = [key]
    if chat_template is not None:
        params.chat_template = chat_template
    if host is not None:
        params.hostnames = [host]
    if port:
        params.port = port
    if name is not None:
        params.model_alias = {name}
    return xllamacpp.Server(params)


def log_probs(
    server: xllamacpp.Server, tokens: list[int], *, positions: range, vocab_size: int
) -> torch.Tensor:
    """The log-probabilities of the next token after each of these positions:
    (positions, vocabulary).
    """
    rows = torch.full((len(positions), vocab_size), float("nan"))
    # There is no answer if the sampled token ends the text or is half a character: take an "a".
    # What is sampled does not change the log-probabilities.
    (letter,) = post(server, "/tokenize", {"content": "a"})["tokens"]
    sampling = {"max_tokens": 1, "temperature": 0, "logit_bias": {str(letter): 1000}}
    for row, position in zip(rows, positions, strict=True):
        request = {"prompt": tokens[: position + 1], "logprobs": vocab_size}
        answer = server.handle_completions(request | sampling)
        (token,) = answer["choices"][0]["logprobs"]["content"]
        for candidate in token["top_logprobs"]:
            row[candidate["id"]] = candidate["logprob"]
    return rows


def post(server: xllamacpp.Server, path: str, body: dict[str, Any]) -> Any:
    """What the server's HTTP endpoint answers."""
    data = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = Request(f"{server.listening_address}{path}", data=data, headers=headers)
    with urlopen(request, timeout=300) as response:
        return json.load(response)
