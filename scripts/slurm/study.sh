#!/usr/bin/env bash
# Run scripts/study.sh as a chain of Slurm jobs. Every training is a job of its own, so methods and seeds run in
# parallel. The settings are those of scripts/study.sh, and SLURM_OPTIONS for every job:
#
#   RUNS=/data/runs/study POLICY=/data/runs/sft REWARD=/data/runs/reward LABELLED=/data/runs/label/labelled.jsonl \
#     PROMPTS=/data/raw/prompts.jsonl SLURM_OPTIONS='launcher.partition=dgx launcher.account=me launcher.time=4h' \
#     TRAIN_OPTIONS='parallel=tp4 launcher.nodes=4 launcher.nproc_per_node=8' \
#     scripts/slurm/study.sh [--dry-run | --wait]
#
# --dry-run checks all settings and prints the graph. --wait waits for the last job and prints the report. Run the same
# line again to submit the stages that are neither complete nor in the queue.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/slurm/jobs.sh
source "$here/jobs.sh"
jobs_begin "$@"
set --                                         # scripts/study.sh takes no argument
# shellcheck source=scripts/study.sh
source "$here/../study.sh"
jobs_end "$RUNS/evaluate"
