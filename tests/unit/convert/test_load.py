import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from offline_align.config.sections import ModelSection
from offline_align.convert.architecture import read_architecture
from offline_align.convert.export import huggingface_tensors
from offline_align.convert.load import load_huggingface
from offline_align.errors import ConfigError, StorageError

Save = Callable[..., Path]
Read = Callable[[Path], dict[str, torch.Tensor]]


@pytest.mark.parametrize("head", ["ForCausalLM", "ForSequenceClassification"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_and_out_are_the_same_bits(
    save_model: Save, read_tensors: Read, family: str, head: str, dtype: torch.dtype
) -> None:
    folder = save_model(family, head, dtype)
    found = read_architecture(folder)
    ours = list(load_huggingface(folder))
    theirs = read_tensors(folder)
    back = dict(huggingface_tensors(ours, found.model, found.kind))
    assert back.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name], tensor), name


def test_query_groups_are_interleaved(save_model: Save, read_tensors: Read) -> None:
    folder = save_model("llama3")
    theirs = read_tensors(folder)
    qkv = dict(load_huggingface(folder))["decoder.layers.1.self_attention.linear_qkv.weight"]
    q, k, v = (theirs[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv")
    # 4 query heads of width 8 in 2 groups: q0 q1 k0 v0 q2 q3 k1 v1.
    expected = [q[:16], k[:8], v[:8], q[16:], k[8:], v[8:]]
    assert torch.equal(qkv, torch.cat(expected))


def test_vocabulary_is_padded_with_zeros(save_model: Save) -> None:
    embedding = dict(load_huggingface(save_model("llama")))["embedding.word_embeddings.weight"]
    assert embedding.shape == (384, 32)
    assert not embedding[301:].any()
    assert embedding[300].any()


@pytest.mark.parametrize("make_vocab_size_divisible_by", [128, 512])
def test_shards_of_two_ranks_join_to_the_whole(
    save_model: Save, family: str, make_vocab_size_divisible_by: int
) -> None:
    folder = save_model(family)
    whole = dict(load_huggingface(folder, 0, 1, make_vocab_size_divisible_by))
    first, second = (dict(load_huggingface(folder, r, 2, make_vocab_size_divisible_by)) for r in range(2))
    axes = {"linear_proj": 1, "linear_fc2": 1, "linear_qkv": 0, "word_embeddings": 0, "output_layer": 0}
    assert whole.keys() == first.keys() == second.keys()
    for name, tensor in whole.items():
        axis = next((axis for part, axis in axes.items() if part in name), None)
        if "linear_fc1" in name:
            # Each rank stacks its own part of gate and up.
            gates, ups = zip(first[name].chunk(2), second[name].chunk(2), strict=True)
            joined = torch.cat([*gates, *ups])
        elif axis is None:
            assert torch.equal(first[name], second[name])
            joined = first[name]
        else:
            assert first[name].shape[axis] * 2 == tensor.shape[axis]
            joined = torch.cat([first[name], second[name]], dim=axis)
        assert torch.equal(joined, tensor), name


def test_sharded_files_give_the_same_tensors(save_model: Save, tmp_path: Path) -> None:
    single = dict(load_huggingface(save_model("qwen3")))
    shutil.rmtree(tmp_path / "qwen3-ForCausalLM")
    folder = save_model("qwen3", max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    sharded = dict(load_huggingface(folder))
    assert all(torch.equal(single[name], sharded[name]) for name in single)


@pytest.mark.parametrize("shards_are_there", [True, False])
def test_a_single_file_takes_precedence_over_an_index(
    save_model: Save, read_tensors: Read, caplog: pytest.LogCaptureFixture, shards_are_there: bool
) -> None:
    """As in `transformers`: an index is left over if a folder was saved again as a single file."""
    folder = save_model("llama", max_shard_size="40KB")
    shards = list(folder.glob("*.safetensors"))
    whole = {name: tensor + 1.0 for name, tensor in read_tensors(folder).items()}
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    if not shards_are_there:
        for shard in shards:
            shard.unlink()
    embedding = dict(load_huggingface(folder))["embedding.word_embeddings.weight"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).model.embed_tokens.weight
    assert torch.equal(embedding[:301], theirs)
    assert torch.equal(theirs, whole["model.embed_tokens.weight"])
    assert "model.safetensors is read; model.safetensors.index.json beside it is ignored" in caplog.text


def test_tensor_parallel_size_must_divide_the_model(save_model: Save) -> None:
    with pytest.raises(ConfigError, match="query groups 2"):
        next(load_huggingface(save_model("llama3"), 0, 4))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_missing_left_over_and_misshapen_tensors_are_named_together(save_model: Save) -> None:
    folder = save_model("llama")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
        tensors["lm_head.weight"] = torch.zeros(300, 32)

    rewrite(folder, change)
    with pytest.raises(ConfigError) as caught:
        next(load_huggingface(folder))
    missing, left_over, shape = caught.value.problems
    assert "model.norm.weight is missing" in missing
    assert "q_proj.bias is not part of" in left_over
    assert "lm_head.weight has shape [300, 32], config.json says [301, 32]" in shape


def test_harmless_extra_tensors_are_ignored(save_model: Save) -> None:
    folder = save_model("llama_tied")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)

    rewrite(folder, change)
    assert "output_layer.weight" not in dict(load_huggingface(folder))


def test_pickled_weights_are_refused_with_the_reason(save_model: Save) -> None:
    folder = save_model("llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin.*pickle can run any code"):
        next(load_huggingface(folder))


def test_a_folder_without_weights_is_refused(save_model: Save) -> None:
    folder = save_model("llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="neither"):
        next(load_huggingface(folder))


def index(folder: Path, file_name: str) -> None:
    weight_map = dict.fromkeys(load_file(folder / "model.safetensors"), file_name)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a\0.safetensors", "model.bin"])
def test_an_index_cannot_name_files_elsewhere(save_model: Save, name: str) -> None:
    folder = save_model("llama")
    shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
    index(folder, name)
    with pytest.raises(ConfigError, match="not a safetensors file inside it"):
        next(load_huggingface(folder))


def test_a_link_out_of_the_folder_is_refused(save_model: Save) -> None:
    folder = save_model("llama")
    outside = folder.parent / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    with pytest.raises(ConfigError, match="outside the folder; copy"):
        next(load_huggingface(folder))


def test_the_links_of_the_hub_cache_are_followed(save_model: Save, tmp_path: Path) -> None:
    saved = save_model("llama")
    repository = tmp_path / "models--a--b"
    folder = repository / "snapshots" / "0123abc"
    folder.parent.mkdir(parents=True)
    (repository / "blobs").mkdir()
    saved.rename(folder)
    (folder / "model.safetensors").rename(repository / "blobs" / "5eed")
    (folder / "model.safetensors").symlink_to("../../blobs/5eed")
    assert "output_layer.weight" in dict(load_huggingface(folder))


@pytest.mark.parametrize("weight_map", ['{"weight_map": []}', "[]", "{", '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_refused(save_model: Save, weight_map: str) -> None:
    folder = save_model("llama")
    (folder / "model.safetensors").rename(folder / "shard.safetensors")
    (folder / "model.safetensors.index.json").write_text(weight_map)
    with pytest.raises(ConfigError, match=r"index\.json"):
        next(load_huggingface(folder))


def test_a_truncated_file_is_a_storage_error(save_model: Save) -> None:
    folder = save_model("llama")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(StorageError, match="damaged"):
        next(load_huggingface(folder))


def test_a_checkpoint_with_a_missing_or_unknown_tensor_is_refused() -> None:
    model = ModelSection(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=2, vocab_size=10)
    with pytest.raises(ConfigError, match=r"output_layer\.weight"):
        dict(huggingface_tensors([("embedding.word_embeddings.weight", torch.zeros(128, 8))], model, "policy"))
    with pytest.raises(ConfigError, match="unheard_of"):
        dict(huggingface_tensors([("unheard_of", torch.zeros(1))], model, "policy"))
