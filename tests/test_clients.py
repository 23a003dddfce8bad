"""What we export, in what people use: versions of transformers, PEFT, lm-evaluation-harness, and vLLM.

tests/peers.sh builds .venv-peers/clients/NAME-VERSION; further versions put there are tried too. With RECORD=1 what ran
becomes the table of docs/clients.md; without it, the table must say the same.
"""

import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from ouro import files
from ouro.data.chats import prompt_tokens
from ouro.model.loading import load_ouro, load_run_model, load_tokenizer
from ouro.settings import Settings
from tools import card
from tools import export as exporting

import pytest
import torch
import transformers
from conftest import PATIENCE
from helpers import port, read_jsonl, trained
from tiny_ouro import assert_close
from torch import Tensor

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_the_repository")]
ROOT = Path(__file__).resolve().parents[1]
CLIENTS = ROOT / ".venv-peers/clients"
TABLE = ROOT / "docs/clients.md"
PINNED = f"transformers-{transformers.__version__}"  # beside .venv's torch, as the others
BUILT = (PINNED, "transformers-4.57.6", "transformers-5.24.0", "vllm-0.32.0")  # by tests/peers.sh
NANO, DEPTH, EXP = "sample/ouro-nano", 2, "exp3a-wangchan-ut2"
TEXTS = ["The mountain is high and", "She took the book and went to", "จงบอกชื่อ"]
ran: dict[tuple[str, str], str] = {}  # (client, version) -> what works


def versions(client: str) -> list[str]:
    found = {path.name for path in CLIENTS.glob(f"{client}-*")} | {name for name in BUILT if name.startswith(client)}
    return sorted(found)


def environment(name: str) -> Path:
    if name != PINNED and not (CLIENTS / name).exists():
        reason = f"no {name} in .venv-peers/clients: tests/peers.sh builds it"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return CLIENTS / name


def result(command: list, **variables: str) -> dict:
    """What a program prints after RESULT, as JSON."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd=variables["HF_HOME"],
        env=kept | {"HF_HUB_OFFLINE": "1"} | variables, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.partition("RESULT ")[2].splitlines()[0])


@pytest.fixture(scope="module")
def run(tmp_path_factory, in_the_repository):
    """The folder of a run of ouro-nano, merged: its answers are sure enough to be compared between programs."""
    folder = tmp_path_factory.mktemp("clients")
    few = ["--max_steps", "12", "--eval_steps", "0", "--learning_rate", "0.003", "--max_length", "2048"]
    few += ["--model_name_or_path", NANO, "--use_qlora", "false", "--activation_checkpointing", "none"]
    trained(folder, "--exp", EXP, *few)
    exporting.merge(resolved_export(folder, "merge"))
    return folder / EXP


def resolved_export(folder: Path, action: str):
    argv = [action, "--config", "tests/smoke.yaml", "--exp", EXP, "--output_dir", str(folder)]
    return exporting.resolve("", argv, add_options=exporting.options, several=True)


@pytest.fixture(scope="module")
def ours(run):
    """The merged model and the adapter on its base, in fp32."""
    settings = Settings(**files.read_yaml(run / "config.yaml"))
    return {
        "merged": load_ouro(str(run / "merged"), dtype=torch.float32).eval(),
        "lora": load_run_model(settings, run / "final_adapter", total_ut_steps=DEPTH, fused=False).eval(),
    }


# --------------------------------------------------------------------------------------------------- transformers, PEFT

IN_TRANSFORMERS = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
merged, adapter, block, texts = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
tokenizer = AutoTokenizer.from_pretrained(merged, padding_side="left")
loaded = AutoModelForCausalLM.from_pretrained(merged, trust_remote_code=True, torch_dtype=torch.float32).eval()
code = type(loaded).__module__

def answers(texts, **how):
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    made = loaded.generate(**batch, max_new_tokens=12, do_sample=False, **how)
    return made[:, batch.input_ids.shape[1]:].tolist()

with torch.no_grad():
    ids = tokenizer(texts[0], return_tensors="pt").input_ids
    told = {
        "version": transformers.__version__, "code": code, "ids": ids.tolist(), "merged": loaded(ids).logits.tolist(),
        "cached": answers(texts), "uncached": answers(texts, use_cache=False),
        "alone": [answers([text])[0] for text in texts],
        "beams": answers(texts, num_beams=3), "uncached beams": answers(texts, num_beams=3, use_cache=False),
        "chat": tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False,
                                              add_generation_prompt=True),
    }
    exec(sys.argv[5])
    told["reply"] = reply[0, prompt.input_ids.shape[1] :].tolist()
    exec(block)
    told["lora"] = model.float().eval()(ids).logits.tolist()
print("RESULT", json.dumps(told))
"""


@pytest.mark.parametrize("name", versions("transformers"))
def test_a_merged_folder_and_an_adapter_run_in_another_version_of_transformers(name, run, ours, tmp_path):
    """From an empty folder, with what the cards say; the model's own tests pass there too."""
    place = environment(name)
    adapter = run / "final_adapter"
    settings = Settings(**files.read_yaml(run / "config.yaml"))
    (block,) = re.findall("```python\n(.*?)```", card.card(EXP, settings, adapter), re.DOTALL)
    block = block.replace('"ouro-nano"', repr(str(ROOT / NANO))).replace('"PLACE")\n', f"{str(run / 'merged')!r})\n", 1)
    block = block.replace('"PLACE"', repr(str(adapter)))
    (use,) = re.findall("```python\n(.*?)```", (run / "merged/README.md").read_text(encoding="utf-8"), re.DOTALL)
    use = use.replace("PLACE", str(run / "merged"))
    path = {"PYTHONPATH": str(place), "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", IN_TRANSFORMERS, run / "merged", adapter, block, json.dumps(TEXTS), use]
    told = result(command, **path)
    assert told["version"] == name.partition("-")[2] and told["code"].startswith("transformers_modules.")
    assert told["reply"], "by the merged folder's card"
    for kind, model in ours.items():
        assert_close(Tensor(told[kind]), model(input_ids=torch.tensor(told["ids"])).logits, 1e-4, kind)
    assert told["cached"] == told["uncached"] and told["beams"] == told["uncached beams"] != told["cached"]
    for row, alone in zip(told["cached"], told["alone"], strict=True):
        assert row[: len(alone)] == alone and not any(row[len(alone) :]), "padding on the left changes nothing"
    chat = [{"role": "user", "content": "hi"}]
    assert load_tokenizer(NANO)(told["chat"]).input_ids == prompt_tokens(chat, load_tokenizer(NANO))
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_model.py", "tests/test_generation.py"]
    done = subprocess.run(
        [sys.executable, *tests], capture_output=True, text=True, env=os.environ | path, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stdout[-3000:]
    works = "merged folder, adapter with PEFT; cache, left padding, beams, chat template; the model's tests"
    ran["transformers", told["version"]] = works


# ---------------------------------------------------------------------------------------------------------------- vLLM

IN_VLLM = """
import gc, json, os, sys
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
               "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"}
import vllm
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest
merged, base, adapter, prompts = sys.argv[1:5]
prompts = [{"prompt_token_ids": ids} for ids in json.loads(prompts)]
wanted = vllm.SamplingParams(temperature=0, max_tokens=16, prompt_logprobs=0)
told = {"version": vllm.__version__.partition("+")[0]}
requests = [(prompt, depth) for prompt in prompts for depth in (1, 2, 3, 4)]
by_request = vllm.LLM(merged, dtype="bfloat16", max_model_len=512, max_num_seqs=5, max_num_batched_tokens=64,
                      enforce_eager=True, hf_overrides={"total_ut_steps": 4, "depth_by_request": True},
                      logits_processors=["ouro_vllm_model:Depth"])  # prompts in pieces, requests come and go
own = [vllm.SamplingParams(temperature=0, max_tokens=4 + 2 * depth, logprobs=0, extra_args={"total_ut_steps": depth})
       for _, depth in requests]
for (_, depth), reply in zip(requests, by_request.generate([prompt for prompt, _ in requests], own, use_tqdm=False)):
    told.setdefault(f"merged-by-request-{depth}", []).append(
        [list(reply.outputs[0].token_ids), [list(one.values())[0].logprob for one in reply.outputs[0].logprobs]])
del by_request
gc.collect()
cleanup_dist_env_and_memory()
for depth in (1, 2, 3, 4):
    for kind, model in (("merged", merged), ("lora", base)):
        engine = vllm.LLM(model, dtype="bfloat16", max_model_len=512, enforce_eager=True, enable_prefix_caching=False,
                          enable_lora=kind == "lora", hf_overrides={"total_ut_steps": depth})
        lora = {"lora_request": LoRARequest("adapter", 1, adapter)} if kind == "lora" else {}
        told[f"{kind}-{depth}"] = [
            [list(reply.outputs[0].token_ids), [list(one.values())[0].logprob for one in reply.prompt_logprobs[1:]]]
            for reply in engine.generate(prompts, wanted, use_tqdm=False, **lora)
        ]
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()
print("RESULT", json.dumps(told))
"""


@torch.no_grad()
def distance(model, prompt: list[int], reply: list[int], logprobs: list[float], depth: int) -> tuple[float, float]:
    """How far their log-probabilities, of the prompt's tokens or of the reply's, are from ours on average, and how much
    less likely than ours their least likely greedy choice is."""
    ids = torch.tensor([prompt + reply])
    found = model(input_ids=ids, total_ut_steps=depth).logits[0, :-1].log_softmax(-1)
    chosen = found.gather(1, ids[0, 1:, None])[:, 0]
    behind = (found.amax(-1) - chosen)[len(prompt) - 1 :]
    compared = chosen[: len(prompt) - 1] if len(logprobs) == len(prompt) - 1 else chosen[len(prompt) - 1 :]
    return float((compared - Tensor(logprobs)).abs().mean()), float(behind.max())


@pytest.mark.parametrize("name", versions("vllm"))
def test_vllm_with_the_plugin_answers_as_we_do_merged_and_by_lora_at_every_depth(name, run, ours, tmp_path):
    """bf16 there, fp32 here: a reply may leave ours where two tokens are as likely as each other."""
    place, tokenizer = environment(name), load_tokenizer(NANO)
    prompts = [prompt_tokens([{"role": "user", "content": text}], tokenizer) for text in TEXTS]
    told = result(
        [place / "bin/python", "-c", IN_VLLM, run / "merged", ROOT / NANO, run / "final_adapter", json.dumps(prompts)],
        PYTHONPATH=str(exporting.PLUGIN), HF_HOME=str(tmp_path),
    )  # fmt: skip
    assert told["version"] == name.partition("-")[2]
    for depth in (1, 2, 3, 4):
        for kind, model in (ours | {"merged-by-request": ours["merged"]}).items():
            for prompt, (reply, logprobs) in zip(prompts, told[f"{kind}-{depth}"], strict=True):
                near, behind = distance(model, prompt, reply, logprobs, depth)
                far, _ = distance(model, prompt, reply, logprobs, depth % 4 + 1)
                assert near < 0.05 and behind < 0.2, (kind, depth)
                assert far > 2 * near, "another depth is told apart"
    ran["vLLM (CPU), with the plugin", told["version"]] = "merged folder and LoRA at depths 1 to 4; depth by request"


# A server takes minutes to start: a folder that is served at its own depth alone is for the table.
SERVED = ["adapter", "merged folder, depth by request"]


@pytest.fixture(scope="module", params=SERVED + ["merged folder"] * ("RECORD" in os.environ))
def served(request, run, tmp_path_factory):
    """What `make serve` prints, run as it is printed: the param, its address, its name."""
    place, address = environment(BUILT[-1]), port()
    folder = tmp_path_factory.mktemp("served")
    kept = {"PATH": f"{place}/bin:{os.environ['PATH']}", "HF_HOME": str(folder), "VLLM_CPU_KVCACHE_SPACE": "1"}
    kept |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CACHE_ROOT": str(folder), "VLLM_PORT": address}
    by_request = ["--by_request"] * request.param.endswith("by request")
    exported = subprocess.run(
        [sys.executable, "tools/export.py", "serve", "--config", "tests/smoke.yaml", "--exp", EXP, "--output_dir",
         run.parent, *by_request], capture_output=True, text=True, check=True)  # fmt: skip
    _, adapter, merged = re.split("# The .*clients ask.*\n", exported.stdout)
    command = (adapter if request.param == "adapter" else merged).strip()
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(["bash", "-c", f"{command} --port {address}"], stdout=log, stderr=log,
                                  env=os.environ | kept, start_new_session=True)  # fmt: skip
    until = time.monotonic() + PATIENCE
    while True:
        assert server.poll() is None and time.monotonic() < until, (folder / "log").read_text()[-3000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{address}/v1/models", timeout=5).close()
            break
        except OSError:
            time.sleep(1)
    yield request.param, f"http://127.0.0.1:{address}/v1", f"{EXP}:1-{DEPTH}" if by_request else f"{EXP}:{DEPTH}"
    os.killpg(server.pid, signal.SIGTERM)
    server.wait(PATIENCE)


def test_a_live_server_replies_as_we_do(served, ours):
    kind, address, name = served
    for text in TEXTS:
        prompt = prompt_tokens([{"role": "user", "content": text}], load_tokenizer(NANO))
        asked = {"model": name, "prompt": prompt, "temperature": 0, "max_tokens": 16, "prompt_logprobs": 0}
        body = json.dumps(asked | {"return_token_ids": True}).encode()
        wanted = urllib.request.Request(f"{address}/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(wanted, timeout=PATIENCE) as answer:
            (choice,) = json.load(answer)["choices"]
        logprobs = [next(iter(one.values()))["logprob"] for one in choice["prompt_logprobs"][1:]]
        near, behind = distance(
            ours["lora" if kind == "adapter" else "merged"], prompt, choice["token_ids"], logprobs, DEPTH
        )
        assert near < 0.05 and behind < 0.2


def test_a_live_server_is_scored_and_judges_and_what_is_too_long_for_it_is_left_out(served, tmp_path):
    kind, address, name = served
    questions = json.loads((ROOT / "sample/mt_bench_thai/mt_bench_thai_full.json").read_text(encoding="utf-8"))[:2]
    questions[1]["turns"][0] = "a b c d e f " * 3000  # more tokens than the server takes
    (tmp_path / "questions.json").write_text(json.dumps(questions), encoding="utf-8")
    command = [sys.executable, "evaluate.py", "--config", "tests/smoke.yaml", "--endpoint", address,
               "--tasks", "mt_bench_thai", "--paths", f"mt_bench_thai={tmp_path}/questions.json",
               "--max_new_tokens", "16", "--results_dir", str(tmp_path)]  # fmt: skip
    judge = {"JUDGE_BASE_URL": address, "JUDGE_MODEL": name, "ENDPOINT_MODEL": name}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | judge, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    file = tmp_path / f"baseline-{EXP}/mt_bench_thai-ut{DEPTH}.items.jsonl"
    first, second = read_jsonl(file)
    assert all(turn["reply"] and turn["judgement"] for turn in first["turns"])
    assert [turn["end"].startswith("refused") for turn in second["turns"]] == [True, True]
    study = json.loads(file.with_name("mt_bench_thai-ut2.json").read_text())["study"]
    assert study["refused"] == 2 and "left out" in done.stderr
    if kind.endswith("by request"):
        shallower = read_jsonl(file.with_name("mt_bench_thai-ut1.items.jsonl"))[0]
        assert shallower["turns"][0]["reply"] != first["turns"][0]["reply"]
    ran[f"vLLM over HTTP, by `make serve`: {kind}", BUILT[-1].partition("-")[2]] = (
        "replies, log-probabilities; `evaluate.py --endpoint` and judge; too long prompts are left out and counted"
    )


# ------------------------------------------------------------------------------------------------------------ the table


def test_the_table_of_the_documentation_is_what_ran():
    text = TABLE.read_text(encoding="utf-8")
    rows = dict(re.findall(r"^(\| [^|]+ \| [^|]+ \|) ([^|]+ \| 20[\d-]+ \|)$", text, re.MULTILINE))
    for (client, version), works in ran.items():
        row, today = f"| {client} | {version} |", datetime.date.today().isoformat()
        if os.environ.get("RECORD"):
            rows[row] = f"{works} | {today} |"
        assert rows.get(row, "").rpartition(" | ")[0] == works, f"{row}: RECORD=1 writes what ran"
    if os.environ.get("RECORD"):
        head, line, rest = text.partition("|---|---|---|---|\n")
        body = "".join(f"{row} {cells}\n" for row, cells in sorted(rows.items()))
        files.write_atomic(TABLE, head + line + body + rest[rest.index("\n\n") + 1 :])
