"""Generation with vLLM, if it is installed (`pip install '.[vllm]'`): one engine on each rank.

Alone, the engine has a process of its own. With token details, for a rollout, it runs in the process
of the trainer, which then hands over weights as tensors and gets the engine's memory while it trains.
"""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offline_align.config.sections import GenerateSection
from offline_align.convert import names
from offline_align.convert.architecture import read_architecture
from offline_align.data.companions import HUGGING_FACE_FILE
from offline_align.data.tokenizer import Tokenizer
from offline_align.generate import vllm_in_process
from offline_align.generate.requests import Completion, Request
from offline_align.generate.stop import finish
from offline_align.generate.weights import checked

# vLLM batches internally; few large calls leave the device idle less often.
_REQUESTS_A_CALL = 4096
# Answers are yielded, and therefore written to disk, at most this often.
_SECONDS_BETWEEN_YIELDS = 1.0
# Variables of torchrun, which vLLM would use for its own processes.
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class VllmEngine:
    """A policy in Hugging Face format in vLLM."""

    batch_size = _REQUESTS_A_CALL

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        settings: GenerateSection,
        eos_ids: frozenset[int],
        seed: int,
        device: torch.device,
        max_length: int,
        dtype: str,
        token_details: bool = False,
    ) -> None:
        from vllm import LLM

        self._tokenizer, self._settings, self._eos_ids, self._seed = tokenizer, settings, eos_ids, seed
        # vLLM finds stop strings with its own tokenizer. Without one, only `finish` cuts the answer.
        self._stops_itself = bool(settings.stop) and (folder / HUGGING_FACE_FILE).is_file()
        self._token_details, self._folder, self._asleep = token_details, folder, False
        with vllm_in_process.environment(device) if token_details else _single_rank_environment(device):
            self._llm = LLM(
                model=str(folder),
                skip_tokenizer_init=not self._stops_itself,
                trust_remote_code=False,
                tensor_parallel_size=1,
                max_model_len=max_length,
                dtype=dtype,
                seed=seed,
                # On a CPU, compilation takes longer than most runs.
                enforce_eager=device.type == "cpu",
                # Ignore the folder's own defaults (temperature, repetition penalty, ...).
                generation_config="vllm",
                **(vllm_in_process.arguments(device) if token_details else {}),
            )

    def answers(self, requests: Sequence[Request]) -> Iterator[list[Completion]]:
        """Yield answers about once a second, in the order in which they finish. See `Engine.answers`."""
        from vllm.inputs import TokensPrompt

        engine = self._llm.llm_engine
        waiting = {str(number): request for number, request in enumerate(requests)}
        for name, request in waiting.items():
            engine.add_request(name, TokensPrompt(prompt_token_ids=request.context), self._parameters(request))
        try:
            ready: list[Completion] = []
            since = time.monotonic()
            while waiting:
                ended = [output for output in engine.step() if output.finished]
                ready += [self._finish(waiting.pop(one.request_id), one.outputs[0]) for one in ended]
                if ready and (not waiting or time.monotonic() - since > _SECONDS_BETWEEN_YIELDS):
                    yield ready
                    ready, since = [], time.monotonic()
        finally:
            # If the consumer stops early, the engine must not continue with the remaining requests.
            engine.abort_request(list(waiting))

    def reseed(self, seed: int) -> None:
        """Use another seed from now on. See `RolloutEngine.reseed`."""
        self._seed = seed

    def replace_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Overwrite all weights in place; needs token details. See `RolloutEngine.replace_weights`."""
        found = read_architecture(self._folder)
        shapes = names.part_shapes(found.family, found.model, "policy")
        # vLLM joins the tensors itself. The function is called in this process, so nothing is copied first.
        self._llm.apply_model(lambda model: model.load_weights(checked(tensors, shapes)))

    def release(self) -> None:
        """Move the weights to the host and free the cache; needs token details. See `RolloutEngine.release`."""
        self._llm.sleep(level=1)
        self._asleep = True
        vllm_in_process.set_expandable_segments(True)

    def resume(self) -> None:
        """Move the weights back, and allocate the cache. See `RolloutEngine.resume`."""
        if self._asleep:
            vllm_in_process.set_expandable_segments(False)
            self._llm.wake_up()
            self._asleep = False

    def _finish(self, request: Request, output: Any) -> Completion:
        ids = list(output.token_ids)
        log_probs = None
        if self._token_details:
            log_probs = [found[token].logprob for token, found in zip(ids, output.logprobs, strict=True)]
        return finish(request, ids, self._tokenizer, self._eos_ids, self._settings.stop, log_probs)

    def _parameters(self, request: Request) -> Any:
        from vllm import SamplingParams

        touched = any(request.frame.touches(stop) for stop in self._settings.stop)
        seeds = np.random.SeedSequence((self._seed, request.row, request.sample_index))
        return SamplingParams(
            temperature=self._settings.temperature,
            top_p=self._settings.top_p,
            max_tokens=request.max_new_tokens,
            stop_token_ids=sorted(self._eos_ids),
            seed=int(seeds.generate_state(1)[0]),
            # vLLM would also stop in the text that the template writes before the answer.
            stop=self._settings.stop if self._stops_itself and not touched else None,
            # `finish` removes stop strings, as for the other engine.
            include_stop_str_in_output=True,
            detokenize=self._stops_itself,
            # 0 asks for the sampled token alone.
            logprobs=0 if self._token_details else None,
        )


@contextlib.contextmanager
def _single_rank_environment(device: torch.device) -> Iterator[None]:
    """Limit the process that vLLM starts to this rank's GPU, and hide the other ranks from it."""
    before = dict(os.environ)
    if device.type == "cuda":
        visible = [name for name in before.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        index = device.index or 0
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[index] if visible else str(index)
    os.environ["VLLM_WORKER_MULTIPROCESSING_METHOD"] = "spawn"
    for name in _RANK_VARIABLES:
        os.environ.pop(name, None)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
