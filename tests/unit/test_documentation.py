"""The documentation against the code: commands are valid, and keys, links and paths exist."""

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from offline_align.__main__ import run
from offline_align.config import checks
from offline_align.config.reference import reference_page, schema_keys, stage_help
from offline_align.data.condition import ValueCondition
from offline_align.stages.registry import STAGES
from tests.runs import compose
from tests.small_tokenizers import write_hugging_face

REPOSITORY = Path(__file__).resolve().parents[2]
README = REPOSITORY / "README.md"
INDEX = REPOSITORY / "docs" / "README.md"
PAGES = [README, *sorted((REPOSITORY / "docs").glob("*.md"))]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
INLINE_KEY = re.compile(r"`([a-z_]+\.[a-z_.]+?)(?:=[^`]*)?`")
FILE_SUFFIXES = (".json", ".safetensors", ".jsonl", ".model", ".yaml", ".md", ".html")


@dataclass(frozen=True)
class Command:
    """A command of the documentation that runs a stage."""

    stage: str
    words: tuple[str, ...]
    ranks: int | None
    """Number of ranks that torchrun starts, or None if the launcher starts them."""


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def blocks(text: str, language: str) -> Iterator[str]:
    """Yield the fenced code blocks of a page in one language."""
    yield from (body for found, body in FENCE.findall(text) if found == language)


def commands(text: str) -> Iterator[Command]:
    """Yield every offline-align command in the shell blocks of a page."""
    for block in blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            command = parse(shlex.split(line, comments=True))
            if command is not None:
                yield command


def parse(words: list[str]) -> Command | None:
    """Return the command in a shell line, or None for other programs and for `--help`."""
    variables = dict(w.split("=", 1) for w in words if re.match(r"[A-Z_]+=", w))
    words = [w for w in words if not re.match(r"[A-Z_]+=", w)]
    if words[:1] == ["offline-align"]:
        return Command(words[1], tuple(words[2:]), None)
    if words[:1] == ["torchrun"]:
        at = words.index("offline_align")
        options = dict(w.removeprefix("--").split("=", 1) for w in words[1:at] if "=" in w)
        ranks = int(options.get("nnodes", 1)) * int(options["nproc-per-node"])
        return Command(words[at + 1], tuple(words[at + 2 :]), ranks)
    if words and words[0].startswith("scripts/torchrun/"):
        assert (REPOSITORY / words[0]).is_file(), words[0]
        ranks = int(variables.get("NNODES", 1)) * int(variables["NPROC_PER_NODE"])
        return Command(words[1], tuple(words[2:]), ranks)
    return None


def problems(command: Command) -> list[str]:
    """Return the problems of a command. Its files need not exist."""
    if command.stage not in STAGES:
        return [f"{command.stage}: no such stage"]
    composed = compose(command.stage, list(command.words))
    launcher = getattr(composed.config, "launcher", None)
    world = command.ranks or (launcher.nproc_per_node * launcher.nodes if launcher else 1)
    return composed.problems + checks.problems(composed.config, None, world)


@pytest.fixture
def files_of_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change into a folder that holds the files shown in the pages: YAML blocks that begin with a path."""
    for page in PAGES:
        for block in blocks(page.read_text(encoding="utf-8"), "yaml"):
            shown = re.match(r"# (\S+\.yaml)\n", block)
            if shown:
                path = tmp_path / shown[1]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("files_of_pages")
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_accepted(page: Path) -> None:
    found = {c: problems(c) for c in commands(page.read_text(encoding="utf-8"))}
    assert {" ".join((c.stage, *c.words)): wrong for c, wrong in found.items() if wrong} == {}


def test_commands_are_found() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    found = list(commands(text))
    assert {c.stage for c in found} == set(STAGES)
    shown = sum(len(re.findall(r"^(?:offline-align|torchrun) ", b, re.MULTILINE)) for b in blocks(text, "bash"))
    scripts = text.count(" scripts/torchrun/multi_node.sh ")
    assert len(found) == shown + scripts > 20


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("offline-align sft run.dir=a trainer.micro_batch=4", "unknown key"),
        ("offline-align train run.dir=a", "no such stage"),
        ("offline-align sft run.dir=a model=none", "no such choice"),
        ("torchrun --nnodes=3 --nproc-per-node=2 -m offline_align sft run.dir=a parallel=tp4", "6 ranks"),
        ("NNODES=1 NPROC_PER_NODE=2 scripts/torchrun/multi_node.sh sft run.dir=a parallel=tp4", "2 ranks"),
    ],
)
def test_a_wrong_command_is_noticed(line: str, complaint: str) -> None:
    (command,) = commands(f"```bash\n{line}\n```\n")
    assert complaint in " ".join(problems(command))


# Print the commands instead of running them. Scripts inherit these functions.
STAND_INS = """
offline-align() { printf '%q ' offline-align "$@"; echo; }
torchrun() { printf '%q ' torchrun "$@"; echo; }
make() { printf '%q ' make "$@"; echo; }
export -f offline-align torchrun make
"""


def started_by(shell: str) -> list[list[str]]:
    """Return the words of each command that a shell block runs, directly or through scripts."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", STAND_INS + shell],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    return [shlex.split(line) for line in done.stdout.splitlines()]


def made_up_row(stage: str) -> dict[str, Any]:
    """Return a row that `stage` reads."""
    row = {"prompt": "Name a prime.", "response": "2"}
    if stage in ("reward", "dpo"):
        return {"prompt": "Name a prime.", "chosen": "2", "rejected": "4"}
    return row | ({"reward_raw": 1.0, "reward": 1.0, "source_id": "a"} if stage in ("fa", "rwr", "ca") else {})


def make_up(command: Command) -> None:
    """Write stand-ins for the models and rows that a command reads, since a dry run reads some of them."""
    for key, _, value in (word.partition("=") for word in command.words):
        for path in map(Path, value.strip("[]").split(",")):
            if key in ("init.from", "judge.model"):
                make_up_model(path)
            elif key in ("data.train", "data.valid", "data.input"):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(made_up_row(command.stage)) + "\n", encoding="utf-8")


def make_up_model(folder: Path) -> None:
    """Write a Hugging Face folder without weights. The name of the folder decides the kind of model."""
    condition = ValueCondition("<rm_score>{reward:.1f}", reward_limit=9.9, target_reward=5.0)
    config = {
        "architectures": ["LlamaForSequenceClassification" if folder.name == "reward" else "LlamaForCausalLM"],
        "offline_align": {"condition": asdict(condition)} if folder.name == "ca" else {},
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 8,
        "num_hidden_layers": 2,
        "max_position_embeddings": 4096,
        "vocab_size": 512,
        "num_labels": 1,
    }
    write_hugging_face(folder)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("shell", blocks(README.read_text(encoding="utf-8"), "bash"))
def test_commands_of_the_readme_pass_a_dry_run(
    shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = started_by(shell)
    assert found
    monkeypatch.chdir(tmp_path)
    for words in found:
        if words[0] == "make":
            makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), words
            continue
        command = parse([word.replace("/data/", "data/") for word in words])
        assert command is not None, words
        make_up(command)
        ranks = [f"launcher.nproc_per_node={command.ranks}"] if command.ranks else []
        # The stand-in of a run has the format that `convert` would write.
        other = ["convert.to=megatron"] if command.stage == "convert" else []
        assert run([command.stage, *command.words, *ranks, *other, "dry_run=true"]) == 0, (words, capsys.readouterr())


def dry_runs() -> Iterator[tuple[str, str]]:
    """Yield every dry-run command in the pages together with the output shown below it."""
    for page in PAGES:
        found = FENCE.findall(page.read_text(encoding="utf-8"))
        for (language, shell), (next_language, shown) in pairwise(found):
            if (language, next_language) == ("bash", "") and "dry_run=true" in shell:
                yield shell, shown


def shows(block: str, printed: str) -> bool:
    """Return whether a block equals the output, apart from white space and text replaced by `...`."""
    parts = [" ".join(part.split()) for part in re.split(r"^\.\.\.$", block, flags=re.MULTILINE)]
    return re.fullmatch(".*".join(map(re.escape, parts)), " ".join(printed.split())) is not None


@pytest.mark.parametrize(("shell", "shown"), dry_runs())
def test_dry_runs_print_what_the_pages_show(
    shell: str, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (command,) = commands(f"```bash\n{shell}```\n")
    monkeypatch.setattr("sys.argv", ["offline-align", command.stage, *command.words])
    assert run([command.stage, *command.words]) == 0
    printed = capsys.readouterr().out
    assert shows(shown, printed), printed


def test_dry_runs_are_found() -> None:
    assert len(list(dry_runs())) == 3


@pytest.mark.parametrize(
    ("block", "same"), [("a  1\nb 2\n c\n", True), ("...\nb 2 c\n", True), ("a 1\n...\n", True), ("a 1\n", False)]
)
def test_stale_output_is_noticed(block: str, same: bool) -> None:
    assert shows(block, "a      1\nb      2 c\n") is same


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_keys_named_in_the_text_exist(page: Path) -> None:
    known = {key.name for stage in STAGES.values() for key in schema_keys(stage.schema)}
    sections = {name.partition(".")[0] for name in known if "." in name}
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    named = {k for k in INLINE_KEY.findall(text) if k.partition(".")[0] in sections}
    own = {k for k in named if not k.endswith(FILE_SUFFIXES) and k.rpartition(".")[0] not in known}
    assert own <= known


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_have_targets(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    assert [link for link in LINK.findall(text) if not link.startswith("http") and not leads(page, link)] == []


def leads(page: Path, link: str) -> bool:
    """Return whether the file of a relative link exists, and the heading too if the link names one."""
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    return target.exists() and (not anchor or anchor in anchors(target))


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_paths_of_the_tree_exist() -> None:
    part = INDEX.read_text(encoding="utf-8").split("## Where things live\n")[1].split("\n## ")[0]
    (tree,) = blocks(part, "")
    paths = [line.split()[0] for line in tree.splitlines()]
    assert len(paths) > 10
    assert [path for path in paths if not (REPOSITORY / path).exists()] == []


def test_the_tree_lists_every_part_of_the_package() -> None:
    parts = {p.name for p in (REPOSITORY / "offline_align").iterdir() if (p / "__init__.py").is_file()}
    text = INDEX.read_text(encoding="utf-8")
    assert {part for part in parts if f"offline_align/{part}/ " not in text} == set()


def test_the_index_links_every_page() -> None:
    linked = set(LINK.findall(INDEX.read_text(encoding="utf-8")))
    assert {page.name for page in PAGES if page.parent == INDEX.parent} - linked == {INDEX.name}


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) < 200


# Words that a stage needs in addition. With BEHIND_A_JOB, files of earlier jobs need not exist.
GIVEN = {
    "prepare": ["data.input=demo"],
    "evaluate": ["data.input=answers.jsonl", "judge=ground_truth"],
    "plan": ["data.input=labelled.jsonl"],
}
BEHIND_A_JOB = ["init.from=before", "data.input=before.jsonl", "launcher=slurm", "launcher.dependency=1"]


def examples(stage: str) -> list[list[str]]:
    """Return every example `key=value ...` in the help of a stage."""
    texts = " ".join(key.text for key in schema_keys(STAGES[stage].schema))
    shown = [text.split() for text in re.findall(r"`([^`]+)`", texts)]
    return [words for words in shown if all(re.match(r"[a-z_.]+(\.[A-Z_]+)?=[^=]", word) for word in words)]


@pytest.mark.parametrize("stage", [stage for stage in STAGES if examples(stage)])
def test_examples_of_the_help_pass_a_dry_run(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("answers.jsonl").write_text('{"id": "a", "prompt": "Hi", "response": "b", "finish_reason": "stop"}\n')
    scored = '{"id": "a", "prompt": "Hi", "response": "b", "reward_raw": 1, "reward": 1, "source_id": "a"}\n'
    Path("labelled.jsonl").write_text(scored)
    given = GIVEN.get(stage, BEHIND_A_JOB if stage in ("label", "generate", "convert", "ppo") else [])
    if stage in ("convert", "ppo"):
        given = [word for word in given if not word.startswith("data.")]
    given = [*given, "data.train=before.jsonl"] if stage == "ppo" else given
    for example in examples(stage):
        code = run([stage, "run.dir=out", *given, *example, "dry_run=true"])
        assert code == 0, (example, capsys.readouterr().err)


def test_examples_of_the_help_are_found() -> None:
    assert ["parallel=tp4", "launcher.nproc_per_node=4"] in examples("sft")
    assert ["launcher.environment.NCCL_DEBUG=INFO"] in examples("prepare")


@pytest.mark.parametrize("stage", STAGES)
def test_the_short_help_has_the_required_keys_first_and_fits_a_terminal(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    record = STAGES[stage]
    short, whole = (stage_help(stage, record.schema, "", record.required, whole) for whole in (False, True))
    assert max(map(len, short.splitlines())) <= 100
    for text in (short, whole):
        first = re.findall(r"^  ([a-z_.]+)", text.partition("\nRequired\n")[2], re.MULTILINE)
        assert first[: len(record.required)] == record.required
    keys = [key.name for key in schema_keys(record.schema)]
    assert [key for key in keys if f"\n  {key} " not in whole + " "] == []
    assert f"--help=all shows all {len(keys)} keys" in short
    assert len(re.findall(r"^  [a-z_.]+ \(", short, re.MULTILINE)) <= 24


def test_the_help_shows_the_defaults_of_the_stage() -> None:
    assert "optim.lr (9e-06)" in stage_help("reward", STAGES["reward"].schema, "", whole=False)
    assert "optim.lr (5e-06)" in stage_help("sft", STAGES["sft"].schema, "", whole=False)


def test_the_configuration_reference_is_up_to_date() -> None:
    page = (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == reference_page({name: stage.schema for name, stage in STAGES.items()}), "run `make reference`"
