"""How far one model's predictions are from another's, on the same tokens.

KL divergences are in nats a token, of the trained model from another: sum p (log p - log q).
"""

from typing import Any

import torch
from accelerate import PartialState

Rows = list[dict[str, list[int]]]
Logits = list[torch.Tensor]


@torch.no_grad()
def run(model: Any, rows: Rows) -> Logits:
    """Each conversation's logits (tokens, vocabulary) in fp32, on CPU."""
    model.eval()
    device = PartialState().device
    batches = (torch.tensor([row["input_ids"]], device=device) for row in rows)
    return [model(input_ids=batch, use_cache=False).logits[0].float().cpu() for batch in batches]


def difference(trained: Logits, exported: Logits, rows: Rows) -> dict[str, float | int]:
    """Over every token of every conversation."""
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
    """Mean KL divergence of the first's distribution from the second's, in nats a token."""
    tokens = []
    for p, q in zip(trained, other, strict=True):
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        tokens.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return max(0.0, float(torch.cat(tokens).mean()))


def loss(logits: Logits, rows: Rows) -> float:
    """Mean cross entropy of what is learnt, in nats a token."""
    parts = [
        torch.nn.functional.cross_entropy(
            values[:-1], torch.tensor(row["labels"][1:]), reduction="none", ignore_index=-100
        )[torch.tensor(row["labels"][1:]) != -100]
        for values, row in zip(logits, rows, strict=True)
    ]
    return float(torch.cat(parts).mean())
