"""One root dataclass for every command: the sections it has, in the order a user meets them."""

from dataclasses import dataclass, field

from offline_align.config import sections as s


@dataclass(frozen=True)
class Run:
    """What every command has."""

    run: s.RunSection = field(default_factory=s.RunSection)
    dry_run: bool = False
    """Print the resolved plan and exit 0: no GPU, no process group, nothing written."""
    debug: bool = False
    """Show tracebacks instead of one line for each error."""


@dataclass(frozen=True)
class PrepareRun(Run):
    """`prepare`: raw data sets to rows."""

    data: s.RawDataSection = field(default_factory=s.RawDataSection)
    prepare: s.PrepareSection = field(default_factory=s.PrepareSection)
    tokenizer: s.TokenizerSection = field(default_factory=s.TokenizerSection)
    trainer: s.LimitSection = field(default_factory=s.LimitSection)
    launcher: s.LauncherSection = field(default_factory=s.LauncherSection)


@dataclass(frozen=True)
class ModelRun(Run):
    """What every command that runs a model has."""

    init: s.InitSection = field(default_factory=s.InitSection)
    model: s.ModelSection = field(default_factory=s.ModelSection)
    parallel: s.ParallelSection = field(default_factory=s.ParallelSection)
    launcher: s.LauncherSection = field(default_factory=s.LauncherSection)


@dataclass(frozen=True)
class TrainRun(ModelRun):
    """`sft`, and the base of the other training commands."""

    data: s.TrainDataSection = field(default_factory=s.TrainDataSection)
    trainer: s.TrainerSection = field(default_factory=s.TrainerSection)
    optim: s.OptimSection = field(default_factory=s.OptimSection)


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


@dataclass(frozen=True)
class GenerateRun(ModelRun):
    """`generate`: a policy answers prompts."""

    data: s.InputDataSection = field(default_factory=s.InputDataSection)
    trainer: s.ComputeSection = field(default_factory=s.ComputeSection)
    generate: s.GenerateSection = field(default_factory=s.GenerateSection)
    method: s.GenerateMethodSection = field(default_factory=s.GenerateMethodSection)


@dataclass(frozen=True)
class EvaluateRun(Run):
    """`evaluate`: several generation files and a judge."""

    data: s.InputDataSection = field(default_factory=s.InputDataSection)
    parallel: s.ParallelSection = field(default_factory=s.ParallelSection)
    launcher: s.LauncherSection = field(default_factory=s.LauncherSection)
    trainer: s.ComputeSection = field(default_factory=s.ComputeSection)
    judge: s.JudgeSection = field(default_factory=s.JudgeSection)
    evaluate: s.EvaluateSection = field(default_factory=s.EvaluateSection)


@dataclass(frozen=True)
class ConvertRun(ModelRun):
    """`convert`: Hugging Face form to ours and back."""

    convert: s.ConvertSection = field(default_factory=s.ConvertSection)
    trainer: s.LimitSection = field(default_factory=s.LimitSection)


@dataclass(frozen=True)
class PlanMethodSection(s.FilteringMethodSection, s.RewardWeightedMethodSection, s.ConditionalMethodSection):
    """The settings of all three methods."""


@dataclass(frozen=True)
class PlanRun(Run):
    """`plan`: what each method would make of a labelled file."""

    model: s.ModelSection = field(default_factory=s.ModelSection)
    data: s.InputDataSection = field(default_factory=s.InputDataSection)
    method: PlanMethodSection = field(default_factory=PlanMethodSection)


@dataclass(frozen=True)
class VerifyRun(Run):
    """`verify`: whether a run folder is whole and where it came from."""
