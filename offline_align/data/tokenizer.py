"""Tokenizers: SentencePiece `.model` files and Hugging Face `tokenizer.json` files, read as data only.

No code that comes with a tokenizer is run, and nothing is unpickled. User text never becomes a
special token: a literal `</s>` or `<|im_end|>` in a row is encoded as plain characters. Only text
from a template may name special tokens (`special=True`).
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from offline_align.data.companions import (
    COMPANIONS,
    HUGGING_FACE_FILE,
    json_object,
    roles,
    settings,
    with_added_tokens,
)
from offline_align.data.prefix import After, Breaks, Prefixed, PrefixRule, rule_of, without_prefix
from offline_align.data.sentencepiece_model import parsed, processor, without_dummy_prefix, without_markers
from offline_align.errors import ConfigError, StorageError

logger = logging.getLogger(__name__)

SENTENCEPIECE_FILE = "tokenizer.model"
USUAL_EOS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[EOS]")
"""Tokens that can be the end of sequence of a `tokenizer.json` whose companions name none."""

MOST_ENTRIES = 10_000_000
"""A file with larger ids is taken to be damaged; the largest vocabularies have about a million entries."""


class Tokenizer(Protocol):
    """Converts text to token ids and back."""

    vocab_size: int
    """Number of embedding rows that the ids need: the largest id plus 1."""
    eos_id: int
    """End of sequence; every tokenizer has one."""
    bos_id: int | None
    """Beginning of sequence."""
    pad_id: int | None
    """Padding; packed batches need none."""
    adds_bos: bool
    """Whether the tokenizer's own rules start every sequence with `bos_id`."""
    named_tokens: dict[str, str]
    """Special tokens by role (`eos_token`, ...), under the names that chat templates use."""
    special_texts: tuple[str, ...]
    """Strings that become one special token if `special=True`."""
    chat_template: str | None
    """Jinja source of the chat template."""
    template_origin: str
    """The file that holds the chat template. If there is none in spite of a file: the reason, else empty."""
    prefix_rule: PrefixRule
    """Where a space is added to the start of a text."""
    content_hash: str
    """SHA-256 of everything that determines the ids of a dialogue."""

    def encode(self, text: str, special: bool = False, after: After = After.nothing) -> list[int]:
        """Return the ids of `text` without begin or end of sequence; `after` says what precedes the text.

        Special-token strings in `text` are plain characters unless `special` is set.
        """

    def encode_batch(
        self, texts: Sequence[str], special: bool = False, after: After = After.nothing
    ) -> list[list[int]]:
        """Return the ids of every text; see `encode`. Uses all cores."""

    def behind(self, text: str, special: bool = False) -> After:
        """Return the value of `after` with which to encode a text that follows `text`."""

    def decode(self, ids: Sequence[int], after: After = After.nothing) -> str:
        """Return the text of `ids` without special tokens; `after` says what precedes the ids."""

    def shown(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` with its special tokens, for display."""

    def save(self, folder: Path) -> None:
        """Write the files that `load_tokenizer(folder)` needs. Raises StorageError."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Return the tokenizer of a `.model` or `tokenizer.json` file, or of a folder with either of them.

    If a folder has both, `tokenizer.json` is used, as in Hugging Face. Companion files are applied
    to a `tokenizer.json` and to the `.model` of a folder; a `.model` file that is given by its own
    path is read without them. Files with the same content give the same object, which is built once.
    Raises ConfigError naming `model.tokenizer`.
    """
    found = _find(Path(path))
    try:
        beside = [found.with_name(name) for name in COMPANIONS]
        companions = {file.name: file.read_bytes() for file in beside if file.is_file()}
        if found.suffix == ".json":
            return _from_files(tuple(({HUGGING_FACE_FILE: found.read_bytes()} | companions).items()))
        if companions and Path(path).is_dir():
            from offline_align.data.sentencepiece_folder import with_tokenizer_json

            files = with_tokenizer_json(found.read_bytes(), companions)
            if files is not None:
                return _from_files(tuple(files.items()))
            logger.warning("%s: read without %s: no tokenizer.json can reproduce its ids", found, ", ".join(companions))
        return _from_model(found.read_bytes())
    except OSError as error:
        raise _problem(found, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise _problem(found, str(error)) from error
    except BaseException as error:
        # The file is third-party data, and the libraries that parse it have no common error class.
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        raise _problem(found, f"is damaged ({type(error).__name__}: {str(error).partition('\n')[0]})") from error


# A command reads the same tokenizer from its model, its judge and its checkpoints. To build a large one takes seconds.
@lru_cache(maxsize=4)
def _from_files(files: tuple[tuple[str, bytes], ...]) -> "HuggingFaceTokenizer":
    return HuggingFaceTokenizer(dict(files))


@lru_cache(maxsize=4)
def _from_model(model: bytes) -> "SentencePieceTokenizer":
    return SentencePieceTokenizer(model)


def is_panic(error: BaseException) -> bool:
    """Return whether an error is a panic of a Rust library, whose class is private and no `Exception`."""
    return type(error).__name__ == "PanicException"


def _find(path: Path) -> Path:
    if path.is_file():
        if path.suffix not in (".json", ".model"):
            raise _problem(path, "is neither a SentencePiece .model nor a tokenizer.json")
        return path
    if not path.is_dir():
        raise _problem(path, "no such file or folder")
    known = [path / HUGGING_FACE_FILE, path / SENTENCEPIECE_FILE, *sorted(path.glob("*.model"))]
    for candidate in known:
        if candidate.is_file():
            return candidate
    raise _problem(path, f"the folder has neither {HUGGING_FACE_FILE} nor a .model file")


def _problem(path: Path, reason: str) -> ConfigError:
    return ConfigError(f"model.tokenizer={path}: {reason}")


def _sha256(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
    except OSError as error:
        raise StorageError(f"{folder}: cannot write the tokenizer: {error.strerror}") from error


class SentencePieceTokenizer(Prefixed):
    """A SentencePiece model. Its file has no chat template and no rule that adds begin of sequence.

    SentencePiece never matches control symbols in text, but it does match user-defined symbols.
    Those that look like markers (`<name>`, `[NAME]`) are therefore disabled for plain text; others,
    such as runs of spaces, stay enabled.
    """

    chat_template: str | None = None
    template_origin = ""
    adds_bos = False

    def __init__(self, model: bytes) -> None:
        self._model = model
        plain, self.special_texts = without_markers(model)
        self._special, self._plain = processor(model), processor(plain)
        self._processors = {(True, False): self._special, (False, False): self._plain}
        self._set_prefix(model, plain)
        self.vocab_size = int(self._special.get_piece_size())
        self.eos_id = int(self._special.eos_id())
        if self.eos_id < 0:
            raise ValueError("has no end-of-sequence piece; train it with eos_id >= 0")
        self.bos_id = _present(self._special.bos_id())
        self.pad_id = _present(self._special.pad_id())
        roles = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        self.named_tokens = {r: self._special.id_to_piece(i) for r, i in roles.items() if i is not None}
        self.content_hash = _sha256([b"sentencepiece", model])

    def _set_prefix(self, model: bytes, plain: bytes) -> None:
        proto = parsed(model)
        adds = proto.normalizer_spec.add_dummy_prefix and not proto.trainer_spec.treat_whitespace_as_suffix
        self.prefix_rule = PrefixRule.always if adds else PrefixRule.never
        self._strips = proto.normalizer_spec.remove_extra_whitespaces
        self._breaks = dict.fromkeys((True, False), Breaks({}, special=True))
        for special, content in ((True, model), (False, plain)):
            usual = self._processors[special, False]
            self._processors[special, True] = processor(without_dummy_prefix(content)) if adds else usual

    def _encoded(self, texts: Sequence[str], special: bool, apart: bool) -> list[list[int]]:
        ids: list[list[int]] = self._processors[special, apart].encode(list(texts), out_type=int)
        return ids

    def _decoded(self, ids: Sequence[int], apart: bool) -> str:
        return str(self._processors[True, apart].decode([int(i) for i in ids]))

    def shown(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.shown`."""
        pieces = [self._special.id_to_piece(int(i)) if self._special.is_control(int(i)) else None for i in ids]
        return _shown(self, ids, pieces)

    def save(self, folder: Path) -> None:
        """See `Tokenizer.save`."""
        _write(folder, {SENTENCEPIECE_FILE: self._model})


def _shown(tokenizer: Tokenizer, ids: Sequence[int], named: Sequence[str | None]) -> str:
    """Return the text of `ids`, in which ids with a name in `named` appear as that name."""
    shown, run = "", list[int]()
    for token, name in zip(ids, named, strict=True):
        if name is None:
            run.append(token)
        else:
            shown, run = shown + tokenizer.decode(run) + name, []
    return shown + tokenizer.decode(run)


def _present(token_id: int) -> int | None:
    return int(token_id) if token_id >= 0 else None


class HuggingFaceTokenizer(Prefixed):
    """A `tokenizer.json` with the special tokens and the chat template of its companions.

    A token is special if `tokenizer.json` flags it or if a companion names it in a role. Truncation
    and padding that were saved with the file are disabled.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._files = dict(files)
        config = settings(self._files)
        definition = with_added_tokens(json_object(self._files, HUGGING_FACE_FILE), config, self._files)
        definition |= {"truncation": None, "padding": None}
        self.named_tokens = _named_tokens(config, definition)
        self.special_texts = _flag_special(definition, set(self.named_tokens.values()))
        self.prefix_rule = rule_of(definition)
        self._backends = _backends(definition, apart=self.prefix_rule is not PrefixRule.never)
        self._special = self._backends[True, False]
        unknown = (definition.get("model") or {}).get("unk_token")
        self._never_text = {self._special.token_to_id(text) for text in self.special_texts if text != unknown}
        self.vocab_size = max(self._special.get_vocab(with_added_tokens=True).values(), default=0) + 1
        if self.vocab_size > MOST_ENTRIES:
            raise ValueError(f"has the id {self.vocab_size - 1}: no vocabulary is that large; the file is damaged")
        eos = self._id_of("eos_token")
        if eos is None and "eos_token" in self.named_tokens:
            raise self._unknown("eos_token")
        if eos is None:
            raise ValueError("names no end of sequence; put tokenizer_config.json with eos_token beside it")
        self.eos_id = eos
        self.bos_id = self._id_of("bos_token")
        self.pad_id = self._id_of("pad_token")
        self.adds_bos = self._adds_bos(config.get("add_bos_token"))
        self.chat_template, self.template_origin = _chat_template(config, self._files)
        begins = config.get("add_bos_token") is True or "bos_token" in (self.chat_template or "")
        if begins and self.bos_id is None and "bos_token" in self.named_tokens:
            raise self._unknown("bos_token")
        self._breaks = {special: Breaks(definition, special) for special in (True, False)}
        self._strips = self._encoded(["a "], True, False) == self._encoded(["a"], True, False)
        rules = [definition, self.named_tokens, self.adds_bos, self.chat_template]
        self.content_hash = _sha256(json.dumps(rule, sort_keys=True).encode() for rule in rules)

    def _unknown(self, role: str) -> ValueError:
        return ValueError(
            f"{role}={self.named_tokens[role]!r} of the files beside it is not in its vocabulary; "
            "name a token that is, or save the tokenizer with it"
        )

    def _id_of(self, role: str) -> int | None:
        text = self.named_tokens.get(role)
        return None if text is None else self._special.token_to_id(text)

    def _adds_bos(self, setting: object) -> bool:
        if self.bos_id is None:
            return False
        if isinstance(setting, bool):
            return setting
        return bool(self._special.encode("a").ids[:1] == [self.bos_id])

    def _encoded(self, texts: Sequence[str], special: bool, apart: bool) -> list[list[int]]:
        backend = self._backends[special, apart]
        ids = [e.ids for e in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        return ids if special else [self._spelt(t, i, apart) for t, i in zip(texts, ids, strict=True)]

    def _spelt(self, text: str, ids: list[int], apart: bool) -> list[int]:
        """Return the ids of plain `text`, with special tokens that the model matched in it spelt out."""
        if self._never_text.isdisjoint(ids):
            return ids
        parts = re.split("(" + "|".join(map(re.escape, self.special_texts)) + ")", text)
        texts = [piece for part in parts for piece in (part if part in self.special_texts else [part]) if piece]
        backends = [self._backends[False, apart or place > 0] for place in range(len(texts))]
        return [
            token
            for backend, piece in zip(backends, texts, strict=True)
            for token in backend.encode(piece, add_special_tokens=False).ids
        ]

    def _decoded(self, ids: Sequence[int], apart: bool) -> str:
        return str(self._backends[True, apart].decode([int(i) for i in ids], skip_special_tokens=True))

    def shown(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.shown`."""
        return str(self._special.decode([int(i) for i in ids], skip_special_tokens=False))

    def save(self, folder: Path) -> None:
        """See `Tokenizer.save`."""
        _write(folder, self._files)


def _backends(definition: dict[str, Any], apart: bool) -> dict[tuple[bool, bool], Any]:
    """Return the backends by (whether special tokens are matched, whether the prefix is left out)."""
    made: dict[tuple[bool, bool], Any] = {}
    for special in (True, False):
        usual = _backend(definition)
        without = _backend(without_prefix(definition)) if apart else usual
        for backend in (usual, without):
            backend.encode_special_tokens = not special  # True: encode them as plain characters
        made |= {(special, False): usual, (special, True): without}
    return made


def _backend(definition: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer as Backend

    try:
        return Backend.from_str(json.dumps(definition))
    except Exception as error:  # the library raises a bare Exception for every fault of the file
        raise ValueError(f"is not a usable tokenizer.json: {error}") from error


def _named_tokens(config: dict[str, Any], definition: dict[str, Any]) -> dict[str, str]:
    """Return `{role: token}` of the companions, with a usual end of sequence if they name none."""
    named = roles(config)
    if "eos_token" not in named:
        added = {token["content"] for token in definition.get("added_tokens") or []}
        usual = [text for text in USUAL_EOS if text in added]
        if len(usual) == 1:
            named["eos_token"] = usual[0]
    return named


def _flag_special(definition: dict[str, Any], named: set[str]) -> tuple[str, ...]:
    """Flag the named added tokens as special in `definition` and return all that are special."""
    special = []
    for token in definition.get("added_tokens") or []:
        token["special"] = bool(token.get("special")) or token["content"] in named
        if token["special"]:
            special.append(str(token["content"]))
    return tuple(special)


def _chat_template(config: dict[str, Any], files: Mapping[str, bytes]) -> tuple[str | None, str]:
    """Return the chat template and its file; if there is no template for plain dialogues, None and why."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode("utf-8"), "chat_template.jinja"
    source, origin = config.get("chat_template"), "tokenizer_config.json"
    if isinstance(source, list):  # several named templates; `default` is for plain dialogues
        named = {str(entry.get("name")): entry.get("template") for entry in source}
        if "default" not in named:
            return None, f"{origin} has chat templates only for {', '.join(named)}, and none named default"
        source = named["default"]
    return (source, origin) if isinstance(source, str) else (None, "")
