"""The sections of the configuration. Every key has one default, one docstring and one unit.

Defaults are defined only here. The YAML files under `configs/` hold named differences from them.
A key whose value is None is not set, and its docstring says what happens then.
"The paper" is arXiv 2308.12050.
"""

from offline_align.config.sections.answers import (
    Engine,
    EvaluateSection,
    GenerateMethodSection,
    GenerateSection,
    JudgeForm,
    JudgeKind,
    JudgeSection,
    LabelSection,
)
from offline_align.config.sections.data import (
    DataSection,
    InputDataSection,
    OnBadRow,
    PrepareSection,
    RawDataSection,
    RowDataSection,
    Template,
    TokenizerSection,
    TooLong,
    TrainDataSection,
)
from offline_align.config.sections.execution import (
    Device,
    GpuKind,
    LauncherKind,
    LauncherSection,
    LimitSection,
    ParallelSection,
    RunSection,
)
from offline_align.config.sections.model import (
    Backend,
    ConvertSection,
    ConvertTo,
    InitSection,
    ModelSection,
)
from offline_align.config.sections.training import (
    ComputeSection,
    ConditionalMethodSection,
    DecayStyle,
    FilteringMethodSection,
    MethodSection,
    OptimSection,
    Precision,
    Recompute,
    RewardMethodSection,
    RewardWeightedMethodSection,
    TrainerSection,
)

__all__ = [
    "Backend",
    "ComputeSection",
    "ConditionalMethodSection",
    "ConvertSection",
    "ConvertTo",
    "DataSection",
    "DecayStyle",
    "Device",
    "Engine",
    "EvaluateSection",
    "FilteringMethodSection",
    "GenerateMethodSection",
    "GenerateSection",
    "GpuKind",
    "InitSection",
    "InputDataSection",
    "JudgeForm",
    "JudgeKind",
    "JudgeSection",
    "LabelSection",
    "LauncherKind",
    "LauncherSection",
    "LimitSection",
    "MethodSection",
    "ModelSection",
    "OnBadRow",
    "OptimSection",
    "ParallelSection",
    "Precision",
    "PrepareSection",
    "RawDataSection",
    "Recompute",
    "RewardMethodSection",
    "RewardWeightedMethodSection",
    "RowDataSection",
    "RunSection",
    "Template",
    "TokenizerSection",
    "TooLong",
    "TrainDataSection",
    "TrainerSection",
]
