"""Rules for the source: nothing executes loaded data or starts a shell, and modules have docstrings."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "offline_align"

# Each can execute code from a data file, a checkpoint or a file name.
BANNED_CALLS = {
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "cPickle.load",
    "dill.load",
    "dill.loads",
    "joblib.load",
    "yaml.load",
    "yaml.load_all",
    "yaml.full_load",
    "yaml.unsafe_load",
    "cloudpickle.load",
    "cloudpickle.loads",
    "marshal.load",
    "marshal.loads",
    "shelve.open",
    "pandas.read_pickle",
    "numpy.lib.format.read_array",
    "torch.jit.load",
    "torch.hub.load",
    "torch.package.PackageImporter",
    "torch.serialization.add_safe_globals",
    "runpy.run_path",
    "runpy.run_module",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "os.system",
    "os.popen",
    "eval",
    "exec",
    "compile",
    "__import__",
}
# The only module that reads megatron's pickles, with an unpickler that allows a fixed list of classes.
READING = PACKAGE / "train" / "safe_unpickling.py"
MEGATRON_LOADS = {
    f"megatron.core.dist_checkpointing.{name}"
    for name in (
        "load",
        "load_common_state_dict",
        "load_content_metadata",
        "load_plain_tensors",
        "load_sharded_metadata",
        "load_tensors_metadata",
    )
}
"""Each unpickles files in the checkpoint folder."""
ITS_EXCEPTIONS = {
    "subclass of pickle.Unpickler",
    "megatron.core.dist_checkpointing.load",
    "megatron.core.dist_checkpointing.load_tensors_metadata",
}
BANNED_BASES = {"pickle.Unpickler", "dill.Unpickler", "cloudpickle.Unpickler"}
BANNED_ARGUMENTS = {"allow_pickle", "shell", "trust_remote_code"}
SUBPROCESSES = {f"subprocess.{name}" for name in ("run", "Popen", "call", "check_call", "check_output")}
"""Each accepts a command line as one string, in which a file name can become several words."""


def dangers(source: str, root: str = "offline_align") -> Iterator[str]:
    """Yield `line: call` for every call in a source that can execute what it reads.

    `root` is the top-level folder. The rules for loading checkpoints and models apply to the package
    only, since benchmarks load only files of their own.
    """
    tree = ast.parse(source)
    full_names = imported_names(tree)
    for parent in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        yield from (
            f"{parent.lineno}: subclass of {dotted_name(base, full_names)}"
            for base in parent.bases
            if dotted_name(base, full_names) in BANNED_BASES
        )
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = dotted_name(call.func, full_names)
        arguments = {k.arg: k.value for k in call.keywords if k.arg}
        if name in BANNED_CALLS or (name in MEGATRON_LOADS and root == "offline_align"):
            yield f"{call.lineno}: {name}"
        if name == "torch.load" and not is_constant(arguments.get("weights_only"), True):
            yield f"{call.lineno}: torch.load without weights_only=True"
        if name in SUBPROCESSES and call.args and isinstance(call.args[0], ast.Constant | ast.JoinedStr | ast.BinOp):
            yield f"{call.lineno}: {name} with a command in one string"
        if name.endswith(".from_pretrained") and root == "offline_align" and "trust_remote_code" not in arguments:
            yield f"{call.lineno}: {name} without trust_remote_code=False"
        for argument in BANNED_ARGUMENTS & arguments.keys():
            if not is_constant(arguments[argument], False):
                yield f"{call.lineno}: {argument}={ast.unparse(arguments[argument])}"


def imported_names(tree: ast.AST) -> dict[str, str]:
    """Return the full name of each imported name: `from pickle import load as l` gives l: pickle.load."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update({a.asname: a.name for a in node.names if a.asname})
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update({a.asname or a.name: f"{node.module}.{a.name}" for a in node.names})
    return found


def dotted_name(node: ast.expr, full_names: dict[str, str]) -> str:
    first, _, rest = ast.unparse(node).partition(".")
    full = full_names.get(first, first)
    return f"{full}.{rest}" if rest else full


def is_constant(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def sources() -> list[Path]:
    folders = ("offline_align", "benchmarks", "scripts")
    return sorted(path for folder in folders for path in (REPOSITORY / folder).rglob("*.py"))


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_nothing_executes_loaded_data(path: Path) -> None:
    root = path.relative_to(REPOSITORY).parts[0]
    found = [what.partition(": ")[2] for what in dangers(path.read_text("utf-8"), root)]
    assert set(found) == (ITS_EXCEPTIONS if path == READING else set())


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_module_has_a_docstring(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text("utf-8")))


# The entry point prints the list of stages and errors itself, to avoid slow imports.
SILENT = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__main__.py"]


@pytest.mark.parametrize("path", SILENT, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_prints_past_rich_and_logging(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(f)",
        "from pickle import loads\nloads(b)",
        "import pickle as p\np.Unpickler(f)",
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "import torch\ntorch.load(f, weights_only=flag)",
        "import yaml\nyaml.load(f)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import subprocess\nsubprocess.run(c, shell=True)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)",
        "import os\nos.system(c)",
        "import numpy as np\nnp.load(f, allow_pickle=flag)",
        "from joblib import load\nload(f)",
        "import marshal\nmarshal.loads(b)",
        "eval(text)",
        "exec(text)",
        "__import__(name)",
        "import subprocess\nsubprocess.run(f'ls {path}')",
        "import subprocess\nsubprocess.getoutput(c)",
        "import torch\ntorch.jit.load(f)",
        "AutoModel.from_pretrained(p)",
        "import pickle\nclass U(pickle.Unpickler): ...",
        "from pickle import Unpickler as Base\nclass U(Base): ...",
        "from megatron.core import dist_checkpointing\ndist_checkpointing.load(d, p)",
        "from megatron.core.dist_checkpointing import load_plain_tensors\nload_plain_tensors(p)",
    ],
)
def test_dangerous_calls_are_found(source: str) -> None:
    assert len(list(dangers(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(f, weights_only=True)",
        "import yaml\nyaml.safe_load(f)",
        "import numpy as np\nnp.load(f, allow_pickle=False)",
        "model.eval()",
        "AutoModel.from_pretrained(p, trust_remote_code=False)",
        "import subprocess\nsubprocess.run(['ls', path])",
        "import re\nre.compile(p)",
    ],
)
def test_safe_calls_pass(source: str) -> None:
    assert list(dangers(source)) == []


def test_test_files_have_different_names() -> None:
    """The folders of tests are no packages, so pytest cannot import two files of one name."""
    names = [path.name for path in (REPOSITORY / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
