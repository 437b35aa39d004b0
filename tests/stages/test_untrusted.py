"""Files of strangers: whatever they carry, nothing of it runs and nothing outside `run.dir` is written.

Every payload would create the file `executed` beside the run folder; each is refused in one line, or harmless.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from offline_align import lineage
from offline_align.__main__ import run
from offline_align.lineage.manifest import _sealed
from tests import hostile_checkpoints
from tests.hostile_checkpoints import move_shard, put_object, put_record, reseal
from tests.small_tokenizers import CHATML, write_hugging_face, write_sentencepiece
from tests.training import TINY, pairs, samples, train, write_jsonl

Refusal = tuple[list[str], set[int]]
"""Words of a command, and the exit codes that refuse it; 0 among them where the payload is to be ignored."""


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def code(marker: Path) -> str:
    return f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, a reward model and a policy in Hugging Face form, shared and never changed."""
    folder = tmp_path_factory.mktemp("untrusted")
    policy = train("sft", folder / "policy", write_jsonl(folder / "rows.jsonl", samples()), "trainer.max_steps=1")
    write_jsonl(folder / "prompts.jsonl", [{"id": "a", "prompt": "Name red"}])
    words = ["convert", f"init.from={policy}", f"run.dir={folder / 'hf'}", "run.device=cpu"]
    assert run(words) == 0
    reward = [f"init.from={policy}", "data.max_length=128", "run.device=cpu", "trainer.max_steps=1"]
    train("reward", folder / "reward", write_jsonl(folder / "pairs.jsonl", pairs()), *reward, model=[])
    return folder


@pytest.fixture
def place(base: Path, tmp_path: Path) -> Path:
    """A folder of its own with copies of all that, to be spoiled."""
    for name in ("policy", "hf", "reward", "rows.jsonl", "prompts.jsonl", "pairs.jsonl"):
        if (base / name).is_dir():
            shutil.copytree(base / name, tmp_path / name, symlinks=True)
        else:
            shutil.copy(base / name, tmp_path / name)
    return tmp_path


def generate(place: Path, model: str = "hf") -> list[str]:
    more = ["data.max_length=64", "generate.max_new_tokens=2", "run.device=cpu"]
    inputs = [f"init.from={place / model}", f"data.input={place / 'prompts.jsonl'}"]
    return ["generate", f"run.dir={place / 'out'}", *inputs, *more]


def sft(place: Path, *words: str) -> list[str]:
    steps = ["trainer.max_steps=1", "trainer.global_batch_size=2", "run.device=cpu", "data.max_length=128"]
    return ["sft", f"run.dir={place / 'out'}", f"data.train={place / 'rows.jsonl'}", *steps, *words]


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def pickled_weights(place: Path, marker: Path) -> Refusal:
    (place / "hf" / "model.safetensors").unlink()
    (place / "hf" / "pytorch_model.bin").write_bytes(pickle.dumps({"w": Payload(marker)}))
    return generate(place), {78}


def pickled_weights_to_train(place: Path, marker: Path) -> Refusal:
    (place / "hf" / "model.safetensors").unlink()
    (place / "hf" / "consolidated.pt").write_bytes(pickle.dumps({"w": Payload(marker)}))
    return sft(place, f"init.from={place / 'hf'}"), {78}


def pickle_called_safetensors(place: Path, marker: Path) -> Refusal:
    (place / "hf" / "model.safetensors").write_bytes(pickle.dumps(Payload(marker)))
    return sft(place, f"init.from={place / 'hf'}"), {74}


def checkpoint_of(place: Path, name: str = "policy") -> Path:
    return (place / name / "checkpoints" / "latest").resolve()


def resealed_common_pickle(place: Path, marker: Path) -> Refusal:
    """A stranger can make the hashes right: it is the loader that must refuse, whatever the environment says."""
    import torch

    torch.save({"x": Payload(marker)}, checkpoint_of(place) / "common.pt")
    reseal(checkpoint_of(place))
    return sft(place, f"init.from={place / 'policy'}"), {74}


def resealed_records(place: Path, marker: Path) -> Refusal:
    put_record(checkpoint_of(place), hostile_checkpoints.system(marker))
    return sft(place, f"init.from={place / 'policy'}"), {74}


def resealed_records_to_generate(place: Path, marker: Path) -> Refusal:
    put_record(checkpoint_of(place), hostile_checkpoints.by_getattr(marker))
    return generate(place, "policy"), {74}


def resealed_records_to_label(place: Path, marker: Path) -> Refusal:
    put_record(checkpoint_of(place, "reward"), hostile_checkpoints.evaluate(marker))
    words = [f"init.from={place / 'reward'}", f"data.input={place / 'rows.jsonl'}", "run.device=cpu"]
    return ["label", f"run.dir={place / 'out'}", *words, "data.max_length=128"], {74}


def resealed_object_among_the_shards(place: Path, marker: Path) -> Refusal:
    put_object(checkpoint_of(place), "common_state", Payload(marker))
    return sft(place, f"init.from={place / 'policy'}"), {74}


def shards_that_lead_out(place: Path, marker: Path) -> Refusal:
    shard = next(checkpoint_of(place).glob("*.distcp"))
    shutil.copy(shard, place / "secret.distcp")
    move_shard(checkpoint_of(place), "../../../secret.distcp")
    return sft(place, f"init.from={place / 'policy'}"), {74}


def shards_behind_a_link(place: Path, marker: Path) -> Refusal:
    shard = next(checkpoint_of(place).glob("*.distcp"))
    shutil.copy(shard, place / "secret.distcp")
    (shard.with_name("link")).symlink_to(place / "secret.distcp")
    move_shard(checkpoint_of(place), "link")
    return sft(place, f"init.from={place / 'policy'}"), {74}


def swapped_checkpoint_pickle(place: Path, marker: Path) -> Refusal:
    folder = (place / "policy" / "checkpoints" / "latest").resolve()
    (folder / ".metadata").write_bytes(pickle.dumps(Payload(marker)))
    return sft(place, f"init.from={place / 'policy'}"), {74}


def swapped_optimizer_shard(place: Path, marker: Path) -> Refusal:
    folder = (place / "policy" / "checkpoints" / "latest").resolve()
    for shard in folder.glob("*.distcp"):
        shard.write_bytes(pickle.dumps(Payload(marker)))
    return sft(place, f"init.from={place / 'policy'}"), {74}


def model_with_code(place: Path, marker: Path) -> Refusal:
    (place / "hf" / "modeling_evil.py").write_text(code(marker) + "class Evil: pass\n")
    names = {"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    edit(place / "hf" / "config.json", auto_map=names)
    return generate(place), {0}


def unknown_model_with_code(place: Path, marker: Path) -> Refusal:
    (place / "hf" / "modeling_evil.py").write_text(code(marker) + "class Evil: pass\n")
    names = {"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    edit(place / "hf" / "config.json", auto_map=names, model_type="evil", architectures=["Evil"])
    return generate(place), {78}


def generation_with_code(place: Path, marker: Path) -> Refusal:
    (place / "hf" / "custom_generate").mkdir()
    (place / "hf" / "custom_generate" / "generate.py").write_text(code(marker) + "def generate(**_): pass\n")
    return generate(place), {0}


def tokenizer_with_code(place: Path, marker: Path) -> Refusal:
    folder = write_hugging_face(place / "tok")
    folder = folder if folder.is_dir() else folder.parent
    (folder / "tokenizer.py").write_text(code(marker) + "class Evil: pass\n")
    auto_map = {"AutoTokenizer": ["tokenizer.Evil", None]}
    edit(folder / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Evil")
    return sft(place, *TINY, f"model.tokenizer={folder}"), {0}


def template_that_escapes(place: Path, marker: Path) -> Refusal:
    escape = "{{ cycler.__init__.__globals__.os.system('touch " + str(marker) + "') }}"
    folder = write_hugging_face(place / "tok", chat_template=escape + CHATML)
    return sft(place, *TINY, f"model.tokenizer={folder}", "data.template=chat"), {65}


def template_that_never_ends(place: Path, marker: Path) -> Refusal:
    folder = write_hugging_face(place / "tok", chat_template="{% for i in range(10**15) %}x{% endfor %}")
    return sft(place, *TINY, f"model.tokenizer={folder}", "data.template=chat"), {65}


def yaml_tags(place: Path, marker: Path) -> Refusal:
    (place / "mine.yaml").write_text(f"run: !!python/object/apply:os.system ['touch {marker}']\n")
    return [*sft(place, *TINY), f"--config={place / 'mine.yaml'}"], {78}


def yaml_tags_in_a_group(place: Path, marker: Path) -> Refusal:
    (place / "configs" / "model").mkdir(parents=True)
    text = f"num_layers: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{marker}']]\n"
    (place / "configs" / "model" / "evil.yaml").write_text(text)
    return [*sft(place), "model=evil", f"--config-dir={place / 'configs'}"], {78}


def format_that_reaches_out(place: Path, marker: Path) -> Refusal:
    reached = "{reward.__class__.__mro__[1].__subclasses__}"
    condition = {"reward_format": reached, "reward_limit": 9.9, "target_reward": 5.0}
    own = {"method": "ca", "template": "paper", "condition": condition}
    edit(place / "hf" / "config.json", offline_align=own)
    return generate(place), {78}


def format_of_a_gigabyte(place: Path, marker: Path) -> Refusal:
    condition = {"reward_format": "{reward:>1000000000}", "reward_limit": 9.9, "target_reward": 5.0}
    edit(place / "hf" / "config.json", offline_align={"method": "ca", "template": "paper", "condition": condition})
    return generate(place), {78}


def numpy_objects_as_rows(place: Path, marker: Path) -> Refusal:
    import numpy as np

    np.save(place / "rows.npy", np.array([Payload(marker)], dtype=object), allow_pickle=True)
    return sft(place, *TINY, f"data.train={place / 'rows.npy'}"), {65}


def pickle_as_rows(place: Path, marker: Path) -> Refusal:
    (place / "rows.pkl").write_bytes(pickle.dumps(Payload(marker)))
    return ["prepare", f"run.dir={place / 'out'}", f"data.input={place / 'rows.pkl'}"], {65}


def data_set_with_code(place: Path, marker: Path) -> Refusal:
    (place / "set").mkdir()
    (place / "set" / "set.py").write_text(code(marker))
    return ["prepare", f"run.dir={place / 'out'}", f"data.input=hf:{place / 'set'}"], {78}


def file_name_for_a_shell(place: Path, marker: Path) -> Refusal:
    path = place / f"$(touch executed);touch executed;`touch executed`{'.jsonl'}"
    write_jsonl(path, samples(3))
    os.chdir(place)
    return ["prepare", f"run.dir={place / 'out'}", "prepare.valid_fraction=0", f"data.input='{path}'"], {0}


def sentencepiece_nonsense(place: Path, marker: Path) -> Refusal:
    path = write_sentencepiece(place / "tok")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"<0x41>", b"<0xZZ>"))
    return sft(place, *TINY, f"model.tokenizer={path}"), {78}


def tokenizer_that_panics(place: Path, marker: Path) -> Refusal:
    """Parsed with a template longer than its text, the library panics, which is no Exception in Python."""
    folder = write_hugging_face(place / "tok")
    folder = folder if folder.is_dir() else folder.parent
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"] = {**content["model"]["vocab"], "huge": 2**31}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return sft(place, *TINY, f"model.tokenizer={folder}"), {78}


def index_that_leads_out(place: Path, marker: Path) -> Refusal:
    (place / "secret.safetensors").write_bytes((place / "hf" / "model.safetensors").read_bytes())
    (place / "hf" / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "../secret.safetensors"}}
    (place / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    return generate(place), {78}


def link_that_leads_out(place: Path, marker: Path) -> Refusal:
    (place / "hf" / "model.safetensors").rename(place / "secret.safetensors")
    (place / "hf" / "model.safetensors").symlink_to(place / "secret.safetensors")
    return generate(place), {78}


PAYLOADS: list[Callable[[Path, Path], Refusal]] = [
    pickled_weights,
    pickled_weights_to_train,
    pickle_called_safetensors,
    resealed_common_pickle,
    resealed_records,
    resealed_records_to_generate,
    resealed_records_to_label,
    resealed_object_among_the_shards,
    shards_that_lead_out,
    shards_behind_a_link,
    swapped_checkpoint_pickle,
    swapped_optimizer_shard,
    model_with_code,
    unknown_model_with_code,
    generation_with_code,
    tokenizer_with_code,
    template_that_escapes,
    template_that_never_ends,
    yaml_tags,
    yaml_tags_in_a_group,
    format_that_reaches_out,
    format_of_a_gigabyte,
    numpy_objects_as_rows,
    pickle_as_rows,
    data_set_with_code,
    file_name_for_a_shell,
    sentencepiece_nonsense,
    tokenizer_that_panics,
    index_that_leads_out,
    link_that_leads_out,
]


def everything(folder: Path) -> dict[str, bytes]:
    """Return all files outside the run folder and their content."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_relative_to(folder / "out"))
    return {str(path): path.read_bytes() for path in files}


@pytest.fixture(autouse=True)
def _stay(tmp_path: Path) -> Iterator[None]:
    here = Path.cwd()
    yield
    os.chdir(here)


@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda p: p.__name__)
def test_nothing_runs_and_nothing_is_written_outside(
    place: Path,
    payload: Callable[[Path, Path], Refusal],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Its own words are no excuse: nothing that comes with the files may run.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker = place / "executed"
    words, expected = payload(place, marker)
    before = everything(place)
    words = [word for word in words if word != "debug=true"]
    assert run(words) in expected, capfd.readouterr().err
    assert not marker.exists()
    assert everything(place) == before
    assert "Traceback" not in capfd.readouterr().err


def test_the_payloads_would_run(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "pickled")))
    exec(code(tmp_path / "code"))
    assert {path.name for path in tmp_path.iterdir()} == {"pickled", "code"}


@pytest.mark.parametrize(
    "path",
    ["../secret", "/etc/hostname", "a/../../secret", "link", "x\0y", "n" * 300, "n" * 100_000, "d/" * 3000, 3, None],
    ids=lambda path: str(path)[:12].replace("\0", "NUL"),
)
def test_paths_of_a_hostile_manifest_are_not_followed(
    tmp_path: Path, path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its seal is right: anybody can make one."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (tmp_path / "secret").write_text("x")
    (run_dir / "link").symlink_to(tmp_path / "secret")
    record = {"path": path, "sha256": lineage.file_sha256(tmp_path / "secret"), "bytes": 1}
    manifest = asdict(lineage.Manifest("label", "k", "now", {}, [], [], [], {}))
    (run_dir / "manifest.json").write_bytes(_sealed(manifest | {"outputs": [record]}))
    assert run(["verify", f"run.dir={run_dir}"]) == 74
    # Inputs may lie anywhere: they are hashed, and nothing else.
    (run_dir / "manifest.json").write_bytes(_sealed(manifest | {"inputs": [record]}))
    assert run(["verify", f"run.dir={run_dir}"]) == (0 if path in ("../secret", "link") else 74)
    assert "internal error" not in capsys.readouterr().err


def test_a_chain_without_end_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for k in range(400):
        (tmp_path / f"r{k}").mkdir()
        parent = {"path": f"../r{k + 1}", "stage": "sft", "manifest_sha256": "", "content_sha256": ""}
        manifest = asdict(lineage.Manifest("sft", "k", "now", {}, [], [], [], {})) | {"parents": [parent]}
        (tmp_path / f"r{k}" / "manifest.json").write_bytes(_sealed(manifest))
    assert run(["verify", f"run.dir={tmp_path / 'r0'}"]) == 74
    assert "generations back" in capsys.readouterr().err
