"""Hostile files. Each would create a file if any of its code ran.

A payload tampers with the copies in a folder and returns a command that reads them.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import hostile_checkpoints
from tests.hostile_checkpoints import move_shard, put_object, put_record, reseal
from tests.small_tokenizers import CHATML, write_hugging_face, write_sentencepiece
from tests.training import TINY, samples, write_jsonl

Refusal = tuple[list[str], set[int]]
"""Words of a command and the accepted exit codes, which include 0 if the payload may be ignored."""


class Payload:
    """An object whose unpickling creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def code(marker: Path) -> str:
    return f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"


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
    """A checkpoint with matching hashes, which the loader itself must refuse in any environment."""
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
    """A tokenizer on which the library panics, which is not an Exception in Python."""
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
