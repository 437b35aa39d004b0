#!/usr/bin/env bash
# Which method is best for these data? Train every method from one policy on one labelled file, with several seeds, and
# write one page: scores by several judges, hours, and a recommendation (Section 5 of the paper).
#
#   scripts/study.sh                        the demo: a small synthetic corpus and a tiny model, on two CPU cores
#   RUNS=runs/study POLICY=runs/sft REWARD=runs/reward LABELLED=runs/label/labelled.jsonl \
#     PROMPTS=runs/prepare/prompts.jsonl scripts/study.sh
#   SIZE=real RUNS=runs/study INIT=models/SmolLM2-135M-Instruct DATA=my_rows.jsonl PROMPTS=my_prompts.jsonl \
#     scripts/study.sh                      one GPU, from raw data: first makes the policy, reward model and labels
#
# Without LABELLED, the policy, the reward model and the labels are made as in scripts/pipeline.sh, from the same
# variables (DATA, INIT, MODEL and the options of the stages). SIZE=small tries a real model on a CPU in few steps.
# After a crash or a time limit (exit code 75), run the same line again: complete stages are skipped.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if (($#)); then
    sed -n '2,/^set /{/^#/p}' "${BASH_SOURCE[0]}" | cut -c 3-
    [[ "$1" == --help || "$1" == -h ]] && exit 0
    echo "study.sh: takes no argument: $1" >&2
    exit 78
fi

# ---- What to compare -------------------------------------------------------------------------------------------------

RUNS=${RUNS:-runs/study}                       # folder for all run folders
METHODS=${METHODS:-sft fa rwr ca dpo ppo}      # sft trains on all labelled rows, whatever their reward
SEEDS=${SEEDS:-1 2 3}                          # every method is trained once with each seed
BUDGET=${BUDGET:-own}                          # own: each method reads its own rows once; equal: the same number of tokens
TOKENS=${TOKENS:-}                             # tokens of a training for BUDGET=equal; empty: those of the labelled file
BEST_OF=${BEST_OF:-16}                         # answers of best-of-n; 0 leaves it out
JUDGES=${JUDGES:-}                             # more judges, separated by semicolons: "judge=openai judge.model=...; ..."
SIZE=${SIZE:-}                                 # real: one GPU; small: a CPU, few steps

case "$SIZE" in
'') ;;
real)
    TRAIN_OPTIONS=${TRAIN_OPTIONS:-trainer.micro_batch_size=4}
    LABEL_OPTIONS=${LABEL_OPTIONS:-trainer.micro_batch_size=16}
    ;;
small)
    rows="trainer=cpu data.max_length=512"
    OPTIONS=${OPTIONS:-$rows}
    SFT_OPTIONS=${SFT_OPTIONS:-trainer.max_steps=4 trainer.global_batch_size=4}
    REWARD_OPTIONS=${REWARD_OPTIONS:-trainer.max_steps=4 trainer.global_batch_size=4}
    LABEL_OPTIONS=${LABEL_OPTIONS:-data.sample=24}
    ALIGN_OPTIONS=${ALIGN_OPTIONS:-trainer.max_steps=2 trainer.global_batch_size=4}
    PPO_OPTIONS=${PPO_OPTIONS:-trainer.max_steps=1 trainer.global_batch_size=4 method.rollout_batch_size=8 \
        generate.max_new_tokens=16}
    GENERATE_OPTIONS=${GENERATE_OPTIONS:-generate.max_new_tokens=16}
    BEST_OF=2
    ;;
*) echo "study.sh: SIZE=$SIZE: use real or small, or leave it unset" >&2 && exit 78 ;;
esac
[[ "$BUDGET" == own || "$BUDGET" == equal ]] || { echo "study.sh: BUDGET=$BUDGET: use own or equal" >&2 && exit 78; }

# ---- The policy, the reward model and the labels ---------------------------------------------------------------------

if [[ -n "${LABELLED:-}" ]]; then
    INIT=${POLICY:?set POLICY to the policy from which all methods start}
    : "${REWARD:?set REWARD to the reward model that judges the answers}" "${PROMPTS:?set PROMPTS to held-out prompts}"
    DATA=$LABELLED UNTIL=settings
else
    [[ "$BUDGET" == own ]] || { echo "study.sh: BUDGET=equal: set LABELLED, whose tokens are counted first" >&2 && exit 78; }
    UNTIL=labels
fi
# shellcheck source=scripts/pipeline.sh
source "$here/pipeline.sh"
if [[ "$UNTIL" == labels ]]; then
    POLICY=$RUNS/sft REWARD=$RUNS/reward LABELLED=$RUNS/label/labelled.jsonl
    # A second reward model from another seed judges too: gains that only the first one sees are no gains.
    offline-align reward run.dir="$RUNS/reward_2" run.seed=2 init.from="$POLICY" \
        data.train="$RUNS/prepare/preferences_train.jsonl" data.valid="$RUNS/prepare/preferences_valid.jsonl" \
        "${all[@]}" "${train[@]}" "${reward[@]}"
    JUDGES="judge=reward_model judge.model=$RUNS/reward_2${JUDGES:+; $JUDGES}"
fi
# A tiny model needs larger learning rates. Mini-batches of PPO are an eighth of the answers of an iteration, as in the
# paper. With the paper's KL coefficient, 0.01, the demo's policy exploits its reward model.
if [[ "$MODEL" == demo ]]; then
    DPO_OPTIONS=${DPO_OPTIONS:-optim.lr=3e-4}
    PPO_OPTIONS=${PPO_OPTIONS:-$size method.rollout_batch_size=256 trainer.max_steps=12 optim.lr=2e-4 \
        method.critic_lr=1e-3 method.kl_coefficient=0.1 generate.max_new_tokens=48 generate.batch_size=128}
fi
read -ra dpo <<<"${DPO_OPTIONS:-}"
read -ra ppo <<<"${PPO_OPTIONS:-}"
read -ra methods <<<"$METHODS"
read -ra seeds <<<"$SEEDS"

# ---- Budgets ---------------------------------------------------------------------------------------------------------

# The mean length of rows differs: FA keeps only some rows, CA adds a condition to each, and a pair has two answers. So
# the same number of tokens is a different number of steps for each method. `plan` counts the tokens.
BATCH=64                                       # rows, or pairs, of a step with BUDGET=equal
[[ "$BUDGET" == own ]] || command offline-align plan run.dir="$RUNS/plan" data.input="$LABELLED"

budget() {
    [[ "$BUDGET" == equal ]] || return 0
    python - "$RUNS/plan/plan.json" "$1" "$BATCH" "${TOKENS:-0}" <<'PYTHON'
import json, sys

path, method, batch, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
plan = json.load(open(path))
if plan["unit"] != "tokens":
    sys.exit(f"study.sh: {path}: counted {plan['unit']}, not tokens; set LABELLED to the output of a `label` run")
size, rows, kept, pairs = plan["size"], plan["rows"], plan["filtering"], plan["preference"]
means = {
    "fa": (kept["size"], kept["rows"]),
    "ca": (size + plan["conditional"]["extra_size"], rows),
    "dpo": (pairs["size"], pairs["pairs"]),
}
total, count = means.get(method, (size, rows))
if not count:
    sys.exit(f"study.sh: {method}: no row or pair to train on; remove {method} from METHODS")
steps = max(1, round((tokens or size) * count / (total * batch)))
print(f"trainer.global_batch_size={batch} trainer.max_steps={steps}")
PYTHON
}

# ---- Training and answers --------------------------------------------------------------------------------------------

answers=()
answer() {
    local folder=$1 policy=$2
    shift 2
    offline-align generate run.dir="$folder" init.from="$policy" data.input="$PROMPTS" \
        "${all[@]}" "${generate[@]}" "$@"
}

# The policy before alignment, and the best of several of its answers.
answer "$RUNS/start" "$POLICY"
answers+=("$RUNS/start/generations.jsonl")
if ((BEST_OF)); then
    answer "$RUNS/sampled" "$POLICY" generate.n="$BEST_OF" generate.temperature=1
    offline-align label run.dir="$RUNS/best_of_n" init.from="$REWARD" label.best_of=1 \
        data.input="$RUNS/sampled/generations.jsonl" "${all[@]}" "${label[@]}" data.sample=null
    answers+=("$RUNS/best_of_n/best.jsonl")
fi

for method in "${methods[@]}"; do
    steps=$(budget "$method")
    read -ra length <<<"$steps"
    for seed in "${seeds[@]}"; do
        policy=$RUNS/policies/${method}_$seed asked=()
        own=("${align[@]}")
        case $method in
        rwr) own+=("${rwr[@]}") ;;
        ca)
            own+=("${ca[@]}" method.target_reward="$TARGET_REWARD")
            # The first seed also answers for lower targets: Table 1 of the paper.
            [[ "$seed" != "${seeds[0]}" ]] || asked=(method.target_reward="[$TARGET_REWARD,0.0,$LOW_REWARD]")
            ;;
        dpo) own+=("${dpo[@]}") ;;
        # Its data are the prompts; its budget is that of PPO_OPTIONS.
        ppo) own=(method.reward_model="$REWARD" "${ppo[@]}") length=() ;;
        esac
        offline-align "$method" run.dir="$policy" run.seed="$seed" init.from="$POLICY" data.train="$LABELLED" \
            "${all[@]}" "${train[@]}" "${own[@]}" "${length[@]}"
        answer "$RUNS/answers/${method}_$seed" "$policy" "${asked[@]}"
        answers+=("$RUNS/answers/${method}_$seed/generations.jsonl")
    done
done

# ---- The page --------------------------------------------------------------------------------------------------------

files="[$(IFS=, && echo "${answers[*]}")]"
judged=()
IFS=';' read -ra more <<<"$JUDGES"
for words in "${more[@]}"; do
    read -ra judge <<<"$words"
    folder=$RUNS/judge_$((${#judged[@]} + 1))
    offline-align evaluate run.dir="$folder" data.input="$files" evaluate.divergence=false \
        "${all[@]}" "${evaluate[@]}" "${judge[@]}"
    judged+=("$folder")
done
offline-align evaluate run.dir="$RUNS/evaluate" judge=reward_model judge.model="$REWARD" data.input="$files" \
    ${judged:+evaluate.runs="[$(IFS=, && echo "${judged[*]}")]"} "${all[@]}" "${evaluate[@]}"
