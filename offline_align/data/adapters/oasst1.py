"""OpenAssistant oasst1: trees of messages, published as flat messages or as nested trees.

Each user turn yields its best-ranked reply as an SFT row, and a preference pair for every two
replies with different ranks. Rank 0 is the best.

The dumps of all trees also contain unfinished and rejected ones: prompts without a reply, trees
that are still growing or whose ranks are not final, and trees that were stopped for quality or by a
moderator. Their ranks and replies differ from the finished set, so only trees in the state
`ready_for_export` are used.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from offline_align.data.adapters.columns import optional_text, text_column
from offline_align.data.adapters.counts import InputCounts
from offline_align.data.jsonl import RowError

ROLES = {"prompter": "user", "assistant": "assistant"}
UNUSABLE = "oasst1: message deleted, refused in review or written by a model"
UNREACHABLE = "oasst1: an earlier message of the dialogue is missing"
UNFINISHED = "oasst1: the tree is not finished, tree_state is"
TWICE = "oasst1: a message_id that occurred before"
UNANSWERED = "oasst1: a prompt without a usable reply"
UNRANKED = "oasst1: a reply that is not the best, and whose rank sets it apart from no other"

FINISHED = "ready_for_export"

type Dialogue = tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Node:
    """One message of a tree; the root has `parent_id` None, an unranked message has `rank` None."""

    id: str
    parent_id: str | None
    text: str
    role: str
    rank: float | None
    lang: str
    refusal: str | None
    """Why the message cannot be used; None if it can."""


def oasst1_nodes(columns: dict[str, Any]) -> list[Node]:
    """Return the messages of one published row: one flat message, or a whole nested tree.

    `tree_state` is the state of the tree; a row without this column counts as finished.
    """
    state = optional_text(columns, "tree_state") or FINISHED
    if not isinstance(columns.get("prompt"), dict):
        return [_node(columns, optional_text(columns, "parent_id") or None, state)]
    nodes = []
    waiting: list[tuple[dict[str, Any], str | None]] = [(columns["prompt"], None)]
    while waiting:
        message, parent_id = waiting.pop(0)
        node = _node(message, parent_id, state)
        nodes.append(node)
        waiting += [(reply, node.id) for reply in _replies(message)]
    return nodes


def _replies(message: dict[str, Any]) -> list[dict[str, Any]]:
    replies = message.get("replies") or []
    if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
        raise RowError("replies: not a list of objects")
    return replies


def _node(message: dict[str, Any], parent_id: str | None, tree_state: str) -> Node:
    rank = message.get("rank")
    if isinstance(rank, bool) or not isinstance(rank, (int, float, type(None))):
        raise RowError("rank: not a number")
    if message.get("role") not in list(ROLES):  # a list, because the role may be unhashable
        raise RowError("role: not prompter or assistant")
    return Node(
        id=text_column(message, "message_id"),
        parent_id=parent_id,
        text=text_column(message, "text"),
        role=ROLES[message["role"]],
        rank=rank,
        lang=optional_text(message, "lang"),
        refusal=_refusal(message, tree_state),
    )


def _refusal(message: dict[str, Any], tree_state: str) -> str | None:
    if tree_state != FINISHED:
        return f"{UNFINISHED} {tree_state}"
    refused = message.get("deleted") or message.get("synthetic") or message.get("review_result") is False
    return UNUSABLE if refused else None


def oasst1_rows(nodes: Sequence[Node], counts: InputCounts) -> Iterator[dict[str, Any]]:
    """Yield SFT rows and preference pairs of all trees; count each message as used or dropped."""
    unique: dict[str, Node] = {}
    for node in nodes:
        unique.setdefault(node.id, node)
    if len(nodes) > len(unique):
        counts.dropped[TWICE] += len(nodes) - len(unique)
    children: defaultdict[str | None, list[Node]] = defaultdict(list)
    for node in unique.values():
        if node.refusal is None:
            children[node.parent_id].append(node)
    reached: set[str] = set()
    used: set[str] = set()
    waiting: list[Dialogue] = [(root,) for root in reversed(children[None])]
    while waiting:
        dialogue = waiting.pop()
        reached.add(dialogue[-1].id)
        replies = children[dialogue[-1].id]
        if dialogue[-1].role == "user":
            yield from _rows(dialogue, [reply for reply in replies if reply.role == "assistant"], used)
        waiting += [(*dialogue, reply) for reply in reversed(replies)]
    counts.rows_used += len(used)
    counts.dropped.update(_reason(node, reached) for node in unique.values() if node.id not in used)


def _reason(node: Node, reached: set[str]) -> str:
    """Return why a message is in no row."""
    if node.refusal is not None:
        return node.refusal
    if node.id not in reached:
        return UNREACHABLE
    return UNANSWERED if node.role == "user" else UNRANKED


def _rows(dialogue: Dialogue, replies: Sequence[Node], used: set[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of one user turn, and add the ids of their messages to `used`."""
    if not replies:
        return
    best = min(replies, key=_order)
    used.update(node.id for node in (*dialogue, best))
    prompt = [{"role": node.role, "content": node.text} for node in dialogue]
    shared = {"source": "oasst1", "lang": best.lang, "prompt": prompt}
    yield {"id": best.id, **shared, "response": best.text}
    ranked = sorted((reply for reply in replies if reply.rank is not None), key=_order)
    for better, worse in combinations(ranked, 2):
        if better.rank != worse.rank:
            used.update((better.id, worse.id))
            pair_id = f"{better.id}-{worse.id}"
            yield {"id": pair_id, **shared, "chosen": better.text, "rejected": worse.text}


def _order(reply: Node) -> float:
    return float("inf") if reply.rank is None else reply.rank
