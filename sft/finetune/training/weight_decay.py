"""Which parameters weight decay pulls towards zero."""

import re
from collections.abc import Iterable

# Names decide and not dimensions: the experts' biases are stacked, and so have two. Left out are
# biases, norms, attention sinks, the router, and the embedding of the input. Decay would shrink the
# embeddings of all tokens that the data does not hold, which no gradient pulls back (OLMo 2 leaves
# them out as well).
NOT_DECAYED = re.compile(r"bias|norm|sinks|router|embed_tokens")


def decayed(names: Iterable[str]) -> list[str]:
    """Those of the parameters' names that are decayed: matrices, lm_head, and LoRA's factors.

    LoRA's factors always are: decay pulls them towards the base model.
    """
    return [name for name in names if ".lora_" in name or not NOT_DECAYED.search(name)]
