"""The catalogue lists every part of the report, and calls those that the evidence allows."""

import inspect
import pkgutil
from importlib import import_module

from offline_align.config.sections import EvaluateSection
from offline_align.evaluate import parts
from offline_align.evaluate.parts.catalogue import Evidence, report_sections
from tests.unit.evaluate.parts.test_served_judge import described


def test_every_part_is_listed() -> None:
    modules = [import_module(f"{parts.__name__}.{found.name}") for found in pkgutil.iter_modules(parts.__path__)]
    defined = {
        name
        for module in modules
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if name.endswith("_section") and not name.startswith("_") and function.__module__ == module.__name__
    }
    assert len(defined) == 12
    assert defined <= set(inspect.getclosurevars(report_sections).globals)


def test_a_report_without_a_comparison_has_the_other_parts() -> None:
    settings = EvaluateSection()
    assert report_sections(Evidence(settings, 0)) == []
    found = report_sections(Evidence(settings, 0, judge=described(), runs=[]))
    assert [section.name for section in found] == ["judge_effort", "runs"]
