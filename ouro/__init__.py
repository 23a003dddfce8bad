"""Ouro-Thai's rooms, in the order in which data flows: data, model, train, evaluate, verdict, cluster.

What the environment must hold before torch and its relatives are imported is set here: importing any room comes through
this file.
"""

import gc
import importlib.util
import logging
import os
import sys
import warnings

if importlib.util.find_spec("numpy") is None:
    print(f"error: {sys.executable} has none of the packages: `make env`, then `. .venv/bin/activate`", file=sys.stderr)
    sys.exit(2)
# torch and bitsandbytes each bring an OpenMP runtime whose idle threads spin for seconds and so starve the other's:
# scoring in NF4 on two cores took 36-61 s instead of 9. Read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# bitsandbytes calls torch.compile while it is imported, which starts a pool of compiler processes, as many as cores.
# Without this they start when something is compiled.
os.environ.setdefault("TORCH_WARM_POOL", "0")
# PyThaiNLP makes a folder in the home folder when it is imported, which may be read-only.
os.environ.setdefault("PYTHAINLP_READ_ONLY", "1")
# All graphs of a run compute in one memory. Without this it is made of pieces as large as the first graph's tensors,
# into which those of a pass of another size do not fit.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
# What other programs' users set for accelerate, torch and CUDA: it would change numbers, or the library that computes
# them, beside the settings, or let torch.load run what a checkpoint's file says. `call` says what was taken out; a
# setting of ours takes its place where there is one.
FOREIGN = (
    "ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "MEGATRON_LM_", "XLA_", "FP8_", "TORCHINDUCTOR_", "TORCHDYNAMO_",
    "TORCH_COMPILE_DISABLE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE", "TORCH_BLAS_PREFER_",
    "TORCH_LINALG_PREFER_", "DISABLE_ADDMM_CUDA_LT", "PYTORCH_TUNABLEOP_", "DNNL_DEFAULT_FPMATH_MODE",
    "ONEDNN_DEFAULT_FPMATH_MODE", "USE_TORCH", "USE_TF", "USE_FLAX", "USE_JAX", "FORCE_TF_AVAILABLE",
    "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "OPENAI_CUSTOM_HEADERS",
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD",
)  # fmt: skip
HARMLESS = ("TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS", "TORCHINDUCTOR_DETERMINISTIC")
REMOVED = [name for name in sorted(os.environ) if name.startswith(FOREIGN) and name not in HARMLESS]
for _name in REMOVED:
    del os.environ[_name]
# Imports make half a million objects that stay. With Python's own threshold the garbage collector goes through them
# again and again, for a fifth of the time that imports take. `ouro.files.call` restores that threshold.
COLLECT_AT = gc.get_threshold()
gc.set_threshold(100_000)
# Ctrl-C during imports, which take seconds, would print fifty lines of them.
_hook = sys.excepthook
sys.excepthook = lambda kind, *more: None if kind is KeyboardInterrupt else _hook(kind, *more)
# bitsandbytes warns of a CPU kernel that is not used, at import, and of paged optimizers, at the first step on a CPU.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
