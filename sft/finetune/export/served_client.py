"""Ask an OpenAI-compatible server what it would say next: vLLM, SGLang, or llama.cpp's server.

All three take a prompt as token ids at /v1/completions and give the likeliest next tokens with
their log-probabilities. They differ in how they name these tokens, and in how they show what their
chat template makes of a message.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
from transformers import PreTrainedTokenizerBase

from finetune.credentials import without_secrets
from finetune.errors import UserError

NUM_TOKENS = 20  # that are asked for; vLLM gives no more by default (--max-logprobs)
TIMEOUT = 300  # seconds for one answer: a server may still be loading its kernels
LOADING = 503, 429  # it will answer later: llama.cpp's server says 503 while it loads the model
FAILED = 500, 502, 504  # one replica or a proxy, maybe
TRIES = 3  # of a request that fails, or whose connection is dropped
MOST = 100  # nats, so that what is no log-probability at all can be added up and told
MASKED = -1000  # nats; servers write less for tokens that they left out, vLLM -9999


class Refusal(UserError):
    """The server is there, and does not take this request, for example a prompt that is longer
    than its context.
    """


class Client:
    """A server at `url`, such as http://localhost:8000, and a model's name there.

    key: sent as a bearer token, if given. model: None takes the only one, or the one named
    `preferred`. Raises UserError, naming the URL, for whatever keeps it from answering.
    """

    def __init__(self, url: str, *, key: str | None, model: str | None, preferred: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        key = (key or "").strip()
        if not (key.isascii() and (key.isprintable() or not key)):
            # httpx would quote the key in its error.
            raise UserError("API_KEY holds characters that no key has: export it again")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(headers=headers, timeout=TIMEOUT)
        listed = self.get("/v1/models")
        with self.reading("/v1/models", listed):
            names = [str(entry["id"]) for entry in listed["data"]]
        if model is None:
            model = preferred if preferred in names else names[0] if len(names) == 1 else None
        if model not in names:
            served = ", ".join(names) or "no model"
            raise UserError(f"{self.shown_url} serves {served}: say which with --model")
        self.model = model

    @property
    def shown_url(self) -> str:
        """The URL without a password in it."""
        return without_secrets(self.url)

    @contextmanager
    def reading(self, path: str, answer: Any) -> Iterator[None]:
        """Turn what an answer of another form makes Python raise into a line that shows it."""
        try:
            yield
        except (TypeError, ValueError, AttributeError, LookupError, OverflowError):
            raise UserError(
                f"{self.shown_url}{path} does not answer as OpenAI's API does: {str(answer)[:200]}"
            ) from None

    def get(self, path: str) -> Any:
        return self.answer("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return self.answer("POST", path, body)

    def answer(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        response = self.response(method, path, body)
        try:
            response.raise_for_status()
            return response.json()
        except (httpx.HTTPStatusError, ValueError, RecursionError):
            kind = Refusal if response.status_code in (400, 413, 422) else UserError
            raise kind(self.problem_of(response, path)) from None

    def problem_of(self, response: httpx.Response, path: str) -> str:
        """What is wrong with an answer that cannot be used, and what to do if that is known."""
        if response.status_code == 401:
            return f"{self.shown_url} wants another key: export API_KEY as the server has it"
        text = " ".join(response.text.split())[:200] or "an empty text"
        answer = f"{self.shown_url}{path} answers {response.status_code}"
        if response.status_code == 403:
            return (
                f"{answer}, not allowed: the key in API_KEY lacks the permission, or a proxy in "
                f"between refuses ({text})"
            )
        if response.is_redirect:
            place = without_secrets(response.headers.get("Location", "")) or "a place it leaves out"
            return f"{answer}, a redirect to {place}: give the URL of the server itself"
        return f"{answer}: {text}"

    def response(self, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
        """Ask again while the server is loading or busy, and a few times where it fails."""
        deadline, tries = time.monotonic() + TIMEOUT, 0
        while True:
            tries += 1
            try:
                response = self.http.request(method, self.url + path, json=body)
            except httpx.TimeoutException:
                raise UserError(f"{self.shown_url} has not answered in {TIMEOUT} s") from None
            except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError) as error:
                if tries == TRIES:
                    raise UserError(
                        f"{self.shown_url} has dropped the connection {tries} times ({error})"
                    ) from None
                continue
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise UserError(
                    f"{self.shown_url} cannot be reached ({error}): is it serving?"
                ) from None
            is_loading = response.status_code in LOADING and time.monotonic() < deadline
            if not is_loading and not (response.status_code in FAILED and tries < TRIES):
                return response
            wanted = response.headers.get("Retry-After", "")
            time.sleep(min(int(wanted), 30) if wanted.isdecimal() else 1)

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
        answer = self.post("/v1/completions", body)
        with self.reading("/v1/completions", answer):
            found = log_probs_of(answer, tokenizer)
        if sum(map(math.exp, found.values())) > 1.01:  # more than all tokens together have
            raise UserError(
                f"{self.shown_url}/v1/completions does not give natural logarithms of "
                f"probabilities, but {list(found.values())[:3]}"
            )
        return found

    def prompt_of(self, message: str, tokenizer: PreTrainedTokenizerBase) -> list[int] | int | None:
        """What the server's chat template makes of a user's message: its tokens or, from a server
        that does not show them, their number; None if it gives neither.
        """
        messages = [{"role": "user", "content": message}]
        no_answer = UserError, KeyError, TypeError, ValueError, AttributeError, OverflowError
        with suppress(*no_answer):  # vLLM
            answer = self.post("/tokenize", {"model": self.model, "messages": messages})
            tokens = answer["tokens"]
            # One token, or tokens in words: not what the template made of the message.
            if len(tokens) > 1 and all(isinstance(token, int) for token in tokens):
                return list(tokens)
        with suppress(*no_answer):  # llama.cpp
            prompt = self.post("/apply-template", {"messages": messages})["prompt"]
            return tokenizer.encode(prompt, add_special_tokens=False)
        body = {"model": self.model, "messages": messages, "max_tokens": 1}
        with suppress(*no_answer):
            return int(self.post("/v1/chat/completions", body)["usage"]["prompt_tokens"]) or None
        return None


def log_probs_of(answer: Any, tokenizer: PreTrainedTokenizerBase) -> dict[int, float]:
    """The log-probabilities in an answer of /v1/completions. Raises ValueError and its like for
    one of another form.
    """
    (choice,) = answer["choices"]
    given = choice.get("logprobs") or {}
    if given.get("content"):  # llama.cpp's
        tops = given["content"][0]["top_logprobs"]
        pairs = [(int(top["id"]), float(top["logprob"])) for top in tops]
    elif given.get("top_logprobs"):
        named = given["top_logprobs"][0].items()
        found = [(token_id(name, tokenizer), float(value)) for name, value in named]
        pairs = [(number, value) for number, value in found if number is not None]
    else:
        pairs = []
    if any(math.isnan(value) for _, value in pairs):
        raise ValueError("a log-probability is not a number")
    return {number: min(value, MOST) for number, value in pairs if value > MASKED}


def token_id(name: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id behind vLLM's "token_id:17", or of a token's text; None if that is not one token."""
    if name.startswith("token_id:"):
        return int(name.removeprefix("token_id:"))
    if "\ufffd" in name:  # a part of a character, of which hundreds of tokens look the same
        return None
    ids = tokenizer.encode(name, add_special_tokens=False)
    return ids[0] if len(ids) == 1 else None
