"""Ouro-Thai's rooms, in the order in which data flows: data, model, train, evaluate, verdict, cluster.

What the environment must hold before torch and its relatives are imported is set here: importing any room comes through
this file.
"""

import gc
import logging
import os
import warnings

# torch and bitsandbytes each bring an OpenMP runtime whose idle threads spin for seconds and so starve the other's:
# scoring in NF4 on two cores took 36-61 s instead of 9. Read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# bitsandbytes calls torch.compile while it is imported, which starts a pool of compiler processes, as many as cores.
# Without this they start when something is compiled.
os.environ.setdefault("TORCH_WARM_POOL", "0")
# PyThaiNLP makes a folder in the home folder when it is imported, which may be read-only.
os.environ.setdefault("PYTHAINLP_READ_ONLY", "1")
# Imports make half a million objects that stay. With Python's own threshold the garbage collector goes through them
# again and again, for a fifth of the time that imports take. `ouro.files.call` restores that threshold.
COLLECT_AT = gc.get_threshold()
gc.set_threshold(100_000)
# bitsandbytes warns of a CPU kernel that is not used, at import, and of paged optimizers, at the first step on a CPU.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
