"""Whatever answers at the URL, verify_served.py ends with one line that says what is wrong."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from finetune.errors import UserError
from finetune.export.served_client import Client
from finetune.export.served_reference import Place
from finetune.export.served_template import template_problem
from finetune.export.served_verdict import align, judge
from finetune.model.loading import load_tokenizer

MODELS = {"data": [{"id": "run"}]}
Serve = Callable[[dict[str, Any]], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start a server on loopback that is no engine: it answers a path with a text or with JSON, or
    with a status, or with one and a Location, and everything else with status 404. Returns its URL.
    """
    servers = []

    def start(answers: dict[str, Any]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                answer = answers.get(self.path, 404)
                if isinstance(answer, Iterator):  # another answer each time
                    answer = next(answer)
                if answer is None:
                    self.close_connection = True
                    return
                status, place = answer if isinstance(answer, tuple) else (answer, None)
                self.send_response(status if isinstance(status, int) else 200)
                if place is not None:
                    self.send_header("Location", place)
                text = answer if isinstance(answer, str) else json.dumps(answer)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            do_POST = do_GET

            def log_message(self, *arguments: Any) -> None: ...

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(tiny_model))


def connect(url: str, *, key: str | None = None, model: str | None = None) -> Client:
    return Client(url, key=key, model=model, preferred="run")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (404, "answers 404"),
        (500, "answers 500"),
        (
            301,
            "answers 301, a redirect to a place it leaves out: give the URL of the server",
        ),
        (
            (307, "https://me:secret@login/"),
            "answers 307, a redirect to https://login/: give",
        ),
        (401, "wants another key: export API_KEY"),
        (403, "answers 403, not allowed: the key in API_KEY lacks the permission, or a proxy in"),
        ("<html>Welcome to nginx!</html>", "answers 200: <html>Welcome"),
        ("{torn", "answers 200: {torn"),
        ("", "answers 200: an empty text"),
        ([], "does not answer as OpenAI's API does"),
        ("null", "does not answer as OpenAI's API does: None"),
        ({"data": [{"name": "run"}]}, "does not answer as OpenAI's API does"),
        ({"data": []}, "serves no model"),
        ({"data": [{"id": "a"}, {"id": "b"}]}, "serves a, b: say which with --model"),
    ],
)
def test_what_is_no_such_server_is_one_line(answer: Any, message: str, serve: Serve) -> None:
    with pytest.raises(UserError, match=message) as error:
        connect(serve({"/v1/models": answer}))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("first", [[503, 503], [429], [502, 500], [None], [None, None]])
def test_a_server_that_loads_or_fails_once_is_asked_again(first: list[Any], serve: Serve) -> None:
    assert connect(serve({"/v1/models": iter([*first, MODELS])})).model == "run"


@pytest.mark.parametrize(
    ("first", "message"), [([500] * 3, "answers 500"), ([None] * 3, "dropped the connection 3")]
)
def test_a_server_that_fails_again_and_again_is_named(
    first: list[Any], message: str, serve: Serve
) -> None:
    with pytest.raises(UserError, match=message):
        connect(serve({"/v1/models": iter([*first, MODELS])}))


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_the_url_may_have_the_apis_version(end: str, serve: Serve) -> None:
    assert connect(serve({"/v1/models": MODELS}) + end).model == "run"


@pytest.mark.parametrize("url", ["localhost:8000", "http://", "ftp://localhost", "", "http://[::1"])
def test_what_is_no_url_is_one_line(url: str) -> None:
    with pytest.raises(UserError, match="cannot be reached"):
        connect(url)


def test_a_model_that_is_not_served_is_named_with_those_that_are(serve: Serve) -> None:
    with pytest.raises(UserError, match="serves run: say which with --model"):
        connect(serve({"/v1/models": MODELS}), model="another")


@pytest.mark.parametrize("key", ["secret\nsecret", "s\u00e9cret"])
def test_a_key_that_cannot_be_sent_is_not_shown(key: str, serve: Serve) -> None:
    with pytest.raises(UserError, match="API_KEY holds characters") as error:
        connect(serve({"/v1/models": MODELS}), key=key)
    assert "cret" not in str(error.value)


def test_a_password_in_the_url_is_not_shown(serve: Serve) -> None:
    url = serve({"/v1/models": 500}).replace("//", "//me:secret@")
    with pytest.raises(UserError, match="answers 500") as error:
        connect(url)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"choices": []},
        {"choices": ["text"]},
        {"choices": [{"logprobs": {"top_logprobs": [["a", -1]]}}]},
        {"choices": [{"logprobs": {"top_logprobs": [{"a": "much"}]}}]},
        {"choices": [{"logprobs": {"top_logprobs": [{"token_id:x": -1}]}}]},
        {"choices": [{"logprobs": {"content": [{"top_logprobs": [{"logprob": -1}]}]}}]},
        '{"choices": [{"logprobs": {"top_logprobs": [{"token_id:3": NaN}]}}]}',
    ],
)
def test_an_answer_of_another_form_is_one_line(
    answer: Any, serve: Serve, tokenizer: PreTrainedTokenizerBase
) -> None:
    client = connect(serve({"/v1/models": MODELS, "/v1/completions": answer}))
    with pytest.raises(UserError, match="/v1/completions does not answer as OpenAI's API does"):
        client.next_log_probs([1, 2], tokenizer)


@pytest.mark.parametrize("values", [[0.9, 0.05], [0.0, 0.0], ["Infinity", -1.0], [2.3, 4.6]])
def test_what_are_no_log_probabilities_is_told(
    values: list[Any], serve: Serve, tokenizer: PreTrainedTokenizerBase
) -> None:
    given = {f"token_id:{number}": float(value) for number, value in enumerate(values)}
    answer = {"choices": [{"logprobs": {"top_logprobs": [given]}}]}
    client = connect(serve({"/v1/models": MODELS, "/v1/completions": answer}))
    with pytest.raises(UserError, match="does not give natural logarithms of probabilities"):
        client.next_log_probs([1, 2], tokenizer)


def test_tokens_that_a_server_has_left_out_are_left_out_here(
    serve: Serve, tokenizer: PreTrainedTokenizerBase
) -> None:
    given = {"token_id:1": -0.5, "token_id:2": -9999.0, "token_id:3": float("-inf")}
    answer = {"choices": [{"logprobs": {"top_logprobs": [given]}}]}
    client = connect(serve({"/v1/models": MODELS, "/v1/completions": answer}))
    assert client.next_log_probs([1, 2], tokenizer) == {1: -0.5}


def test_an_engines_refusal_is_shown(serve: Serve, tokenizer: PreTrainedTokenizerBase) -> None:
    client = connect(serve({"/v1/models": MODELS, "/v1/completions": 400}))
    with pytest.raises(UserError, match="/v1/completions answers 400"):
        client.next_log_probs([1, 2], tokenizer)


def test_a_server_without_log_probabilities_is_told_apart(
    serve: Serve, tokenizer: PreTrainedTokenizerBase
) -> None:
    answer = {"choices": [{"text": "4", "logprobs": None}]}
    client = connect(serve({"/v1/models": MODELS, "/v1/completions": answer}))
    place = Place([1, 2], [3, 4], {"trained": [-1.0, -2.0], "base": [-2.0, -1.0]})
    verdict = judge(align([place], [client.next_log_probs(place.tokens, tokenizer)]))
    assert verdict.ok is None and "gives no log-probabilities" in verdict.text


@pytest.mark.parametrize(
    "answer",
    [
        [],
        "null",
        {"tokens": 3},
        {"tokens": [1]},
        {"tokens": ["a", "b"]},
        {"prompt": None},
        {"usage": []},
        {"usage": {"prompt_tokens": 0}},
        '{"usage": {"prompt_tokens": Infinity}}',
    ],
)
def test_a_template_that_is_not_shown_is_not_compared(
    answer: Any, serve: Serve, tokenizer: PreTrainedTokenizerBase
) -> None:
    paths = ("/tokenize", "/apply-template", "/v1/chat/completions")
    client = connect(serve({"/v1/models": MODELS} | dict.fromkeys(paths, answer)))
    assert template_problem(client, tokenizer) is None
