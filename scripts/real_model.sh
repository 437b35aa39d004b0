#!/usr/bin/env bash
# Align a Hugging Face model and export it again, with a check after every step. At the end, plain transformers
# generates answers with the exported model.
#
#   MODEL=models/SmolLM2-135M DATA=my_rows scripts/real_model.sh             one GPU: an epoch, the paper's batch
#   MODEL=models/SmolLM2-135M DATA=my_rows SIZE=small scripts/real_model.sh  a CPU: 20 steps, 200 labelled answers
#
# DATA is a folder with sft_train.jsonl, preferences_train.jsonl and preferences_valid.jsonl, as `prepare` writes them,
# and eval_prompts.jsonl (or set PROMPTS). Run the same line again to continue: complete stages are skipped.
set -euo pipefail

MODEL=${MODEL:?set MODEL to a Hugging Face folder}
DATA=${DATA:?set DATA to a folder of prepared rows}
RUNS=${RUNS:-runs/real_model}
PROMPTS=${PROMPTS:-$DATA/eval_prompts.jsonl}
TARGET=${TARGET:-2.0}
# `auto`: the chat template of the model's folder if it has one, else the paper's.
TEMPLATE=${TEMPLATE:-auto}
SIZE=${SIZE:-full}

PATH="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin:$PATH"

case "$SIZE" in
small)
    rows="data.max_length=256 trainer.micro_batch_size=2"
    SFT="${SFT:-$rows trainer.global_batch_size=4 trainer.max_steps=20 optim.lr=1e-5}"
    REWARD="${REWARD:-$rows trainer.global_batch_size=4 trainer.max_steps=10 optim.lr=1e-5}"
    ALIGN="${ALIGN:-$rows trainer.global_batch_size=4 trainer.max_steps=5 optim.lr=1e-5}"
    LABEL="${LABEL:-data.max_length=2048 trainer.micro_batch_size=1}"
    LABEL_PAIRS=${LABEL_PAIRS:-100}
    GENERATE="${GENERATE:-generate.max_new_tokens=32 generate.batch_size=8 data.max_length=1024}"
    LABEL_PROMPTS=${LABEL_PROMPTS:-8}
    ;;
full)
    SFT="${SFT:-trainer.micro_batch_size=4}"
    REWARD="${REWARD:-trainer.micro_batch_size=4}"
    ALIGN="${ALIGN:-trainer.micro_batch_size=4}"
    LABEL="${LABEL:-trainer.micro_batch_size=16}"
    LABEL_PAIRS=${LABEL_PAIRS:-1000000}
    GENERATE="${GENERATE:-}"
    LABEL_PROMPTS=${LABEL_PROMPTS:-1000000}
    ;;
*)
    echo "real_model.sh: SIZE=$SIZE: use small or full" >&2
    exit 78
    ;;
esac
read -ra sft <<<"$SFT"
read -ra reward <<<"$REWARD"
read -ra align <<<"$ALIGN"
read -ra label <<<"$LABEL"
read -ra generate <<<"$GENERATE"

started=$SECONDS
step() { printf '\n== %s (after %d s)\n' "$1" "$((SECONDS - started))"; }

mkdir -p "$RUNS"
head -n "$LABEL_PAIRS" "$DATA/preferences_train.jsonl" >"$RUNS/pairs_to_label.jsonl"
head -n "$LABEL_PROMPTS" "$PROMPTS" >"$RUNS/prompts.jsonl"

step "round trip: import and export give the same bits, and the same logits as transformers"
offline-align convert run.dir="$RUNS/in" init.from="$MODEL" convert.to=megatron convert.check=true
offline-align convert run.dir="$RUNS/out" init.from="$RUNS/in" convert.check=true
python - "$MODEL" "$RUNS/out" <<'PYTHON'
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

before, after = (
    {name: tensor for file in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(file).items()}
    for folder in sys.argv[1:3]
)
# A tied output layer may be stored as a second copy.
different = [name for name in after if not torch.equal(before[name], after[name])]
absent = sorted(before.keys() - after.keys() - {"lm_head.weight"})
assert not different and not absent, (different, absent)
print(f"{len(after)} tensors are bitwise equal")
PYTHON

step "SFT"
offline-align sft run.dir="$RUNS/sft" init.from="$MODEL" data.train="$DATA/sft_train.jsonl" \
    data.template="$TEMPLATE" "${sft[@]}"

step "reward model"
offline-align reward run.dir="$RUNS/reward" init.from="$RUNS/sft" \
    data.train="$DATA/preferences_train.jsonl" data.valid="$RUNS/pairs_to_label.jsonl" "${reward[@]}"

step "labels"
offline-align label run.dir="$RUNS/label" init.from="$RUNS/reward" \
    data.input="$RUNS/pairs_to_label.jsonl" "${label[@]}"

step "the exported reward model gives the same scores in transformers, from text"
offline-align convert run.dir="$RUNS/reward_out" init.from="$RUNS/reward" convert.check=true
python - "$RUNS/reward_out" "$RUNS/label/labelled.jsonl" <<'PYTHON'
import json
import sys

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder, labelled = sys.argv[1:3]
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).to(device).eval()
rows = [json.loads(line) for line in open(labelled, encoding="utf-8")][:200]
differences = []
for row in rows:
    prompt = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
    turns = [*prompt, {"role": "assistant", "content": row["response"]}]
    ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True).input_ids.to(device)
    with torch.no_grad():
        differences.append(abs(float(model(ids).logits[0, 0]) - row["reward_raw"]))
print(f"{len(rows)} scores: largest difference {max(differences):.2g}")
# On a GPU the labels were computed in bf16.
assert max(differences) < (1e-4 if device == "cpu" else 5e-2)
PYTHON

step "Conditional Alignment"
offline-align ca run.dir="$RUNS/ca" init.from="$RUNS/sft" method.target_reward="$TARGET" \
    data.train="$RUNS/label/labelled.jsonl" "${align[@]}"

step "export: a folder in Hugging Face format"
offline-align convert run.dir="$RUNS/aligned" init.from="$RUNS/ca" convert.check=true
offline-align verify run.dir="$RUNS/aligned"

step "answers: from offline-align, and from plain transformers with the exported folder"
offline-align generate run.dir="$RUNS/generate" init.from="$RUNS/ca" data.input="$RUNS/prompts.jsonl" "${generate[@]}"
python - "$RUNS/aligned" "$RUNS/prompts.jsonl" "$RUNS/generate/generations.jsonl" <<'PYTHON'
import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, prompts, ours = sys.argv[1:4]
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
answers = [json.loads(line) for line in open(ours, encoding="utf-8")]
same = 0
for line, answer in list(zip(open(prompts, encoding="utf-8"), answers))[:8]:
    row = json.loads(line)
    turns = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs.to(device), max_new_tokens=32, do_sample=False)
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    same += answer["response"].startswith(text) or text.startswith(answer["response"])
    print(f"{turns[-1]['content'][:60]!r} -> {text[:100]!r}")
print(f"{same} of {min(8, len(answers))} answers are the same as those of offline-align")
PYTHON

printf '\n%s\n' "done after $((SECONDS - started)) s: $RUNS/aligned"
