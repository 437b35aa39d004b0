"""The records of the commands: each one is whole, and names what is there."""

import importlib

import pytest

from offline_align.config.compose import configs_dir
from offline_align.stages.registry import STAGES, Stage, title


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_a_record_names_what_is_there(stage: Stage) -> None:
    assert callable(importlib.import_module(f"offline_align.stages.{stage.body}").run)
    assert (configs_dir() / "stage" / f"{stage.name}.yaml").is_file()
    assert stage.data_key is None or stage.data_key in stage.schema().named_files()


def test_methods_have_a_title() -> None:
    assert title("rwr") == "Reward-Weighted Regression"
    assert title("distilled") == "distilled"
