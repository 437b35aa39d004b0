"""OpenAssistant oasst1: trees of messages, published as flat messages or as nested trees.

Each user turn gives its best-ranked reply as an SFT row, and a preference pair for every two of its
replies that people ranked differently. Rank 0 is the best.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from offline_align.data.adapters.columns import optional_text, text_column
from offline_align.data.jsonl import RowError

ROLES = {"prompter": "user", "assistant": "assistant"}
UNUSABLE = "oasst1: message deleted, refused in review or written by a model"
UNREACHABLE = "oasst1: an earlier message of the dialogue is missing"

type Messages = tuple[dict[str, str], ...]


@dataclass(frozen=True, slots=True)
class Node:
    """One message of a tree; `parent_id` None is the root, `rank` None was never ranked."""

    id: str
    parent_id: str | None
    text: str
    role: str
    rank: float | None
    lang: str
    usable: bool


def oasst1_nodes(columns: dict[str, Any]) -> list[Node]:
    """Return the messages of one published row: one flat message, or a whole nested tree."""
    if not isinstance(columns.get("prompt"), dict):
        return [_node(columns, optional_text(columns, "parent_id") or None)]
    nodes = []
    waiting: list[tuple[dict[str, Any], str | None]] = [(columns["prompt"], None)]
    while waiting:
        message, parent_id = waiting.pop(0)
        node = _node(message, parent_id)
        nodes.append(node)
        waiting += [(reply, node.id) for reply in _replies(message)]
    return nodes


def _replies(message: dict[str, Any]) -> list[dict[str, Any]]:
    replies = message.get("replies") or []
    if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
        raise RowError("replies: not a list of objects")
    return replies


def _node(message: dict[str, Any], parent_id: str | None) -> Node:
    rank = message.get("rank")
    if isinstance(rank, bool) or not isinstance(rank, (int, float, type(None))):
        raise RowError("rank: not a number")
    if message.get("role") not in ROLES:
        raise RowError("role: not prompter or assistant")
    refused = message.get("deleted") or message.get("synthetic") or message.get("review_result") is False
    return Node(
        id=text_column(message, "message_id"),
        parent_id=parent_id,
        text=text_column(message, "text"),
        role=ROLES[message["role"]],
        rank=rank,
        lang=optional_text(message, "lang"),
        usable=not refused,
    )


def oasst1_rows(nodes: Sequence[Node], drops: Counter[str]) -> Iterator[dict[str, Any]]:
    """Yield SFT rows and preference pairs of all trees; messages that cannot be used are counted."""
    children: defaultdict[str | None, list[Node]] = defaultdict(list)
    for node in nodes:
        children[node.parent_id].append(node)
    waiting: list[tuple[Node, Messages]] = [(root, ()) for root in reversed(children[None])]
    unreached = len(nodes)
    while waiting:
        node, history = waiting.pop()
        unreached -= 1
        if not node.usable:
            drops[UNUSABLE] += 1
            continue
        dialogue = (*history, {"role": node.role, "content": node.text})
        replies = children[node.id]
        if node.role == "user":
            yield from _rows(dialogue, [reply for reply in replies if reply.usable])
        waiting += [(reply, dialogue) for reply in reversed(replies)]
    if unreached:
        drops[UNREACHABLE] += unreached


def _rows(dialogue: Messages, replies: Sequence[Node]) -> Iterator[dict[str, Any]]:
    if not replies:
        return
    best = min(replies, key=_order)
    shared = {"source": "oasst1", "lang": best.lang, "prompt": list(dialogue)}
    yield {"id": best.id, **shared, "response": best.text}
    ranked = sorted((reply for reply in replies if reply.rank is not None), key=_order)
    for better, worse in combinations(ranked, 2):
        if better.rank != worse.rank:
            pair_id = f"{better.id}-{worse.id}"
            yield {"id": pair_id, **shared, "chosen": better.text, "rejected": worse.text}


def _order(reply: Node) -> float:
    return float("inf") if reply.rank is None else reply.rank
