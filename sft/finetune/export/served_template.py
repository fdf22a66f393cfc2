"""Does a server's chat template make the tokens that training made?"""

from datetime import date, timedelta

from transformers import PreTrainedTokenizerBase

from finetune.data.harmony import START, Encoder, Piece, to_messages, to_pieces
from finetune.export.served_client import Client

MESSAGE = "Why is the sky blue?"


def prompt_tokens(message: str, tokenizer: PreTrainedTokenizerBase, *, date: str) -> list[int]:
    """A user's message with the opening of the answer, as training renders it on that date."""
    conversation = {"messages": [{"role": "user", "content": message}]}
    pieces = to_pieces(to_messages(conversation, date=date, reasoning_effort="medium"))
    opening = [Piece(START, True, False), Piece("assistant", False, False)]
    return Encoder(tokenizer).encode([[*pieces, *opening]])[0][0]


def template_problem(client: Client, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A sentence if the server's chat template makes other tokens of a message than training did.

    The system message holds the server's date, which may be a day off from here.
    """
    found = client.prompt_of(MESSAGE, tokenizer)
    if found is None:
        print("the server's chat template was not compared: it shows no prompt", flush=True)
        return None
    today = date.today()
    days = [(today + timedelta(days=days)).isoformat() for days in (-1, 0, 1)]
    expected = [prompt_tokens(MESSAGE, tokenizer, date=day) for day in days]
    if isinstance(found, int):
        same = found in {len(tokens) for tokens in expected}
    else:
        same = found in expected
    if same:
        return None
    size = found if isinstance(found, int) else len(found)
    return (
        f"the server's chat template differs from training: it makes {size} tokens of "
        f"{MESSAGE!r}, training made {len(expected[1])}"
    )
