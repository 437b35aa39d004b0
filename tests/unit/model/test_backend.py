"""The choice between megatron-core's layers and Transformer Engine's, without running either."""

from pathlib import Path

import pytest
import torch

from offline_align.config.sections import Backend, ModelSection, OptimSection, ParallelSection, Recompute
from offline_align.data.pack import padding_multiple
from offline_align.errors import ConfigError
from offline_align.model import backend
from offline_align.model.backend import choose_backend, engine_is_installed, torch_name

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("asked", "device", "installed", "chosen"),
    [
        (Backend.auto, CPU, True, Backend.torch),
        (Backend.auto, CUDA, False, Backend.torch),
        (Backend.auto, CUDA, True, Backend.transformer_engine),
        (Backend.torch, CUDA, True, Backend.torch),
        (Backend.transformer_engine, CUDA, True, Backend.transformer_engine),
    ],
)
def test_auto_takes_what_is_installed(
    monkeypatch: pytest.MonkeyPatch, asked: Backend, device: torch.device, installed: bool, chosen: Backend
) -> None:
    monkeypatch.setattr(backend, "engine_is_installed", lambda: installed)
    monkeypatch.setattr(backend, "_log_choice", lambda _: None)
    assert choose_backend(asked, device) is chosen


@pytest.mark.parametrize(
    ("part", "installed"),
    [
        ("transformer_engine/transformer_engine_torch.cpython-312-x86_64-linux-gnu.so", True),
        ("transformer_engine/wheel_lib/transformer_engine_torch.cpython-312-x86_64-linux-gnu.so", True),
        ("transformer_engine_torch.cpython-312-x86_64-linux-gnu.so", True),
        ("transformer_engine/wheel_lib/transformer_engine_jax.cpython-312-x86_64-linux-gnu.so", False),
        ("transformer_engine_torch.txt", False),
    ],
)
def test_the_compiled_part_is_found_wherever_it_is_put(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, part: str, installed: bool
) -> None:
    package = tmp_path / "transformer_engine"
    (package / "wheel_lib").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('it is not to be imported')\n")
    (tmp_path / part).touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert engine_is_installed() is installed


def test_transformer_engine_is_not_taken_unasked_for_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "engine_is_installed", lambda: True)
    monkeypatch.setattr(backend, "_log_choice", lambda _: None)
    assert choose_backend(Backend.auto, CUDA, bf16=False) is Backend.torch
    assert choose_backend(Backend.transformer_engine, CUDA, bf16=False) is Backend.transformer_engine


def test_megatrons_swiglu_is_compiled_where_there_is_a_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from offline_align.model.build import transformer_config

    def is_compiled(device: torch.device) -> bool:
        section = ModelSection(hidden_size=8, ffn_hidden_size=8, num_layers=1, num_attention_heads=1, vocab_size=8)
        config = transformer_config(section, ParallelSection(), device, True, Recompute.none)
        assert config.bias_activation_fusion is not config.use_te_activation_func
        return bool(config.bias_activation_fusion)

    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    monkeypatch.setenv("CC", "a compiler")
    found = []
    for _ in range(2):
        backend.can_compile.cache_clear()
        found.append((is_compiled(CPU), is_compiled(CUDA)))
        (tmp_path / "Python.h").touch()
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    backend.can_compile.cache_clear()
    found.append((is_compiled(CPU), is_compiled(CUDA)))
    assert found == [(False, False), (False, True), (False, False)]
    backend.can_compile.cache_clear()


def test_nothing_is_found_where_nothing_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert not engine_is_installed()


@pytest.mark.parametrize(("device", "installed", "said"), [(CPU, True, "CUDA"), (CUDA, False, "not installed")])
def test_what_cannot_be_used_is_refused(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, installed: bool, said: str
) -> None:
    monkeypatch.setattr(backend, "engine_is_installed", lambda: installed)
    with pytest.raises(ConfigError, match=said):
        choose_backend(Backend.transformer_engine, device)


def test_the_choice_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    backend._log_choice.cache_clear()
    for _ in range(3):
        choose_backend(Backend.auto, CPU)
    assert [r.message.split()[:2] for r in caplog.records] == [["model.backend:", "torch"]]


def test_names_of_fused_norms() -> None:
    assert torch_name("decoder.layers.3.self_attention.linear_qkv.layer_norm_weight") == (
        "decoder.layers.3.input_layernorm.weight"
    )
    assert (
        torch_name("decoder.layers.3.mlp.linear_fc1.layer_norm_weight") == "decoder.layers.3.pre_mlp_layernorm.weight"
    )
    for name in ("decoder.final_layernorm.weight", "decoder.layers.3.self_attention.linear_qkv.weight"):
        assert torch_name(name) == name


def test_fp8_is_for_linear_layers_of_the_engine() -> None:
    from offline_align.model.build import build_model, transformer_config

    model = ModelSection(num_layers=1, hidden_size=32, ffn_hidden_size=64, num_attention_heads=2, vocab_size=64)
    config = transformer_config(model, ParallelSection(), CPU, True, Recompute.none, fp8=True)
    assert (config.fp8, config.fp8_recipe) == ("hybrid", "tensorwise")
    assert transformer_config(model, ParallelSection(), CPU, True, Recompute.none).fp8 is None
    with pytest.raises(ConfigError, match="trainer.precision=fp8"):
        build_model("policy", model, ParallelSection(), CPU, True, fp8=True)
    assert padding_multiple(2, 2, True, fp8=True) % 16 == 0


def test_precision_aware_fields_follow_the_gradients() -> None:
    from megatron.core.optimizer import OptimizerConfig

    from offline_align.train.optim import _precision_aware_fields

    assert not OptimSection().use_precision_aware_optimizer
    fields = _precision_aware_fields(ParallelSection(grad_reduce_in_fp32=False))
    assert fields["main_grads_dtype"] is torch.bfloat16
    assert _precision_aware_fields(ParallelSection())["main_grads_dtype"] is torch.float32
    assert set(fields) <= set(OptimizerConfig.__dataclass_fields__)
