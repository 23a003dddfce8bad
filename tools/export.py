"""What a trained run becomes elsewhere: a merged model, a repository on the Hub, a server.

    python tools/export.py merge --config configs/default.yaml --exp exp2-wangchan-ut1
    python tools/export.py push --config configs/default.yaml --exp exp2-wangchan-ut1 --repo USER/NAME [--merged]
    python tools/export.py serve --config configs/default.yaml --exp exp2-wangchan-ut1        # prints the vLLM command

merge writes OUTPUT_DIR/<experiment>/merged, on the CPU: a bf16 model folder for load_ouro, the published code and vLLM.
push uploads the adapter, or the merged model, to a private repository. Model and server have the depth that the run was
trained at; --total_ut_steps names another.
"""

import argparse
import json
import os
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where ouro/ is

from ouro.data.chats import END_OF_TURN
from ouro.files import (
    UserError,
    call,
    file_sha256,
    message,
    read_json,
    seal,
    sealed_files,
    sync_folder,
    unfinished,
    write_atomic,
    write_json,
)
from ouro.model.loading import WEIGHTS, frozen_kind, load_run_model, read_config
from ouro.model.modeling_ouro import OuroConfig, OuroForCausalLM
from ouro.settings import REVISIONS, Resolved, Settings, resolve
from ouro.train.run_folder import finished_run, whole

import torch
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from transformers import AutoTokenizer, GenerationConfig

MERGE = "merge.json"  # of a merged folder: what it was made from
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's --max-lora-rank can be
EXACT = ("bf16", "fp32")  # frozen weights as they are in the checkpoint


def base_revision(folder: Path, trained: Settings) -> str | None:
    """The commit of the base that the run was trained on; None for a folder.

    Raises:
        UserError: the run's manifest does not say.
    """
    commit = read_json(folder / "manifest.json", "model_commit")["model_commit"]
    return commit or trained.model_revision or REVISIONS.get(trained.model_name_or_path)


def depth(run: Resolved, trained: Settings) -> int:
    asked = run.origins["total_ut_steps"] in ("command line", "environment TOTAL_UT_STEPS")
    return (run.settings if asked else trained).total_ut_steps


# ------------------------------------------------------------------------------------------------------------- merge


@torch.no_grad()
def merge_adapter(model: PeftModel) -> OuroForCausalLM:
    """The model with the adapter in its weights: each sum in fp32, and rounded once to the weight's dtype.

    Raises:
        ValueError: a sum that is not finite.
    """
    for layer in [module for module in model.modules() if isinstance(module, LoraLayer)]:
        weight = layer.get_base_layer().weight
        dtype, weight.data = weight.dtype, weight.data.float()
        layer.merge(safe_merge=True)
        weight.data = weight.data.to(dtype)
    return model.unload()


def merged_model(trained: Settings, adapter: Path, revision: str | None, loops: int) -> OuroForCausalLM:
    """The unquantised base, in the dtype of the training, with the adapter in it, on the CPU; in bf16.

    Raises:
        UserError: base or adapter cannot be read, they do not belong together, or the adapter is not finite.
    """
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


def merged_card(record: dict, adapter: Path) -> str:
    """The model card: what was merged, then the adapter's own without its YAML."""
    text = (adapter / "README.md").read_text(encoding="utf-8").split("---\n", 2)[2]
    text = text.replace("\n# ", "\n## ", 1)
    base, place = record["base"], f"base_model: {record['base']}\nbase_model_relation: finetune\n"
    if Path(base).exists():  # nobody else has it, and its path is nobody else's business
        base, place, text = Path(base).name, "", text.replace(base, Path(base).name)
    differs = ""
    if record["trained_on"] not in EXACT:
        differs = f"""
The adapter was trained beside weights in {record["trained_on"]} and is merged into the unquantised ones, which differ
by the error of {record["trained_on"]}: scores of the adapter on the weights it was trained beside are not exactly those
of this model.
"""
    return f"""---
{place}library_name: transformers
pipeline_tag: text-generation
language: th
tags: [looped-transformer, ouro]
---
# {record["run"]}, merged

The adapter described below, merged into {base} ({record["base_commit"] or "a local folder"}): sums in fp32,
rounded once to bf16. It was trained at `total_ut_steps = {record["trained_ut_steps"]}`; `config.json` sets
`total_ut_steps = {record["total_ut_steps"]}`, and `early_exit_threshold` to null, so that the published code, too,
answers from the last loop. `generation_config.json` ends an answer at `<|endoftext|>` or `{END_OF_TURN}`.
{differs}{text}"""


def merge(run: Resolved) -> None:
    """Writes the run's merged folder.

    Raises:
        UserError: the run is not finished, its adapter does not fit, another merged model is there, the disk is full.
    """
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
        remedy = f"rm -r {shlex.quote(str(target))}, and merge again"
        there = read_json(whole(target, remedy) / MERGE)
        if differs := [
            f"{key} {there.get(key)}, not {value}" for key, value in record.items() if there.get(key) != value
        ]:
            raise UserError(f"{target} holds another model ({'; '.join(differs)}): {remedy}")
        print(f"{target} is there already")
        return
    model = merged_model(trained, adapter, revision, loops)
    megabytes, free = 2 * model.num_parameters() / 1e6, shutil.disk_usage(folder).free / 1e6
    try:
        with unfinished(target) as mark:
            partial = Path(f"{mark.name}.d")
            model.save_pretrained(partial, max_shard_size="1TB")  # one file, as published
            AutoTokenizer.from_pretrained(adapter, trust_remote_code=False).save_pretrained(partial)
            write_atomic(partial / "README.md", merged_card(record, adapter))
            write_json(partial / MERGE, record)
            seal(partial)
            os.replace(partial, target)
    except (OSError, SafetensorError) as error:
        why = f"{' '.join(str(error).split())[:300]} ({megabytes:,.0f} MB are needed, {free:,.0f} MB were free)"
        raise UserError(f"{target} could not be written: {why}") from None
    sync_folder(folder)
    print(f"merged: {target}, {megabytes:,.0f} MB, total_ut_steps = {loops} (trained at {trained.total_ut_steps})")
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
    """Uploads the adapter, or the merged model, with tokenizer and model card, in one commit.

    Raises:
        UserError: the run is not finished, there is nothing whole to upload, no repository or token is named, the
            repository is public though --public was not said, or the Hub refuses.
    """
    repo, public = run.options.repo or "", run.options.public
    folder, trained, source = finished_run(run)
    if run.options.merged:
        source = whole(folder / "merged", f"make merge EXP={run.run}")
    elif Path(trained.model_name_or_path).exists():
        raise UserError(
            f"the base of this adapter is the folder {trained.model_name_or_path}, which nobody else has: merge, and "
            "push with --merged (MERGED=1), or train from a Hub id"
        )
    try:
        validate_repo_id(repo if repo.count("/") == 1 else "")
    except HFValidationError:
        asked = run.options.repo
        raise UserError(
            f"name the repository as USER/NAME, got {asked!r}: --repo, or make push … REPO=USER/NAME"
        ) from None
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set: an upload needs the network")
    if not get_token():
        raise UserError("no token for the Hub: hf auth login, or HF_TOKEN in the environment")
    api, what = HfApi(), "merged model" if run.options.merged else "adapter"
    try:
        user = api.whoami()["name"]
        api.create_repo(repo, private=not public, exist_ok=True)
        private = api.model_info(repo).private
        if not private and not public:  # `exist_ok` leaves it as it is
            raise UserError(
                f"{repo} exists and is public: --public (PUBLIC=1) says that you mean it, or use another name"
            )
        print(f"uploading {source} as {user} to {repo} ({'private' if private else 'public'})", flush=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=source,
            allow_patterns=[*sealed_files(source).keys() - {MERGE}],  # no file browser's .DS_Store
            commit_message=f"{what} of {run.run}",
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{repo}: {refusal(error, repo)}") from None
    print(f"uploaded: {message(commit.commit_url)}")


# ------------------------------------------------------------------------------------------------------------- serve


def command(model: str, loops: int, trained: Settings, *options: str, revision: str | None = None) -> str:
    """The vLLM command of a model, an option a line."""
    # vLLM has Ouro's model code, but takes the class of its config from where config.json says, so that is pinned too.
    named, _ = OuroConfig.get_config_dict(model, revision=revision)
    repo, elsewhere, _ = named.get("auto_map", {}).get("AutoConfig", "").partition("--")
    code = REVISIONS.get(repo) if elsewhere else revision
    lines = [
        f"vllm serve {shlex.quote(model)}",
        *([f"--revision {revision}"] if revision else []),
        f"--trust-remote-code{f' --code-revision {code}' if code else ''}",
        f"--dtype bfloat16 --max-model-len {trained.max_length}",
        f"--hf-overrides {shlex.quote(json.dumps({'total_ut_steps': loops}))}",
        *options,
    ]
    return " \\\n  ".join(lines)


def serve(run: Resolved) -> None:
    """Prints the vLLM command for the adapter and, if there is one, for the merged model.

    Raises:
        UserError: the run is not finished, the base's config cannot be read, or vLLM cannot serve it and it is not
            merged.
    """
    folder, trained, adapter = finished_run(run)
    name, revision, loops = trained.model_name_or_path, base_revision(folder, trained), depth(run, trained)
    config, merged = read_config(name, revision), folder / "merged"
    rank = next((rank for rank in RANKS if rank >= trained.r), None)
    unservable = "DoRA" if trained.use_dora else f"rank {trained.r}" if rank is None else None
    if unservable and not merged.exists():
        raise UserError(f"vLLM cannot serve adapters with {unservable}: make merge EXP={run.run}, then it serves that")

    slot = 2 * 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim / 2**20  # K and V, 2 bytes
    print("# vLLM 0.12 or later. Always the last loop; the exit gate is not used.")
    print(f"# Keys and values: {slot * loops:.3g} MiB a token at depth {loops}, {slot:.3g} a loop; ", end="")
    print(f"{slot * loops * trained.max_length / 1024:.3g} GiB for {trained.max_length} tokens.")
    if not unservable:
        write_atomic(folder / "generation_config.json", generation_config(adapter).to_json_string())
        place = str(Path(name).resolve()) if Path(name).exists() else name
        if (kept := frozen_kind(trained)) not in EXACT:
            print(f"# The adapter was trained beside {kept} weights; here it stands beside bf16 ones: nearly the same.")
        print(f"# The adapter; clients ask for model {run.run!r} ({place!r}: the base at this depth).")
        options = (
            f"--generation-config {shlex.quote(str(folder.resolve()))}",
            f"--enable-lora --max-lora-rank {rank}",
            f"--lora-modules {shlex.quote(f'{run.run}={adapter.resolve()}')}",
        )
        print(command(place, loops, trained, *options, revision=revision))
    if merged.exists():
        model = str(whole(merged, f"rm -r {shlex.quote(str(merged))}, and merge again").resolve())
        print(f"# The merged model; clients ask for model {run.run!r}.")
        print(command(model, loops, trained, f"--served-model-name {shlex.quote(run.run)}"))


ACTIONS = {"merge": merge, "push": push, "serve": serve}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action", choices=ACTIONS, help="merge: write a bf16 model; push: upload; serve: print a command"
    )
    parser.add_argument("--repo", help="push: the repository, USER/NAME")
    parser.add_argument("--merged", action="store_true", help="push: the merged model in place of the adapter")
    parser.add_argument("--public", action="store_true", help="push: a repository that everybody can read")


def main() -> None:
    run = resolve(__doc__, add_options=options, several=True)
    ACTIONS[run.options.action](run)


if __name__ == "__main__":
    call(main)
