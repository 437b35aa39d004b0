"""The description of the model in a checkpoint: `model.json`, which can be read without torch.

A stage that loads a checkpoint reads architecture, template and condition from this file. Users do not
repeat them, and a model sees the same form of text in training, labelling and generation.
"""

import json
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from offline_align.config.sections import Backend, ConvertDtype, ModelSection, Template
from offline_align.data.condition import Condition
from offline_align.data.template import Encoding, Reading, Renderer
from offline_align.data.tokenizer import Tokenizer, load_tokenizer
from offline_align.errors import ConfigError, StorageError

FILE_NAME = "model.json"
ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class ModelDescription:
    """Architecture, tokenizer, template and method of a checkpoint."""

    kind: Literal["policy", "reward_model"]
    model: ModelSection
    template: Template
    tokenizer_hash: str
    condition: Condition | None = None
    method: str = ""
    template_date: str | None = None
    """The day that the template takes for today, as `YYYY-MM-DD`; None: it writes none, or nobody has fixed it."""
    reading: Reading | None = None
    """How a reward model of others reads rows; None: as ours do."""
    encoding: Encoding = Encoding.whole
    """Which texts of a dialogue are encoded together; files without this entry mean `pieces`."""
    source_dtype: str | None = None
    """The precision of the Hugging Face folder in which the chain of trainings began, `float32`, `bfloat16` or
    `float16`; None: it began with random weights, or an older version did not record it."""

    @property
    def text_form(self) -> dict[str, str]:
        """What determines how text becomes tokens.

        It must agree between two models if the output of one is training data of the other.
        """
        dated = {"template_date": self.template_date} if self.template_date else {}
        form = {"tokenizer_hash": self.tokenizer_hash, "template": self.template.value, "encoding": self.encoding.value}
        return form | dated

    def renderer(self, tokenizer: Tokenizer) -> Renderer:
        """Return what turns dialogues into the ids that the model was trained with."""
        day = date.fromisoformat(self.template_date) if self.template_date else None
        scores = self.kind == "reward_model"
        return Renderer(tokenizer, self.template, day, self.reading, self.encoding, scores)

    def save(self, folder: Path) -> None:
        """Write `model.json` into `folder`."""
        values = asdict(self)
        # These two belong to the run and not to the model.
        values["model"].pop("backend")
        values["model"].pop("tokenizer")
        (folder / FILE_NAME).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "ModelDescription":
        """Read `model.json` of a checkpoint folder. Raises StorageError if it is missing or damaged."""
        path = folder / FILE_NAME
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls._from_values(values)
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise StorageError(f"{path}: not a readable model description ({error})") from error

    def load_tokenizer(self, folder: Path) -> Tokenizer:
        """Return the tokenizer of a checkpoint folder.

        Raises StorageError if it is not the tokenizer that the model was trained with.
        """
        tokenizer = load_tokenizer(folder / "tokenizer")
        if tokenizer.content_hash != self.tokenizer_hash:
            raise StorageError(
                f"{folder / 'tokenizer'}: is not the tokenizer that the model was trained with; restore it from a copy"
            )
        return tokenizer

    @classmethod
    def _from_values(cls, values: dict[str, Any]) -> "ModelDescription":
        known = {f.name for f in fields(ModelSection)}
        unknown = set(values["model"]) - known
        if unknown or values["kind"] not in ("policy", "reward_model"):
            raise ValueError(f"unknown fields {sorted(unknown)} or kind {values['kind']!r}")
        _check_types(values["model"])
        return cls(
            kind=values["kind"],
            model=ModelSection(**values["model"], backend=Backend.auto, tokenizer=None),
            template=recorded_template(values["template"]),
            tokenizer_hash=str(values["tokenizer_hash"]),
            condition=Condition.from_values(values["condition"]),
            method=str(values["method"]),
            template_date=day_of(values.get("template_date")),
            reading=Reading.from_values(values.get("reading")),
            encoding=Encoding(values.get("encoding", Encoding.pieces)),
            source_dtype=dtype_of(values.get("source_dtype")),
        )


def recorded_template(value: Any) -> Template:
    """Return the template that a file records; ValueError if it is none that a model can have."""
    template = Template(value)
    if template is Template.auto:
        raise ValueError("the template of a model is paper or chat")
    return template


def dtype_of(value: Any) -> str | None:
    """Return a precision as files have it; ValueError if it is none."""
    return None if value is None else ConvertDtype(value).value


def day_of(value: Any) -> str | None:
    """Return a day as files have it; ValueError or TypeError where it is none."""
    return None if value is None else date.fromisoformat(value).isoformat()


def _check_types(values: dict[str, Any]) -> None:
    """Raise ValueError if the value of a field does not have the type that ModelSection declares."""
    for name, hint in get_type_hints(ModelSection).items():
        allowed = tuple(
            get_origin(kind) or kind for kind in (get_args(hint) if isinstance(hint, UnionType) else [hint])
        )
        value = values.get(name)
        fits = isinstance(value, allowed) or (float in allowed and type(value) is int)
        if name in values and (not fits or (isinstance(value, bool) and bool not in allowed)):
            raise ValueError(f"model.{name}={value!r}")


def is_huggingface(path: str | Path) -> bool:
    """Return whether `path` is a folder in Hugging Face format."""
    return (Path(path) / "config.json").is_file() and not (Path(path) / FILE_NAME).is_file()


def find_model(path: str | Path, key: str = "init.from") -> Path:
    """Return the Hugging Face folder or checkpoint folder that `path` names.

    Raises ConfigError, naming `key`, if there is none.
    """
    return Path(path).resolve() if is_huggingface(path) else find_checkpoint(path, key)


def find_checkpoint(path: str | Path, key: str = "init.from") -> Path:
    """Return the checkpoint folder that `path` names; for a run folder, this is its `checkpoints/latest`.

    Raises ConfigError, naming `key`, if `path` is neither a run folder nor a checkpoint folder.
    """
    given = Path(path)
    if not given.exists():
        raise ConfigError(
            f"{key}={path}: no such folder; give a run folder, a checkpoint folder or a Hugging Face folder"
        )
    for folder in (given, given / "checkpoints" / "latest"):
        if (folder / FILE_NAME).is_file():
            return folder.resolve()
    refuse_adapter(given, key)
    if (given / "checkpoints").is_dir():
        raise ConfigError(f"{key}={path}: this run has no finished checkpoint yet; run its command again")
    raise ConfigError(f"{key}={path}: neither a run folder, a checkpoint folder nor a Hugging Face folder")


def refuse_adapter(folder: Path, key: str = "init.from") -> None:
    """Raise ConfigError, naming `key`, if a folder holds an adapter such as LoRA instead of a full model."""
    if (folder / ADAPTER).is_file():
        raise ConfigError(
            f"{key}: {folder} holds an adapter ({ADAPTER}), not a model of its own; merge it into its base model and "
            "give the folder of that (peft: merge_and_unload, then save_pretrained of model and tokenizer)"
        )
