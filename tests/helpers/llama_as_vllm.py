"""llama.cpp's server, started by the command line with which sft/serve.yaml starts vLLM.

GGUF and ADAPTER, environment variables, are what it serves. Both servers have OpenAI's API and
/health; vLLM itself does not run on the machines of the tests.
"""

import os
import sys
import threading
from pathlib import Path

from helpers.llama import start_server


def value_of(flag: str) -> str:
    """As argparse reads it, and so vLLM: of a flag that is given twice, the last value."""
    *_, last = (index for index, word in enumerate(sys.argv) if word == flag)
    return sys.argv[last + 1]


adapter = os.environ.get("ADAPTER")
server = start_server(
    Path(os.environ["GGUF"]),
    adapter=Path(adapter) if adapter else None,
    key=os.environ["VLLM_API_KEY"],
    host=value_of("--host"),
    port=int(value_of("--port")),
    name=value_of("--lora-modules").partition("=")[0],
)
threading.Event().wait()  # until SIGTERM
