"""The turns of a conversation in order: who speaks after whom, and which call a result answers."""

from itertools import takewhile

from finetune.data.calls import take_answered
from finetune.data.findings import Findings
from finetune.data.values import Row

INSTRUCTION_ROLES = ("system", "developer")


def join_turns(turns: list[Row], findings: Findings) -> list[Row]:
    """The turns without those behind the assistant's last, each result with its function's name.

    Text before a call is a preamble, which goes to the commentary channel. Where it is a turn of
    its own, `channel` says so.
    """
    turns = cut_behind_the_last_answer(turns, findings)
    unanswered: list[Row] = []
    start = 0
    while start < len(turns):
        role = turns[start]["role"]
        end = start + 1
        if role == "assistant":
            while end < len(turns) and turns[end]["role"] == "assistant":
                end += 1
            read_run(turns[start:end], findings)
            note_unanswered(unanswered, findings)
            unanswered = [call for turn in turns[start:end] for call in turn["tool_calls"]]
        elif role == "tool":
            later = {str(turn["id"]) for turn in results_behind(turns, start)}
            before = turns[start - 1] if start else turns[start]
            answer(turns[start], unanswered, later, before, findings)
        else:
            note_unanswered(unanswered, findings)
            unanswered = []
        start = end
    return [finished(turn) for turn in turns]


def note_unanswered(unanswered: list[Row], findings: Findings) -> None:
    if unanswered:
        findings.notes.append("calls without a result, although the conversation goes on")


def cut_behind_the_last_answer(turns: list[Row], findings: Findings) -> list[Row]:
    last = next((n for n, t in reversed(list(enumerate(turns))) if t["role"] == "assistant"), None)
    if last is None:
        if not findings.problems:
            findings.problems.append(
                "there is no assistant message, so there is nothing to train on"
            )
        return turns
    if not any(turn["role"] == "user" for turn in turns) and not findings.problems:
        findings.problems.append(f"{turns[last]['where']}: the assistant speaks before a user has")
    if last + 1 < len(turns):
        roles = sorted({turn["role"] for turn in turns[last + 1 :]})
        findings.notes.append(f"messages behind the last answer cut off ({', '.join(roles)})")
    return turns[: last + 1]


def read_run(run: list[Row], findings: Findings) -> None:
    """What the assistant writes without a break: thinking, preambles, calls or an answer."""
    last_call = max((n for n, turn in enumerate(run) if turn["tool_calls"]), default=-1)
    for number, turn in enumerate(run):
        where, is_last = turn["where"], number == len(run) - 1
        kind = turn.get("kind")
        if not turn["content"]:
            # What is no text has been said already.
            is_said = any(problem.startswith(where) for problem in findings.problems)
            if is_last and not turn["tool_calls"] and not is_said:
                what = "thinking alone, and no answer" if turn["thinking"] else "empty `content`"
                findings.problems.append(f"{where} has {what}")
        elif number > 0 and any(earlier["tool_calls"] for earlier in run[:number]):
            findings.problems.append(f"{where}: text behind a call that has no result yet")
        elif not turn["tool_calls"]:
            if kind == "preamble" and is_last:
                findings.problems.append(
                    f"{where} has a preamble alone (channel `commentary`): the answer is missing"
                )
            elif kind == "preamble" or (kind == "text" and number < last_call):
                turn["channel"] = "commentary"
            elif not is_last:
                after = run[number + 1]["where"]
                problem = f"{after}: two assistant messages in a row"
                if after == where:  # its parts do not fit into one turn
                    problem = (
                        f"{where} has thinking or text behind its answer: write its parts in the "
                        "order thinking, text, calls"
                    )
                findings.problems.append(problem)


def results_behind(turns: list[Row], start: int) -> list[Row]:
    """The results that follow the one at `start`, up to the next turn of another role."""
    return list(takewhile(lambda turn: turn["role"] == "tool", turns[start + 1 :]))


def answer(
    turn: Row, unanswered: list[Row], later: set[str], before: Row, findings: Findings
) -> None:
    """Name the function whose result a turn is. later: the ids that the results behind it have.

    before: the turn before it, whose text may hold a call that could not be read.
    """
    if not unanswered:
        reason = f"{turn['where']}: a tool's result that answers no call"
        warning = next((w for w in findings.warnings if w.startswith(f"{before['where']} ")), None)
        if warning is not None and before["role"] == "assistant":
            reason += (
                f"; {warning.removesuffix(': left as it stands')}: write calls as `tool_calls`"
            )
        findings.problems.append(reason)
        return
    ids = {str(call["id"]) for call in unanswered} - {"None"}
    if ids and turn["id"] is not None and str(turn["id"]) not in ids:
        findings.notes.append("results whose id no call has, paired by name or order")
    turn["name"] = take_answered(turn, unanswered, later)


def finished(turn: Row) -> Row:
    """The turn as harmony.py reads it."""
    kept = {key: value for key, value in turn.items() if key not in ("where", "kind", "id")}
    if turn.get("tool_calls"):
        names = ("name", "arguments")
        kept["tool_calls"] = [{key: call[key] for key in names} for call in turn["tool_calls"]]
    return kept
