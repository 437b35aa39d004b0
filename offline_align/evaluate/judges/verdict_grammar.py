"""Parse the verdict at the end of a served judge's reply.

    verdict = line of entries, blank lines between them allowed, up to the end of the reply
    line    = [list mark] [label] entry {[","] entry}
    entry   = name [label] separator [label] number ["/ 10"] [unit] [remark]
    remark  = text without any digit, in brackets or after punctuation

A judge may reason in marked blocks or before its verdict, and change its mind there. So only the
last lines count. A reply that does not match the grammar is not guessed at: the caller asks again.
"""

import html
import re
import unicodedata
from collections.abc import Sequence

LOWEST, HIGHEST = 1.0, 10.0

Entry = tuple[str, float]

_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
# Blocks of reasoning: <think>, [THINK], <|begin_of_thought|>, and <|channel|>analysis.
_REASONING = re.compile(
    r"<\|channel\|>\s*(?P<channel>\w+)"
    r"|[<\[◁](?P<tag>[/|]*(?:\w+:)?\w*(?:think|thought|reason|reflect|analysis|scratchpad)\w*\|?)(?:\s[^<>\[\]\n]*)?[>\]▷]",
    re.IGNORECASE,
)
_CLOSING = re.compile(r"/|\bend|end_|_end", re.IGNORECASE)

_CELL = re.compile(r"</?t[dh]\b[^<>]*>", re.IGNORECASE)
_TAG = re.compile(r"<!--.*?(?:-->|\Z)|<[/|]?[a-z][^<>\n]*>|<(?=[\d.,]+>)|(?<=\d)>", re.IGNORECASE | re.DOTALL)
_POSSESSIVE = re.compile(r"['’]s\b")
_MARKUP = re.compile(r"""\\(?:boxed|text\w*)|\\[()\[\]_*#]|[*_`"'“”„«»‘’{}\[\]【】「」$]""")

_LABEL = r"(?:(?:final|overall|total) )?(?:scores?|ratings?|grades?|marks?|verdict)"
_SEPARATOR = r"(?::? ?\|[ |]*|:=|=>|->|→|[:=—]|[-–]+(?= ))"
_NAME = re.compile(
    rf"(?:\band |[,;|/&、] ?)?\b(?P<name>Assistant[ -]?[A-Z])\b ?(?:{_LABEL})? ?{_SEPARATOR} ?(?:{_LABEL} ?[:=] ?)?",
    re.IGNORECASE,
)
_BEFORE = re.compile(rf"\W*(?:\d+[.)]\W*)?(?:{_LABEL}(?: of| for)?\W*)?", re.IGNORECASE)
_SCORE = re.compile(
    r"[~≈]? ?(\d+(?:\.\d+|,\d\d?)?)"
    r"(?: ?\(?(?:/|out of) ?(?:10(?:[.,]0+)?(?!\d)|ten\b)\)?)?"
    r"(?: ?(?:points?|pts?|分|点|점|[★⭐]+))?"
    r"(?: ?\([^()\d]*\))?"
    r"(?: ?[.,;:!。|—][^\d]*| [-–]+ [^\d]+)? ?",
    re.IGNORECASE,
)


def read_verdict(reply: str, names: Sequence[str]) -> list[float] | None:
    """Return a score from 1 to 10 for each name, or None unless the reply ends with all of them.

    If several verdicts follow each other, the last one counts.
    """
    run: list[Entry] = []
    for line in _lines(after_reasoning(_readable(reply))):
        entries = _entries(line)
        run = [] if entries is None else run + entries
    last = dict(run[-len(names) :])
    if len(run) % len(names) or last.keys() != {_key(name) for name in names}:
        return None
    scores = [last[_key(name)] for name in names]
    return scores if all(LOWEST <= score <= HIGHEST for score in scores) else None


def _readable(reply: str) -> str:
    """Replace full-width and HTML-escaped characters by plain ones, and drop invisible ones."""
    text = html.unescape(reply).translate(_FULL_WIDTH)
    return "".join(c for c in text if unicodedata.category(c) != "Cf" and c != "\ufe0f")


def after_reasoning(text: str) -> str:
    """Return the text after the last block of reasoning; empty if that block is not closed."""
    found = list(_REASONING.finditer(text))
    if not found:
        return text
    last = found[-1]
    closed = last["channel"].lower() == "final" if last["channel"] else _CLOSING.search(last["tag"])
    return text[last.end() :] if closed else ""


def _lines(text: str) -> list[str]:
    """Return the lines that contain words, without markup and with single spaces."""
    text = _POSSESSIVE.sub("", _TAG.sub(" ", _CELL.sub("|", text)))
    lines = (" ".join(_MARKUP.sub(" ", line).split()) for line in text.splitlines())
    return [line for line in lines if re.search(r"\w", line)]


def _entries(line: str) -> list[Entry] | None:
    """Return the entries of a line, or None if the line does not consist of entries."""
    names = list(_NAME.finditer(line))
    if not names or not _BEFORE.fullmatch(line[: names[0].start()]):
        return None
    found: list[Entry] = []
    for name, end in zip(names, [n.start() for n in names[1:]] + [len(line)], strict=True):
        score = _SCORE.fullmatch(line[name.end() : end])
        if score is None:
            return None
        found.append((_key(name["name"]), float(score[1].replace(",", "."))))
    return found


def _key(name: str) -> str:
    return name[-1].upper()
