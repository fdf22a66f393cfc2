"""Ask an OpenAI-compatible server what it would say next: vLLM, SGLang, or llama.cpp's server.

All three take a prompt as token ids at /v1/completions and give the likeliest next tokens with
their log-probabilities. They differ in how they name these tokens, and in how they show what their
chat template makes of a message.
"""

from typing import Any

import httpx
from transformers import PreTrainedTokenizerBase

from finetune.errors import UserError

NUM_TOKENS = 20  # that are asked for; vLLM gives no more by default (--max-logprobs)
TIMEOUT = 300  # seconds for one answer: a server may still be loading its kernels


class Client:
    """A server at `url`, such as http://localhost:8000, and a model's name there.

    key: sent as a bearer token, if given. model: None takes the only one, or the one named
    `preferred`. Raises UserError, naming the URL, for whatever keeps it from answering.
    """

    def __init__(self, url: str, *, key: str | None, model: str | None, preferred: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(headers=headers, timeout=TIMEOUT)
        names = [entry["id"] for entry in self.get("/v1/models")["data"]]
        if model is None:
            model = preferred if preferred in names else names[0] if len(names) == 1 else None
        if model not in names:
            raise UserError(f"{self.url} serves {', '.join(names)}: say which with --model")
        self.model = model

    def get(self, path: str) -> Any:
        return self.answer("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return self.answer("POST", path, body)

    def answer(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        try:
            response = self.http.request(method, self.url + path, json=body)
        except httpx.TimeoutException:
            raise UserError(f"{self.url} has not answered in {TIMEOUT} s") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise UserError(f"{self.url} cannot be reached ({error}): is it serving?") from None
        if response.status_code in (401, 403):
            raise UserError(f"{self.url} wants another key: export API_KEY as the server has it")
        try:
            response.raise_for_status()
            return response.json()
        except (httpx.HTTPStatusError, ValueError):
            text = " ".join(response.text.split())[:200]
            raise UserError(f"{self.url}{path} answers {response.status_code}: {text}") from None

    def next_log_probs(
        self, tokens: list[int], tokenizer: PreTrainedTokenizerBase
    ) -> dict[int, float]:
        """The log-probabilities (nats) of the likeliest tokens after a prompt, by token id.

        Empty if the server gives none: llama.cpp's does so where the token that it samples ends the
        text, or is half a character.
        """
        body = {
            "model": self.model,
            "prompt": tokens,
            "max_tokens": 1,
            "logprobs": NUM_TOKENS,
            "temperature": 1,  # some servers scale log-probabilities by it
            "return_tokens_as_token_ids": True,  # vLLM; the others ignore it
        }
        (choice,) = self.post("/v1/completions", body)["choices"]
        given = choice.get("logprobs") or {}
        if given.get("content"):  # llama.cpp's
            return {c["id"]: c["logprob"] for c in given["content"][0]["top_logprobs"]}
        if not given.get("top_logprobs"):
            return {}
        pairs = given["top_logprobs"][0].items()
        named = [(token_id(name, tokenizer), value) for name, value in pairs]
        return {number: value for number, value in named if number is not None}

    def prompt_of(self, message: str, tokenizer: PreTrainedTokenizerBase) -> list[int] | int | None:
        """What the server's chat template makes of a user's message: its tokens or, from a server
        that does not show them, their number; None if it gives neither.
        """
        messages = [{"role": "user", "content": message}]
        try:  # vLLM
            answer = self.post("/tokenize", {"model": self.model, "messages": messages})
            if answer.get("tokens"):
                return answer["tokens"]
        except UserError:
            pass
        try:  # llama.cpp
            prompt = self.post("/apply-template", {"messages": messages})["prompt"]
            return tokenizer.encode(prompt, add_special_tokens=False)
        except UserError:
            pass
        body = {"model": self.model, "messages": messages, "max_tokens": 1}
        try:
            return self.post("/v1/chat/completions", body)["usage"]["prompt_tokens"]
        except (UserError, KeyError):
            return None


def token_id(name: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id behind vLLM's "token_id:17", or of a token's text; None if that is not one token."""
    if name.startswith("token_id:"):
        return int(name.removeprefix("token_id:"))
    ids = tokenizer.encode(name, add_special_tokens=False)
    return ids[0] if len(ids) == 1 else None
