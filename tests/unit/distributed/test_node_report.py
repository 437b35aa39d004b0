"""Problems of nodes, judged from the reports of their ranks."""

from dataclasses import replace

import pytest

from offline_align.distributed.node_report import LARGEST_SKEW_SECONDS, NodeReport, judge, node_name
from offline_align.errors import AlignError, ConfigError, StorageError

GOOD = NodeReport(
    rank=0, host="h0", versions={"torch": "2.13.0"}, gpus=8, clock=1e9, free_bytes=2**40, shares_folder=True
)


@pytest.fixture(autouse=True)
def nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLINE_ALIGN_NODES", "dgx0 dgx1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")


def reports(**wrong: object) -> list[NodeReport]:
    """Return reports of four ranks on two nodes; the second node has the values in `wrong`."""
    good = [replace(GOOD, rank=rank, host=f"h{rank // 2}") for rank in range(4)]
    return [*good[:2], *(replace(r, **wrong) for r in good[2:])]  # type: ignore[arg-type]


def test_good_nodes_pass() -> None:
    judge(reports(), 5)
    judge(reports(clock=1e9 + LARGEST_SKEW_SECONDS - 1), 5)


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        ({"versions": {"torch": "2.13.0", "NCCL": "2.1"}}, ConfigError, "(h1): NCCL is 2.1, elsewhere not installed"),
        ({"versions": {}}, ConfigError, "(h1): torch is not installed, elsewhere 2.13.0; install the same everywhere"),
        ({"clock": 1e9 - 60}, ConfigError, "the clock is "),
        ({"shares_folder": False}, ConfigError, "(h1): run.dir is not the folder that rank 0 sees"),
        ({"free_bytes": 2**30}, StorageError, "(h1): 1.0 GiB free for run.dir; at least 5 GiB are needed"),
        ({"gpus": 7}, AlignError, "(h1): 7 GPUs visible, elsewhere 8"),
        ({"problem": "GPU 1: ECC error"}, AlignError, "(h1), rank 2: GPU 1: ECC error"),
    ],
)
def test_a_problem_is_reported_with_its_node(wrong: dict[str, object], error: type[AlignError], said: str) -> None:
    with pytest.raises(error) as raised:
        judge(reports(**wrong), 5)
    assert type(raised.value) is error
    assert said in str(raised.value)
    if "clock" not in wrong and "NCCL" not in said:
        assert "dgx0" not in str(raised.value)


def test_a_problem_of_a_node_is_reported_once() -> None:
    with pytest.raises(StorageError) as raised:
        judge(reports(free_bytes=0), 5)
    assert str(raised.value).count("\n") == 0


def test_nodes_without_names_get_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert node_name(3) == "node dgx1, rank 3"
    monkeypatch.delenv("OFFLINE_ALIGN_NODES")
    assert node_name(3) == "node 1, rank 3"
