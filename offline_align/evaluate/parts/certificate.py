"""The label certificate of the run that labelled the rows: do rewards depend on how they were computed?"""

import json

from offline_align.evaluate.comparison import Comparison
from offline_align.evaluate.parts.label_set import find_label_set
from offline_align.evaluate.sections import Section
from offline_align.label.certificate import FILE_NAME, in_words

NOTE = "A random part of the labelled rows, scored a second time alone in its batch and with the model loaded afresh."


def certificate_section(comparison: Comparison) -> Section | None:
    """Return what the newest label run's certificate says, or None where it has none that can be read."""
    labels = find_label_set(comparison.files)
    if labels is None:
        return None
    try:
        found = json.loads((labels.run_dir / FILE_NAME).read_text(encoding="utf-8"))
        finding = in_words(found)
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return Section("certificate", "Are the labels reproducible?", NOTE, [finding], {"certificate": found})
