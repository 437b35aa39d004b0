"""A real model, SmolLM2-135M: the same bits, logits and losses as in transformers.

Skipped without the model. Put it into `models/SmolLM2-135M`, or set OFFLINE_ALIGN_SMOLLM2 to its folder.
"""

import json
import logging
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from offline_align.__main__ import run
from tests.distributed.test_logits import ours
from tests.support import smollm2
from tests.training import metrics, write_jsonl

pytestmark = pytest.mark.slow
DIALOGUES = [
    ("Why is the sky blue?", "Air scatters blue light more than red."),
    ("Name three primes.", "2, 3 and 5."),
]


@pytest.fixture(scope="module", name="smollm2")
def folder_of_smollm2() -> Path:
    return smollm2()


@pytest.fixture(scope="module")
def texts(smollm2: Path) -> list[tuple[list[int], list[int]]]:
    """Return context and target of each dialogue from transformers' tokenizer and chat template."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    found = []
    for question, answer in DIALOGUES:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        whole = tokenizer.apply_chat_template(turns, return_dict=False)
        context = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
        assert whole[: len(context)] == context
        # The template's final line break follows the end-of-sequence token and is not a target.
        end = len(whole) - whole[::-1].index(tokenizer.eos_token_id)
        found.append((context, whole[len(context) : end]))
    return found


def test_a_round_trip_keeps_every_bit(smollm2: Path, tmp_path: Path) -> None:
    words = ["run.device=cpu", "convert.check=true"]
    assert run(["convert", f"init.from={smollm2}", f"run.dir={tmp_path / 'in'}", "convert.to=megatron", *words]) == 0
    assert run(["convert", f"init.from={tmp_path / 'in'}", f"run.dir={tmp_path / 'out'}", *words]) == 0
    before, after = load_file(smollm2 / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_logits_on_one_and_three_ranks_equal_those_of_transformers(
    smollm2: Path, texts: list[tuple[list[int], list[int]]], tmp_path: Path
) -> None:
    """The error is as small as that of transformers in fp32, both with respect to fp64."""
    rows = [context + target for context, target in texts]
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = torch.cat([model(torch.tensor([row])).logits[0] for row in rows])
        exact = torch.cat([model.double()(torch.tensor([row])).logits[0] for row in rows])
    scale, rounding = exact.abs().max(), (theirs - exact).abs().max()
    for tp_size in (1, 3):
        (found,) = ours([smollm2], rows, tp_size, tmp_path)
        assert (found - theirs).abs().max() < 1e-5 * scale
        assert (found - exact).abs().max() < 2 * rounding


def test_the_first_loss_equals_that_of_transformers(
    smollm2: Path, texts: list[tuple[list[int], list[int]]], tmp_path: Path
) -> None:
    rows = [{"prompt": question, "response": answer} for question, answer in DIALOGUES]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["data.template=chat", "data.max_length=256", "trainer.global_batch_size=2", "trainer.max_steps=1"]
    source = [f"run.dir={tmp_path / 'sft'}", f"data.train={data}", f"init.from={smollm2}"]
    assert run(["sft", *source, *words, "run.device=cpu"]) == 0
    # Compare with fp64, since the fp32 loss of transformers on these texts is off by 8e-6.
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval().double()
    total = 0.0
    for context, target in texts:
        with torch.no_grad():
            scores = model(torch.tensor([context + target])).logits[0, len(context) - 1 : -1].log_softmax(-1)
        total -= float(scores[torch.arange(len(target)), target].sum())
    assert metrics(tmp_path / "sft") == [pytest.approx(total / sum(len(t) for _, t in texts), abs=1e-5)]


PROMPTS = [
    [{"role": "user", "content": "Why is the sky blue?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name three primes."}],
    [
        {"role": "user", "content": "Hi!"},
        {"role": "assistant", "content": "Hello, what can I do?"},
        {"role": "user", "content": "Name a colour of the rainbow."},
    ],
    [{"role": "user", "content": "Write a sentence about the sea.\n"}],
]


@pytest.mark.parametrize("template", ["auto", "paper"])
def test_greedy_answers_of_an_export_are_those_of_generate(
    smollm2: Path, template: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Fine-tuned by `ca`, exported, and asked with `apply_chat_template` alone."""
    rows = [
        {"id": str(k), "source_id": str(k), "prompt": PROMPTS[k % 4], "response": answer, "reward_raw": r, "reward": r}
        for k, (r, (_, answer)) in enumerate(zip((1.3, -0.4, 0.2, -1.1), DIALOGUES * 2, strict=True))
    ]
    data, prompts = write_jsonl(tmp_path / "rows.jsonl", rows), [{"prompt": prompt} for prompt in PROMPTS]
    asked = write_jsonl(tmp_path / "prompts.jsonl", prompts)
    common = ["run.device=cpu", "trainer.precision=fp32"]
    caplog.set_level(logging.INFO, "offline_align")
    ca = ["data.max_length=128", "trainer.global_batch_size=4", "trainer.max_steps=2", f"data.template={template}"]
    assert run(["ca", f"run.dir={tmp_path / 'ca'}", f"data.train={data}", f"init.from={smollm2}", *ca, *common]) == 0
    chosen = "paper, as data.template says" if template == "paper" else f"chat, from {smollm2} (tokenizer_config.json)"
    assert f"template   {chosen}" in caplog.messages
    assert run(["convert", f"run.dir={tmp_path / 'out'}", f"init.from={tmp_path / 'ca'}", "run.device=cpu"]) == 0
    assert any("gives the token ids of training (5 dialogues compared)" in message for message in caplog.messages)
    words = [f"init.from={tmp_path / 'ca'}", f"data.input={asked}", "generate.max_new_tokens=12"]
    assert run(["generate", f"run.dir={tmp_path / 'answers'}", *words, *common]) == 0
    ours = [json.loads(line)["response"] for line in (tmp_path / "answers" / "generations.jsonl").open()]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    theirs = []
    for prompt in PROMPTS:
        given = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        answer = model.generate(**given, max_new_tokens=12, do_sample=False)[0, given["input_ids"].shape[1] :]
        theirs.append(tokenizer.decode(answer, skip_special_tokens=True))
    assert theirs == ours
    assert len(set(ours)) == 4
