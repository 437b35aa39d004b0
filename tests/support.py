"""What several tests share."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def real_data_dir() -> Path:
    """Return the folder of real rows, or skip the test where it is absent."""
    default = REPOSITORY.parent / "shared" / "data"
    folder = Path(os.environ.get("OFFLINE_ALIGN_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set OFFLINE_ALIGN_DATA")
    return folder
