#!/usr/bin/env bash
# Everything that one GPU can tell: sets up, checks results against fp32, measures beside the peers, prints one table and
# draws it (gpu.png).
#
#   benchmarks/gpu.sh [RESULTS] [OPTIONS of python -m benchmarks.gpu]
#   benchmarks/gpu.sh out                      all of it, with one H100 or A100 of 80 GB
#   benchmarks/gpu.sh out --task check sft     a piece; the table is made from all pieces in the same folder
#   SMOKE=1 benchmarks/gpu.sh                  tiny shapes on the CPU: shows that the script works
#
# Pieces that fit ten minutes each, beside the setup, in minutes on an H100 and 16 cores (a contender on rows of one kind
# took 20 to 55 s, vLLM two minutes; an A100 should take two to three times as long):
#
#   --task check                               5 to 7, tests/gpu among them
#   --task sft                                 4, 6 with Transformer Engine
#   --task reward                              5, 7 with Transformer Engine
#   --task label --only offline-align          3, 6 with Transformer Engine
#   --task label --only transformers           3
#   --task label --only vLLM                   6, with vLLM
#   --task fp8                                 3, with Transformer Engine
#
# A contender that is there already is skipped (--again: measured anew), so that a piece that was cut short goes on where
# it stood. One that fails or takes more than 300 s (--timeout-seconds) is a row that says so.
#
# PYTHON: an interpreter whose torch sees the GPU, such as that of NVIDIA's PyTorch container (unset: `make setup`).
# WITH_TE=1, WITH_VLLM=1: also install Transformer Engine (needs nvcc) and vLLM, each only if its installation works.
set -euo pipefail
cd "$(dirname "$0")/.."
results=benchmarks/results
if [[ $# -gt 0 && "$1" != -* ]]; then
    results="$1"
    shift
fi

if [[ -z "${PYTHON:-}" ]]; then
    make setup
    PYTHON=.venv/bin/python
fi
if ! "$PYTHON" -c 'import megatron.core, offline_align' 2>/dev/null; then
    "$PYTHON" -m pip install --quiet -e .
fi
# Transformer Engine is built against the torch that is there, so this package needs its builder beside it.
[[ -z "${WITH_TE:-}" ]] \
    || { "$PYTHON" -m pip install --quiet hatchling && "$PYTHON" -m pip install --no-build-isolation '.[te]'; } \
    || echo "Transformer Engine: left out"
[[ -z "${WITH_VLLM:-}" ]] || "$PYTHON" -m pip install '.[vllm]' || echo "vLLM: left out"

if [[ "${SMOKE:-}" != 1 ]]; then
    "$PYTHON" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "no GPU is visible: use SMOKE=1")'
    # What fails here fails again below, where it costs the contenders of one backend alone.
    if [[ -d tests/gpu && (" $* " != *" --task "* || " $* " == *" check "*) ]]; then
        timeout 300 "$PYTHON" -m pytest -q -m gpu tests/gpu || echo "tests/gpu: not all passed; going on"
    fi
fi
exec "$PYTHON" -m benchmarks.gpu --results "$results" "$@"
