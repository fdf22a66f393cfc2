"""Write an export of a model of the true size, and print the most memory that it took.

    python tests/helpers/export_memory.py FOLDER 20b FORMAT [NUM_LAYERS]

FORMAT is bf16, mxfp4 or gguf. The base is a sparse file and the adapter random numbers, so that
every block of the experts is quantised anew. FOLDER receives the export, for 20b 42 GB in bf16 and
13.8 GB in the other two, and is deleted at the end.
"""

import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from finetune.export.gguf_model import write_model
from finetune.export.shards import write_weights
from finetune.model.loading import load_tokenizer
from helpers.finished_runs import open_run, save_adapter_run
from helpers.loading_memory import Peak, anonymous_bytes
from helpers.paths import VOCABULARY
from helpers.sparse_checkpoint import save_sparse
from helpers.vocabulary import fetch_ranks, make_tokenizer


def main() -> None:
    folder, size, form = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    save_sparse(folder / "base", size, int(sys.argv[4]) if sys.argv[4:] else None)
    fetch_ranks(VOCABULARY)
    make_tokenizer(VOCABULARY).save_pretrained(folder / "base")
    save_adapter_run(folder / "run", folder / "base")
    output = folder / "export"
    output.mkdir()
    before, peak, started = anonymous_bytes(), Peak(), time.monotonic()
    peak.start()
    write(folder, output, form=form)
    added = peak.stop()["peak"]
    most = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sizes = sorted((file.stat().st_size / 1e9 for file in output.iterdir()), reverse=True)
    print(f"{sum(sizes):.1f} GB in {time.monotonic() - started:.0f} s", end=", ")
    print(f"the largest file {sizes[0]:.2f} GB")
    print(f"memory of the process: {(before + added) / 1e9:.2f} GB", end=" ")
    print(f"and, with pages of the files it reads, {most / 1e9:.2f} GB")
    shutil.rmtree(folder)


def write(folder: Path, output: Path, *, form: Any) -> None:
    merged = open_run(folder / "run")
    if form == "gguf":
        write_model(merged, load_tokenizer(str(folder / "base")), output, name="measured")
    else:
        write_weights(merged, output, form=form)


if __name__ == "__main__":
    main()
