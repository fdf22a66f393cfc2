"""How each format is used: the commands and the Python that a model card shows.

They are those of somebody who has downloaded the folder and is in it, or, of an upload, of anybody.
"""

from dataclasses import dataclass

from finetune.export.record import Format

# vLLM takes only these, and reserves memory for the one that it is given.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass
class Usage:
    """What the examples name.

    where: the artifact, a hub's name or a folder; name: under which a server offers the model;
    base: the base model, with its revision on the hub ("" for a folder), and whether its experts
    are in MXFP4; rank: LoRA's, None of whole weights.
    """

    where: str
    name: str
    base: str
    revision: str
    base_is_mxfp4: bool
    rank: int | None = None


def usage_section(form: Format, usage: Usage) -> str:
    """The section of the card, with an example for each program that loads the format."""
    parts = {
        "adapter": (adapter_in_python, adapter_in_vllm, as_gguf),
        "bf16": (weights_in_python, weights_in_vllm, as_gguf),
        "mxfp4": (mxfp4_in_python, weights_in_vllm, as_gguf),
        "gguf": (model_in_llama, model_in_ollama),
        "gguf-adapter": (adapter_in_llama,),
    }[form]
    return "\n\n".join(["## How to use it", *(part(usage) for part in parts)])


def adapter_in_python(usage: Usage) -> str:
    revision = f'\n    revision="{usage.revision}",' if usage.revision else ""
    unpacked = "\n    quantization_config=Mxfp4Config(dequantize=True),"
    also = ", Mxfp4Config" if usage.base_is_mxfp4 else ""
    loading = f"""base = AutoModelForCausalLM.from_pretrained(
    "{usage.base}",{revision}
    dtype=torch.bfloat16,{unpacked if usage.base_is_mxfp4 else ""}
    device_map="auto",
)
model = PeftModel.from_pretrained(base, "{usage.where}")"""
    why = "PEFT needs the base's experts as plain tensors, so they are unpacked to bf16.\n\n"
    return (
        "### Python, with transformers and PEFT\n\n"
        + (why if usage.base_is_mxfp4 else "")
        + in_python(usage, f"AutoModelForCausalLM, AutoTokenizer{also}", loading, peft=True)
    )


def weights_in_python(usage: Usage) -> str:
    loading = f"""model = AutoModelForCausalLM.from_pretrained(
    "{usage.where}", dtype=torch.bfloat16, device_map="auto"
)"""
    return "### Python, with transformers\n\n" + in_python(
        usage, "AutoModelForCausalLM, AutoTokenizer", loading
    )


def mxfp4_in_python(usage: Usage) -> str:
    loading = f"""model = AutoModelForCausalLM.from_pretrained(
    "{usage.where}",
    dtype=torch.bfloat16,
    quantization_config=Mxfp4Config(dequantize=True),
    device_map="auto",
)"""
    why = (
        "The experts are unpacked to bf16, which works everywhere. On a GPU with the package "
        "`kernels` they can stay in MXFP4: leave `quantization_config` out.\n\n"
    )
    return (
        "### Python, with transformers\n\n"
        + why
        + in_python(usage, "AutoModelForCausalLM, AutoTokenizer, Mxfp4Config", loading)
    )


def in_python(usage: Usage, imported: str, loading: str, *, peft: bool = False) -> str:
    """Code that runs as it stands: it loads tokenizer and model, asks, and prints the answer."""
    imports = "import torch\n" + ("from peft import PeftModel\n" if peft else "")
    return f"""```python
{imports}from transformers import {imported}

tokenizer = AutoTokenizer.from_pretrained("{usage.where}")
{loading}
question = [{{"role": "user", "content": "2+2?"}}]
prompt = tokenizer.apply_chat_template(
    question, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = model.generate(**prompt.to(model.device), max_new_tokens=200)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :]))
```"""


def adapter_in_vllm(usage: Usage) -> str:
    assert usage.rank is not None
    rank = next((r for r in VLLM_RANKS if r >= usage.rank), usage.rank)
    revision = f" --revision {usage.revision}" if usage.revision else ""
    return f"""### vLLM

```bash
vllm serve {usage.base}{revision} --enable-lora --max-lora-rank {rank} \\
  --lora-modules {usage.name}={usage.where}
```

Then name `{usage.name}` as the model in requests."""


def weights_in_vllm(usage: Usage) -> str:
    return f"""### vLLM

```bash
vllm serve {usage.where} --served-model-name {usage.name}
```"""


def as_gguf(usage: Usage) -> str:
    """llama.cpp and Ollama load GGUF alone, which is made of the run's folder."""
    adapter = " (or `--format gguf-adapter` for an adapter beside the base's own file)"
    return f"""### llama.cpp, Ollama, LM Studio

They load GGUF. The repository that trained this model makes it of the run's folder\
{adapter if usage.rank is not None else ""}:

```bash
python sft/export.py RUN --format gguf --output my-gguf && cd my-gguf
llama-server -m model.gguf --jinja
ollama create {usage.name} && ollama run {usage.name}
```"""


def model_in_llama(usage: Usage) -> str:
    return """### llama.cpp, LM Studio

```bash
llama-server -m model.gguf --jinja
curl http://localhost:8080/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{"messages": [{"role": "user", "content": "2+2?"}]}'
```"""


def model_in_ollama(usage: Usage) -> str:
    return f"""### Ollama

With the `Modelfile` that lies beside `model.gguf`:

```bash
ollama create {usage.name} && ollama run {usage.name}
```"""


def adapter_in_llama(usage: Usage) -> str:
    return f"""### llama.cpp

With `base.gguf`, a GGUF file of {usage.base} whose experts are in MXFP4:

```bash
llama-server -m base.gguf --lora adapter.gguf --jinja
```

Ollama takes no adapters of gpt-oss: export the whole model with `--format gguf` for it."""
