"""What all tests share: no network, two threads, and imports of the project's modules and of the test helpers."""

import os
import sys
from pathlib import Path

# Before anything imports torch or transformers. Threads that wait by spinning make small tensors 3 times slower on a
# machine that does something else too.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_WAIT_POLICY="PASSIVE")
TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]


def pytest_configure(config):
    import torch

    torch.set_num_threads(2)
