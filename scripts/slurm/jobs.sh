#!/usr/bin/env bash
# Turn a script that calls offline-align for each stage into a chain of Slurm jobs. scripts/slurm/pipeline.sh and
# scripts/slurm/study.sh source this file; it is not run by itself.
#
# `jobs_begin ARGUMENTS` reads --dry-run or --wait. `jobs_end REPORT` waits and prints the report, if asked to.

read -ra slurm <<<"${SLURM_OPTIONS:-}"         # options for every job; the options of a stage override them

folders=()                                     # run folders in the order of the chain
declare -A job=()                              # run folder: id of the job that writes it

# Replaces the offline-align command in scripts/pipeline.sh: submits the stage instead of running it.
offline-align() {
    local stage=$1 run_dir='' word folder after=() names=()
    shift
    for word in "$@"; do [[ "$word" != run.dir=* ]] || run_dir=${word#run.dir=}; done
    for folder in "${folders[@]}"; do
        for word in "$@"; do
            [[ "$word," == *[=,[]"$folder"[],/]* && "$word" != run.dir=* ]] || continue
            names+=("${folder#"$RUNS"/}")
            [[ -z "${job[$folder]}" ]] || after+=("${job[$folder]}")
            break
        done
    done
    folders+=("$run_dir")
    local words=(launcher=slurm "${slurm[@]}" "$@")
    if [[ "$mode" == --dry-run ]]; then
        command offline-align "$stage" "${words[@]}" dry_run=true launcher.dependency=1 >/dev/null
        job[$run_dir]=
        draw "$stage" "$run_dir" "${names[*]}" "${words[@]}"
        return
    fi
    [[ ${#after[@]} -eq 0 ]] || words+=("launcher.dependency=$(IFS=: && echo "${after[*]}")")
    job[$run_dir]=$(command offline-align "$stage" "${words[@]}")
    printf '%-9s %-24s %s\n' "$stage" "$run_dir" "${job[$run_dir]:+job ${job[$run_dir]}${after[*]:+, after ${after[*]}}}"
}

# Print one line of the graph: the stage, its ranks, the stages it waits for, and whether it is complete.
draw() {
    local stage=$1 run_dir=$2 behind=$3 nodes=1 ranks=1 tensor=1 word
    for word in "${@:4}"; do
        case $word in
        launcher.nodes=*) nodes=${word#*=} ;;
        launcher.nproc_per_node=*) ranks=${word#*=} ;;
        parallel=tp*) tensor=${word#*=tp} ;;
        parallel.tensor_model_parallel_size=*) tensor=${word#*=} ;;
        esac
    done
    local state=''
    [[ ! -f "$run_dir/manifest.json" ]] || state='  (complete)'
    printf '%-9s %-16s %2d x %d ranks, TP %d   %s%s\n' "$stage" "${run_dir#"$RUNS"/}" "$nodes" "$ranks" "$tensor" \
        "${behind:+after ${behind// /, }}" "$state"
}

jobs_begin() {
    mode=${1:-}
    if [[ "$mode" == --help || "$mode" == -h ]]; then
        sed -n '2,/^set /{/^#/p}' "$0" | cut -c 3-
        exit 0
    fi
    [[ "$mode" =~ ^(--dry-run|--wait|)$ ]] || { echo "${0##*/}: $mode: use --dry-run or --wait" >&2 && exit 78; }
}

jobs_end() {
    local report=$1 folder
    [[ "$mode" != --dry-run ]] || exit 0
    if [[ "$mode" == --wait ]]; then
        ids=$(IFS=, && echo "${job[*]}")
        ids=$(tr -s ',' <<<"$ids")
        while [[ -n "${ids//,/}" && -n "$(squeue --noheader --jobs="${ids#,}" 2>/dev/null)" ]]; do sleep "${POLL_SECONDS:-10}"; done
        for folder in "${folders[@]}"; do
            [[ -f "$folder/manifest.json" ]] || { echo "not complete: $folder (see $folder/logs)" >&2 && exit 70; }
        done
        cat "$report/report.md"
    else
        echo "the report will be in $report/report.md, and at the end of $report/logs/slurm-${job[$report]:-*}.out"
    fi
}
