"""GPU tests run on a node, which has the training environment and pytest alone."""

import os
import re
import subprocess
import sys

import pytest

from helpers.paths import REPO

# What tests import that is not in sft/requirements.lock.
TOOLS = ("boto3", "gcp_storage_emulator", "gpt_oss", "hypothesis", "openai_harmony", "xllamacpp")
COLLECT = f"""
import sys

import pytest

sys.modules.update(dict.fromkeys({TOOLS}))  # None: as if it were not installed
sys.exit(pytest.main(["-m", "gpu", "--collect-only", "-q", "tests"]))
"""


@pytest.mark.slow
def test_gpu_tests_are_found_without_the_other_tools_of_tests() -> None:
    result = subprocess.run(
        [sys.executable, "-c", COLLECT],
        cwd=REPO,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},  # hypothesis brings a plugin
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = set(re.findall(r"tests/model/test_\w+\.py::", result.stdout))
    assert {f"tests/model/test_{name}.py::" for name in ("attention", "fused_unpacking")} <= found
