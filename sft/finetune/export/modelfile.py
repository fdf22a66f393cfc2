"""The Modelfile from which `ollama create` makes a model of model.gguf."""

from pathlib import Path

from finetune.export.gguf_model import MODEL

# Ollama recognises gpt-oss by the file's architecture and renders harmony itself. The two
# parameters are those that OpenAI recommends for gpt-oss: sample from the whole distribution.
TEXT = f"""FROM ./{MODEL}
PARAMETER temperature 1
PARAMETER top_p 1
"""


def write_modelfile(output: Path) -> None:
    (output / "Modelfile").write_text(TEXT)
