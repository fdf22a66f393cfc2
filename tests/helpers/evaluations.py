"""An evaluation as evaluate.py writes it."""

from typing import Any

EVALUATION: dict[str, Any] = {
    "loss": {
        "overall": {
            "tokens": 1234,
            "loss": [2.0, 1.5],
            "perplexity": [7.389, 4.4817],
            "token_accuracy": [0.5, 0.625],
        }
    },
    "generated": 1,
    "valid_harmony": [0.0, 1.0],
    "cut_short": [1.0, 0.0],
    "analysis_in_language": [None, 1.0],
    "generations": [
        {
            "question": "2+2?",
            "language": "French",
            "before": {"text": "[not markup]", "problem": "a message is not closed"},
            "after": {"text": "<|channel|>final", "problem": None},
        }
    ],
}
