"""Nodes that do not see the same files: no rank waits forever, and no rank trains on other rows."""

import os
import socket
import subprocess
from pathlib import Path

import pytest

from tests.preloaded import python
from tests.support import free_ports
from tests.training import STEPS, TINY, samples, write_jsonl

pytestmark = pytest.mark.distributed


def ranks(folder: Path, counts: list[int], *words: str) -> list[subprocess.CompletedProcess[str]]:
    """Train with one rank on each of two nodes; their files of the same name have `counts` rows."""
    port = str(*free_ports(1))
    processes = []
    for rank, count in enumerate(counts):
        node = folder / f"node{rank}"
        node.mkdir()
        write_jsonl(node / "rows.jsonl", samples(count))
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(counts)),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        arguments = ["sft", f"run.dir={folder / 'run'}", "data.train=rows.jsonl", *TINY, *STEPS, *words]
        process = subprocess.Popen(
            [python(), "-m", "offline_align", *arguments],
            cwd=node,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
    return [
        subprocess.CompletedProcess(p.args, p.wait(), "", said)
        for p, said in [(p, p.communicate(timeout=240)[1]) for p in processes]
    ]


def test_other_rows_end_all_ranks(tmp_path: Path) -> None:
    done = ranks(tmp_path, [14, 13])
    assert [d.returncode for d in done] == [65, 65], done
    assert f"data.train: rank 1 on {socket.gethostname()} read other rows than rank 0" in done[0].stderr


def test_a_cache_on_every_node_is_made_on_every_node(tmp_path: Path) -> None:
    done = ranks(tmp_path, [14, 14], "data.cache_dir=local_cache")
    assert [d.returncode for d in done] == [0, 0], done
    assert all(list((tmp_path / f"node{rank}" / "local_cache").glob("tokens-*")) for rank in (0, 1))
