"""Are the labels reproducible? The certificate of the run that labelled the training rows."""

import json

from offline_align.evaluate.comparison import Comparison
from offline_align.evaluate.parts.label_set import find_label_set
from offline_align.evaluate.sections import Section
from offline_align.label.certificate import FILE_NAME, in_words

NOTE = (
    "A random sample of the labelled rows is scored again, each row in a batch of its own, by a freshly loaded model."
)


def certificate_section(comparison: Comparison) -> Section | None:
    """Return the certificate of the newest label run, or None if there is no readable one."""
    labels = find_label_set(comparison.files)
    if labels is None:
        return None
    try:
        found = json.loads((labels.run_dir / FILE_NAME).read_text(encoding="utf-8"))
        finding = in_words(found)
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return Section("certificate", "Are the labels reproducible?", NOTE, [finding], {"certificate": found})
