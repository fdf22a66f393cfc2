"""OpenAI's harmony format: conversations as tokens, and which of the tokens are in the loss.

The reference is oss-harmony 0.0.11, the renderer with which vLLM 0.33.0 serves gpt-oss: a fork of
openai-harmony. The tests compare the two token for token. A message is encoded piece by piece:
control tokens become their ids, and everything else is encoded as text. A `<|start|>` that a user
typed therefore stays text.

The chat template of the published checkpoints differs from the renderer. This module follows the
renderer:

    chat template                                     oss-harmony and this module
    the developer message ends with a blank line      there is no blank line
    some tool schemas become `any` or `object`        TypeScript for every schema (tool_schema.py)
    a call's content type is `json`                   it is `<|constrain|>json`
    only the first call of a message is rendered      all calls are
    tool results are encoded as JSON                  they are inserted as they are
    call arguments that are text are encoded as JSON  they are inserted as they are
    content beside a tool call becomes analysis       it becomes a preamble on the commentary
                                                      channel, after the analysis
    only the first message can hold instructions      every system or developer message can

oss-harmony differs from openai-harmony 0.0.8 in the place of the recipient:

    openai-harmony    <|start|>assistant to=functions.f<|channel|>commentary <|constrain|>json
    oss-harmony       <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json

The second is what the model itself writes (docs/format.md of openai-harmony), and what it reads in
its prompts from vLLM, so it is learnt. The same goes for tools' results (`to=assistant`), which are
never in the loss. Only on other channels than commentary the recipient precedes the channel.

vLLM (at commit 8fada2f, chat_completion/harmony.py) does not always give the renderer the messages
that the renderer's defaults or OpenAI's documentation of the format suggest:

    vLLM                                              this module
    drops all analysis before the last final message  does the same, because that is what the model
                                                      reads. The renderer's default drops only the
                                                      analysis before the first final message
                                                      (openai/harmony#96), which makes a difference
                                                      from the third user turn on
    gives earlier calls the content type `json`       writes `<|constrain|>json`, as oss-harmony
                                                      renders that type
    puts an earlier preamble before its analysis      puts the analysis first, as the model does
    without tools, leaves `commentary` out of the     always names all three channels, which is the
    valid channels                                    renderer's default

The tokens in the loss are those that the model writes when it is served, with one exception: the
channel's name in a turn that has shown no analysis so far. There the model chooses whether to think
first. A turn is everything the assistant writes, with the results of its tools, until the user
speaks again. Either the data has no analysis for the turn, or it was dropped because the turn is
over. To train on `commentary` or `final` there would teach the model to skip thinking. The rest of
the message is in the loss: `<|channel|>`, the recipient, the type, the content, and the token that
ends it. With learn_no_thinking the channel's name is in the loss too.

Once a turn has shown analysis, it shows where the model thinks and where it goes on without. From
there on every message is in the loss with all of its header: a preamble, a call or an answer that
has no analysis of its own, whether it comes directly after the analysis or after a tool's result. A
turn without any analysis shows neither: after a tool's result the model could think as well.

turn_samples.py makes a sample of each turn whose analysis later prompts lack: all of it is learnt.

A final answer that later turns follow ends with `<|end|>`, as it does in their prompts. There the
model must write `<|return|>`, or the server would not stop: vLLM stops at `<|return|>` and
`<|call|>` only. So at that position the input is `<|end|>` and the label `<|return|>`, and a turn
learns the same tokens wherever it stands. Runs begun before learn `<|end|>` there.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from finetune.data.options import TrainOn
from finetune.data.text_tokens import TextTokens
from finetune.data.tool_schema import tools_section
from finetune.errors import UserError

IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
KNOWLEDGE_CUTOFF = "2024-06"
VALID_CHANNELS = (
    "# Valid channels: analysis, commentary, final. Channel must be included for every message."
)
CALLS_GO_TO = "Calls to these tools must go to the commentary channel: 'functions'."
START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, CALL, RETURN, END_OF_TEXT = "<|end|>", "<|call|>", "<|return|>", "<|endoftext|>"
CONTROL_TOKENS = (START, CHANNEL, CONSTRAIN, MESSAGE, END, CALL, RETURN, END_OF_TEXT)


class Piece(NamedTuple):
    """A part of a conversation that is encoded at once: a control token, or a stretch of text.

    In a stretch of text the names of control tokens are ordinary text. learnt_as: the control token
    that is the label in place of this one.
    """

    text: str
    is_control: bool
    in_loss: bool
    learnt_as: str | None = None


@dataclass
class Message:
    """One message of harmony. author: a role, or `functions.NAME` for a tool's result."""

    author: str
    content: str
    channel: str | None = None
    recipient: str | None = None
    constrain: str | None = None  # the type of the content, `json` for the arguments of a call
    in_loss: bool = True  # counts for the assistant's messages only

    @property
    def is_call(self) -> bool:
        return self.author == "assistant" and self.recipient is not None


def to_messages(conversation: dict[str, Any], *, date: str, reasoning_effort: str) -> list[Message]:
    """Harmony's messages as the model reads them in the last turn: without past turns' thinking.

    See all_messages for the arguments.
    """
    return drop_past_analysis(
        all_messages(conversation, date=date, reasoning_effort=reasoning_effort)
    )


def all_messages(
    conversation: dict[str, Any], *, date: str, reasoning_effort: str
) -> list[Message]:
    """Turn a conversation, as conversations.py returns it, into harmony's messages.

    date: the current date in the system message, as YYYY-MM-DD. reasoning_effort: used if the
    conversation has none of its own.
    """
    tools = conversation.get("tools") or []
    turns = conversation["messages"]
    effort = conversation.get("reasoning_effort") or reasoning_effort
    messages = [system_message(date=date, reasoning_effort=effort, has_tools=bool(tools))]
    has_instructions = bool(turns) and turns[0]["role"] in ("system", "developer")
    if tools and not has_instructions:
        messages.append(Message("developer", tools_section(tools)))
    for number, turn in enumerate(turns):
        if turn["role"] in ("system", "developer"):
            sections = ["# Instructions", turn["content"]]
            if tools and number == 0:
                sections.append(tools_section(tools))
            messages.append(Message("developer", "\n\n".join(sections)))
        elif turn["role"] == "assistant":
            messages += assistant_messages(turn)
        elif turn["role"] == "tool":
            author = f"functions.{turn['name']}"
            messages.append(Message(author, turn["content"], "commentary", "assistant"))
        else:
            messages.append(Message("user", turn["content"]))
    return messages


def system_message(*, date: str, reasoning_effort: str, has_tools: bool) -> Message:
    """Harmony's system message. What datasets call "system" goes into the developer message."""
    text = (
        f"{IDENTITY}\nKnowledge cutoff: {KNOWLEDGE_CUTOFF}\nCurrent date: {date}\n\n"
        f"Reasoning: {reasoning_effort}\n\n{VALID_CHANNELS}"
    )
    return Message("system", f"{text}\n{CALLS_GO_TO}" if has_tools else text)


def assistant_messages(turn: dict[str, Any]) -> list[Message]:
    """The analysis and the final message; or the analysis, a preamble and the tool calls."""
    calls = turn.get("tool_calls") or []
    in_loss = turn.get("in_loss", True)
    messages = []
    if turn.get("thinking"):
        messages.append(Message("assistant", turn["thinking"], "analysis", in_loss=in_loss))
    if turn.get("content"):
        channel = turn.get("channel") or ("commentary" if calls else "final")
        messages.append(Message("assistant", turn["content"], channel, in_loss=in_loss))
    for call in calls:
        recipient, arguments = f"functions.{call['name']}", call["arguments"]
        messages.append(
            Message("assistant", arguments, "commentary", recipient, "json", in_loss=in_loss)
        )
    return messages


def drop_past_analysis(messages: list[Message]) -> list[Message]:
    """Drop the analysis before the last final message that a user's message follows.

    This is exactly what vLLM drops from the prompt for the last turn.
    """
    past = past_end(messages)
    return [m for number, m in enumerate(messages) if number >= past or m.channel != "analysis"]


def past_end(messages: list[Message]) -> int:
    """The index of the last final message that a user's message follows; 0 if there is none."""
    last_user = last_index(messages, author="user")
    return max(last_index(messages[: max(last_user, 0)], channel="final"), 0)


def last_index(
    messages: list[Message], *, author: str | None = None, channel: str | None = None
) -> int:
    """The index of the last message of this author, on this channel; -1 if there is none.

    None stands for any author or channel.
    """
    for number in range(len(messages) - 1, -1, -1):
        message = messages[number]
        if author in (None, message.author) and channel in (None, message.channel):
            return number
    return -1


def to_pieces(
    messages: list[Message],
    train_on: TrainOn = "assistant",
    *,
    learn_no_thinking: bool = False,
    first_learnt: int = 0,
    as_earlier: bool = False,
) -> list[Piece]:
    """The pieces of a conversation in order, each marked as in the loss or not.

    first_learnt: the messages before this one are not in the loss. as_earlier: for runs begun under
    training rules 1 or 2; see EarlierDataArguments. The module's docstring has the rule. It treats
    a message in three parts:

    - `<|start|>assistant`. The server writes it at the beginning of a turn and after a tool's
      result. It is in the loss where the model writes it: between two messages of its own.
    - The channel's name, with which the model chooses whether to think first. It is in the loss if
      the turn has shown analysis, or with learn_no_thinking.
    - The rest of the header, the content, and the token that ends it. They are always in the loss.
    """
    last_user = last_index(messages, author="user")
    has_shown_analysis = False  # in the present turn
    pieces: list[Piece] = []
    for number, message in enumerate(messages):
        if message.author == "user":
            has_shown_analysis = False
        elif message.channel == "analysis":
            has_shown_analysis = True
        is_everything = train_on == "everything" and number >= first_learnt
        is_trained = message.author == "assistant" and message.in_loss and number >= first_learnt
        if train_on == "last_turn":
            is_trained = is_trained and number > last_user
        # After a call the model waits for the result, and the server opens the next message.
        before = messages[number - 1] if number else None
        model_opens = before is not None and before.author == "assistant" and not before.is_call
        choice_in_loss = is_trained and (has_shown_analysis or learn_no_thinking)
        pieces += message_pieces(
            message,
            ends_conversation=number == len(messages) - 1,
            start_in_loss=is_everything or (is_trained and model_opens),
            choice_in_loss=is_everything or choice_in_loss,
            content_in_loss=is_everything or is_trained,
            as_earlier=as_earlier,
        )
    return pieces


def message_pieces(
    message: Message,
    *,
    ends_conversation: bool,
    start_in_loss: bool,
    choice_in_loss: bool,
    content_in_loss: bool,
    as_earlier: bool = False,
) -> list[Piece]:
    """`<|start|>AUTHOR<|channel|>CHANNEL to=RECIPIENT <|constrain|>TYPE<|message|>CONTENT<|end|>`.

    The recipient, the channel and the type are left out where the message has none. choice_in_loss
    is for the channel's name or, as_earlier, for the whole header after the author.
    """
    rest_in_loss = choice_in_loss if as_earlier else content_in_loss
    recipient, channel, constrain = [], [], []
    if message.recipient is not None:
        recipient = [Piece(f" to={message.recipient}", False, rest_in_loss)]
    if message.channel is not None:
        name = Piece(message.channel, False, choice_in_loss)
        channel = [Piece(CHANNEL, True, rest_in_loss), name]
    if message.constrain is not None:
        constrain = [
            Piece(" ", False, rest_in_loss),
            Piece(CONSTRAIN, True, rest_in_loss),
            Piece(message.constrain, False, rest_in_loss),
        ]
    # oss-harmony writes the recipient behind the commentary channel only, and openai-harmony never.
    recipient_last = message.channel == "commentary" and not as_earlier
    # The model ends its answer with <|return|>. In the prompt of a later turn the same answer ends
    # with <|end|>.
    end, learnt_as = CALL if message.is_call else END, None
    if message.channel == "final" and ends_conversation:
        end = RETURN
    elif message.channel == "final" and not as_earlier:
        learnt_as = RETURN
    return [
        Piece(START, True, start_in_loss),
        Piece(message.author, False, start_in_loss),
        *(channel + recipient if recipient_last else recipient + channel),
        *constrain,
        Piece(MESSAGE, True, rest_in_loss),
        Piece(message.content, False, content_in_loss),
        Piece(end, True, content_in_loss, learnt_as),
    ]


def document_pieces(text: str) -> list[Piece]:
    """The pieces of plain text that is no conversation. All of it is in the loss, its end too."""
    return [Piece(text, False, True), Piece(END_OF_TEXT, True, True)]


class Encoder:
    """Encodes pieces with the vocabulary of a gpt-oss tokenizer. Its chat template is not used.

    Raises UserError if the tokenizer lacks one of harmony's control tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        vocabulary = tokenizer.get_vocab()  # a copy of all 201,088 entries
        self.ids = {token: vocabulary.get(token) for token in CONTROL_TOKENS}
        missing = [token for token, number in self.ids.items() if number is None]
        if missing:
            raise UserError(
                f"{tokenizer.name_or_path!r} is not a gpt-oss tokenizer: "
                f"it lacks {', '.join(missing)}"
            )
        self.text_tokens = TextTokens(tokenizer.backend_tokenizer.to_str())

    def encode(self, conversations: list[list[Piece]]) -> tuple[list[list[int]], list[list[int]]]:
        """The input_ids and labels (-100 = not in the loss) of each conversation.

        It uses all cores, so give it many conversations at once.
        """
        # Roles, channels and system messages repeat in every conversation: each distinct text is
        # encoded once. The order is fixed so that the same batch always does the same work.
        texts = {p.text for pieces in conversations for p in pieces if not p.is_control and p.text}
        unique = sorted(texts)
        ids_of_text = dict(zip(unique, self.text_tokens.encode(unique), strict=True))
        ids_of_text[""] = []
        all_ids, all_labels = [], []
        for pieces in conversations:
            input_ids: list[int] = []
            labels: list[int] = []
            for piece in pieces:
                ids = [self.ids[piece.text]] if piece.is_control else ids_of_text[piece.text]
                input_ids += ids
                if not piece.in_loss:
                    labels += [-100] * len(ids)
                else:
                    labels += [self.ids[piece.learnt_as]] if piece.learnt_as else ids
            all_ids.append(input_ids)
            all_labels.append(labels)
        return all_ids, all_labels
