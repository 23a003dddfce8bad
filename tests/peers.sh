#!/usr/bin/env bash
# Builds .venv-peers, beside .venv and with its versions: lm-evaluation-harness, scipy, statsmodels, playwright, which
# some tests compare this project's numbers with. Harmless to repeat.
set -euo pipefail
cd "$(dirname "$0")/.."
wanted=$(sha256sum requirements.txt tests/peers.txt | sha256sum | cut -d' ' -f1)
[ "$(cat .venv-peers/.complete 2>/dev/null || true)" = "$wanted" ] && exit 0
tools/env.sh
rm -rf .venv-peers
.venv/bin/python -m venv --without-pip .venv-peers
.venv/bin/uv pip install --quiet --python .venv-peers/bin/python --constraint requirements.txt -r tests/peers.txt
echo "$wanted" >.venv-peers/.complete
