"""Write the GGUF file of a model of the true size, and print the most memory that it took.

    python tests/helpers/export_memory.py FOLDER 20b [NUM_LAYERS]

The base is a sparse file and the adapter random numbers, so that every block of the experts is
quantised anew. FOLDER receives the GGUF file, of 13.8 GB for 20b, and is deleted at the end.
"""

import resource
import shutil
import sys
import time
from pathlib import Path

from finetune.export.gguf_model import MODEL, write_model
from finetune.model.loading import load_tokenizer
from helpers.finished_runs import open_run, save_adapter_run
from helpers.loading_memory import Peak, anonymous_bytes
from helpers.paths import VOCABULARY
from helpers.sparse_checkpoint import save_sparse
from helpers.vocabulary import fetch_ranks, make_tokenizer


def main() -> None:
    folder, size = Path(sys.argv[1]), sys.argv[2]
    save_sparse(folder / "base", size, int(sys.argv[3]) if sys.argv[3:] else None)
    fetch_ranks(VOCABULARY)
    make_tokenizer(VOCABULARY).save_pretrained(folder / "base")
    save_adapter_run(folder / "run", folder / "base")
    merged, tokenizer = open_run(folder / "run"), load_tokenizer(str(folder / "base"))
    before, peak, started = anonymous_bytes(), Peak(), time.monotonic()
    peak.start()
    write_model(merged, tokenizer, folder, name=size)
    added = peak.stop()["peak"]
    most = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{(folder / MODEL).stat().st_size / 1e9:.1f} GB in {time.monotonic() - started:.0f} s")
    print(f"memory of the process: {(before + added) / 1e9:.2f} GB", end=" ")
    print(f"and, with pages of the files it reads, {most / 1e9:.2f} GB")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
