"""What all tests share: no network, one thread, and imports of the project's modules and of the test helpers."""

import functools
import gc
import os
import signal
import sys
from pathlib import Path

import pytest

# Before anything imports torch or transformers. One thread: the models are so small that several would wait for each
# other most of the time, and the cores are for pytest's workers and what they start.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
# Seconds: what takes longer hangs, whatever the machine. Less than the half hour after which torch's processes give up
# waiting for each other, so that a hang is not taken for an error.
PATIENCE = 600
SLOWEST = ["cluster", "report", "resume", "hub", "batches", "evaluate", "guards", "loading", "smoke", "nano", "demo",
           "fsdp"]  # fmt: skip


def pytest_collection_modifyitems(items):
    """`make test` gives its workers whole files in this order: what takes longest first, so that they end together."""
    rank = {f"test_{name}": place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_collection_finish():
    """What was imported stays: without this each of accelerate's collections, of which training makes some, takes half
    a second to look at all of it."""
    gc.freeze()


@pytest.fixture(scope="module")
def in_the_repository():
    """The folder and the environment of a user in a fresh clone; signal handlers that training sets go afterwards."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(TESTS.parent)
        for name in list(os.environ):
            if name in ("CONFIG", "OUTPUT_DIR", "RESULTS_DIR", "REPORT_TO", "TOTAL_UT_STEPS") or name.startswith(
                ("SLURM_", "WANDB_")
            ):
                patch.delenv(name)
        yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tokenizer():
    """The embedded model's; a test that changes it takes a copy."""
    from ouro.model.loading import load_tokenizer  # the environment above comes first

    return load_tokenizer(str(TESTS.parent / "sample/ouro-tiny"))


@pytest.fixture
def prepared(tmp_path, tokenizer):
    """Makes a training set of rows and prepares it: `prepare_set` of training_sets.py."""
    from training_sets import prepare_set

    return functools.partial(prepare_set, tmp_path, tokenizer=tokenizer)


@pytest.fixture
def scaled_mm(monkeypatch):
    """What torch._scaled_mm computes on Hopper; CPUs have no kernel for it."""
    import torch

    def product(a, b, scale_a, scale_b, out_dtype, use_fast_accum):
        assert a.dtype == b.dtype == torch.float8_e4m3fn
        assert a.is_contiguous() and b.t().is_contiguous()  # the tensor cores' only layout
        assert scale_a.shape == (len(a), 1) and scale_b.shape == (1, b.shape[1])
        assert scale_a.is_contiguous() and scale_b.t().is_contiguous()
        return ((a.float() * scale_a) @ (b.float() * scale_b)).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", product)


@pytest.fixture
def server(monkeypatch):
    """The judge that the environment names, and no other server."""
    from ouro.evaluate import endpoint

    import openai
    from fake_openai import FakeServer
    from judging import KEY

    fake = FakeServer()
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("JUDGE_", "ENDPOINT_", "OPENAI_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("JUDGE_BASE_URL", fake.url)
    monkeypatch.setenv("JUDGE_MODEL", "a-judge")
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr(endpoint, "PAUSE", 0)
    yield fake
    fake.close()


@pytest.fixture
def model(monkeypatch):
    """Another server: of the model under test."""
    from ouro.evaluate import endpoint

    from fake_openai import FakeServer

    monkeypatch.setattr(endpoint, "PAUSE", 0)
    fake = FakeServer()
    yield fake
    fake.close()


@pytest.fixture
def one_thread(server):
    """The judge, asked one thing at a time."""
    from ouro.evaluate.endpoint import find_judge

    grader = find_judge()
    grader.threads = 1
    return grader


@pytest.fixture(scope="session")
def questions():
    from judging import SAMPLE, load

    return load(SAMPLE)


@pytest.fixture(autouse=True)
def without_accelerates_variables():
    """accelerate leaves variables in this process; a program that a test starts would say that it does not use them."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
