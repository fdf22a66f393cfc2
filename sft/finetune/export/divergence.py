"""How far the predictions of two models are apart on the same tokens.

A KL divergence here is that of another model q from the trained model p, sum p (log p - log q), in
nats per token.
"""

from typing import Any

import torch
from accelerate import PartialState

Rows = list[dict[str, list[int]]]  # conversations: their input_ids, and labels with -100
Logits = list[torch.Tensor]  # of each conversation: (tokens, vocabulary)


@torch.no_grad()
def logits_of(model: Any, rows: Rows) -> Logits:
    """Run a model on each conversation. The logits are in fp32, on the CPU."""
    model.eval()
    device = PartialState().device
    batches = (torch.tensor([row["input_ids"]], device=device) for row in rows)
    return [model(input_ids=batch, use_cache=False).logits[0].float().cpu() for batch in batches]


def compare_logits(trained: Logits, exported: Logits, rows: Rows) -> dict[str, float | int]:
    """Differences over all tokens of all conversations; the loss is that of the exported model."""
    pairs = list(zip(trained, exported, strict=True))
    same = torch.cat([(p.argmax(-1) == q.argmax(-1)).float() for p, q in pairs])
    return {
        "num_tokens": len(same),
        "kl": divergence(trained, exported),
        "top1_agreement": float(same.mean()),
        "logits_mean_abs_diff": float(torch.cat([(p - q).abs().mean(-1) for p, q in pairs]).mean()),
        "logits_max_abs_diff": max(float((p - q).abs().max()) for p, q in pairs),
        "loss": loss(exported, rows),
    }


def divergence(trained: Logits, other: Logits) -> float:
    """The KL divergence of the other model from the trained one: the mean over all tokens."""
    tokens = []
    for p, q in zip(trained, other, strict=True):
        # In fp64, because the divergence of nearly equal models is a small difference of logs.
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        tokens.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return max(0.0, float(torch.cat(tokens).mean()))  # rounding can take it below zero


def loss(logits: Logits, rows: Rows) -> float:
    """Mean cross entropy of the tokens in the loss, in nats per token."""
    parts = []
    for values, row in zip(logits, rows, strict=True):
        targets = torch.tensor(row["labels"][1:])  # the logits at a token predict the next one
        losses = torch.nn.functional.cross_entropy(
            values[:-1], targets, reduction="none", ignore_index=-100
        )
        parts.append(losses[targets != -100])
    return float(torch.cat(parts).mean())
