#!/usr/bin/env bash
# Run one stage on several machines: run the same line on each of them, with the same MASTER_ADDR.
#   NNODES=4 MASTER_ADDR=node0 scripts/torchrun/multi_node.sh sft run.dir=/shared/runs/sft parallel=tp4 ...
# The run folder must be on storage that all machines share. Ranks find each other through torchrun's rendezvous, so
# machines need no numbers, and a restarted machine can join again.
set -euo pipefail

: "${NNODES:?set NNODES to the number of machines}"
: "${MASTER_ADDR:?set MASTER_ADDR to the name of one of the machines}"
MASTER_PORT=${MASTER_PORT:-29500}
# All machines of a run use the same RUN_ID. Two runs at the same time on one machine need different ones.
RUN_ID=${RUN_ID:-offline-align}
NPROC_PER_NODE=${NPROC_PER_NODE:-$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)}
[[ "$NPROC_PER_NODE" -gt 0 ]] || NPROC_PER_NODE=1

exec torchrun \
    --nnodes "$NNODES" --nproc-per-node "$NPROC_PER_NODE" \
    --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "$RUN_ID" \
    -m offline_align "$@"
