"""Training, labelling and export agree with transformers: same losses and scores for the same weights."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers

from offline_align.__main__ import run
from offline_align.config.sections import OnBadRow, Template
from offline_align.data.records import BadRows, Message, PreferencePair, Sample, read_rows
from offline_align.data.template import Renderer
from offline_align.data.tokenizer import load_tokenizer
from tests.random_llama import save_random_llama
from tests.small_tokenizers import CHATML, write_hugging_face, write_sentencepiece
from tests.support import real_data_dir
from tests.training import STEPS, TINY, metrics, pairs, samples, write_jsonl

STRICT = BadRows(OnBadRow.fail, None)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_the_first_loss_equals_that_of_transformers(tmp_path: Path, family: str) -> None:
    """The vocabulary of 400 is padded to 512, and the padding must have no probability."""
    torch.manual_seed(5)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=2,
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    model.save_pretrained(tmp_path / "theirs")
    write_sentencepiece(tmp_path / "theirs")
    rows = write_jsonl(tmp_path / "rows.jsonl", samples())
    words = ["trainer.global_batch_size=14", "trainer.max_steps=1", "data.max_length=128", "run.device=cpu"]
    source = [f"run.dir={tmp_path / 'sft'}", f"data.train={rows}", f"init.from={tmp_path / 'theirs'}"]
    assert run(["sft", *source, *words]) == 0

    renderer = Renderer(load_tokenizer(tmp_path / "theirs"), Template.paper)
    total, count = 0.0, 0
    for row in read_rows([rows], Sample, STRICT):
        context, target = renderer.context(row.prompt), renderer.target(row.prompt, row.response)
        labels = torch.tensor([[-100] * len(context) + target])
        with torch.no_grad():
            loss = model(torch.tensor([context + target]), labels=labels).loss
        total, count = total + float(loss) * len(target), count + len(target)
    assert metrics(tmp_path / "sft") == [pytest.approx(total / count, abs=1e-5)]


def dialogue(prompt: Sequence[Message], answer: str) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in (*prompt, Message("assistant", answer))]


@pytest.mark.parametrize("template", ["auto", "paper"])
def test_scores_of_plain_transformers_are_those_of_label(template: str, tmp_path: Path) -> None:
    """A byte-level tokenizer, which joins an answer with the `Assistant: ` before it."""
    base = write_hugging_face(tmp_path / "base", CHATML)
    save_random_llama(base, load_tokenizer(base))
    write_hugging_face(base, CHATML)
    system, turn = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}
    earlier = [turn, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Name a fox."}]
    asked: list[list[dict[str, str]]] = [[turn], [system, turn], earlier, [system, *earlier]]
    given = [
        {"id": str(k), "prompt": prompt, "chosen": f"Fine, thank you! {k}", "rejected": "- one\n"}
        for k, prompt in enumerate(asked)
    ]
    rows, source = write_jsonl(tmp_path / "pairs.jsonl", given), f"init.from={tmp_path / 'reward'}"
    common = ["data.max_length=128", "run.device=cpu"]
    reward = [f"run.dir={tmp_path / 'reward'}", f"init.from={base}", f"data.train={rows}", f"data.template={template}"]
    assert run(["reward", *reward, *common, "trainer.global_batch_size=4", "trainer.max_steps=1"]) == 0
    assert run(["label", f"run.dir={tmp_path / 'label'}", source, f"data.input={rows}", *common]) == 0
    assert run(["convert", f"run.dir={tmp_path / 'out'}", source, "run.device=cpu"]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    labelled = [json.loads(line) for line in (tmp_path / "label" / "labelled.jsonl").open()]
    turns = [[*row["prompt"], {"role": "assistant", "content": row["response"]}] for row in labelled]
    rendered = [tokenizer.apply_chat_template(one, return_tensors="pt", return_dict=True) for one in turns]
    with torch.no_grad():
        found = [float(model(**ids).logits) for ids in rendered]
    assert found == pytest.approx([row["reward_raw"] for row in labelled], abs=1e-5)
    assert len(set(found)) == 8
    assert ("<|im_start|>" in tokenizer.decode(rendered[0]["input_ids"][0])) is (template == "auto")


def test_exported_scores_equal_those_of_label_on_real_pairs(tmp_path: Path) -> None:
    lines = (real_data_dir() / "preferences_train.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    data = tmp_path / "real.jsonl"
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    few = write_jsonl(tmp_path / "pairs.jsonl", pairs())
    reward = ["reward", f"run.dir={tmp_path / 'reward'}", f"data.train={few}", *TINY, *STEPS]
    assert run([*reward, "model.max_position_embeddings=4096"]) == 0
    source = f"init.from={tmp_path / 'reward'}"
    labelled = tmp_path / "label"
    words = [f"data.input={data}", "data.max_length=4096", "run.device=cpu"]
    assert run(["label", f"run.dir={labelled}", source, *words]) == 0
    assert run(["convert", f"run.dir={tmp_path / 'out'}", source, "run.device=cpu", "convert.check=true"]) == 0

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    expected = [json.loads(line)["reward_raw"] for line in (labelled / "labelled.jsonl").read_text().splitlines()]
    answers = [
        tokenizer.apply_chat_template(dialogue(pair.prompt, text), return_dict=False)
        for pair in read_rows([data], PreferencePair, STRICT)
        for text in (pair.chosen, pair.rejected)
    ]
    assert len(answers) == len(expected) == 400
    found = []
    for first in range(0, 400, 20):
        batch = answers[first : first + 20]
        width = max(map(len, batch))
        pad = model.config.pad_token_id
        tokens = torch.tensor([row + [pad] * (width - len(row)) for row in batch])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch])
        with torch.no_grad():
            found += model(tokens, attention_mask=mask).logits[:, 0].tolist()
    assert found == pytest.approx(expected, abs=1e-5)
    assert len(set(found)) > 300
