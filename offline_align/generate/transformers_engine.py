"""Batched generation with `transformers`: left-padded, greedy or sampled, ended by ids and stop strings."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from offline_align.config.sections import GenerateSection
from offline_align.data.tokenizer import Tokenizer
from offline_align.generate.decoding import sample
from offline_align.generate.requests import Completion, Request
from offline_align.generate.sampling import choose, uniforms
from offline_align.generate.stop import finish, is_stopped
from offline_align.generate.weights import checked


class TransformersEngine:
    """A policy in Hugging Face format on one device."""

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        settings: GenerateSection,
        eos_ids: frozenset[int],
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        token_details: bool = False,
    ) -> None:
        self.batch_size = settings.batch_size
        self._token_details, self._device = token_details, device
        self._tokenizer, self._settings, self._eos_ids, self._seed = tokenizer, settings, eos_ids, seed
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=dtype,
            attn_implementation="sdpa",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
        self._model = model.to(device).eval()
        # Ignore the folder's own defaults (temperature, repetition penalty, ...).
        self._model.generation_config = transformers.GenerationConfig()

    def answers(self, requests: Sequence[Request]) -> Iterator[list[Completion]]:
        """Yield all answers at once, because the rows of a batch end together. See `Engine.answers`."""
        yield self.complete(requests)

    @torch.inference_mode()
    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """Return the answers in the order of the requests."""
        tokens, mask = self._left_padded(requests)
        width = tokens.size(1)
        stop = self._settings.stop
        if self._token_details:
            numbers = uniforms(requests, self._seed, self._model.device)
            sampled = sample(self._model, requests, tokens, mask, numbers, self._settings.temperature, self._eos_ids)
            return [
                finish(request, ids, self._tokenizer, self._eos_ids, stop, log_probs)
                for request, (ids, log_probs) in zip(requests, sampled, strict=True)
            ]
        output = self._model.generate(
            input_ids=tokens,
            attention_mask=mask,
            generation_config=self._generation_config(requests),
            logits_processor=self._processors(requests, width),
            stopping_criteria=self._criteria(requests, width),
        )
        return [
            finish(request, ids, self._tokenizer, self._eos_ids, stop)
            for request, ids in zip(requests, output[:, width:].tolist(), strict=True)
        ]

    def reseed(self, seed: int) -> None:
        """Use another seed from now on. See `RolloutEngine.reseed`."""
        self._seed = seed

    @torch.no_grad()
    def replace_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Overwrite all weights in place. See `RolloutEngine.replace_weights`."""
        # A tied output layer is the embedding, and is listed once, under that name.
        parameters = dict(self._model.named_parameters())
        for name, tensor in checked(tensors, {name: parameter.shape for name, parameter in parameters.items()}):
            parameters[name].copy_(tensor)

    def release(self) -> None:
        """Move the weights from a GPU to the host. See `RolloutEngine.release`."""
        if self._device.type == "cuda":
            self._model.to("cpu")
            torch.cuda.empty_cache()

    def resume(self) -> None:
        """Move the weights back. See `RolloutEngine.resume`."""
        self._model.to(self._device)

    def _left_padded(self, requests: Sequence[Request]) -> tuple[Tensor, Tensor]:
        """Return tokens and mask [B, longest context]; padding is end of sequence and is masked."""
        width = max(len(request.context) for request in requests)
        gaps = [width - len(request.context) for request in requests]
        eos = self._tokenizer.eos_id
        tokens = [[eos] * gap + request.context for gap, request in zip(gaps, requests, strict=True)]
        mask = [[0] * gap + [1] * (width - gap) for gap in gaps]
        device = self._model.device
        return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)

    def _generation_config(self, requests: Sequence[Request]) -> Any:
        return transformers.GenerationConfig(
            do_sample=False,
            max_new_tokens=max(request.max_new_tokens for request in requests),
            eos_token_id=sorted(self._eos_ids),
            # Rows that have ended are padded with end of sequence, where `finish` cuts them.
            pad_token_id=self._tokenizer.eos_id,
        )

    def _processors(self, requests: Sequence[Request], width: int) -> Any:
        if self._settings.temperature == 0:
            return transformers.LogitsProcessorList()
        numbers = uniforms(requests, self._seed, self._model.device)
        return transformers.LogitsProcessorList([_Sampling(numbers, width, self._settings)])

    def _criteria(self, requests: Sequence[Request], width: int) -> Any:
        if not self._settings.stop:
            return transformers.StoppingCriteriaList()
        return transformers.StoppingCriteriaList([_StopStrings(self._tokenizer, requests, width, self._settings.stop)])


class _Sampling(transformers.LogitsProcessor):  # type: ignore[misc]
    """Leaves one possible token in each row, drawn with the row's own random numbers."""

    def __init__(self, numbers: Tensor, width: int, settings: GenerateSection) -> None:
        self._numbers, self._width, self._settings = numbers, width, settings

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        number = self._numbers[:, input_ids.size(1) - self._width]
        ids = choose(scores, number, self._settings.temperature, self._settings.top_p)
        return torch.full_like(scores, -torch.inf).scatter_(1, ids[:, None], 0.0)


class _StopStrings(transformers.StoppingCriteria):  # type: ignore[misc]
    """Ends a row once its answer contains a stop string."""

    def __init__(self, tokenizer: Tokenizer, requests: Sequence[Request], width: int, stop: Sequence[str]) -> None:
        self._tokenizer, self._requests, self._width, self._stop = tokenizer, requests, width, stop

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        answers = zip(self._requests, input_ids[:, self._width :].tolist(), strict=True)
        found = [is_stopped(request, ids, self._tokenizer, self._stop) for request, ids in answers]
        return torch.tensor(found, device=input_ids.device)
