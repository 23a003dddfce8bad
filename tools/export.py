"""What a trained run becomes elsewhere: a merged model, a repository on the Hub, a server.

    python tools/export.py merge --config configs/default.yaml --exp exp2-wangchan-ut1
    python tools/export.py push --config configs/default.yaml --exp exp2-wangchan-ut1 --repo USER/NAME [--merged]
    python tools/export.py serve --config configs/default.yaml --exp exp2-wangchan-ut1 [--run]      # the vLLM command

merge writes OUTPUT_DIR/<experiment>/merged, on the CPU: a bf16 model folder with the code that runs it in transformers,
lm-evaluation-harness and vLLM (docs/clients.md). push uploads the adapter, or the merged model, to a private
repository, with the scores of RESULTS_DIR. Model and server have the depth that the run was trained at;
--total_ut_steps names another.
"""

import argparse
import json
import os
import shutil
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where ouro/ is

from ouro import files
from ouro.data.chats import END_OF_TURN
from ouro.files import ROOT, Progress, UserError, call, file_sha256, quoted, read_json, seal, write_atomic, write_json
from ouro.model import modeling_ouro
from ouro.model.loading import WEIGHTS, frozen_kind, load_run_model, read_config, sizes, warn_of_depth
from ouro.model.modeling_ouro import OuroForCausalLM
from ouro.settings import REVISIONS, Resolved, Settings, resolve
from ouro.train.run_folder import finished_run, whole
from tools.card import WHEEL, card, path_in_repository, published_results, scores

import torch
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from transformers import AutoTokenizer, GenerationConfig

MERGE = "merge.json"  # of a merged folder: what it was made from
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's --max-lora-rank can be
EXACT = ("bf16", "fp32")  # frozen weights as they are in the checkpoint
PLUGIN = ROOT / "tools/vllm_ouro"  # what runs Ouro in vLLM
SERVED = 8192  # tokens of prompt and reply, at least, that a server takes: judging and long chats need them


def base_revision(folder: Path, trained: Settings) -> str | None:
    """The commit of the base that the run was trained on; None for a folder.
    Raises UserError: the run's manifest does not say."""
    commit = read_json(folder / "manifest.json", "model_commit")["model_commit"]
    return commit or trained.model_revision or REVISIONS.get(trained.model_name_or_path)


def depth(run: Resolved, trained: Settings) -> int:
    asked = run.origins["total_ut_steps"] in ("command line", "environment TOTAL_UT_STEPS")
    loops = (run.settings if asked else trained).total_ut_steps
    warn_of_depth(loops, sizes(trained).total_ut_steps)
    return loops


# ------------------------------------------------------------------------------------------------------------- merge


@torch.no_grad()
def merge_adapter(model: PeftModel) -> OuroForCausalLM:
    """The model with the adapter in its weights: each sum in fp32, and rounded once to the weight's dtype.
    Raises ValueError: a sum that is not finite."""
    for layer in [module for module in model.modules() if isinstance(module, LoraLayer)]:
        weight = layer.get_base_layer().weight
        dtype, weight.data = weight.dtype, weight.data.float()
        layer.merge(safe_merge=True)
        weight.data = weight.data.to(dtype)
    return model.unload()


def merged_model(trained: Settings, adapter: Path, revision: str | None, loops: int) -> OuroForCausalLM:
    """The unquantised base, in the dtype of the training, with the adapter in it, on the CPU; in bf16.
    Raises UserError: base or adapter cannot be read, they do not belong together, or the adapter is not finite."""
    plain = replace(trained, use_qlora=False, frozen_weights="auto", model_revision=revision)
    model = load_run_model(plain, adapter, total_ut_steps=loops, fused=False)
    try:
        model = merge_adapter(model).to(torch.bfloat16)
    except ValueError as error:
        raise UserError(f"{adapter} cannot be merged: {error}") from None
    model.config.early_exit_threshold = None  # at 1.0 the published code, in bf16, leaves early where p rounds up to it
    vars(model.config).pop("init_seed", None)  # without weights such a folder would be a random model
    model.generation_config = generation_config(adapter)
    return model


def generation_config(adapter: Path) -> GenerationConfig:
    """Generation ends with the text or the turn; the base's own config knows only the first."""
    tokenizer = AutoTokenizer.from_pretrained(adapter, trust_remote_code=False)
    text, turn = tokenizer.convert_tokens_to_ids(["<|endoftext|>", END_OF_TURN])
    return GenerationConfig(bos_token_id=text, eos_token_id=[text, turn], pad_token_id=text)


def write_wheel(file: Path) -> None:
    """The vLLM plugin as a package that `pip install` takes: one file, so that it can lie beside a model's."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as wheel:
        inside = {path.relative_to(PLUGIN).as_posix(): path.read_text() for path in sorted(PLUGIN.glob("**/*"))
                  if path.is_file() and path.suffix != ".pyc" and path.name != "pyproject.toml"}  # fmt: skip
        (info,) = {Path(name).parent.name for name in inside} - {""}
        inside[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: ouro\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        inside[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*inside, f"{info}/RECORD"])
        for name, text in inside.items():
            wheel.writestr(zipfile.ZipInfo(name), text)  # at the same time of writing each time: the same bytes


def merge(run: Resolved) -> None:
    """Writes the run's merged folder.
    Raises UserError: the run is not finished, its adapter does not fit, another merged model is there, the disk is
    full."""
    folder, trained, adapter = finished_run(run)
    target, revision, loops = folder / "merged", base_revision(folder, trained), depth(run, trained)
    record = {
        "run": run.run,
        "base": trained.model_name_or_path,
        "base_commit": revision,
        "adapter_sha256": file_sha256(adapter / WEIGHTS),
        "trained_on": frozen_kind(trained),
        "trained_ut_steps": trained.total_ut_steps,
        "total_ut_steps": loops,
    }
    if target.exists():
        remedy = f"rm -r {quoted(target)}, and merge again"
        there = read_json(whole(target, remedy) / MERGE)
        differs = [f"{key} {there.get(key)}, not {value}" for key, value in record.items() if there.get(key) != value]
        if differs:
            raise UserError(f"{target} holds another model ({'; '.join(differs)}): {remedy}")
        files.remove_left(target)
        print(f"{files.one_line(target)} is there already; to write it anew: {remedy}")
        return
    model = merged_model(trained, adapter, revision, loops)
    megabytes, free = 2 * model.num_parameters() / 1e6, shutil.disk_usage(folder).free / 1e6
    try:
        with files.unfinished(target) as mark, Progress(f"writing {target}, {megabytes:,.0f} MB"):
            partial = Path(f"{mark.name}.d")
            model.save_pretrained(partial, max_shard_size="1TB")  # one file, as published
            # Some classes of tokenizers add token types, which `generate` refuses.
            inputs = ["input_ids", "attention_mask"]
            tokenizer = AutoTokenizer.from_pretrained(adapter, model_input_names=inputs, trust_remote_code=False)
            tokenizer.save_pretrained(partial)
            write_wheel(partial / WHEEL)
            write_atomic(partial / "README.md", card(run.run, trained, adapter, record=record))
            write_json(partial / MERGE, record)
            seal(partial)
            os.replace(partial, target)
    except (OSError, SafetensorError) as error:
        why = f"{' '.join(str(error).split())[:300]} ({megabytes:,.0f} MB are needed, {free:,.0f} MB were free)"
        raise UserError(f"{target} could not be written: {why}") from None
    files.sync_folder(folder)
    depths = f"total_ut_steps = {loops} (trained at {trained.total_ut_steps})"
    print(f"merged: {files.one_line(target)}, {megabytes:,.0f} MB, {depths}")
    print("  its README.md says what runs it: transformers, lm-evaluation-harness, vLLM (make serve)")
    if (kept := record["trained_on"]) not in EXACT:
        print(f"  trained beside {kept} weights, merged into the unquantised ones: nearly the same model")


# -------------------------------------------------------------------------------------------------------------- push


def refusal(error: Exception, repo: str) -> str:
    """What an error of the Hub's client means. The text of one with an answer is left out: it can hold signed URLs."""
    answered = error
    while answered is not None and getattr(answered, "response", None) is None:
        answered = answered.__cause__ or answered.__context__
    if answered is None:
        if isinstance(error, ValueError) and not isinstance(error, OSError):
            return " ".join(str(error).split())[:300]
        return f"no connection to {constants.ENDPOINT}, or it broke ({type(error).__name__}); try again"
    status = answered.response.status_code
    if status == 401:
        return "the Hub does not know the token (401): hf auth login, or a valid HF_TOKEN"
    if status == 403:
        owner = f"{repo.split('/')[0]} must be you or an organisation of yours"
        return f"the token may not write there (403): it needs write access, and {owner}"
    return f"the Hub answered {status}: {getattr(answered, 'server_message', None) or answered.response.reason}"


def push(run: Resolved) -> None:
    """Uploads the adapter, or the merged model, with tokenizer, code, model card and scores, in one commit.
    Raises UserError: the run is not finished, there is nothing whole to upload, no repository or token is named, the
    repository is public though --public was not said, or the Hub refuses."""
    repo, public = run.options.repo or "", run.options.public
    folder, trained, source = finished_run(run)
    if run.options.merged:
        source = whole(folder / "merged", f"make merge EXP={run.run}")
    elif Path(trained.model_name_or_path).exists():
        remedy = "merge, and push with --merged (MERGED=1), or train from a Hub id"
        raise UserError(f"its base is the folder {trained.model_name_or_path}, which nobody else has: {remedy}")
    try:
        validate_repo_id(repo if repo.count("/") == 1 else "")
    except HFValidationError:
        raise UserError(f"name the repository as USER/NAME, got {repo!r}: make push … REPO=USER/NAME") from None
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set: an upload needs the network")
    if not get_token():
        raise UserError("no token for the Hub: hf auth login, or HF_TOKEN in the environment")
    content = upload_of(run, trained, folder, source)
    api, what = HfApi(), "merged model" if run.options.merged else "adapter"
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        there = api.model_info(repo)
        if not there.private and not public:  # `exist_ok` leaves it as it is
            raise UserError(f"{repo} exists and is public: --public (PUBLIC=1) if you mean it, or use another name")
        if others := {x.rfilename for x in there.siblings} & {"config.json", "adapter_config.json"} - content.keys():
            raise UserError(f"{repo} holds another kind of model ({others.pop()}): use another name for the {what}")
        print(f"uploading {files.one_line(source)} to {repo} ({'private' if not public else 'public'})", flush=True)
        added = [CommitOperationAdd(name, part) for name, part in content.items()]
        commit = api.create_commit(repo, added, commit_message=f"{what} of {run.run}")
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{repo}: {refusal(error, repo)}") from None
    print(f"uploaded: {files.one_line(files.message(commit.commit_url))}")


def upload_of(run: Resolved, trained: Settings, folder: Path, source: Path) -> dict[str, Path | bytes]:
    """What a push uploads, by its path in the repository: the files that were written (no file browser's .DS_Store),
    the code, the results that the card names, and a card that knows them."""
    adapter, repo = folder / "final_adapter", run.options.repo
    record = read_json(source / MERGE) if run.options.merged else None
    loops = record["total_ut_steps"] if record else trained.total_ut_steps
    results = Path(run.settings.results_dir)
    studies = published_results(results, run.run, loops, file_sha256(adapter / WEIGHTS))
    base = base_revision(folder, trained)
    about = card(run.run, trained, adapter, record=record, studies=studies, repo=repo, revision=base)
    texts = {"README.md": about} | scores(studies, repo)
    return (
        {"modeling_ouro.py": Path(modeling_ouro.__file__)}
        | {name: source / name for name in files.sealed_files(source).keys() - {MERGE}}
        | {path_in_repository(name): results / run.run / name for name in studies}
        | {name: text.encode() for name, text in texts.items()}
    )


# ------------------------------------------------------------------------------------------------------------- serve


def command(
    model: str, loops: int, length: int, *options: str, revision: str | None = None, by_request: bool = False
) -> str:
    """The vLLM command of a model, an option a line. by_request: each request may name its depth, up to `loops`."""
    runner = "VLLM_USE_V2_MODEL_RUNNER=0 " if by_request else ""  # the other never tells a model whose logits it makes
    overrides = {"total_ut_steps": loops} | ({"depth_by_request": True} if by_request else {})
    lines = [
        f"{runner}PYTHONPATH={quoted(PLUGIN)} vllm serve {quoted(model)}",
        *([f"--revision {revision}"] if revision else []),
        f"--dtype bfloat16 --max-model-len {length}",
        f"--hf-overrides {quoted(json.dumps(overrides))}",
        *(["--logits-processors ouro_vllm_model:Depth"] if by_request else []),
        *options,
    ]
    return " \\\n  ".join(lines)


def serve(run: Resolved) -> None:
    """Prints the vLLM command for the adapter and, if there is one, for the merged model; with --run, runs the last.
    Raises UserError: the run is not finished, the base's config cannot be read, vLLM cannot serve it and it is not
    merged, or it is to be run and vLLM is not there."""
    folder, trained, adapter = finished_run(run)
    name, revision, loops = trained.model_name_or_path, base_revision(folder, trained), depth(run, trained)
    config, merged = read_config(name, revision), folder / "merged"
    rank = next((rank for rank in RANKS if rank >= trained.r), None)
    unservable = "DoRA" if trained.use_dora else f"rank {trained.r}" if rank is None else None
    if unservable and not merged.exists():
        raise UserError(f"vLLM cannot serve adapters with {unservable}: make merge EXP={run.run}, then it serves that")

    by_request = run.options.by_request and loops > 1
    told = f":1-{loops}" if by_request else f":{loops}"  # for evaluate.py: vLLM tells its clients names alone
    asked = f"{run.run}{told}"
    length = min(max(SERVED, trained.max_length), config.max_position_embeddings)
    slot = 2 * 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim / 2**20  # K and V, 2 bytes
    with torch.device("meta"):
        weights = 2 * OuroForCausalLM(config).num_parameters() / 2**30
    print("# vLLM 0.26 to 0.32, in an environment of its own: docs/clients.md. Always the last loop, without the gate.")
    print(f"# Weights {weights:.2g} GiB; keys and values {slot * loops:.3g} MiB a token at depth {loops}, ", end="")
    print(f"{slot * loops * length / 1024:.3g} GiB for {length} tokens. Less fits with a smaller --max-model-len.")
    if not unservable:
        write_atomic(folder / "generation_config.json", generation_config(adapter).to_json_string())
        place = str(Path(name).resolve()) if Path(name).exists() else name
        if (kept := frozen_kind(trained)) not in EXACT:
            print(f"# The adapter was trained beside {kept} weights; here it stands beside bf16 ones: nearly the same.")
        print(f"# The adapter; clients ask for model {asked!r} ({place + told!r}: the base).")
        options = (
            f"--generation-config {quoted(folder.resolve())}",
            f"--enable-lora --max-lora-rank {rank}",
            f"--served-model-name {quoted(place + told)}",
            f"--lora-modules {quoted(f'{asked}={adapter.resolve()}')}",
        )
        last = command(place, loops, length, *options, revision=revision, by_request=by_request)
        print(last)
    if merged.exists():
        model = str(whole(merged, f"rm -r {quoted(merged)}, and merge again").resolve())
        print(f"# The merged model; clients ask for model {asked!r}.")
        last = command(model, loops, length, f"--served-model-name {quoted(asked)}", by_request=by_request)
        print(last, flush=True)
    if run.options.run:
        if not shutil.which("vllm"):
            raise UserError("there is no vllm in PATH: install it in an environment of its own, and put its bin/ there")
        os.execvp("bash", ["bash", "-c", last])


ACTIONS = {"merge": merge, "push": push, "serve": serve}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=ACTIONS, help="merge: write a model; push: upload; serve: print a command")
    parser.add_argument("--repo", help="push: the repository, USER/NAME")
    parser.add_argument("--merged", action="store_true", help="push: the merged model in place of the adapter")
    parser.add_argument("--run", action="store_true", help="serve: run the last of the printed commands")
    parser.add_argument(
        "--by_request", action="store_true", help="serve: each request may name a depth, up to this one"
    )
    parser.add_argument("--public", action="store_true", help="push: a repository that everybody can read")


def main() -> None:
    run = resolve(__doc__, add_options=options, several=True)
    ACTIONS[run.options.action](run)


if __name__ == "__main__":
    call(main)
