#!/usr/bin/env bash
# Run the whole pipeline, from raw data to a report that compares the aligned policies.
#
#   scripts/pipeline.sh                    the demo: a small synthetic corpus and a tiny model, minutes on two CPU cores
#   RUNS=runs/mine DATA=[my_rows.jsonl,my_pairs.jsonl] PROMPTS=my_questions.jsonl INIT=models/SmolLM2-135M-Instruct \
#     OPTIONS=trainer=cpu scripts/pipeline.sh
#   RUNS=/big/runs DATA=my_rows.jsonl PROMPTS=my_prompts.jsonl INIT=/models/llama3_8b \
#     OPTIONS=launcher.nproc_per_node=8 TRAIN_OPTIONS=parallel=tp4 scripts/pipeline.sh
#
# Options of single stages: PREPARE_OPTIONS, SFT_OPTIONS, REWARD_OPTIONS, LABEL_OPTIONS, RWR_OPTIONS, CA_OPTIONS,
# GENERATE_OPTIONS (for example generate.max_new_tokens=64) and EVALUATE_OPTIONS; of all trainings: TRAIN_OPTIONS.
# With INIT, the last step exports the CA policy in Hugging Face format to $RUNS/aligned.
# After a crash, a full disk or a time limit (exit code 75), run the same line again: complete stages are skipped, and
# an interrupted stage continues where it stopped.
set -euo pipefail

# Settings come from the environment. An argument prints the lines above, and is an error unless it is --help.
if (($#)); then
    sed -n '2,/^set /{/^#/p}' "${BASH_SOURCE[0]}" | cut -c 3-
    [[ "$1" == --help || "$1" == -h ]] && exit 0
    echo "pipeline.sh: takes no argument: $1" >&2
    exit 78
fi

# ---- What to run on --------------------------------------------------------------------------------------------------

RUNS=${RUNS:-runs}                             # folder for the run folders of all stages
DATA=${DATA:-demo}                             # raw data: a path, [a,b,...], hf:<name>, or demo
PROMPTS=${PROMPTS:-}                           # held-out prompts; the demo corpus has its own
INIT=${INIT:-}                                 # pre-trained weights, a Hugging Face folder; empty: train from scratch
MODEL=${MODEL:-}                               # a file in configs/model, for training from scratch
[[ -n "$INIT" ]] || MODEL=${MODEL:-demo}

if [[ -z "$PROMPTS" ]]; then
    [[ "$DATA" == demo ]] || { echo "pipeline.sh: set PROMPTS to a file of prompts to answer" >&2 && exit 78; }
    PROMPTS=$RUNS/prepare/prompts.jsonl
fi

# ---- Settings of the stages ------------------------------------------------------------------------------------------

# The demo is small: 1,600 SFT rows, 1,200 pairs and a tiny model. Every method makes one pass over the labelled rows,
# so FA costs less than RWR and CA, as in the paper. Other models keep the paper's settings.
if [[ "$MODEL" == demo ]]; then
    size="data.max_length=256 trainer.micro_batch_size=16 trainer.global_batch_size=32"
    PREPARE_OPTIONS=${PREPARE_OPTIONS:-prepare.demo_sft_rows=1600 prepare.demo_preference_rows=1200}
    SFT_OPTIONS=${SFT_OPTIONS:-$size trainer.max_epochs=4 optim.lr=3e-3 optim.lr_warmup_steps=20}
    REWARD_OPTIONS=${REWARD_OPTIONS:-$size trainer.max_epochs=2 optim.lr=2e-3 optim.lr_warmup_steps=10}
    ALIGN_OPTIONS=${ALIGN_OPTIONS:-$size trainer.max_epochs=1 optim.lr=1e-3 optim.lr_warmup_steps=10}
    LABEL_OPTIONS=${LABEL_OPTIONS:-data.max_length=256 trainer.micro_batch_size=16}
    # The demo's rewards range from about -2 to 1.5. With the paper's beta of 5 all rows would have nearly equal weights.
    RWR_OPTIONS=${RWR_OPTIONS:-method.beta=1}
    GENERATE_OPTIONS=${GENERATE_OPTIONS:-data.max_length=256 generate.max_new_tokens=48 generate.batch_size=160}
    EVALUATE_OPTIONS=${EVALUATE_OPTIONS:-data.max_length=256 trainer.micro_batch_size=16}
    # Rewards beyond 1.1 standard deviations are written as 1.1, so that hundreds of rows lie at each end and a few steps
    # can learn them. The targets are these ends: no row of the demo has the paper's 5.
    CA_OPTIONS=${CA_OPTIONS:-method.reward_limit=1.1 optim.lr=2e-3}
    TARGET_REWARD=${TARGET_REWARD:-1.1}
    LOW_REWARD=${LOW_REWARD:--1.1}
fi
TARGET_REWARD=${TARGET_REWARD:-5.0}            # target reward for Conditional Alignment (the paper's)
LOW_REWARD=${LOW_REWARD:--2.0}                 # a low target reward, for poor answers on purpose

# Options for every stage that runs a model (OPTIONS), for every training stage (TRAIN_OPTIONS) and for each kind of
# stage, from the environment. Later ones win.
read -ra all <<<"${OPTIONS:-}"
read -ra prepare <<<"${PREPARE_OPTIONS:-}"
read -ra train <<<"${TRAIN_OPTIONS:-}"
read -ra sft <<<"${SFT_OPTIONS:-}"
read -ra reward <<<"${REWARD_OPTIONS:-}"
read -ra label <<<"${LABEL_OPTIONS:-}"
read -ra align <<<"${ALIGN_OPTIONS:-}"
read -ra rwr <<<"${RWR_OPTIONS:-}"
read -ra ca <<<"${CA_OPTIONS:-}"
read -ra generate <<<"${GENERATE_OPTIONS:-}"
read -ra evaluate <<<"${EVALUATE_OPTIONS:-}"

# Use the environment of this checkout if `make setup` has created it.
PATH="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin:$PATH"

# scripts/study.sh sources this file for its settings, or for everything up to the labels.
UNTIL=${UNTIL:-end}
[[ "$UNTIL" != settings ]] || return 0

# ---- Data ------------------------------------------------------------------------------------------------------------

# Turn raw rows into SFT rows and preference pairs, remove duplicates, and split them so that no prompt is in both parts.
offline-align prepare run.dir="$RUNS/prepare" data.input="$DATA" "${prepare[@]}"

# ---- Steps 1 and 2: the SFT policy, and the reward model that starts from it -----------------------------------------

offline-align sft run.dir="$RUNS/sft" ${MODEL:+model="$MODEL"} ${INIT:+init.from="$INIT"} \
    data.train="$RUNS/prepare/sft_train.jsonl" data.valid="$RUNS/prepare/sft_valid.jsonl" \
    "${all[@]}" "${train[@]}" "${sft[@]}"

offline-align reward run.dir="$RUNS/reward" init.from="$RUNS/sft" \
    data.train="$RUNS/prepare/preferences_train.jsonl" data.valid="$RUNS/prepare/preferences_valid.jsonl" \
    "${all[@]}" "${train[@]}" "${reward[@]}"

# ---- Step 3: the reward model scores the SFT rows and both answers of every pair -------------------------------------

offline-align label run.dir="$RUNS/label" init.from="$RUNS/reward" \
    data.input="[$RUNS/prepare/sft_train.jsonl,$RUNS/prepare/preferences_train.jsonl]" \
    "${all[@]}" "${label[@]}"

[[ "$UNTIL" != labels ]] || return 0

# ---- Step 4: three ways to learn from the same labelled rows ---------------------------------------------------------

# Filtering Alignment keeps the rows above the threshold.
offline-align fa run.dir="$RUNS/fa" init.from="$RUNS/sft" \
    data.train="$RUNS/label/labelled.jsonl" "${all[@]}" "${train[@]}" "${align[@]}"

# Reward-Weighted Regression weights every row by its reward.
offline-align rwr run.dir="$RUNS/rwr" init.from="$RUNS/sft" \
    data.train="$RUNS/label/labelled.jsonl" "${all[@]}" "${train[@]}" "${align[@]}" "${rwr[@]}"

# Conditional Alignment writes the reward into the prompt, so that a reward can be requested at generation.
offline-align ca run.dir="$RUNS/ca" init.from="$RUNS/sft" method.target_reward="$TARGET_REWARD" \
    data.train="$RUNS/label/labelled.jsonl" "${all[@]}" "${train[@]}" "${align[@]}" "${ca[@]}"

# ---- Answers to prompts that no stage has seen -----------------------------------------------------------------------

for policy in sft fa rwr; do
    offline-align generate run.dir="$RUNS/generate_$policy" init.from="$RUNS/$policy" \
        data.input="$PROMPTS" "${all[@]}" "${generate[@]}"
done

# Ask the CA policy for good and for poor answers, to see how far the condition steers it.
offline-align generate run.dir="$RUNS/generate_ca" init.from="$RUNS/ca" \
    method.target_reward="[$TARGET_REWARD,$LOW_REWARD]" data.input="$PROMPTS" "${all[@]}" "${generate[@]}"

# ---- The comparison --------------------------------------------------------------------------------------------------

answers=("$RUNS"/generate_{sft,fa,rwr,ca}/generations.jsonl)
offline-align evaluate run.dir="$RUNS/evaluate" judge=reward_model judge.model="$RUNS/reward" \
    data.input="[$(IFS=, && echo "${answers[*]}")]" "${all[@]}" "${evaluate[@]}"

# ---- The aligned model in Hugging Face format ------------------------------------------------------------------------

if [[ -n "$INIT" ]]; then
    offline-align convert run.dir="$RUNS/aligned" init.from="$RUNS/ca"
fi
