"""`fa`: Filtering Alignment (Eq. 4): SFT on the rows whose reward is above a threshold."""

from pathlib import Path

from offline_align.config.runs import FilteringRun
from offline_align.data.records import BadRows
from offline_align.data.template import Renderer
from offline_align.methods import fa
from offline_align.stages import training
from offline_align.stages.sft import next_token_objective


def run(config: FilteringRun, explicit: frozenset[str]) -> int:
    """Train a policy on the kept rows; the others cost no compute."""

    def read(paths: list[Path], bad_rows: BadRows, renderer: Renderer) -> training.Rows:
        labelled = training.read_labelled(paths, bad_rows)
        kept = fa.keep(labelled, config.method.threshold, config.method.best_of)
        facts = {"labelled": len(labelled), "kept": len(kept)}
        return training.Rows(kept, lambda _: training.Settled(facts))

    recipe = training.Recipe(
        method="fa",
        kind="policy",
        read=read,
        read_validation=training.read_samples,
        objective=next_token_objective,
    )
    return training.run("fa", config, explicit, recipe)
