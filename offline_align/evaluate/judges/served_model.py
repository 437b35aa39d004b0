"""A model behind an OpenAI-compatible endpoint as the judge, in the manner of the paper's Appendix A."""

import importlib.util
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offline_align.config.sections import JudgeSection
from offline_align.data.records import Sample
from offline_align.errors import ConfigError, StoppedEarly
from offline_align.evaluate.judges import verdict_text
from offline_align.evaluate.judges.verdict_cache import Verdict, VerdictCache, verdict_key
from offline_align.progress import Meter

if TYPE_CHECKING:
    from openai import OpenAI

CONCURRENT_REQUESTS = 8
READING_ATTEMPTS = 3
# The client backs off exponentially between these and heeds Retry-After.
NETWORK_RETRIES = 6


@dataclass(slots=True)
class ServedModelJudge:
    """Asks for one verdict on all answers to a prompt together; `client` is the openai package's."""

    client: "OpenAI"
    model: str
    cache: VerdictCache
    seed: int
    name: str = ""
    _verdicts: list[Verdict] = field(default_factory=list)

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """Return scores from 1 to 10; NaN for a set whose verdict could not be read.

        Samples with one `id` stand together and form a set. Raises ConfigError where the endpoint refuses
        the key, the model or the request, StoppedEarly where it cannot be reached: verdicts so far are kept.
        """
        sets = [list(group) for _, group in groupby(samples, key=lambda sample: sample.id)]
        with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
            futures = [pool.submit(self._judge, one) for one in sets]
            try:
                with Meter("judging", len(sets), "sets") as meter:
                    self._verdicts = []
                    for future in futures:
                        self._verdicts.append(future.result())
                        meter.advance()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        missing = float("nan")
        pairs = zip(sets, self._verdicts, strict=True)
        return [score for one, verdict in pairs for score in verdict.scores or [missing] * len(one)]

    def describe(self) -> dict[str, Any]:
        """Return model, verdicts that could not be read, and tokens, earlier runs' included."""
        return {
            "kind": "openai",
            "model": self.model,
            "verdicts": len(self._verdicts),
            "unreadable_verdicts": sum(verdict.scores is None for verdict in self._verdicts),
            "prompt_tokens": sum(verdict.prompt_tokens for verdict in self._verdicts),
            "completion_tokens": sum(verdict.completion_tokens for verdict in self._verdicts),
        }

    def _judge(self, samples: list[Sample]) -> Verdict:
        order = verdict_text.shuffled(samples, self.seed)
        messages = verdict_text.request(samples, order)
        key = verdict_key(self.model, messages)
        known = self.cache.get(key)
        if known is not None:
            return known
        verdict = self._ask(key, samples[0].id, messages, order)
        self.cache.add(verdict)
        return verdict

    def _ask(self, key: str, set_id: str, messages: list[dict[str, str]], order: list[int]) -> Verdict:
        reply, scores, attempt, sent, received = "", None, 0, 0, 0
        for attempt in range(1, READING_ATTEMPTS + 1):
            again = verdict_text.reminder(reply, len(order)) if attempt > 1 else []
            completion = self._complete([*messages, *again])
            reply = completion.choices[0].message.content or ""
            if completion.usage is not None:
                sent += completion.usage.prompt_tokens
                received += completion.usage.completion_tokens
            scores = verdict_text.parse(reply, order)
            if scores is not None:
                break
        return Verdict(key, set_id, scores, reply, attempt, sent, received)

    def _complete(self, messages: list[dict[str, str]]) -> Any:
        import openai

        try:
            return self._send(messages)
        except (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError) as error:
            raise StoppedEarly(
                f"judge.base_url={self.client.base_url}: no verdict after {NETWORK_RETRIES} retries "
                f"({type(error).__name__}); run the same command again: verdicts so far are kept"
            ) from error
        except openai.APIStatusError as error:
            raise ConfigError(
                f"judge.model={self.model}: {self.client.base_url} answers {error.status_code} "
                f"({type(error).__name__}); check judge.model, judge.base_url and OPENAI_API_KEY"
            ) from error

    def _send(self, messages: list[dict[str, str]]) -> Any:
        import openai

        create: Any = self.client.chat.completions.create
        try:
            return create(model=self.model, messages=messages, temperature=0)
        except openai.BadRequestError as error:
            # Reasoning models take no temperature.
            if "temperature" not in str(error):
                raise
            return create(model=self.model, messages=messages)


def served_model_judge(judge: JudgeSection, run_dir: Path, seed: int) -> ServedModelJudge:
    """Return the judge; raises ConfigError for a missing package, model name or key."""
    problems = []
    if importlib.util.find_spec("openai") is None:
        problems.append("judge=openai: the openai client is missing; install the extra: offline-align[judge]")
    if not judge.model:
        problems.append("judge.model is not set: give the name of the served model")
    key = os.environ.get("OPENAI_API_KEY")
    if not key and not judge.base_url:
        problems.append("judge=openai: OPENAI_API_KEY is not set in the environment; set it, or judge.base_url")
    if problems or not judge.model:
        raise ConfigError(problems)
    from openai import OpenAI

    # A server of one's own asks for no key, but the client insists on one.
    client = OpenAI(api_key=key or "none", base_url=judge.base_url, max_retries=NETWORK_RETRIES)
    cache = VerdictCache(run_dir / "verdicts.jsonl")
    return ServedModelJudge(client, judge.model, cache, seed, name=judge.model)
