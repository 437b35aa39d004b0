#!/usr/bin/env bash
# Align a policy in rounds. In each round the policy answers training prompts several times, the reward model labels the
# answers on the scale of the first round, one method learns from them, and a report compares all rounds so far.
#
#   scripts/rounds.sh                      the demo: three rounds of DPO after scripts/pipeline.sh, minutes on two CPU cores
#   METHOD=fa scripts/rounds.sh
#   RUNS=/big/rounds POLICY=/big/runs/sft REWARD=/big/runs/reward TRAIN_PROMPTS=my_rows.jsonl PROMPTS=my_questions.jsonl \
#     ROUNDS=5 MAX_KL=30 OPTIONS=launcher.nproc_per_node=8 scripts/rounds.sh
#
# METHOD is dpo (the best against the worst answer to each prompt), fa (the best answer, if it is better than the mean of
# the first round) or ca. MAX_KL and MAX_BEYOND end the rounds early, see below.
# Options of single stages: SAMPLE_OPTIONS (answers to training prompts), LABEL_OPTIONS, TRAIN_OPTIONS, GENERATE_OPTIONS
# (answers to held-out prompts) and EVALUATE_OPTIONS; of all stages: OPTIONS.
# After a crash, a full disk or a time limit (exit code 75), run the same line again: complete stages are skipped, and
# an interrupted stage continues where it stopped. A higher ROUNDS adds rounds.
set -euo pipefail

# Settings come from the environment. An argument prints the lines above, and is an error unless it is --help.
if (($#)); then
    sed -n '2,/^set /{/^#/p}' "${BASH_SOURCE[0]}" | cut -c 3-
    [[ "$1" == --help || "$1" == -h ]] && exit 0
    echo "rounds.sh: takes no argument: $1" >&2
    exit 78
fi

# ---- What to run on --------------------------------------------------------------------------------------------------

FROM=${FROM:-runs}                             # folder of scripts/pipeline.sh, for the defaults of the next four
POLICY=${POLICY:-$FROM/sft}                    # the policy that the first round starts from
REWARD=${REWARD:-$FROM/reward}                 # labels the answers of every round, and judges in the report
TRAIN_PROMPTS=${TRAIN_PROMPTS:-$FROM/prepare/sft_train.jsonl} # rows whose prompts are answered; their answers are not used
PROMPTS=${PROMPTS:-}                           # held-out prompts; the demo corpus has its own
METHOD=${METHOD:-dpo}
RUNS=${RUNS:-$FROM/rounds_$METHOD}             # folder for the run folders of all rounds
ROUNDS=${ROUNDS:-3}
SEED=${SEED:-0}                                # every round samples and shuffles with a seed of its own, from this one on

[[ "$METHOD" =~ ^(dpo|fa|ca)$ ]] || { echo "rounds.sh: METHOD=$METHOD: use dpo, fa or ca" >&2 && exit 78; }
for name in ROUNDS SEED SAMPLES PROMPTS_PER_ROUND; do
    [[ "${!name:-0}" =~ ^[0-9]+$ ]] || { echo "rounds.sh: $name=${!name}: must be a whole number" >&2 && exit 78; }
done
is_demo=false
if [[ -z "$PROMPTS" ]]; then
    PROMPTS=$FROM/prepare/prompts.jsonl
    [[ -f "$PROMPTS" ]] || { echo "rounds.sh: no $PROMPTS: run scripts/pipeline.sh first, or set PROMPTS" >&2 && exit 78; }
    is_demo=true
fi

# ---- Settings of the stages ------------------------------------------------------------------------------------------

# The demo is small. Other models keep the paper's settings.
if $is_demo; then
    SAMPLES=${SAMPLES:-4}
    PROMPTS_PER_ROUND=${PROMPTS_PER_ROUND:-320}
    size="data.max_length=256 trainer.micro_batch_size=16"
    short="data.max_length=256 generate.max_new_tokens=48 generate.batch_size=320"
    SAMPLE_OPTIONS=${SAMPLE_OPTIONS:-$short}
    LABEL_OPTIONS=${LABEL_OPTIONS:-$size}
    case $METHOD in
    dpo) own="optim.lr=1e-4" ;;
    fa) own="optim.lr=3e-4" ;;
    ca) own="optim.lr=2e-3 trainer.max_epochs=4 method.reward_limit=1.5" ;; # near the highest reward of round 0
    esac
    TRAIN_OPTIONS=${TRAIN_OPTIONS:-$size trainer.global_batch_size=32 optim.lr_warmup_steps=2 $own}
    GENERATE_OPTIONS=${GENERATE_OPTIONS:-$short}
    EVALUATE_OPTIONS=${EVALUATE_OPTIONS:-$size}
    TARGET_REWARD=${TARGET_REWARD:-1.5}
fi
SAMPLES=${SAMPLES:-8}                          # answers to each training prompt
PROMPTS_PER_ROUND=${PROMPTS_PER_ROUND:-0}      # training prompts of a round, the next ones in each round; 0: all
TARGET_REWARD=${TARGET_REWARD:-5.0}            # target reward for Conditional Alignment (the paper's)

# The rounds end after the first one whose policy is too far from the first policy: KL divergence in nats per answer, or
# the share of answers with a reward above all labels of the first round. Empty: no limit.
MAX_KL=${MAX_KL:-}
MAX_BEYOND=${MAX_BEYOND:-}
for name in MAX_KL MAX_BEYOND; do
    [[ "${!name:-0}" =~ ^-?[0-9]*\.?[0-9]+$ ]] || { echo "rounds.sh: $name=${!name}: must be a number" >&2 && exit 78; }
done

read -ra all <<<"${OPTIONS:-}"
read -ra sample <<<"${SAMPLE_OPTIONS:-}"
read -ra label <<<"${LABEL_OPTIONS:-}"
read -ra train <<<"${TRAIN_OPTIONS:-}"
read -ra generate <<<"${GENERATE_OPTIONS:-}"
read -ra evaluate <<<"${EVALUATE_OPTIONS:-}"

case $METHOD in
dpo) method=(method.pairs=best_worst) ;;
fa) method=(method.best_of=1) ;;               # with the threshold 0, the mean reward of the first round
ca) method=(method.target_reward="$TARGET_REWARD") ;;
esac

# Use the environment of this checkout if `make setup` has created it.
PATH="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin:$PATH"

# ---- Parts of a round ------------------------------------------------------------------------------------------------

# Print the file with the training prompts of a round. If there are fewer prompts than all rounds take, they start again.
prompts_of() {
    local file=$RUNS/prompts_$1.jsonl
    ((PROMPTS_PER_ROUND > 0)) || { echo "$TRAIN_PROMPTS" && return; }
    [[ -f "$TRAIN_PROMPTS" ]] || { echo "rounds.sh: TRAIN_PROMPTS=$TRAIN_PROMPTS: no such file" >&2 && return 78; }
    mkdir -p "$RUNS"
    awk -v count="$PROMPTS_PER_ROUND" -v round="$1" '
        NR == FNR { total = NR; next }
        (FNR - 1 - (round * count) % total + total) % total < count
    ' "$TRAIN_PROMPTS" "$TRAIN_PROMPTS" >"$file.tmp"
    mv "$file.tmp" "$file"
    echo "$file"
}

# Answers of a policy to the held-out prompts. They are sampled, so that the KL divergence is unbiased, and all rounds
# have the same random numbers, so that their differences are due to the policies.
answer_held_out() {
    offline-align generate run.dir="$RUNS/round_$1" run.seed="$SEED" init.from="$2" data.input="$PROMPTS" \
        generate.temperature=1 generate.n=4 "${all[@]}" "${generate[@]}"
    answers+=("$RUNS/round_$1/generations.jsonl")
}

# Print why the rounds end after this one; nothing if they go on, or if the report is not written yet.
reason_to_stop() {
    [[ -n "$MAX_KL$MAX_BEYOND" && -f "$1/report.json" ]] || return 0
    python - "$1/report.json" "$MAX_KL" "$MAX_BEYOND" <<'PYTHON'
import json, sys

path, *limits = sys.argv[1:]
((_, series),) = json.load(open(path))["rounds"]["series"].items()
number, last = list(series["rounds"].items())[-1]
names = {"kl": "MAX_KL", "beyond": "MAX_BEYOND"}
for (key, name), limit in zip(names.items(), limits):
    if limit and key not in last:
        print(f"rounds.sh: {name}={limit}: {path} has no {key}; leave {name} unset", file=sys.stderr)
        sys.exit(78)
    if limit and last[key]["mean"] > float(limit):
        print(f"round {number} has {key} {last[key]['mean']:.3g}, above {name}={limit}")
        break
PYTHON
}

# ---- The rounds ------------------------------------------------------------------------------------------------------

answers=()
policy=$POLICY
answer_held_out 0 "$policy"
for ((round = 0; round < ROUNDS; round++)); do
    next=$((round + 1)) seed=$((SEED + round))
    prompts=$(prompts_of "$round")

    # The policy answers training prompts.
    offline-align generate run.dir="$RUNS/answers_$round" run.seed="$seed" init.from="$policy" data.input="$prompts" \
        generate.temperature=1 generate.n="$SAMPLES" "${all[@]}" "${sample[@]}"

    # The reward model labels the answers; rewards of all rounds are normalised with the statistics of the first one.
    # Empty answers have no label.
    scale=()
    ((round == 0)) || scale=(label.statistics="$RUNS/label_0")
    offline-align label run.dir="$RUNS/label_$round" init.from="$REWARD" \
        data.input="$RUNS/answers_$round/generations.jsonl" data.on_bad_row=skip "${scale[@]}" "${all[@]}" "${label[@]}"

    # The method learns from them, starting from the policy that gave them.
    offline-align "$METHOD" run.dir="$RUNS/${METHOD}_$next" run.seed="$seed" init.from="$policy" \
        data.train="$RUNS/label_$round/labelled.jsonl" "${method[@]}" "${all[@]}" "${train[@]}"

    # The new policy answers held-out prompts, and the report compares all rounds so far.
    before=$policy policy=$RUNS/${METHOD}_$next
    answer_held_out "$next" "$policy"
    offline-align evaluate run.dir="$RUNS/evaluate_$next" judge=reward_model judge.model="$REWARD" \
        data.input="[$(IFS=, && echo "${answers[*]}")]" "${all[@]}" "${evaluate[@]}"

    why=$(reason_to_stop "$RUNS/evaluate_$next")
    if [[ -n "$why" ]]; then
        echo "stopped: $why; the last policy before is $before"
        break
    fi
done
