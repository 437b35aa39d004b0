"""One root dataclass for every command: the sections it has, in the order a user meets them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offline_align.config import sections as s


@dataclass(frozen=True)
class Run:
    """What every command has."""

    run: s.RunSection = field(default_factory=s.RunSection)
    dry_run: bool = False
    """Print the resolved plan and exit 0: no GPU, no process group, nothing written."""
    debug: bool = False
    """Show tracebacks instead of one line for each error."""

    def named_files(self) -> dict[str, Any]:
        """Return the values of the keys that name data files; None for a key that is not set."""
        return {}

    def named_models(self) -> dict[str, str | None]:
        """Return the values of the keys that name models; None for a key that is not set."""
        return {}

    def named_runs(self) -> list[str]:
        """Return the run folders, or folders of runs, that the command shows."""
        return []


def section[S](config: Run, kind: type[S]) -> S | None:
    """Return the section of `kind` that a command has, or None if it has none."""
    return next((part for part in vars(config).values() if isinstance(part, kind)), None)


@dataclass(frozen=True)
class PrepareRun(Run):
    """`prepare`: raw data sets to rows."""

    data: s.RawDataSection = field(default_factory=s.RawDataSection)
    prepare: s.PrepareSection = field(default_factory=s.PrepareSection)
    tokenizer: s.TokenizerSection = field(default_factory=s.TokenizerSection)
    trainer: s.LimitSection = field(default_factory=s.LimitSection)
    launcher: s.LauncherSection = field(default_factory=s.LauncherSection)

    def named_files(self) -> dict[str, Any]:
        """Return `data.input`, which may also name the demo corpus and data sets of the hub."""
        return {"data.input": self.data.input}


@dataclass(frozen=True)
class ModelRun(Run):
    """What every command that runs a model has."""

    init: s.InitSection = field(default_factory=s.InitSection)
    model: s.ModelSection = field(default_factory=s.ModelSection)
    parallel: s.ParallelSection = field(default_factory=s.ParallelSection)
    launcher: s.LauncherSection = field(default_factory=s.LauncherSection)

    def named_models(self) -> dict[str, str | None]:
        """Return `init.from`."""
        return {"init.from": self.init.from_}


@dataclass(frozen=True)
class TrainRun(ModelRun):
    """`sft`, and the base of the other training commands."""

    data: s.TrainDataSection = field(default_factory=s.TrainDataSection)
    trainer: s.TrainerSection = field(default_factory=s.TrainerSection)
    optim: s.OptimSection = field(default_factory=s.OptimSection)

    def named_files(self) -> dict[str, Any]:
        """Return the rows for training and for validation."""
        return {"data.train": self.data.train, "data.valid": self.data.valid}


@dataclass(frozen=True)
class RewardRun(TrainRun):
    """`reward`: reward-model training."""

    method: s.RewardMethodSection = field(default_factory=s.RewardMethodSection)


@dataclass(frozen=True)
class FilteringRun(TrainRun):
    """`fa`: Filtering Alignment."""

    method: s.FilteringMethodSection = field(default_factory=s.FilteringMethodSection)


@dataclass(frozen=True)
class RewardWeightedRun(TrainRun):
    """`rwr`: Reward-Weighted Regression."""

    method: s.RewardWeightedMethodSection = field(default_factory=s.RewardWeightedMethodSection)


@dataclass(frozen=True)
class ConditionalRun(TrainRun):
    """`ca`: Conditional Alignment."""

    method: s.ConditionalMethodSection = field(default_factory=s.ConditionalMethodSection)


@dataclass(frozen=True)
class LabelRun(ModelRun):
    """`label`: a reward model scores a data set."""

    data: s.InputDataSection = field(default_factory=s.InputDataSection)
    trainer: s.ComputeSection = field(default_factory=s.ComputeSection)
    label: s.LabelSection = field(default_factory=s.LabelSection)

    def named_files(self) -> dict[str, Any]:
        """Return `data.input`."""
        return {"data.input": self.data.input}


@dataclass(frozen=True)
class GenerateRun(ModelRun):
    """`generate`: a policy answers prompts."""

    data: s.InputDataSection = field(default_factory=s.InputDataSection)
    trainer: s.ComputeSection = field(default_factory=s.ComputeSection)
    generate: s.GenerateSection = field(default_factory=s.GenerateSection)
    method: s.GenerateMethodSection = field(default_factory=s.GenerateMethodSection)

    def named_files(self) -> dict[str, Any]:
        """Return `data.input`."""
        return {"data.input": self.data.input}


@dataclass(frozen=True)
class EvaluateRun(Run):
    """`evaluate`: several generation files and a judge."""

    data: s.InputDataSection = field(default_factory=s.InputDataSection)
    parallel: s.ParallelSection = field(default_factory=s.ParallelSection)
    launcher: s.LauncherSection = field(default_factory=s.LauncherSection)
    trainer: s.ComputeSection = field(default_factory=s.ComputeSection)
    judge: s.JudgeSection = field(default_factory=s.JudgeSection)
    evaluate: s.EvaluateSection = field(default_factory=s.EvaluateSection)

    @property
    def judges(self) -> bool:
        """Whether there is anything to judge: answers, or pairs that people have judged."""
        return self.data.input is not None or self.judge.calibration is not None

    def named_files(self) -> dict[str, Any]:
        """Return the answers and the pairs that people have judged."""
        return {"data.input": self.data.input, "judge.calibration": self.judge.calibration}

    def named_models(self) -> dict[str, str | None]:
        """Return the reward models that judge."""
        if not self.judges:
            return {}
        judge = self.judge
        first = judge.model if judge.kind is s.JudgeKind.reward_model else None
        return {"judge.model": first, "judge.second_model": judge.second_model}

    def named_runs(self) -> list[str]:
        """Return what `evaluate.runs` names."""
        given = self.evaluate.runs
        return [str(name) for name in (given if isinstance(given, list | tuple) else [given]) if name is not None]


@dataclass(frozen=True)
class ConvertRun(ModelRun):
    """`convert`: Hugging Face form to ours and back."""

    convert: s.ConvertSection = field(default_factory=s.ConvertSection)
    trainer: s.LimitSection = field(default_factory=s.LimitSection)

    def named_files(self) -> dict[str, Any]:
        """Return the report whose table goes into the model card."""
        folder = self.convert.evaluation
        return {"convert.evaluation": None if folder is None else str(Path(folder) / "report.json")}


@dataclass(frozen=True)
class PlanMethodSection(s.FilteringMethodSection, s.RewardWeightedMethodSection, s.ConditionalMethodSection):
    """The settings of all three methods."""


@dataclass(frozen=True)
class PlanRun(Run):
    """`plan`: what each method would make of a labelled file."""

    model: s.ModelSection = field(default_factory=s.ModelSection)
    data: s.InputDataSection = field(default_factory=s.InputDataSection)
    method: PlanMethodSection = field(default_factory=PlanMethodSection)

    def named_files(self) -> dict[str, Any]:
        """Return `data.input`."""
        return {"data.input": self.data.input}


@dataclass(frozen=True)
class VerifyRun(Run):
    """`verify`: whether a run folder is whole and where it came from."""
