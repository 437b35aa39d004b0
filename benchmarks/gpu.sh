#!/usr/bin/env bash
# Everything that one GPU can tell: sets up, checks results against fp32, measures beside the peers, prints one table.
#
#   benchmarks/gpu.sh [RESULTS]     with one H100 or A100 of 80 GB, about half an hour
#   SMOKE=1 benchmarks/gpu.sh       tiny shapes on the CPU: shows that the script works
#
# PYTHON: an interpreter whose torch sees the GPU, such as that of NVIDIA's PyTorch container (unset: `make setup`).
# WITH_TE=1, WITH_VLLM=1: also install Transformer Engine (needs nvcc) and vLLM, each only if its installation works.
set -euo pipefail
cd "$(dirname "$0")/.."
results="${1:-benchmarks/results}"

if [[ -z "${PYTHON:-}" ]]; then
    make setup
    PYTHON=.venv/bin/python
fi
if ! "$PYTHON" -c 'import megatron.core, offline_align' 2>/dev/null; then
    "$PYTHON" -m pip install --quiet --no-build-isolation -e .
fi
[[ -z "${WITH_TE:-}" ]] || "$PYTHON" -m pip install --no-build-isolation '.[te]' || echo "Transformer Engine: left out"
[[ -z "${WITH_VLLM:-}" ]] || "$PYTHON" -m pip install '.[vllm]' || echo "vLLM: left out"

if [[ "${SMOKE:-}" != 1 ]]; then
    "$PYTHON" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "no GPU is visible: use SMOKE=1")'
    [[ ! -d tests/gpu ]] || "$PYTHON" -m pytest -q -m gpu tests/gpu
fi
exec "$PYTHON" -m benchmarks.gpu --results "$results"
