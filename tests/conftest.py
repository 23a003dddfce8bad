"""What all tests share: no network, two threads, and imports of the project's modules and of the test helpers."""

import os
import sys
from pathlib import Path

import pytest

# Before anything imports torch or transformers. GOMP_SPINCOUNT: see settings.py.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", GOMP_SPINCOUNT="10000")
TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]


def pytest_configure(config):
    import torch

    torch.set_num_threads(2)


@pytest.fixture(scope="module")
def one_thread_in_the_repository():
    """For modules that train models in this process: so small that threads wait for each other most of the time."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(TESTS.parent)
        for name in ("CONFIG", "OUTPUT_DIR", "REPORT_TO", "TOTAL_UT_STEPS"):
            patch.delenv(name, raising=False)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)
