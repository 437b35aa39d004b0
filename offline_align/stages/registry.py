"""The commands, one record each. A record states everything about its command.

A new training method is a row function in `methods/` (or an objective in `objectives/`) and a
record here.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from offline_align.config import runs
from offline_align.config.compose import Composed, compose
from offline_align.config.runs import Run
from offline_align.methods import ca, fa, rwr
from offline_align.stages.recipe import Recipe, labelled, next_token, pairwise, preference_pairs, samples

if TYPE_CHECKING:
    from offline_align.stages.job import Job


class Reads(Enum):
    """The kind of data that a stage reads."""

    raw_rows = "rows of any published form, which it turns into ours"
    rows = "rows of ours"
    prompts = "prompts"
    nothing = "no data of its own"


@dataclass(frozen=True)
class Stage:
    """Everything about one command."""

    name: str
    summary: str
    """Its line in the list of commands."""
    schema: type[Run]
    """Its configuration: a field is a section, and a field of a section is a key."""
    body: str
    """The module of this package whose `run(job)` does the work; it is imported on use.

    A function `problems(job)` in it may check settings that only this stage can judge. It returns one
    line for each problem.
    """
    reads: Reads = Reads.nothing
    data_key: str | None = None
    """The key that names its data, if that must be set."""
    starts_from: str | None = None
    """A description of what `init.from` must name, if that must be set."""
    needs: Literal["policy", "reward_model"] | None = None
    """The kind of model that `init.from` must name; None if both are accepted."""
    recipe: Recipe | None = None
    """Rows and objective of a training stage."""
    watches_the_clock: bool = False
    """Whether its own loop checks `trainer.max_time`, so that it can save first. All other commands
    are stopped wherever they are."""
    needs_run_dir: bool = True
    runs_megatron: bool = False
    """Whether its ranks run a megatron-core model."""
    one_process: bool = False
    """Whether it runs as one process without a GPU, even as a job on a cluster."""

    def compose(self, words: Sequence[str]) -> Composed:
        """Return the configuration for command-line words. Problems are collected, not raised."""
        return compose(self.name, self.schema, list(words), self.needs_run_dir)

    def problems(self, job: "Job[Any]") -> list[str]:
        """Return the problems that the body finds in the settings of a job."""
        check = getattr(self._module(), "problems", None)
        found: list[str] = check(job) if check is not None else []
        return found

    def run(self, job: "Job[Any]") -> int:
        """Run the body and return the exit code."""
        code: int = self._module().run(job)
        return code

    def _module(self) -> ModuleType:
        return importlib.import_module(f"offline_align.stages.{self.body}")


def _training(
    name: str,
    summary: str,
    schema: type[runs.TrainRun],
    recipe: Recipe,
) -> Stage:
    """Return the record of a training stage."""
    return Stage(
        name,
        summary,
        schema,
        "training",
        reads=Reads.rows,
        data_key="data.train",
        needs=None if recipe.makes == "reward_model" else "policy",
        recipe=recipe,
        watches_the_clock=True,
        runs_megatron=True,
    )


_ALL = (
    Stage(
        "prepare",
        "raw data sets to rows: SFT and preference files, splits, a report",
        runs.PrepareRun,
        "prepare",
        reads=Reads.raw_rows,
        data_key="data.input",
        one_process=True,
    ),
    _training(
        "sft",
        "supervised fine-tuning of a policy (Eq. 1)",
        runs.TrainRun,
        Recipe("supervised fine-tuning", "policy", samples, next_token),
    ),
    _training(
        "reward",
        "reward model on preference pairs (Eq. 2)",
        runs.RewardRun,
        Recipe(
            "a reward model trained on preference pairs",
            "reward_model",
            preference_pairs,
            pairwise,
            valid=preference_pairs,
        ),
    ),
    Stage(
        "label",
        "a reward model scores a data set (Figure 3)",
        runs.LabelRun,
        "label",
        reads=Reads.rows,
        data_key="data.input",
        starts_from="a reward model",
        needs="reward_model",
        watches_the_clock=True,
        runs_megatron=True,
    ),
    _training(
        "fa",
        "Filtering Alignment: rows above a reward threshold (Eq. 4)",
        runs.FilteringRun,
        Recipe("Filtering Alignment", "policy", labelled(fa.training_rows), next_token),
    ),
    _training(
        "rwr",
        "Reward-Weighted Regression: rows weighted by exp(reward / beta) (Eq. 5)",
        runs.RewardWeightedRun,
        Recipe("Reward-Weighted Regression", "policy", labelled(rwr.training_rows), next_token),
    ),
    _training(
        "ca",
        "Conditional Alignment: the reward written into the prompt (Eq. 6)",
        runs.ConditionalRun,
        Recipe(
            "Conditional Alignment",
            "policy",
            labelled(ca.training_rows),
            next_token,
            # Validation rows have rewards too, and each is conditioned on its own.
            valid=labelled(ca.training_rows),
            condition=ca.stored_condition,
        ),
    ),
    Stage(
        "generate",
        "a policy answers prompts",
        runs.GenerateRun,
        "generate",
        reads=Reads.prompts,
        data_key="data.input",
        starts_from="a policy",
        needs="policy",
        watches_the_clock=True,
    ),
    Stage(
        "evaluate",
        "several sets of answers, a judge, tables and a page",
        runs.EvaluateRun,
        "evaluate",
        reads=Reads.rows,
        data_key="data.input",
    ),
    Stage(
        "convert",
        "Hugging Face form to ours and back",
        runs.ConvertRun,
        "convert",
        starts_from="a Hugging Face folder, or a policy or reward model of ours",
    ),
    Stage(
        "plan",
        "what FA would keep, RWR weigh and CA write: no GPU, no model",
        runs.PlanRun,
        "plan",
        reads=Reads.rows,
        data_key="data.input",
        needs_run_dir=False,
    ),
    Stage("verify", "whether a run folder is whole and where it came from", runs.VerifyRun, "verify"),
)
STAGES = {stage.name: stage for stage in _ALL}


def title(method: str) -> str:
    """Return the title of a training method, or `method` itself if no stage has that name."""
    stage = STAGES.get(method)
    return stage.recipe.title if stage is not None and stage.recipe is not None else method
