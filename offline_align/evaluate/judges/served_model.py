"""A model behind an OpenAI-compatible endpoint as the judge, in the manner of the paper's Appendix A."""

import importlib.util
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offline_align.config.sections import JudgeForm, JudgeSection
from offline_align.data.records import Sample
from offline_align.errors import ConfigError, StoppedEarly
from offline_align.evaluate.judges import verdict_text
from offline_align.evaluate.judges.questions import Question, ask, place_bias, scores
from offline_align.evaluate.judges.verdict_cache import Verdict, VerdictCache, verdict_key
from offline_align.progress import Meter

if TYPE_CHECKING:
    from openai import OpenAI

READING_ATTEMPTS = 3


@dataclass(slots=True)
class ServedModelJudge:
    """Asks a model for verdicts in the form of `settings`; `client` is the openai package's."""

    client: "OpenAI"
    model: str
    settings: JudgeSection
    cache: VerdictCache
    seed: int
    name: str = ""
    _questions: list[Question] = field(default_factory=list)
    _verdicts: list[Verdict] = field(default_factory=list)

    def score(self, samples: Sequence[Sample], in_order_from: int | None = None) -> list[float]:
        """Return scores from 1 to 10, or shares of pairs won; NaN where a verdict could not be read.

        Raises ConfigError where the endpoint refuses the key, the model or the request, StoppedEarly where it cannot
        be reached: verdicts so far are kept.
        """
        form = self.settings.form
        self._questions = ask(samples, form, self.seed, in_order_from)
        self._verdicts = self._answers()
        return scores(self._questions, self._verdicts, form)

    def _answers(self) -> list[Verdict]:
        verdicts = []
        requests = [verdict_text.request([q.samples[index] for index in q.shown]) for q in self._questions]
        keys = [verdict_key(self.model, messages) for messages in requests]
        with ThreadPoolExecutor(self.settings.concurrent_requests) as pool:
            # Equal questions, as a single answer in both orders of a pair, are asked once.
            asked: dict[str, Future[Verdict]] = {}
            for key, messages, question in zip(keys, requests, self._questions, strict=True):
                if key not in asked:
                    asked[key] = pool.submit(self._judge, key, messages, question)
            futures = [asked[key] for key in keys]
            try:
                with Meter("judging", len(futures), "verdicts") as meter:
                    for future in futures:
                        verdicts.append(future.result())
                        meter.advance()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return verdicts

    def describe(self) -> dict[str, Any]:
        """Return model and form, verdicts that could not be read, places, tokens and cost, earlier runs' included."""
        given = list({verdict.key: verdict for verdict in self._verdicts}.values())
        prompt_tokens = sum(verdict.prompt_tokens for verdict in given)
        completion_tokens = sum(verdict.completion_tokens for verdict in given)
        prices = self.settings.prompt_token_price, self.settings.completion_token_price
        return {
            "kind": "openai",
            "model": self.model,
            "form": self.settings.form.value,
            "verdicts": len(given),
            "unreadable_verdicts": sum(verdict.scores is None for verdict in given),
            "asked_again": sum(verdict.attempts > 1 for verdict in given),
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "cost": (prompt_tokens * prices[0] + completion_tokens * prices[1]) / 1e6 if any(prices) else None,
            "places": place_bias(self._verdicts),
        }

    def _judge(self, key: str, messages: list[dict[str, str]], question: Question) -> Verdict:
        known = self.cache.get(key)
        if known is not None:
            return known
        verdict = self._ask(key, question.samples[0].id, messages, len(question.shown))
        self.cache.add(verdict)
        return verdict

    def _ask(self, key: str, set_id: str, messages: list[dict[str, str]], count: int) -> Verdict:
        reply, found, attempt, sent, received = "", None, 0, 0, 0
        for attempt in range(1, READING_ATTEMPTS + 1):
            again = verdict_text.reminder(reply, count) if attempt > 1 else []
            completion = self._complete([*messages, *again])
            reply = _text(completion)
            usage = getattr(completion, "usage", None)
            if usage is not None:
                sent += usage.prompt_tokens
                received += usage.completion_tokens
            found = verdict_text.parse(reply, count)
            if found is not None:
                break
        return Verdict(key, set_id, found, reply, attempt, sent, received)

    def _complete(self, messages: list[dict[str, str]]) -> Any:
        import openai

        try:
            return self._send(messages)
        except (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError) as error:
            raise StoppedEarly(
                f"judge.base_url={self.client.base_url}: no verdict after {self.settings.retries} retries "
                f"({type(error).__name__}); run the same command again: verdicts so far are kept"
            ) from error
        except (openai.APIResponseValidationError, ValueError):
            # A body that is no completion is a reply that cannot be read.
            return None
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


def _text(completion: Any) -> str:
    """Return the text of a completion, or nothing where the endpoint sent something else."""
    try:
        return str(completion.choices[0].message.content or "")
    except (AttributeError, IndexError, TypeError):
        return ""


def served_model_judge(judge: JudgeSection, run_dir: Path, seed: int) -> ServedModelJudge:
    """Return the judge; raises ConfigError for a missing package, model name or key."""
    problems = []
    if importlib.util.find_spec("openai") is None:
        problems.append("judge=openai: the openai client is missing; pip install '.[judge]'")
    if not judge.model:
        problems.append("judge.model is not set: give the name of the served model")
    key = os.environ.get("OPENAI_API_KEY")
    if not key and not judge.base_url:
        problems.append("judge=openai: OPENAI_API_KEY is not set in the environment; set it, or judge.base_url")
    if problems or not judge.model:
        raise ConfigError(problems)
    from openai import OpenAI

    # A server of one's own asks for no key, but the client insists on one. It backs off exponentially between its
    # retries and heeds Retry-After.
    client = OpenAI(
        api_key=key or "none", base_url=judge.base_url, max_retries=judge.retries, timeout=judge.timeout_seconds
    )
    cache = VerdictCache(run_dir / "verdicts.jsonl")
    name = judge.model if judge.form is JudgeForm.set else f"{judge.model}, {judge.form.value}"
    return ServedModelJudge(client, judge.model, judge, cache, seed, name=name)
