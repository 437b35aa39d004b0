"""A row as the model sees it, as a block of text that is decoded from the row's token ids.

Special tokens appear by name. Every line break appears as `\\n`, followed by a new line of the block,
and spaces at the end of a line as `\\x20`.
"""

from collections.abc import Iterator, Sequence

from offline_align.data.bins import PairSource, RowSource, SampleSource
from offline_align.data.template import Renderer
from offline_align.data.tokenize import TokenizedPairs, TokenizedRows
from offline_align.data.tokenizer import Tokenizer

_MOST_CHARACTERS = 600
"""A longer part of a row is cut in the middle."""


def first_row(source: RowSource, renderer: Renderer, answer: str = "target") -> str:
    """Return the first row of `source`; `answer` is the name of a sample's response in the block."""
    form = f"template {renderer.template}"
    if isinstance(source, PairSource):
        return show_pair(source.pairs, 0, renderer.tokenizer, form)
    assert isinstance(source, SampleSource)
    return show_sample(source.rows, 0, renderer.tokenizer, form, answer)


def show_sample(rows: TokenizedRows, row: int, tokenizer: Tokenizer, form: str, answer: str = "target") -> str:
    """Return one row: its context, its condition if it has one, and its response.

    The head names the row and its weight. `form` says how the row was rendered.
    """
    ids = _ids(rows, row)
    start = int(rows.target_start[row])
    before = start - _at(rows.condition_length, row)
    parts = [("prompt", before), ("condition", start), (answer, len(ids))]
    weight = f", weight {rows.weight[row]:.3g}" if rows.weight[row] != 1 else ""
    head = f"{rows.row_ids[row]}: {len(ids):,} tokens, {len(ids) - start:,} of them {answer}{weight}, {form}"
    return show_parts(head, ids, parts, tokenizer)


def show_pair(pairs: TokenizedPairs, row: int, tokenizer: Tokenizer, form: str) -> str:
    """Return one pair: the prompt, then each answer behind it."""
    sides = {"chosen": pairs.chosen, "rejected": pairs.rejected}
    ids = {name: _ids(side, row) for name, side in sides.items()}
    counts = ", ".join(f"{name} {len(found):,}" for name, found in ids.items())
    margin = pairs.margin[row]
    scale = "" if margin != margin else f", margin {margin:.3g}"
    head = f"{pairs.row_ids[row]}: tokens with the prompt: {counts}{scale}, {form}"
    blocks: list[str] = []
    for name, side in sides.items():
        start = int(side.target_start[row])
        first = [("prompt", start)] if not blocks else [("", start)]
        blocks.append(show_parts(head if not blocks else "", ids[name], [*first, (name, len(ids[name]))], tokenizer))
    return "\n".join(blocks)


def show_prompt(row_id: str, ids: Sequence[int], condition_tokens: int, renderer: Renderer) -> str:
    """Return one prompt of token ids, of which the last `condition_tokens` are its condition."""
    head = f"{row_id}: {len(ids):,} tokens, template {renderer.template}"
    return show_parts(head, ids, [("prompt", len(ids) - condition_tokens), ("condition", len(ids))], renderer.tokenizer)


def show_parts(head: str, ids: Sequence[int], parts: Sequence[tuple[str, int]], tokenizer: Tokenizer) -> str:
    """Return `head` and the text of each part below it; a part is (name, index of the token behind it).

    Empty parts and parts without a name are left out.
    """
    lines = [head] if head else []
    done = ""
    for name, end in parts:
        # A text is decoded together with what precedes it, because some tokenizers drop the space at the start.
        whole = tokenizer.shown(ids[:end])
        text = whole[len(done) :] if whole.startswith(done) else whole
        done = whole
        if name and text:
            lines += [f"  {label:<10}{line}" for label, line in _labelled(name, text)]
    return "\n".join(lines)


def _labelled(name: str, text: str) -> Iterator[tuple[str, str]]:
    """Yield the lines of a part, the first of them with the name of the part."""
    for number, line in enumerate(_cut(text).splitlines(keepends=True)):
        bare = line.removesuffix("\n")
        shown = "".join(map(_visible, bare.rstrip(" "))) + "\\x20" * (len(bare) - len(bare.rstrip(" ")))
        yield ("" if number else name), shown + ("\\n" if line.endswith("\n") else "")


def _cut(text: str) -> str:
    if len(text) <= _MOST_CHARACTERS:
        return text
    half = _MOST_CHARACTERS // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


def _visible(character: str) -> str:
    return character if character.isprintable() else repr(character)[1:-1]


def _ids(rows: TokenizedRows, row: int) -> list[int]:
    found: list[int] = rows.ids[rows.offsets[row] : rows.offsets[row + 1]].tolist()
    return found


def _at(lengths: object, row: int) -> int:
    return lengths if isinstance(lengths, int) else int(lengths[row])  # type: ignore[index]
