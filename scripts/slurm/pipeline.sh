#!/usr/bin/env bash
# Run scripts/pipeline.sh as a chain of Slurm jobs. Each job starts after the jobs whose folders it reads have succeeded,
# so FA, RWR and CA run in parallel. Every stage has its own nodes and layout:
#
#   RUNS=/data/runs DATA=/data/raw/rows.jsonl PROMPTS=/data/raw/prompts.jsonl MODEL=llama3_8b INIT=/models/llama3_8b \
#     SLURM_OPTIONS='launcher.partition=dgx launcher.account=me launcher.time=4h' \
#     TRAIN_OPTIONS='parallel=tp4 launcher.nodes=4 launcher.nproc_per_node=8' \
#     LABEL_OPTIONS='launcher.nodes=4 launcher.nproc_per_node=8' GENERATE_OPTIONS='launcher.nproc_per_node=8' \
#     scripts/slurm/pipeline.sh [--dry-run | --wait]
#
# --dry-run checks all settings and prints the graph. --wait waits for the last job and prints the report. Run the same
# line again to submit the stages that are neither complete nor in the queue.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/slurm/jobs.sh
source "$here/jobs.sh"
jobs_begin "$@"
set --                                         # scripts/pipeline.sh takes no argument
# shellcheck source=scripts/pipeline.sh
source "$here/../pipeline.sh"
jobs_end "$RUNS/evaluate"
