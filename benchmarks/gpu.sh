#!/usr/bin/env bash
# Run the whole GPU benchmark: set up, check results against fp32, compare with peers, print one table and
# draw it (gpu.png).
#
#   benchmarks/gpu.sh [RESULTS] [OPTIONS of python -m benchmarks.gpu]
#   benchmarks/gpu.sh out                      everything, on one H100 or A100 with 80 GB
#   benchmarks/gpu.sh out --task check sft     a part; the table is made from all parts in the same folder
#   SMOKE=1 benchmarks/gpu.sh                  tiny shapes on the CPU, to check that the script works
#
# Each of these parts fits into ten minutes without the setup. The numbers are minutes on an H100 with 16
# cores. One contender on one kind of rows took 20 to 55 s, vLLM two minutes. An A100 should take two to
# three times as long.
#
#   --task check                               5 to 7, including tests/gpu
#   --task sft                                 4, 6 with Transformer Engine
#   --task reward                              5, 7 with Transformer Engine
#   --task label --only offline-align          3, 6 with Transformer Engine
#   --task label --only transformers           3
#   --task label --only vLLM                   6, with vLLM
#   --task fp8                                 3, with Transformer Engine
#
# A contender that has a result is skipped, so an interrupted part continues where it stopped (--again
# measures it again). The table also lists contenders that fail or exceed 300 s (--timeout-seconds).
#
# PYTHON: an interpreter whose torch sees the GPU, such as that of NVIDIA's PyTorch container (if unset, that
# of `make setup`).
# WITH_TE=1, WITH_VLLM=1: also try to install Transformer Engine (needs nvcc) and vLLM. If an installation
# fails, the benchmark continues without it.
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
# Transformer Engine is built against the installed torch without build isolation, so this package's own
# build backend must be installed as well.
[[ -z "${WITH_TE:-}" ]] \
    || { "$PYTHON" -m pip install --quiet hatchling && "$PYTHON" -m pip install --no-build-isolation '.[te]'; } \
    || echo "Transformer Engine: left out"
[[ -z "${WITH_VLLM:-}" ]] || "$PYTHON" -m pip install '.[vllm]' || echo "vLLM: left out"

if [[ "${SMOKE:-}" != 1 ]]; then
    "$PYTHON" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "no GPU is visible: use SMOKE=1")'
    # A failure here also fails the check below, which excludes only the contenders of that backend.
    if [[ -d tests/gpu && (" $* " != *" --task "* || " $* " == *" check "*) ]]; then
        timeout 300 "$PYTHON" -m pytest -q -m gpu tests/gpu || echo "tests/gpu: not all passed; going on"
    fi
fi
exec "$PYTHON" -m benchmarks.gpu --results "$results" "$@"
