#!/usr/bin/env bash
# Run one stage on all GPUs of this machine with torchrun instead of `offline-align`'s own launcher:
#   scripts/torchrun/single_node.sh sft run.dir=runs/sft parallel=tp4 data.train=sft_train.jsonl
set -euo pipefail

NPROC_PER_NODE=${NPROC_PER_NODE:-$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)}
[[ "$NPROC_PER_NODE" -gt 0 ]] || NPROC_PER_NODE=1

exec torchrun --standalone --nproc-per-node "$NPROC_PER_NODE" -m offline_align "$@"
