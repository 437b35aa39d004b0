import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from offline_align.config.sections import Template
from offline_align.convert.architecture import read_architecture
from offline_align.convert.export import export_huggingface
from offline_align.convert.load import load_huggingface
from offline_align.convert.provenance import UNKNOWN
from offline_align.convert.weights import parse_size
from offline_align.data.condition import Condition, ValueCondition
from offline_align.data.records import Message
from offline_align.data.template import Renderer
from offline_align.data.tokenizer import Tokenizer, load_tokenizer
from offline_align.errors import ConfigError, StorageError
from offline_align.model.description import ModelDescription

Save = Callable[..., Path]
Read = Callable[[Path], dict[str, torch.Tensor]]
CORPUS = [
    "User:What is the capital of France?Assistant: Paris is the capital of France.",
    "User:Name three colours.Assistant: Red, green and blue are three colours.",
    "System:Be brief.User:2 + 2 = ?Assistant: 4",
] * 20
DIALOGUE = (Message("user", "Name the capital."), Message("assistant", "Paris"), Message("user", "Of what?"))
CONDITION = ValueCondition("<rm_score>{reward:.1f}", 9.9, 5.0)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}\n"
)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    import sentencepiece as spm

    model = BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=301,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        user_defined_symbols=["<rm_score>"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return load_tokenizer(path)


def write_byte_level(folder: Path, special: list[str], **config: Any) -> Tokenizer:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[AddedToken(text, special=True) for text in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    named = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "chat_template": CHATML}
    return write_byte_level(tmp_path_factory.mktemp("byte_level"), special, **named)


@pytest.fixture(scope="module")
def one_special(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Like GPT-2's tokenizer: begin, end, unknown and padding are one token, the only special token."""
    roles = ("bos_token", "eos_token", "unk_token", "pad_token")
    named = dict.fromkeys(roles, "<|endoftext|>")
    return write_byte_level(tmp_path_factory.mktemp("one_special"), ["<|endoftext|>"], **named)


@pytest.fixture(scope="module")
def begin_is_end(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Begin and end are one token, no padding is named, and an older file also names the end."""
    folder = tmp_path_factory.mktemp("begin_is_end")
    write_byte_level(folder, ["<|endoftext|>", "<|im_start|>"], bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|endoftext|>"}))
    return load_tokenizer(folder)


@pytest.fixture(params=["sentencepiece", "byte_level"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found: Tokenizer = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def export(save_model: Save, tmp_path: Path) -> Callable[..., Path]:
    """Export a random model with a tokenizer; keyword arguments change its description."""

    def run(
        tokenizer: Tokenizer,
        family: str = "llama3",
        head: str = "ForCausalLM",
        max_shard_size: str = "5GB",
        **changes: Any,
    ) -> Path:
        source = save_model(family, head)
        found = read_architecture(source)
        description = ModelDescription(found.kind, found.model, Template.paper, tokenizer.content_hash)
        export_huggingface(
            load_huggingface(source),
            replace(description, **changes),
            tokenizer,
            tmp_path / "out",
            max_shard_size,
            replace(
                UNKNOWN,
                runs=["- `sft`, made yesterday"],
                training=[("optim.lr", "5e-06")],
                method="Conditional Alignment",
            ),
        )
        return tmp_path / "out"

    return run


def turns(dialogue: tuple[Message, ...]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in dialogue]


def their_context(folder: Path, dialogue: tuple[Message, ...] = DIALOGUE) -> list[int]:
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    ids: list[int] = loaded.apply_chat_template(turns(dialogue), add_generation_prompt=True, return_dict=False)
    return ids


def test_transformers_loads_the_same_model(
    export: Callable[..., Path], tokenizer: Tokenizer, family: str, read_tensors: Read, tmp_path: Path
) -> None:
    folder = export(tokenizer, family)
    source = tmp_path / f"{family}-ForCausalLM"
    first, second = (transformers.AutoModelForCausalLM.from_pretrained(path) for path in (source, folder))
    ids = torch.arange(2, 30)[None]
    assert torch.equal(first(ids).logits, second(ids).logits)
    assert second.config.eos_token_id == tokenizer.eos_id
    assert second.generation_config.eos_token_id == tokenizer.eos_id
    theirs, ours = read_tensors(source), read_tensors(folder)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert read_architecture(folder).model == read_architecture(source).model


def test_large_weights_are_split_into_indexed_shards(
    export: Callable[..., Path], byte_level: Tokenizer, read_tensors: Read
) -> None:
    folder = export(byte_level, max_shard_size="50KB")
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 1
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = read_tensors(folder)
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert not list(folder.glob(".*"))
    transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_shards_of_another_size_are_not_left_beside_new_ones(
    export: Callable[..., Path], byte_level: Tokenizer, tmp_path: Path
) -> None:
    export(byte_level)
    shutil.rmtree(tmp_path / "llama3-ForCausalLM")
    folder = export(byte_level, max_shard_size="50KB")
    assert not (folder / "model.safetensors").exists()
    shutil.rmtree(tmp_path / "llama3-ForCausalLM")
    export(byte_level)
    assert [path.name for path in folder.glob("model*")] == ["model.safetensors"]


def test_transformers_encodes_as_we_do(export: Callable[..., Path], tokenizer: Tokenizer) -> None:
    loaded = transformers.AutoTokenizer.from_pretrained(export(tokenizer))
    for text in ["Paris is  the capital\n of France.", " 2 + 2", "naïve 日本 👍", "\tx\n\n", *CORPUS[:3]]:
        ids = tokenizer.encode(text)
        assert loaded.encode(text, add_special_tokens=False) == ids
        assert loaded.decode(ids) == tokenizer.decode(ids) == text


@pytest.mark.parametrize("condition", [None, CONDITION])
@pytest.mark.parametrize("dialogue", [DIALOGUE, DIALOGUE[:1], (Message("system", "Be brief."), *DIALOGUE)])
def test_the_chat_template_asks_as_the_paper_template_does(
    export: Callable[..., Path],
    sentencepiece: Tokenizer,
    condition: Condition | None,
    dialogue: tuple[Message, ...],
) -> None:
    folder = export(sentencepiece, condition=condition)
    text = "<rm_score>5.0" if condition else ""
    assert their_context(folder, dialogue) == Renderer(sentencepiece, Template.paper).context(dialogue, text)


@pytest.mark.parametrize("condition", [None, CONDITION])
def test_a_chat_template_is_kept_and_gets_the_condition(
    export: Callable[..., Path], byte_level: Tokenizer, condition: Condition | None
) -> None:
    folder = export(byte_level, template=Template.chat, condition=condition)
    text = "<rm_score>5.0" if condition else ""
    assert their_context(folder) == Renderer(byte_level, Template.chat).context(DIALOGUE, text)
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    rendered = loaded.apply_chat_template(turns(DIALOGUE), tokenize=False, add_generation_prompt=True)
    assert rendered.endswith(f"<|im_start|>assistant\n{text}")
    assert "<rm_score>" not in loaded.apply_chat_template(turns(DIALOGUE), tokenize=False)


@pytest.mark.parametrize("name", ["sentencepiece", "byte_level", "one_special", "begin_is_end"])
def test_a_reward_model_scores_padded_rows_at_end_of_sequence(
    export: Callable[..., Path], name: str, request: pytest.FixtureRequest
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    folder = export(tokenizer, head="ForSequenceClassification")
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert model.config.num_labels == 1
    assert model.config.pad_token_id not in (None, tokenizer.eos_id)
    renderer = Renderer(tokenizer, Template.paper)
    answers = [
        (DIALOGUE[:1], "Paris"),
        (DIALOGUE, "The capital of France, Paris, of course."),
        (DIALOGUE, "4"),
    ]
    rows = [renderer.context(prompt) + renderer.target(prompt, answer) for prompt, answer in answers]
    assert loaded.pad_token_id == model.config.pad_token_id
    for side in ("left", "right"):
        batch = loaded.pad({"input_ids": rows}, padding_side=side, return_tensors="pt")
        with torch.no_grad():
            together = model(**batch).logits[:, 0]
            hidden = [model.model(torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
            alone = torch.stack([model.score(state)[0] for state in hidden])
        assert (together - alone).abs().max() < 1e-5


def test_padding_is_no_end_and_has_one_name(
    export: Callable[..., Path], tokenizer: Tokenizer, byte_level: Tokenizer
) -> None:
    folder = export(tokenizer)
    config, settings = (json.loads((folder / name).read_text()) for name in ("config.json", "tokenizer_config.json"))
    assert byte_level.pad_id == byte_level.eos_id
    assert settings["pad_token"] == ("<|endoftext|>" if tokenizer is byte_level else "<s>")
    assert config["pad_token_id"] == transformers.AutoTokenizer.from_pretrained(folder).pad_token_id
    assert config["pad_token_id"] == json.loads((folder / "generation_config.json").read_text())["pad_token_id"]
    assert config["pad_token_id"] != config["eos_token_id"]


def test_padding_of_a_tokenizer_with_one_special_token(export: Callable[..., Path], one_special: Tokenizer) -> None:
    """Any other token can occur in an answer, so a policy is padded with the end; a reward model is not."""
    policy = transformers.AutoTokenizer.from_pretrained(export(one_special))
    assert policy.pad_token_id == one_special.eos_id


def test_padding_leaves_the_ids_of_texts_as_they_are(export: Callable[..., Path], one_special: Tokenizer) -> None:
    loaded = transformers.AutoTokenizer.from_pretrained(export(one_special, head="ForSequenceClassification"))
    assert loaded.pad_token_id != one_special.eos_id
    for text in [*CORPUS[:3], loaded.decode([loaded.pad_token_id]).replace("Ġ", " "), "naïve 日本 👍"]:
        assert loaded.encode(text, add_special_tokens=False) == one_special.encode(text)


def test_the_files_are_for_transformers_4_and_5(export: Callable[..., Path], tmp_path: Path) -> None:
    """Keys that only version 5 writes are not exported."""
    from_five = {
        "tokenizer_class": "TokenizersBackend",
        "backend": "tokenizers",
        "is_local": True,
        "local_files_only": True,
        "eos_token": "<|im_end|>",
        "extra_special_tokens": ["<|im_start|>"],
        "model_max_length": 99,
    }
    (tmp_path / "five").mkdir()
    tokenizer = write_byte_level(tmp_path / "five", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], **from_five)
    folder = export(tokenizer)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>"],
        "model_max_length": 99,
        "chat_template": settings["chat_template"],
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500000.0
    assert config["rope_scaling"].items() <= config["rope_parameters"].items()
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    assert set(loaded.all_special_tokens) == {"<|im_start|>", "<|im_end|>", "<|endoftext|>"}


def test_the_model_card_says_how_it_is_asked_and_made(export: Callable[..., Path], sentencepiece: Tokenizer) -> None:
    card = (export(sentencepiece, method="ca", condition=CONDITION) / "README.md").read_text()
    assert "Conditional Alignment" in card
    assert "ends with `<rm_score>5.0`" in card
    assert "- `sft`, made yesterday" in card
    assert "| optim.lr | 5e-06 |" in card


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral", "llama3"])
def test_the_model_card_says_if_the_tokenizer_is_replaced(
    export: Callable[..., Path], sentencepiece: Tokenizer, family: str
) -> None:
    folder = export(sentencepiece, family)
    stock, text = transformers.AutoTokenizer.from_pretrained(folder), " two  spaces\nand 日本 "
    replaced = stock.encode(text, add_special_tokens=False) != sentencepiece.encode(text)
    assert ("uses the tokenizer class of the model's family" in (folder / "README.md").read_text()) is replaced
    exact = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert exact.encode(text, add_special_tokens=False) == sentencepiece.encode(text)
    assert replaced is (family == "qwen2")


def test_config_keeps_what_generation_needs(export: Callable[..., Path], sentencepiece: Tokenizer) -> None:
    folder = export(sentencepiece, method="ca", condition=CONDITION)
    extra = read_architecture(folder).extra
    assert extra == {
        "method": "ca",
        "template": "paper",
        "encoding": "whole",
        "condition": {"reward_format": "<rm_score>{reward:.1f}", "reward_limit": 9.9, "target_reward": 5.0},
    }


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2GiB", 2**31), ("10kb", 10_000)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["5", "GB", "0GB", "-1GB", "5 parsecs", ""])
def test_a_size_without_unit_names_the_key(text: str) -> None:
    with pytest.raises(ConfigError, match=r"convert\.max_shard_size"):
        parse_size(text)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from offline_align.convert import weights

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", fail)
    yield


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_is_a_storage_error(export: Callable[..., Path], byte_level: Tokenizer) -> None:
    with pytest.raises(StorageError, match="No space left"):
        export(byte_level)
