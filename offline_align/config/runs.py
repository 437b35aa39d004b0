"""One root dataclass per command, with its sections in the order in which `--help` lists them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offline_align.config import sections as s


@dataclass(frozen=True)
class Run:
    """Settings of every command."""

    run: s.RunSection = field(default_factory=s.RunSection)
    dry_run: bool = False
    """Check the settings, print what the run would do and exit with 0. Uses no GPU, starts no
    process group and writes nothing."""
    debug: bool = False
    """Print the full traceback of an error instead of one line."""

    def named_files(self) -> dict[str, Any]:
        """Return the values of the keys that name data files. None stands for a key that is not set."""
        return {}

    def named_models(self) -> dict[str, str | None]:
        """Return the values of the keys that name models. None stands for a key that is not set."""
        return {}

    def named_runs(self) -> list[str]:
        """Return the run folders, or folders of run folders, that the command reports on."""
        return []


def section[S](config: Run, kind: type[S]) -> S | None:
    """Return the section of `config` that is of type `kind`, or None if there is none."""
    return next((part for part in vars(config).values() if isinstance(part, kind)), None)


@dataclass(frozen=True)
class PrepareRun(Run):
    """`prepare`: convert raw data sets to rows."""

    data: s.RawDataSection = field(default_factory=s.RawDataSection)
    prepare: s.PrepareSection = field(default_factory=s.PrepareSection)
    tokenizer: s.TokenizerSection = field(default_factory=s.TokenizerSection)
    trainer: s.LimitSection = field(default_factory=s.LimitSection)
    launcher: s.LauncherSection = field(default_factory=s.LauncherSection)

    def named_files(self) -> dict[str, Any]:
        """Return `data.input`, which may also name the demo corpus or data sets on the Hub."""
        return {"data.input": self.data.input}


@dataclass(frozen=True)
class ModelRun(Run):
    """Settings of every command that runs a model."""

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
        """Return `data.train` and `data.valid`."""
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
class PreferenceRun(TrainRun):
    """`dpo`: Direct Preference Optimization."""

    method: s.PreferenceMethodSection = field(default_factory=s.PreferenceMethodSection)


@dataclass(frozen=True)
class PolicyOptimizationRun(TrainRun):
    """`ppo`: Proximal Policy Optimization."""

    data: s.PromptDataSection = field(default_factory=s.PromptDataSection)
    method: s.PolicyOptimizationMethodSection = field(default_factory=s.PolicyOptimizationMethodSection)
    generate: s.GenerateSection = field(default_factory=s.GenerateSection)

    def named_files(self) -> dict[str, Any]:
        """Return `data.train` and `data.ptx`."""
        return {"data.train": self.data.train, "data.ptx": self.data.ptx}

    def named_models(self) -> dict[str, str | None]:
        """Return the policy, the reward model and the critic."""
        method = self.method
        return {
            **super().named_models(),
            "method.reward_model": method.reward_model,
            "method.critic": method.critic,
        }


@dataclass(frozen=True)
class LabelRun(ModelRun):
    """`label`: score a data set with a reward model."""

    data: s.SampledInputDataSection = field(default_factory=s.SampledInputDataSection)
    trainer: s.ComputeSection = field(default_factory=s.ComputeSection)
    label: s.LabelSection = field(default_factory=s.LabelSection)

    def named_files(self) -> dict[str, Any]:
        """Return `data.input`, and the file that `label.statistics` means, also if it names a run folder."""
        given = self.label.statistics
        in_run = given is not None and Path(given).is_dir()
        return {
            "data.input": self.data.input,
            "label.statistics": str(Path(given, "reward_stats.json")) if given is not None and in_run else given,
        }


@dataclass(frozen=True)
class GenerateRun(ModelRun):
    """`generate`: answer prompts with a policy."""

    data: s.InputDataSection = field(default_factory=s.InputDataSection)
    trainer: s.ComputeSection = field(default_factory=s.ComputeSection)
    generate: s.GenerateSection = field(default_factory=s.GenerateSection)
    method: s.GenerateMethodSection = field(default_factory=s.GenerateMethodSection)

    def named_files(self) -> dict[str, Any]:
        """Return `data.input`."""
        return {"data.input": self.data.input}


@dataclass(frozen=True)
class EvaluateRun(Run):
    """`evaluate`: compare several generation files with a judge."""

    data: s.InputDataSection = field(default_factory=s.InputDataSection)
    parallel: s.ParallelSection = field(default_factory=s.ParallelSection)
    launcher: s.LauncherSection = field(default_factory=s.LauncherSection)
    trainer: s.ComputeSection = field(default_factory=s.ComputeSection)
    judge: s.JudgeSection = field(default_factory=s.JudgeSection)
    evaluate: s.EvaluateSection = field(default_factory=s.EvaluateSection)

    @property
    def judges(self) -> bool:
        """Return whether there is anything to judge: answers, or pairs judged by people."""
        return self.data.input is not None or self.judge.calibration is not None

    def named_files(self) -> dict[str, Any]:
        """Return `data.input` and `judge.calibration`."""
        return {"data.input": self.data.input, "judge.calibration": self.judge.calibration}

    def named_models(self) -> dict[str, str | None]:
        """Return the reward models that act as judges."""
        if not self.judges:
            return {}
        judge = self.judge
        first = judge.model if judge.kind is s.JudgeKind.reward_model else None
        return {"judge.model": first, "judge.second_model": judge.second_model}

    def named_runs(self) -> list[str]:
        """Return `evaluate.runs` as a list."""
        given = self.evaluate.runs
        return [str(name) for name in (given if isinstance(given, list | tuple) else [given]) if name is not None]


@dataclass(frozen=True)
class ConvertRun(ModelRun):
    """`convert`: Hugging Face checkpoints to megatron checkpoints and back."""

    convert: s.ConvertSection = field(default_factory=s.ConvertSection)
    trainer: s.LimitSection = field(default_factory=s.LimitSection)

    def named_files(self) -> dict[str, Any]:
        """Return the evaluation report whose table goes into the model card."""
        folder = self.convert.evaluation
        return {"convert.evaluation": None if folder is None else str(Path(folder) / "report.json")}


@dataclass(frozen=True)
class PlanMethodSection(s.FilteringMethodSection, s.ConditionalMethodSection, s.PairsMethodSection):
    """Settings of all methods that learn from labelled rows."""


@dataclass(frozen=True)
class PlanRun(Run):
    """`plan`: show what each method would do with a labelled file."""

    model: s.ModelSection = field(default_factory=s.ModelSection)
    data: s.SampledInputDataSection = field(default_factory=s.SampledInputDataSection)
    method: PlanMethodSection = field(default_factory=PlanMethodSection)

    def named_files(self) -> dict[str, Any]:
        """Return `data.input`."""
        return {"data.input": self.data.input}


@dataclass(frozen=True)
class VerifyRun(Run):
    """`verify`: check that a run folder is intact, and show where it came from."""
