#!/usr/bin/env bash
# Builds .venv from requirements.txt (hash-locked).  Usage: tools/env.sh [PYTHON]   (`make env` calls it; harmless to repeat)
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
uv="uv==0.13.9 --hash=sha256:d7f459fe4fd247d830351c75686d3996ace3c6f3f728eb0e85a30b7ada0cef19"
wanted=$(sha256sum requirements.txt tools/env.sh | sha256sum | cut -d' ' -f1)
[ "$(cat .venv/.complete 2>/dev/null || true)" = "$wanted" ] && exit 0

fail() { echo "env: $*" >&2; exit 1; }
install_uv() { "$1" -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r /dev/stdin <<<"$uv"; }

[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] ||
  fail "the locked packages are built for Linux on x86-64, this is $(uname -s) on $(uname -m); use WSL2, Docker or a Linux machine"
command -v "$python" >/dev/null || fail "'$python' not found; install Python 3.11 to 3.13 or name one: make env PYTHON=python3.12"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
# 6 GB unpacked, and 3 GB of downloads
free_gb=$(df --output=avail -BG . | tail -1 | tr -dc 0-9)
[ "$free_gb" -ge 10 ] || fail "building the environment needs 10 GB of free disk here, found $free_gb GB"

cat <<TEXT
env: building .venv with Python $version from requirements.txt: PyTorch 2.7.1 with its CUDA 12.6 libraries (they also run
env: on a machine without a GPU), transformers, TRL, PEFT, bitsandbytes. About 3 GB to download, 6 GB on disk; about
env: 2 minutes on a fast line.
TEXT
rm -rf .venv
case $version in
  3.11 | 3.12 | 3.13)
    "$python" -m venv .venv ||
      fail "'$python -m venv' failed; on Debian or Ubuntu: apt-get install python3-venv, then again"
    if install_uv .venv/bin/python; then
      install=(.venv/bin/uv pip install --python .venv/bin/python --compile-bytecode --require-hashes)
    else
      echo "env: uv could not be installed; using pip, which is slower"
      install=(.venv/bin/python -m pip install --disable-pip-version-check --require-hashes)
    fi ;;
  *)
    echo "env: Python $version is not among 3.11, 3.12, 3.13; asking uv for Python 3.12"
    tools=$(mktemp -d)
    trap 'rm -rf "$tools"' EXIT
    if ! { "$python" -m venv "$tools" && install_uv "$tools/bin/python" && "$tools/bin/uv" venv --quiet --python 3.12 .venv; }; then
      rm -rf .venv
      fail "Python $version is too old or too new and uv could not bring 3.12; install Python 3.11 to 3.13 and run: make env PYTHON=python3.12"
    fi
    install=("$tools/bin/uv" pip install --python .venv/bin/python --compile-bytecode --require-hashes) ;;
esac
"${install[@]}" -r requirements.txt || fail "installing the packages failed (see above); the next 'make env' starts afresh"
echo "$wanted" > .venv/.complete
echo "env: ready"
