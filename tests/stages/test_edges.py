"""Edge cases of rewards, answers and model folders: a defined result, or an error with a fix."""

import json
import math
from pathlib import Path

import pytest

from offline_align.__main__ import run
from offline_align.data.tokenizer import load_tokenizer
from tests.random_llama import save_random_llama
from tests.small_tokenizers import CHATML, write_hugging_face, write_sentencepiece
from tests.training import STEPS, TINY, continued, labelled, metrics, pairs, samples, train, write_jsonl


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("edges")
    train("sft", made / "base", write_jsonl(made / "rows.jsonl", samples()), "trainer.max_steps=1")
    return made


def learn(folder: Path, stage: str, name: str, rewards: list[float], *words: str) -> int:
    data = write_jsonl(folder / f"{name}.jsonl", labelled(rewards))
    steps = ["trainer.max_steps=3", "trainer.global_batch_size=2"]
    inputs = [f"run.dir={folder / name}", f"data.train={data}", *continued(folder / "base"), *steps]
    return run([stage, *(word for word in inputs if word != "debug=true"), *words])


@pytest.mark.parametrize("rewards", [[0.0] * 4, [1e30, -1e30, 0.0, 1.0], [3.0], [-1e300, 1e300]])
@pytest.mark.parametrize("stage", ["rwr", "ca"])
def test_training_accepts_any_finite_rewards(folder: Path, stage: str, rewards: list[float]) -> None:
    name = f"{stage}{len(rewards)}{max(rewards):g}"
    assert learn(folder, stage, name, rewards) == 0
    assert all(map(math.isfinite, metrics(folder / name)))


def test_weights_at_a_temperature_near_zero(folder: Path) -> None:
    """The best row has all the weight, and steps without it change nothing."""
    assert learn(folder, "rwr", "cold", [3.0, 1.0, 2.0, 0.0], "method.beta=1e-9", "trainer.global_batch_size=1") == 0
    losses = metrics(folder / "cold")
    assert all(map(math.isfinite, losses))
    assert 0.0 in losses
    assert all(map(math.isfinite, metrics(folder / "cold", "grad_norm")))


def test_a_threshold_above_all_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert learn(folder, "fa", "none", [0.5, -0.5], "method.threshold=3") == 78
    assert "method.threshold=3.0: keeps none of 2 rows; the highest reward is 0.5" in capsys.readouterr().err


def test_a_condition_that_is_longer_than_others_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert learn(folder, "ca", "long", [12.0, 1.0], "method.reward_limit=99") == 78
    assert "method.reward_format" in capsys.readouterr().err


@pytest.mark.parametrize("reward", ["NaN", "1e999", "null", '"3"', "true"])
def test_an_invalid_reward_is_reported_with_file_and_line(
    folder: Path, reward: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "bad.jsonl"
    rows = [json.dumps(row) for row in labelled([1.0, 2.0])]
    path.write_text(rows[0] + "\n" + rows[1].replace('"reward": 2.0', f'"reward": {reward}') + "\n")
    words = [f"run.dir={folder / 'bad'}", f"data.train={path}", f"init.from={folder / 'base'}", "data.max_length=128"]
    assert run(["rwr", *words, "run.device=cpu", "trainer.global_batch_size=1"]) == 65
    lines = capsys.readouterr().err.splitlines()
    assert next(line for line in lines if "error" in line).startswith(f"offline-align: error: {path}:2: ")


def test_answers_of_one_token_and_rows_without_room(folder: Path) -> None:
    """A one-token answer is trained on. A row whose answer fills the limit is dropped and counted."""
    rows = [{"id": "one", "prompt": "Say", "response": "a"}, {"id": "long", "prompt": "Say", "response": "word " * 500}]
    path = write_jsonl(folder / "short.jsonl", rows)
    words = ["trainer.max_steps=2", "trainer.global_batch_size=1", "data.too_long=drop"]
    train("sft", folder / "short", path, *words, model=continued(folder / "base"))
    assert all(map(math.isfinite, metrics(folder / "short")))
    manifest = json.loads((folder / "short" / "manifest.json").read_text())
    assert manifest["extra"]["data"]["rows"] == 1
    assert sum(manifest["extra"]["data"]["dropped"].values()) == 1


@pytest.mark.parametrize("stage", ["rwr", "ca"])
def test_a_row_that_is_left_out_changes_nothing(folder: Path, stage: str) -> None:
    """The dropped row has the highest reward. With it, the weights of all other rows would be zero."""
    rows = labelled([0.5, -1.0, 0.0, 1.0])
    long = rows[0] | {"id": "long", "response": "word " * 500, "reward": 9.0}
    words = ["trainer.max_steps=2", "optim.lr=1e-3", *(["method.beta=0.01"] if stage == "rwr" else [])]
    found = {}
    for name, given in (("without", rows), ("with", [*rows[:2], long, *rows[2:]])):
        path = write_jsonl(folder / f"{stage}_{name}.jsonl", given)
        run_dir = train(stage, folder / f"{stage}_{name}", path, *words, model=continued(folder / "base"))
        facts = json.loads((run_dir / "manifest.json").read_text())["extra"]["data"]
        of_all_rows: dict[str, object] = {"dropped": {}, "sources": {}, "reward_scale": {}}
        found[name] = (metrics(run_dir), metrics(run_dir, "grad_norm"), facts | of_all_rows)
        assert sum(facts["dropped"].values()) == (name == "with")
    assert found["with"] == found["without"]


def test_bad_rows_of_both_files_are_quarantined_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [json.dumps(row) for row in samples(4)]
    (folder / "t.jsonl").write_text("\n".join(["nonsense", *good]))
    (folder / "v.jsonl").write_text("\n".join([*good[:2], '{"prompt": "x"}']))
    data = [f"data.train={folder / 't.jsonl'}", f"data.valid={folder / 'v.jsonl'}"]
    words = [f"run.dir={folder / 'both'}", *data, *continued(folder / "base"), "trainer.max_steps=1"]
    words = ["sft", *(word for word in words if word != "debug=true"), "trainer.global_batch_size=2"]
    assert run(words) == 65
    assert f"{folder / 't.jsonl'}:1: json: not valid JSON" in capsys.readouterr().err
    assert run([*words, "data.on_bad_row=skip"]) == 0
    kept = [json.loads(line) for line in (folder / "both" / "quarantine.jsonl").read_text().splitlines()]
    assert [(Path(row["file"]).name, row["line"], row["reason"]) for row in kept] == [
        ("t.jsonl", 1, "json: not valid JSON"),
        ("v.jsonl", 3, "response: missing"),
    ]
    manifest = json.loads((folder / "both" / "manifest.json").read_text())
    assert manifest["extra"]["data"]["bad_rows"] == {"json: not valid JSON": 1}
    assert "quarantine.jsonl" in {record["path"] for record in manifest["outputs"]}


@pytest.mark.parametrize("stage", ["fa", "rwr", "ca"])
@pytest.mark.parametrize("words", [["data.template=chat"], ["model.tokenizer={tokenizer}"]])
def test_a_policy_keeps_its_template_and_tokenizer(
    folder: Path, stage: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = write_sentencepiece(folder / "tokenizer")
    given = [word.format(tokenizer=tokenizer) for word in words]
    assert learn(folder, stage, "never", [1.0, 2.0], *given) == 78
    said = capsys.readouterr().err
    assert given[0] in said and "init.from" in said and "was trained with" in said
    assert not (folder / "never").exists()


def test_a_judge_keeps_its_template(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair_rows = write_jsonl(folder / "pairs.jsonl", pairs())
    judge = train("reward", folder / "judge", pair_rows, "trainer.max_steps=1", model=continued(folder / "base"))
    answer = {"id": "x", "prompt": "Hi", "response": "a", "finish_reason": "stop", "condition": None}
    files = [write_jsonl(folder / f"{name}.jsonl", [answer]) for name in "ab"]
    words = [f"data.input=[{files[0]},{files[1]}]", "judge=reward_model", f"judge.model={judge}", "run.device=cpu"]
    assert run(["evaluate", f"run.dir={folder / 'never'}", *words, "data.template=chat"]) == 78
    assert "data.template=chat: judge.model was trained with paper" in capsys.readouterr().err
    assert not (folder / "never").exists()


REFUSING = "{% if 'never' in messages[0].content %}{{ raise_exception('no such word') }}{% endif %}" + CHATML
STRANGE = {"prompt": "never say", "response": "so", "chosen": "yes", "rejected": "no", "reward_raw": 1.0, "reward": 1.0}


@pytest.mark.parametrize("stage", ["sft", "reward", "ca", "label", "generate"])
def test_a_row_that_the_chat_template_refuses_is_named_by_its_line(
    stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_hugging_face(tmp_path / "policy", chat_template=REFUSING)
    columns = {"reward": ("chosen", "rejected"), "ca": ("response", "reward_raw", "reward"), "generate": ()}
    rows = {"reward": pairs(6), "ca": labelled([0.0, 1.0, 2.0, 3.0])}.get(stage, samples(6))
    strange = {name: STRANGE[name] for name in ("prompt", *columns.get(stage, ("response",)))}
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, {"source_id": "x", **strange}])
    chat = [f"model.tokenizer={folder}", "data.template=chat"]
    if stage == "generate":
        described = {"method": "sft", "template": "chat", "condition": None}
        policy = save_random_llama(folder, load_tokenizer(folder), offline_align=described)
        given = [f"init.from={policy}", f"data.input={path}", "data.max_length=128", "generate.max_new_tokens=4"]
    elif stage == "label":
        usable = write_jsonl(tmp_path / "pairs.jsonl", pairs(4))
        model = train("reward", tmp_path / "model", usable, "trainer.max_steps=1", model=[*TINY, *chat])
        given = [f"init.from={model}", f"data.input={path}"]
    else:
        given = [f"data.train={path}", *TINY, *chat, *STEPS, "trainer.max_steps=1"]
    words = [stage, f"run.dir={tmp_path / 'out'}", *(w for w in given if w != "debug=true"), "run.device=cpu"]
    capsys.readouterr()
    assert run(words) == 65
    line = f"{path}:{len(rows) + 1}"
    assert f"{line}: chat template: no such word; fix the row, or set data.on_bad_row=skip" in capsys.readouterr().err
    assert run([*words, "data.on_bad_row=skip"]) == 0
    (kept,) = map(json.loads, (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines())
    assert f"{kept['file']}:{kept['line']}" == line
    assert json.loads(kept["raw"])["prompt"] == "never say"


@pytest.mark.parametrize(
    ("stage", "architecture", "key"),
    [
        ("sft", "LlamaForCausalLM", "init.from"),
        ("reward", "LlamaForCausalLM", "init.from"),
        ("fa", "LlamaForCausalLM", "init.from"),
        ("generate", "LlamaForCausalLM", "init.from"),
        ("label", "LlamaForSequenceClassification", "init.from"),
        ("convert", "LlamaForSequenceClassification", "init.from"),
        ("evaluate", "LlamaForSequenceClassification", "judge.model"),
        ("evaluate", "LlamaForSequenceClassification", "judge.second_model"),
    ],
)
def test_every_stage_refuses_an_incomplete_model_folder(
    tmp_path: Path, stage: str, architecture: str, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tokenizer larger than the embedding, or an adapter: one line and exit 78, before any computation."""
    size = load_tokenizer(write_hugging_face(tmp_path / "model")).vocab_size
    config = {
        "architectures": [architecture],
        "vocab_size": size - 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "id2label": {"0": "reward"},
    }
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    rows = write_jsonl(tmp_path / "rows.jsonl", pairs() if stage == "reward" else samples())
    data = "data.train" if stage in ("sft", "reward", "fa") else "data.input"
    words = [stage, f"run.dir={tmp_path / 'run'}", "run.device=cpu"]
    words += ["convert.to=megatron"] if stage == "convert" else [f"{data}={rows}"]
    words += ["judge=ground_truth"] if key == "judge.second_model" else []
    for dry_run in ("true", "false"):
        assert run([*words, f"{key}={tmp_path / 'model'}", f"dry_run={dry_run}"]) == 78
        said = capsys.readouterr().err
        assert f"{key}: the tokenizer has {size} entries, the model {size - 1}:" in said
        assert said.count("error") == 1
        assert run([*words, f"{key}={tmp_path / 'adapter'}", f"dry_run={dry_run}"]) == 78
        assert f"{key}: {tmp_path / 'adapter'} holds an adapter" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_given_for_a_folder_must_fit_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(write_hugging_face(tmp_path / "policy"))
    save_random_llama(tmp_path / "policy", tokenizer)
    larger = write_sentencepiece(tmp_path / "larger")
    rows = write_jsonl(tmp_path / "rows.jsonl", samples())
    words = [f"run.dir={tmp_path / 'run'}", f"init.from={tmp_path / 'policy'}", f"data.train={rows}", "run.device=cpu"]
    assert run(["sft", *words, f"model.tokenizer={larger}", "dry_run=true"]) == 78
    sizes = f"the tokenizer has {load_tokenizer(larger).vocab_size} entries, the model {tokenizer.vocab_size}:"
    assert f"model.tokenizer={larger}: {sizes}" in capsys.readouterr().err
