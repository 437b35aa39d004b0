#!/usr/bin/env bash
# Compare the methods over several seeds. Every method is trained from the same policy on one labelled file and for the
# same number of tokens. The report compares them with confidence intervals over seeds.
#
#   RUNS=runs/bakeoff LABELLED=runs/label/labelled.jsonl INIT=runs/sft REWARD=runs/reward \
#     PROMPTS=runs/prepare/prompts.jsonl SEEDS="1 2 3" scripts/bakeoff.sh
#
# After a crash or a time limit (exit code 75), run the same line again: complete stages are skipped.
set -euo pipefail

RUNS=${RUNS:-runs/bakeoff}                     # folder for all run folders
LABELLED=${LABELLED:-runs/label/labelled.jsonl}
INIT=${INIT:-runs/sft}                         # the policy from which all methods start
REWARD=${REWARD:-runs/reward}                  # the reward model that judges the answers
PROMPTS=${PROMPTS:-runs/prepare/prompts.jsonl} # held-out prompts
SEEDS=${SEEDS:-1 2 3}
METHODS=${METHODS:-sft fa rwr ca}              # sft trains on all labelled rows, whatever their reward
TOKENS=${TOKENS:-}                             # tokens of each training run; empty: one pass over the labelled file
BATCH=${BATCH:-64}                             # rows a step (trainer.global_batch_size)
TARGET_REWARD=${TARGET_REWARD:-5.0}            # target reward for Conditional Alignment (the paper's)

# Options for every training run, for generate, and for evaluate.
read -ra train <<<"${TRAIN_OPTIONS:-}"
read -ra generate <<<"${GENERATE_OPTIONS:-}"
read -ra evaluate <<<"${EVALUATE_OPTIONS:-}"
read -ra seeds <<<"$SEEDS"
read -ra methods <<<"$METHODS"

PATH="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin:$PATH"

# The mean row length differs between methods: FA keeps only some rows, and CA adds a condition to each. So the same
# number of tokens is a different number of steps for each method. `plan` counts the tokens.
offline-align plan run.dir="$RUNS/plan" data.input="$LABELLED"

steps() {
    python - "$RUNS/plan/plan.json" "$1" "$BATCH" "${TOKENS:-0}" <<'PYTHON'
import json, sys

path, method, batch, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
plan = json.load(open(path))
if plan["unit"] != "tokens":
    sys.exit(f"bakeoff.sh: {path}: counted {plan['unit']}, not tokens; set LABELLED to the output of a `label` run")
size, rows = plan["size"], plan["rows"]
kept = plan["filtering"]
if method == "fa" and not kept["rows"]:
    sys.exit("bakeoff.sh: fa: no row has a reward above 0; remove fa from METHODS")
mean = {"fa": kept["size"] / max(1, kept["rows"]), "ca": (size + plan["conditional"]["extra_size"]) / rows}
print(max(1, round((tokens or size) / (mean.get(method, size / rows) * batch))))
PYTHON
}

answers=()
for method in "${methods[@]}"; do
    count=$(steps "$method")
    own=()
    [[ "$method" == ca ]] && own=(method.target_reward="$TARGET_REWARD")
    for seed in "${seeds[@]}"; do
        policy=$RUNS/$method/seed_$seed answer=$RUNS/generate_$method/seed_$seed
        offline-align "$method" run.dir="$policy" run.seed="$seed" init.from="$INIT" data.train="$LABELLED" \
            trainer.global_batch_size="$BATCH" trainer.max_steps="$count" "${own[@]}" "${train[@]}"
        offline-align generate run.dir="$answer" init.from="$policy" data.input="$PROMPTS" "${generate[@]}"
        answers+=("$answer/generations.jsonl")
    done
done

offline-align evaluate run.dir="$RUNS/evaluate" judge=reward_model judge.model="$REWARD" \
    data.input="[$(IFS=, && echo "${answers[*]}")]" "${evaluate[@]}"
