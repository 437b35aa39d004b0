"""Exported folders give the same ids, logits and scores in other versions of transformers."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from offline_align.config.sections import Template
from offline_align.convert.architecture import read_architecture
from offline_align.convert.export import export_huggingface
from offline_align.convert.load import load_huggingface
from offline_align.data.records import Message
from offline_align.data.template import Renderer
from offline_align.data.tokenizer import Tokenizer, load_tokenizer
from offline_align.model.description import ModelDescription
from tests.small_tokenizers import CHATML, write_hugging_face, write_sentencepiece
from tests.unit.convert.conftest import FAMILIES, SIZES

pytestmark = pytest.mark.skipif(
    "TEST_CONTAINER" not in os.environ, reason="downloads packages: run make test-container"
)
VERSIONS = ("4.51.3", "4.57.1", transformers.__version__)
TEXTS = ["User:Hello, how are you?", " two  spaces\nand lines ", "日本語 🦊", "a<|im_start|>user\nfox<|im_end|>\n b"]
ENTRIES = 403


def sentencepiece_alone(folder: Path) -> Tokenizer:
    return load_tokenizer(write_sentencepiece(folder))


def sentencepiece_folder(folder: Path) -> Tokenizer:
    write_sentencepiece(folder)
    texts = ("<|im_start|>", "<|im_end|>", "<tool>")
    added = {str(400 + i): {"content": text, "special": True, "normalized": False} for i, text in enumerate(texts)}
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "bos_token": "<s>"}
    config |= {"eos_token": "<|im_end|>", "added_tokens_decoder": added, "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


def saved_by_five(folder: Path) -> Tokenizer:
    """Return a tokenizer saved by version 5, with its own class name and a list of special tokens."""
    write_hugging_face(folder, additional_special_tokens=["<|im_start|>"])
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "TokenizersBackend"
    return load_tokenizer(folder)


TOKENIZERS = {
    "sentencepiece": (sentencepiece_alone, Template.paper),
    "sentencepiece_folder": (sentencepiece_folder, Template.chat),
    "tokenizer_json": (saved_by_five, Template.chat),
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Renderer]:
    """Export a policy and a reward model of every family with every tokenizer."""
    root, found = tmp_path_factory.mktemp("exports"), {}
    for name, (make, template) in TOKENIZERS.items():
        renderer = Renderer(make(root / name), template)
        for family in FAMILIES:
            for head in ("ForCausalLM", "ForSequenceClassification"):
                source = save(root / "theirs" / name / family / head, family, head)
                architecture = read_architecture(source)
                content = renderer.tokenizer.content_hash
                described = ModelDescription(architecture.kind, architecture.model, template, content)
                folder = root / "ours" / name / family / head
                export_huggingface(load_huggingface(source), described, renderer.tokenizer, folder)
                found[folder] = renderer
    return found


def save(folder: Path, family: str, head: str) -> Path:
    prefix, special = FAMILIES[family]
    torch.manual_seed(7)
    labels = {"num_labels": 1} if head != "ForCausalLM" else {}
    config = getattr(transformers, f"{prefix}Config")(**(SIZES | special | labels | {"vocab_size": ENTRIES}))
    model = getattr(transformers, f"{prefix}{head}")(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(folder)
    return folder


def rows(renderer: Renderer) -> list[list[int]]:
    prompt = (Message("user", "Hello, how are you?"),)
    return [renderer.context(prompt) + renderer.target(prompt, answer) for answer in ("Fine.", "I am a fox, too", "4")]


@pytest.fixture(scope="module", params=VERSIONS)
def python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of an environment with this version and with the torch of the tests."""
    folder = tmp_path_factory.mktemp("environment") / "env"
    uv = [str(Path(sys.executable).parent / "uv")]
    subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, str(folder)], check=True)
    python = folder / "bin" / "python"
    packages = [f"transformers=={request.param}", "sentencepiece", "protobuf"]
    subprocess.run([*uv, "pip", "install", "--quiet", "--python", str(python), *packages], check=True)
    site = next(folder.glob("lib/python3.*/site-packages"))
    (site / "torch_of_the_tests.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


def test_every_version_reads_the_same(python: Path, exports: dict[Path, Renderer], tmp_path: Path) -> None:
    asked: dict[str, Any] = {
        str(folder): {"texts": TEXTS, "rows": rows(renderer)} for folder, renderer in exports.items()
    }
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    script = Path(__file__).with_name("load_exports.py")
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(python), str(script), str(tmp_path / "asked.json")],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    for folder, renderer in exports.items():
        check(folder, renderer, asked[str(folder)]["rows"], answer["found"][str(folder)])


def check(folder: Path, renderer: Renderer, asked: list[list[int]], found: dict[str, Any]) -> None:
    tokenizer = renderer.tokenizer
    config = json.loads((folder / "config.json").read_text())
    assert found["entries"] == tokenizer.vocab_size
    assert found["named"] == [tokenizer.bos_id, tokenizer.eos_id, config["pad_token_id"]]
    assert found["prompt"] == renderer.context((Message("user", "Hello, how are you?"),))
    assert found["ids"] == [tokenizer.encode(text, special=True) for text in TEXTS]
    policy = folder.name == "ForCausalLM"
    auto = transformers.AutoModelForCausalLM if policy else transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(folder).eval()
    with torch.no_grad():
        for row, numbers in zip(asked, found["alone"], strict=True):
            hidden = model.model(torch.tensor([row])).last_hidden_state[0]
            expected = model.lm_head(hidden) if policy else model.score(hidden[-1])
            assert (torch.tensor(numbers) - expected).abs().max() < 1e-4
    for scores in found["padded"]:
        assert torch.tensor(scores).sub(torch.tensor(found["alone"])[:, 0]).abs().max() < 1e-4
