"""Runs a script in a process that may use so many GiB of its GPU and sees no more: 78.6 is an 80 GB card, 9.3 what a
10 GB card leaves.

    python tools/capped.py 9.3 train_qlora.py --config configs/default.yaml --exp exp2-wangchan-ut1
"""

import argparse
import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where ouro/ is

import ouro  # noqa: F401 - before torch

import torch

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gib", type=float)
    parser.add_argument("script", nargs=argparse.REMAINDER, help="the script and its arguments")
    asked = parser.parse_args()
    if not asked.script:
        parser.error("which script?")
    limit, gpu = int(asked.gib * 2**30), int(os.environ.get("LOCAL_RANK", 0))
    sys.argv = asked.script
    whole = torch.cuda.mem_get_info
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(gpu).total_memory, gpu)
    torch.cuda.mem_get_info = lambda *device: tuple(min(limit, number) for number in whole(*device))
    runpy.run_path(sys.argv[0], run_name="__main__")
