"""The registry of commands: one record per command, which states everything about it.

To add a training method, write a row function in `methods/` (or an objective in `objectives/`) and
add a record here.
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
from offline_align.stages.recipe import (
    Recipe,
    labelled,
    next_token,
    pairwise,
    preference,
    preference_pairs,
    ranked_answers,
    samples,
)

if TYPE_CHECKING:
    from offline_align.stages.job import Job


class Reads(Enum):
    """The kind of data that a stage reads."""

    raw_rows = "raw rows in any published form, which the stage converts to ours"
    rows = "JSONL rows in the form that `prepare` and later stages write"
    prompts = "prompts"
    nothing = "no data files"


@dataclass(frozen=True)
class Stage:
    """Everything about one command."""

    name: str
    summary: str
    """The description in `offline-align --help`."""
    schema: type[Run]
    """The class of its configuration. Each field is a section, and each field of a section is a key."""
    body: str
    """The module in `offline_align.stages` whose `run(job)` does the work. It is imported on use.

    The module may also define `problems(job)`, which checks settings that only this stage can judge
    and returns one line for each problem.
    """
    reads: Reads = Reads.nothing
    data_key: str | None = None
    """The key that names the data; None if the stage runs without data."""
    starts_from: str | None = None
    """What `init.from` must name, for messages; None if `init.from` need not be set."""
    needs: Literal["policy", "reward_model"] | None = None
    """The kind of model that `init.from` must name; None if both are accepted."""
    recipe: Recipe | None = None
    """The rows and the objective of a training stage; None for other stages."""
    watches_the_clock: bool = False
    """Whether its own loop checks `trainer.max_time`, so that it can save before it stops. If false,
    the time limit and signals interrupt the stage at any point."""
    needs_run_dir: bool = True
    """Whether `run.dir` must be set."""
    runs_megatron: bool = False
    """Whether the stage runs a megatron-core model on its ranks."""
    one_process: bool = False
    """Whether it runs as one process without a GPU, even as a job on a cluster."""

    @property
    def required(self) -> list[str]:
        """The keys without which the stage does not run, except for a report on finished runs."""
        keys = {"run.dir": self.needs_run_dir, "init.from": self.starts_from is not None}
        return [key for key, needed in keys.items() if needed] + ([self.data_key] if self.data_key else [])

    def compose(self, words: Sequence[str]) -> Composed:
        """Return the configuration for command-line arguments. Problems are collected, not raised."""
        return compose(self.name, self.schema, list(words), self.needs_run_dir)

    def problems(self, job: "Job[Any]") -> list[str]:
        """Return what the `problems` function of the body returns for a job; [] if there is none."""
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
        "turn raw data sets into SFT and preference rows, for training and validation",
        runs.PrepareRun,
        "prepare",
        reads=Reads.raw_rows,
        data_key="data.input",
        one_process=True,
    ),
    _training(
        "sft",
        "train a policy by supervised fine-tuning (Eq. 1 of the paper)",
        runs.TrainRun,
        Recipe("supervised fine-tuning", "policy", samples, next_token),
    ),
    _training(
        "reward",
        "train a reward model on preference pairs (Eq. 2)",
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
        "score the answers of a data set with a reward model (Figure 3)",
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
        "Filtering Alignment: train on rows above a reward threshold (Eq. 4)",
        runs.FilteringRun,
        Recipe("Filtering Alignment", "policy", labelled(fa.training_rows), next_token),
    ),
    _training(
        "rwr",
        "Reward-Weighted Regression: weight rows by exp(reward / beta) (Eq. 5)",
        runs.RewardWeightedRun,
        Recipe("Reward-Weighted Regression", "policy", labelled(rwr.training_rows), next_token),
    ),
    _training(
        "ca",
        "Conditional Alignment: write the reward into the prompt (Eq. 6)",
        runs.ConditionalRun,
        Recipe(
            "Conditional Alignment",
            "policy",
            labelled(ca.training_rows, ca.fit),
            next_token,
            # Validation rows also have rewards, and each row is conditioned on its own reward.
            valid=labelled(ca.training_rows, ca.fit),
            condition=ca.stored_condition,
        ),
    ),
    _training(
        "dpo",
        "Direct Preference Optimization: train on preference pairs, or on pairs of labelled rows",
        runs.PreferenceRun,
        Recipe(
            "Direct Preference Optimization",
            "policy",
            ranked_answers,
            preference,
            valid=ranked_answers,
            needs_reference=True,
        ),
    ),
    Stage(
        "ppo",
        "Proximal Policy Optimization: learn from scores of the policy's own answers (Eq. 3)",
        runs.PolicyOptimizationRun,
        "ppo",
        reads=Reads.prompts,
        data_key="data.train",
        starts_from="a policy",
        needs="policy",
        watches_the_clock=True,
        runs_megatron=True,
    ),
    Stage(
        "generate",
        "answer prompts with a policy",
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
        "compare several sets of answers with a judge, and write a report",
        runs.EvaluateRun,
        "evaluate",
        reads=Reads.rows,
        data_key="data.input",
    ),
    Stage(
        "convert",
        "convert between Hugging Face format and checkpoints of this toolkit",
        runs.ConvertRun,
        "convert",
        starts_from="a Hugging Face folder, or a policy or reward model of this toolkit",
    ),
    Stage(
        "plan",
        "show what FA would keep, RWR weight, CA write and DPO pair; needs no GPU and no model",
        runs.PlanRun,
        "plan",
        reads=Reads.rows,
        data_key="data.input",
        needs_run_dir=False,
    ),
    Stage(
        "verify", "check that a run and the runs behind it are unchanged, and show its origin", runs.VerifyRun, "verify"
    ),
)
STAGES = {stage.name: stage for stage in _ALL}


def title(method: str) -> str:
    """Return the title of a training method, or `method` itself if no stage has that name."""
    stage = STAGES.get(method)
    return stage.recipe.title if stage is not None and stage.recipe is not None else method
