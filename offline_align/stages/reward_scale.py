"""The scale of the rewards that a training reads: what its conditions, thresholds and weights count in."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from offline_align.data.records import LabelledSample, Sample
from offline_align.label.statistics import Scale, same_scale, scale_of

_FACT = "reward_scale"


def scale_facts(rows: Sequence[Sample]) -> dict[str, Any]:
    """Return the mean and standard deviation that the rewards of labelled rows were normalised with.

    They are computed from `reward_raw` and `reward`, so they are right wherever the rows come from.
    Empty for other rows, and for rewards that no such scale explains.
    """
    labelled = [row for row in rows if isinstance(row, LabelledSample)]
    if not labelled:
        return {}
    scale = scale_of([row.reward_raw for row in labelled], [row.reward for row in labelled])
    return {_FACT: asdict(scale)} if scale else {}


def other_scale(train: Mapping[str, Any], valid: Mapping[str, Any]) -> str | None:
    """Return a warning if validation rows have another scale than training rows, else None.

    Both are facts as `scale_facts` returns them.
    """
    if _FACT not in train or _FACT not in valid:
        return None
    ours, theirs = Scale(**train[_FACT]), Scale(**valid[_FACT])
    if same_scale(ours, theirs):
        return None
    return (
        f"data.valid: its rewards are normalised with mean {theirs.mean:.4g} and std {theirs.std:.4g}, those of "
        f"data.train with mean {ours.mean:.4g} and std {ours.std:.4g}, so equal rewards are different conditions: "
        "label data.valid with label.statistics=<the run that labelled data.train>"
    )
