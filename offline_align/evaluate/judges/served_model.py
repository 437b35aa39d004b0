"""A model behind an OpenAI-compatible endpoint as the judge, as in the paper's Appendix A."""

import importlib.util
import logging
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from offline_align.config.sections import JudgeForm, JudgeSection
from offline_align.data.records import Sample
from offline_align.errors import ConfigError
from offline_align.evaluate.judges import verdict_text
from offline_align.evaluate.judges.chat_endpoint import ChatEndpoint, Messages, Refused
from offline_align.evaluate.judges.endpoint_errors import shortened
from offline_align.evaluate.judges.questions import Question, ask, place_bias, scores, unreadable_by_answer
from offline_align.evaluate.judges.verdict_cache import Verdict, VerdictCache, verdict_key
from offline_align.progress import Meter

log = logging.getLogger(__name__)
READING_ATTEMPTS = 3


@dataclass(slots=True)
class ServedModelJudge:
    """Asks a model for verdicts in the form that `settings` selects."""

    endpoint: ChatEndpoint
    model: str
    settings: JudgeSection
    cache: VerdictCache
    seed: int
    name: str = ""
    _questions: list[Question] = field(default_factory=list)
    _verdicts: list[Verdict] = field(default_factory=list)

    def score(self, samples: Sequence[Sample], in_order_from: int | None = None) -> list[float]:
        """Return scores from 1 to 10, or shares of pairs won; NaN without a readable verdict.

        Raises ConfigError if the endpoint refuses all questions, for example because of a wrong key
        or model, and StoppedEarly if it cannot be reached. The verdicts so far are kept.
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
            # Equal questions (in the form `single`, both orders of a pair) are asked once.
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
        if verdicts and all(verdict.refused for verdict in verdicts):
            first = verdicts[0]
            raise ConfigError(
                f"judge.model={self.model}: every question was refused, the first with {first.problem}: "
                f"{first.reply}; choose another judge"
            )
        return verdicts

    def describe(self) -> dict[str, Any]:
        """Return model and form, unreadable verdicts with reasons, position bias, tokens and cost.

        Tokens of earlier attempts of this run are included.
        """
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
            "unreadable_reasons": dict(Counter(v.problem for v in given if v.scores is None).most_common()),
            "unreadable_by_answer": unreadable_by_answer(self._questions, self._verdicts),
            "asked_again": sum(verdict.attempts > 1 for verdict in given),
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "cost": (prompt_tokens * prices[0] + completion_tokens * prices[1]) / 1e6 if any(prices) else None,
            "places": place_bias(self._verdicts),
        }

    def _judge(self, key: str, messages: Messages, question: Question) -> Verdict:
        known = self._known(key, len(question.shown))
        if known is not None:
            return known
        verdict = self._ask(key, question.samples[0].id, messages, len(question.shown))
        if verdict.scores is None:
            reply = shortened(verdict.reply)
            log.warning("%s: no verdict for %s: %s: %s", self.cache.path, verdict.id, verdict.problem, reply)
        self.cache.add(verdict)
        return verdict

    def _known(self, key: str, count: int) -> Verdict | None:
        """Return a cached verdict, parsed again in case an earlier version read it differently."""
        kept = self.cache.get(key)
        found = verdict_text.parse(kept.reply, count) if kept else None
        return replace(kept, scores=found) if kept and found else None

    def _ask(self, key: str, set_id: str, messages: Messages, count: int) -> Verdict:
        request, text, problem, attempt, sent, received = messages, "", "", 0, 0, 0
        for attempt in range(1, READING_ATTEMPTS + 1):
            try:
                reply = self.endpoint.ask(request)
            except Refused as refusal:
                problem, words = refusal.problem, refusal.words
                return Verdict(key, set_id, None, words, attempt, sent, received, problem, refused=attempt == 1)
            sent += reply.prompt_tokens
            received += reply.completion_tokens
            text = reply.text
            found = None if reply.problem else verdict_text.parse(text, count)
            if found is not None:
                return Verdict(key, set_id, found, text, attempt, sent, received)
            problem = reply.problem or "no readable scores"
            request = verdict_text.asked_again(messages, "" if reply.problem else text, count)
        return Verdict(key, set_id, None, text, attempt, sent, received, problem)


def served_model_judge(judge: JudgeSection, run_dir: Path, seed: int) -> ServedModelJudge:
    """Return the judge. Raises ConfigError for a missing package, model name or key."""
    problems = []
    if importlib.util.find_spec("openai") is None:
        problems.append("judge=openai: the openai client is missing; pip install '.[judge]'")
    if not judge.model:
        problems.append("judge.model is not set: give the name of the served model")
    key = os.environ.get("OPENAI_API_KEY")
    if not key and not judge.base_url:
        problems.append("judge=openai: OPENAI_API_KEY is not set in the environment; set it, or judge.base_url")
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        problems.append("OPENAI_API_KEY contains a space, a line break or another invalid character; set it again")
    if judge.base_url and not _is_address(judge.base_url):
        problems.append(f"judge.base_url={judge.base_url}: not an address such as http://localhost:8000/v1")
    if problems or not judge.model:
        raise ConfigError(problems)
    from openai import OpenAI

    # Local servers need no key, but the client requires one. Between retries the client backs off
    # exponentially and respects Retry-After.
    client = OpenAI(
        api_key=key or "no-key-needed",
        base_url=judge.base_url,
        max_retries=judge.retries,
        timeout=judge.timeout_seconds,
    )
    cache = VerdictCache(run_dir / "verdicts.jsonl")
    name = judge.model if judge.form is JudgeForm.set else f"{judge.model}, {judge.form.value}"
    endpoint = ChatEndpoint(client, judge.model, judge.retries)
    return ServedModelJudge(endpoint, judge.model, judge, cache, seed, name=name)


def _is_address(text: str) -> bool:
    try:
        url = urlsplit(text)
        return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        return False
