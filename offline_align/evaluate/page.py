"""Render self-contained HTML pages: one file that loads nothing else, with all text escaped."""

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render_page(template: str, values: Mapping[str, Any]) -> str:
    """Return the rendered `templates/<template>`. Raises UndefinedError if a value is missing."""
    environment = Environment(
        loader=PackageLoader("offline_align.evaluate"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)
