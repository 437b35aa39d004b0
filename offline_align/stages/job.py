"""A job: one run of a stage, with its inputs, content key, run folder, ranks and manifest.

A job resolves the model once, hashes each input once, holds the lock of the run folder while it
runs, and writes the manifest last.
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from offline_align import lineage
from offline_align.config.compose import to_mapping
from offline_align.config.runs import ModelRun, Run, section
from offline_align.config.sections import DataSection, LauncherSection, ModelSection, OnBadRow, RowDataSection
from offline_align.convert.source import ModelSource
from offline_align.convert.template_choice import TemplateChoice
from offline_align.data.records import BadRows, input_paths
from offline_align.data.sources import input_sources
from offline_align.distributed.launched import launched
from offline_align.distributed.run_lock import run_lock
from offline_align.errors import ConfigError, StorageError
from offline_align.lineage import effort
from offline_align.model.description import find_model
from offline_align.progress import announced
from offline_align.stages.continuation import RunKey, begin_or_continue
from offline_align.stages.origin import resolve
from offline_align.stages.registry import Reads, Stage

if TYPE_CHECKING:
    from offline_align.distributed.setup import Ranks

logger = logging.getLogger(__name__)
QUARANTINE = "quarantine.jsonl"


class Job[R: Run]:
    """A run of `stage` with `config`; `explicit` are the keys that the user set."""

    def __init__(self, stage: Stage, config: R, explicit: frozenset[str] = frozenset()) -> None:
        self.stage = stage
        self.config = config
        self.explicit = explicit
        self.template: TemplateChoice | None = None
        """The template of the run, and why, once `fix_template` has settled it."""
        self._key: RunKey | None = None

    def change_data(self, keep_source: bool = False, **values: Any) -> None:
        """Set keys of the data section, and drop every cached property that depends on it.

        `keep_source` says that the model is not changed by the new values.
        """
        config: Any = self.config
        self.config = replace(config, data=replace(config.data, **values))
        for name in ("hashed", "settings", *([] if keep_source else ["source"])):
            self.__dict__.pop(name, None)

    @property
    def run_dir(self) -> Path:
        """The folder that all output goes to."""
        return Path(self.config.run.dir)

    @property
    def has_run_dir(self) -> bool:
        """Whether there is a run folder; for `plan` it is optional."""
        return self.config.run.dir not in (MISSING, None)

    @property
    def launcher(self) -> LauncherSection | None:
        """The launcher section; None for stages that run only as one process on this machine."""
        return section(self.config, LauncherSection)

    @property
    def cache_dir(self) -> Path:
        """The folder for the cache of tokenised data."""
        data = section(self.config, DataSection)
        return Path(data.cache_dir) if data is not None and data.cache_dir else self.run_dir / "cache"

    # ---- Inputs

    @cached_property
    def source(self) -> ModelSource:
        """The model that `init.from` and `model.*` name. Raises ConfigError with all problems."""
        assert isinstance(self.config, ModelRun)
        return resolve(self.config, self.explicit)

    @property
    def inputs(self) -> list[Path]:
        """The data files. Raises ConfigError for missing ones."""
        given = {key: value for key, value in self.config.named_files().items() if value is not None}
        if self.stage.reads is Reads.raw_rows:
            sources = [source for key, value in given.items() for source in input_sources(value, key)]
            return [source.path for source in sources if source.path]
        return [path for key, value in given.items() for path in input_paths(value, key)]

    @property
    def models(self) -> list[Path]:
        """The checkpoint or Hugging Face folders that the run builds on.

        Raises ConfigError for a folder that is neither.
        """
        named = self.config.named_models()
        return [find_model(source, key) for key, source in named.items() if source is not None]

    @property
    def shown_runs(self) -> list[Path]:
        """The folders of the finished runs that `evaluate.runs` names, without the folder of this run.

        Raises ConfigError for a folder without a finished run.
        """
        found: list[Path] = []
        for name in self.config.named_runs():
            folder = Path(name)
            is_run = (folder / lineage.MANIFEST).is_file()
            some = [folder] if is_run else sorted(path.parent for path in folder.glob(f"*/{lineage.MANIFEST}"))
            if not some:
                raise ConfigError(
                    f"evaluate.runs={name}: has no finished run; give run folders, or a folder of run folders"
                )
            found += some
        own = self.run_dir.resolve()
        return [path for path in dict.fromkeys(run.resolve() for run in found) if path != own]

    @cached_property
    def hashed(self) -> lineage.Sources:
        """The hashes of everything that the run reads. Use it on one rank only: it reads every file."""
        return lineage.read_sources(self.inputs, [*self.models, *self.shown_runs])

    @cached_property
    def settings(self) -> lineage.RunSettings:
        """Everything that determines the result. The first use hashes every input."""
        return lineage.run_settings(self.stage.name, to_mapping(self.config), self.hashed)

    # ---- Life cycle

    @property
    def key(self) -> RunKey:
        """The content keys of the run. Before `on_ranks` begins, they come from the settings alone."""
        return self._key or RunKey(self.settings.key, self.settings.continuation)

    def is_finished(self) -> bool:
        """Return whether this run is complete; if so, log it and remove leftover files.

        Raises ConfigError if the folder has another run.
        """
        settings = to_mapping(self.config)
        done = lineage.completed(
            self.run_dir,
            self.stage.name,
            self.settings.key,
            lambda manifest: lineage.differences(self.run_dir, manifest, settings, self.settings),
        )
        if done:
            # They still exist if the run was killed right after it wrote its manifest.
            shutil.rmtree(self.run_dir / "journal", ignore_errors=True)
            effort.forget(self.run_dir)
            logger.info("%s: %s is complete", self.stage.name, self.run_dir)
        return done

    @contextlib.contextmanager
    def held(self, continued: bool = False) -> Iterator[bool]:
        """Lock the run folder for the block, on one rank, and yield whether there is work to do.

        Records the effort of this attempt. If the run can be `continued`, adds it to that of earlier
        attempts. Raises ConfigError if another job holds the lock.
        """
        with run_lock(self.run_dir, self.stage.name):
            # Another job may have finished the run in the meantime.
            to_do = not self.is_finished()
            broken = lineage.incomplete_outputs(self.run_dir, lineage.read_manifest(self.run_dir))
            if broken:
                logger.warning("%s: %s is missing or incomplete and is written again", self.run_dir, ", ".join(broken))
            key = self.settings.continuation if continued else self.settings.key
            with effort.recorded(self.run_dir, key) if to_do else contextlib.nullcontext():
                yield to_do

    def on_ranks(self, body: "Callable[[Ranks], None]") -> int:
        """Run `body(ranks)` on all ranks unless the run is finished; return the exit code 0.

        In a process that no launcher started, this checks for a finished run before heavy imports.
        """
        if launched() is None and self.is_finished():
            return 0
        config: Run = self.config
        assert isinstance(config, ModelRun)
        with contextlib.ExitStack() as stack:
            with announced("starting torch and megatron-core"):
                from offline_align.distributed.setup import session

                ranks = stack.enter_context(session(config.parallel, config.run))

            def begin() -> RunKey | None:
                if self.is_finished() or not stack.enter_context(self.held(continued=True)):
                    return None
                return begin_or_continue(self.run_dir, self.settings, lineage.flat(self._in_effect()))

            self._key = ranks.from_main(begin)
            if self._key is not None:
                body(ranks)
        return 0

    def alone(self, body: Callable[[], None]) -> None:
        """Run `body` in this process, unless the run is finished."""
        if self.is_finished():
            return
        with self.held() as to_do:
            if to_do:
                body()

    def _in_effect(self) -> dict[str, Any]:
        """Return the settings, with the architecture and the template of the model that is loaded."""
        found = to_mapping(self.config)
        if isinstance(self.config, ModelRun) and self.config.init.from_ is not None:
            given = self.config.model.tokenizer if "model.tokenizer" in self.explicit else None
            found["model"] = to_mapping(replace(self.source.model, tokenizer=given))
            found["template"] = self.source.description.template.value
        return found

    def start_folder(self, model: ModelSection | None = None, ranks: "Ranks | None" = None) -> None:
        """Create the run folder with `config.yaml`. If `ranks` are given, rank 0 does it and all wait.

        `model` replaces the model section in `config.yaml`: if weights are loaded, the configuration
        does not state their architecture.
        """
        if ranks is None or ranks.is_main:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            # Without this, matplotlib would write a font cache into the home folder.
            os.environ.setdefault("MPLCONFIGDIR", str((self.run_dir / "cache" / "matplotlib").resolve()))
            own = {"model": to_mapping(replace(model, tokenizer=None))} if model is not None else {}
            lineage.write_config(self.run_dir, to_mapping(self.config) | own)
            self._say_template()
        if ranks is not None:
            ranks.barrier()

    def _say_template(self) -> None:
        """Log which template the run uses, and why; as a warning if it replaces that of the model's folder."""
        choice = self.template
        if choice is not None:
            logger.log(logging.WARNING if choice.is_fallback else logging.INFO, "template   %s", choice.in_words())

    def bad_rows(self, writes: bool = True) -> BadRows:
        """Return the handler of bad rows. Call it once per run, with `writes` on one rank only.

        That rank writes the quarantine file. It first removes the file of an earlier attempt, because
        the data may have been corrected since. Raises StorageError if that fails.
        """
        data = section(self.config, RowDataSection)
        policy = data.on_bad_row if data is not None else OnBadRow.fail
        if not writes or not self.has_run_dir:
            return BadRows(policy, None)
        quarantine = self.run_dir / QUARANTINE
        try:
            quarantine.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"{quarantine}: cannot be removed: {error.strerror or error}") from error
        return BadRows(policy, quarantine)

    def finish(self, outputs: Iterable[Path], facts: Mapping[str, Any]) -> None:
        """Write the manifest, which marks the run as complete.

        It lists those of `outputs` that exist, and the quarantine file if there is one. `facts` go
        into its `extra`.
        """
        written = [path for path in dict.fromkeys([*outputs, self.run_dir / QUARANTINE]) if path.exists()]
        extra = {**facts, **self.key.facts}
        lineage.write_manifest(self.run_dir, self.stage.name, self.key.finished, self.hashed, written, extra)
