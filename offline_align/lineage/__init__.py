"""Record how a run folder was made, and verify it: `config.yaml` and `manifest.json`.

A manifest names the stage, the SHA-256 of every input and output, and the runs that the run builds
on. Those runs have manifests too, so the chain reaches back to the first data file. Paths of
outputs are relative to the run folder. So are paths of inputs and parents, unless they share only
the root of the file system with it. A whole tree of data and runs can therefore be moved and still
be verified.
"""

from offline_align.lineage.difference import differences
from offline_align.lineage.files import (
    FileRecord,
    canonical_json,
    file_sha256,
    folder_sha256,
    text_sha256,
    write_atomically,
)
from offline_align.lineage.key import (
    CHANGES,
    RunSettings,
    completed,
    finished_key,
    flat,
    incomplete_outputs,
    run_settings,
)
from offline_align.lineage.manifest import (
    CONFIG,
    MANIFEST,
    Manifest,
    ParentRecord,
    Sources,
    read_manifest,
    read_sources,
    versions,
    write_config,
    write_manifest,
)
from offline_align.lineage.verification import FileCheck, Status, Verification, verify

__all__ = [
    "CHANGES",
    "CONFIG",
    "MANIFEST",
    "FileCheck",
    "FileRecord",
    "Manifest",
    "ParentRecord",
    "RunSettings",
    "Sources",
    "Status",
    "Verification",
    "canonical_json",
    "completed",
    "differences",
    "file_sha256",
    "finished_key",
    "flat",
    "folder_sha256",
    "incomplete_outputs",
    "read_manifest",
    "read_sources",
    "run_settings",
    "text_sha256",
    "verify",
    "versions",
    "write_atomically",
    "write_config",
    "write_manifest",
]
