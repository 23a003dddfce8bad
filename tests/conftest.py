"""What all tests share: no network, two threads, and imports of the project's modules and of the test helpers."""

import os
import sys
from pathlib import Path

# Before anything imports torch or transformers. GOMP_SPINCOUNT: see settings.py.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", GOMP_SPINCOUNT="10000")
TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]


def pytest_configure(config):
    import torch

    torch.set_num_threads(2)
