"""Kernels run on a GPU, or in Triton's interpreter where there is none.

The interpreter has to be chosen before Triton is imported. So the tests of a kernel are marked
`runs_kernels`, and one test beside them, marked `starts_interpreter`, starts pytest again.
"""

import os
import subprocess
import sys

import pytest
import torch
import triton

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
INTERPRETED = triton.knobs.runtime.interpret
runs_kernels = pytest.mark.skipif(
    not (ON_GPU or INTERPRETED), reason="runs on a GPU or in Triton's interpreter"
)
starts_interpreter = pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the kernels run as they are")


def assert_passes_in_interpreter(*arguments: str) -> None:
    """Run pytest with these arguments, files and others, in Triton's interpreter."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout + result.stderr
