#!/usr/bin/env bash
# Which method is best, and is it more than luck? Every method is trained from the same start on one labelled file, with
# the same number of tokens and several seeds; one page compares them with intervals over seeds.
#
#   RUNS=runs/bakeoff LABELLED=runs/label/labelled.jsonl INIT=runs/sft REWARD=runs/reward \
#     PROMPTS=runs/prepare/prompts.jsonl SEEDS="1 2 3" scripts/bakeoff.sh
#
# After a crash or a time limit (exit code 75), run the same line again: what is finished is not done twice.
set -euo pipefail

RUNS=${RUNS:-runs/bakeoff}                     # every run gets a folder in here
LABELLED=${LABELLED:-runs/label/labelled.jsonl}
INIT=${INIT:-runs/sft}                         # where all methods start
REWARD=${REWARD:-runs/reward}                  # the judge
PROMPTS=${PROMPTS:-runs/prepare/prompts.jsonl} # held-out prompts
SEEDS=${SEEDS:-1 2 3}
METHODS=${METHODS:-sft fa rwr ca}              # sft: all labelled rows, whatever their reward
TOKENS=${TOKENS:-}                             # of each training run; empty: once through the labelled file
BATCH=${BATCH:-64}                             # rows a step (trainer.global_batch_size)
TARGET_REWARD=${TARGET_REWARD:-5.0}            # what Conditional Alignment is asked for (the paper's)

# Words for every training run, for generate, and for evaluate.
read -ra train <<<"${TRAIN_OPTIONS:-}"
read -ra generate <<<"${GENERATE_OPTIONS:-}"
read -ra evaluate <<<"${EVALUATE_OPTIONS:-}"
read -ra seeds <<<"$SEEDS"
read -ra methods <<<"$METHODS"

PATH="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin:$PATH"

# Rows differ in length between methods (FA keeps some, CA writes a condition into each), so equal tokens are other
# numbers of steps. The planner counts them.
offline-align plan run.dir="$RUNS/plan" data.input="$LABELLED"

steps() {
    python - "$RUNS/plan/plan.json" "$1" "$BATCH" "${TOKENS:-0}" <<'PYTHON'
import json, sys

path, method, batch, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
plan = json.load(open(path))
if plan["unit"] != "tokens":
    sys.exit(f"bakeoff.sh: {path}: counted {plan['unit']}, not tokens; LABELLED must be the file of a `label` run")
size, rows = plan["size"], plan["rows"]
kept = plan["filtering"]
if method == "fa" and not kept["rows"]:
    sys.exit("bakeoff.sh: fa: no row has a reward above 0; leave it out of METHODS")
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
