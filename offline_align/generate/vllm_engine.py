"""Generation by vLLM, where it is installed (`pip install offline-align[vllm]`): one engine on each rank."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from offline_align.config.sections import GenerateSection
from offline_align.data.tokenizer import Tokenizer
from offline_align.generate.requests import Completion, Request
from offline_align.generate.stop import finish

# vLLM batches by itself; this many requests are written to the journal together.
_REQUESTS_A_CALL = 1024
# Settings of torchrun, which vLLM would take for its own.
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class VllmEngine:
    """A policy in Hugging Face form in vLLM."""

    batch_size = _REQUESTS_A_CALL

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        settings: GenerateSection,
        eos_ids: frozenset[int],
        seed: int,
        device: int,
        max_length: int,
        dtype: str,
    ) -> None:
        from vllm import LLM

        self._tokenizer, self._settings, self._eos_ids, self._seed = tokenizer, settings, eos_ids, seed
        with _environment_of_one(device):
            self._llm = LLM(
                model=str(folder),
                skip_tokenizer_init=True,
                trust_remote_code=False,
                tensor_parallel_size=1,
                max_model_len=max_length,
                dtype=dtype,
                seed=seed,
                # The folder's own defaults (temperature, repetition penalty, ...) are not what was asked for.
                generation_config="vllm",
            )

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """See `Engine.complete`."""
        from vllm.inputs import TokensPrompt

        prompts = [TokensPrompt(prompt_token_ids=request.context) for request in requests]
        outputs = self._llm.generate(prompts, [self._parameters(r) for r in requests], use_tqdm=False)
        return [
            finish(
                request,
                list(output.outputs[0].token_ids),
                self._tokenizer,
                self._eos_ids,
                self._settings.stop,
            )
            for request, output in zip(requests, outputs, strict=True)
        ]

    def _parameters(self, request: Request) -> Any:
        from vllm import SamplingParams

        seeds = np.random.SeedSequence((self._seed, request.row, request.sample_index))
        return SamplingParams(
            temperature=self._settings.temperature,
            top_p=self._settings.top_p,
            max_tokens=request.max_new_tokens,
            stop_token_ids=sorted(self._eos_ids),
            seed=int(seeds.generate_state(1)[0]),
            detokenize=False,
        )


@contextlib.contextmanager
def _environment_of_one(device: int) -> Iterator[None]:
    """Let the process that vLLM starts see one GPU, that of this rank, and no other ranks."""
    before = dict(os.environ)
    visible = [name for name in before.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[device] if visible else str(device)
    os.environ["VLLM_WORKER_MULTIPROCESSING_METHOD"] = "spawn"
    for name in _RANK_VARIABLES:
        os.environ.pop(name, None)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
