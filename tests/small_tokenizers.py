"""Small tokenizers that tests train in a fraction of a second."""

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

CORPUS = [
    "The quick brown fox jumps over the lazy dog, again and again.",
    "User:Hello, how are you?Assistant: Fine, thank you! What can I do for you today?",
    "Scores such as 0.0, -1.5, 2.3, 4.7, 5.0, -6.8 and 9.9 are numbers.",
    "System:You are a helpful assistant.\nAnswer in short lines.\n\n- one\n- two",
] * 5

CHATML = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ["<|begin|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]


@cache
def sentencepiece_model(kind: str = "bpe", split_digits: bool = True, lossy: bool = False, eos_id: int = 2) -> bytes:
    """Return a model of 400 pieces with byte fallback and the user-defined symbols `<rm_score>` and `-->`."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=400,
        model_type=kind,
        byte_fallback=True,
        split_digits=split_digits,
        control_symbols=["<ctl>"],
        user_defined_symbols=["<rm_score>", "-->"],
        normalization_rule_name="nmt_nfkc" if lossy else "identity",
        remove_extra_whitespaces=lossy,
        hard_vocab_limit=False,
        eos_id=eos_id,
        minloglevel=2,
    )
    return model.getvalue()


def write_sentencepiece(folder: Path, **options: Any) -> Path:
    """Write `tokenizer.model` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.model"
    path.write_bytes(sentencepiece_model(**options))
    return path


@cache
def _byte_level(adds_bos: bool) -> str:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<rm_score>", special=False, normalized=False)])
    if adds_bos:
        bos = ("<|begin|>", tokenizer.token_to_id("<|begin|>"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[bos]
        )
    return str(tokenizer.to_str())


def write_hugging_face(folder: Path, chat_template: Any = CHATML, adds_bos: bool = False, **config: Any) -> Path:
    """Write a `tokenizer.json`, byte-level BPE with `SPECIALS`, and its configuration; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(_byte_level(adds_bos), encoding="utf-8")
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True},
        "pad_token": "<|pad|>",
    }
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | config), encoding="utf-8")
    return folder


TEMPLATES = {
    "chatml": CHATML,
    "spaces": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
    ),
    "touching": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "empty_thought": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}"
        "<think>\n\n</think>\n\n{% endif %}{{ m['content'].split('</think>')[-1].lstrip('\n') }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "thoughts": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last and "
        "'</think>' not in m['content'] %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "headings": (
        "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant:\n{% endif %}"
    ),
}
"""Chat templates that write something around an answer, or nothing."""


def with_spaces_in_front(folder: Path, form: str, chat_template: str, **config: Any) -> Path:
    """Write a `tokenizer.json` that puts a space in front of text, by one of three rules, and return its folder.

    `prepend` and `always` do it behind special tokens too, `first` at the start of a text alone.
    """
    from tokenizers import AddedToken

    from offline_align.data.sentencepiece_fast import convert

    fast = convert(write_sentencepiece(folder / "source"))
    assert fast is not None
    fast.add_special_tokens([AddedToken(text, normalized=False) for text in ("<|im_start|>", "<|im_end|>")])
    definition = json.loads(fast.to_str())
    if form != "prepend":
        definition["normalizer"] = None
        definition["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": form, "split": False}
    (folder / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": chat_template} | config))
    return folder
