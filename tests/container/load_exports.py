"""Print what a given version of transformers reads from exported folders, as JSON on stdout.

The tests run this script in an environment with that version.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers


def read(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Return ids of texts and dialogues, and the outputs of rows alone and in left- and right-padded batches."""
    config = json.loads((folder / "config.json").read_text())
    policy = "ForCausalLM" in config["architectures"][0]
    # Version 5 uses Qwen2Tokenizer for this family, whatever the folder names; the model card says so.
    replaced = config["model_type"] == "qwen2" and not transformers.__version__.startswith("4.")
    by = transformers.PreTrainedTokenizerFast if replaced else transformers.AutoTokenizer
    tokenizer = by.from_pretrained(folder)
    auto = transformers.AutoModelForCausalLM if policy else transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(folder).eval().float()
    with torch.no_grad():
        alone = [model(torch.tensor([row])).logits[0] for row in asked["rows"]]
        padded = []
        for side in ("left", "right"):
            tokenizer.padding_side = side
            batch = tokenizer.pad({"input_ids": asked["rows"]}, return_tensors="pt")
            padded.append(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits)
    turns = [{"role": "user", "content": "Hello, how are you?"}]
    return {
        "ids": [tokenizer.encode(text, add_special_tokens=False) for text in asked["texts"]],
        "prompt": tokenizer.encode(
            tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True), add_special_tokens=False
        ),
        "entries": len(tokenizer),
        "named": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        "alone": [tensor.tolist() for tensor in alone],
        "padded": [] if policy else [tensor[:, 0].tolist() for tensor in padded],
    }


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    found = {folder: read(Path(folder), rows) for folder, rows in asked.items()}
    print(json.dumps({"version": transformers.__version__, "found": found}))
