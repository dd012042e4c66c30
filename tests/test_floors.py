"""The house rules that a file's imports show: who may know whom."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "soco"

# Lowest first. A file imports from lower floors only; those on one floor do not know each other.
# A folder is one inhabitant of its floor.
FLOORS = [
    {"core", "memory", "processes"},
    {"data", "folders", "headers", "ops", "taskdata", "workfolder"},
    {"diagnosis", "keeping", "linalg", "modules", "objectives", "quadratics", "ranks"},
    {
        "allocators", "component_gradients", "fitting", "masters", "observing", "packing",
        "pivots", "principal", "spectral", "steps", "surgery", "svd_gradient", "weighting",
    },
    {
        "calibration", "choosing", "contents", "experts", "guard", "optimization", "refinement",
        "sampling", "sequential", "sizes", "stages", "surgeon", "truncation",
    },
    {"archive", "methods", "plugin", "stored", "training"},
    {
        "chain", "checkpoint", "choices", "decomposition", "elastic", "evaluation", "lending",
        "reporting", "tasks", "workbench",
    },
    {"factorization", "installation", "preparation", "record", "running"},
    {"assembling", "learning", "plots", "refitting", "resizing", "resuming", "verification"},
    {"dismantling", "pipeline", "planning", "scoring"},
    {"comparison", "rendering", "streaming"},
    {"cli"},
    {"__main__", "bench"},
]  # fmt: skip
OUTSIDE = {"__init__", "_autoload"}  # public names; the standard library only
KNOW_TRANSFORMERS = {
    "bench", "checkpoint", "cli", "contents", "evaluation", "pipeline", "plugin", "stored",
    "surgery",
}  # fmt: skip
KNOWS_THE_CORE = {"core"}
KNOW_TORCH_OPS = {"ops"}

FILES = sorted(PACKAGE.rglob("*.py"))


def inhabitant(path: Path) -> str:
    """The file's name, or that of its folder in soco/."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from (n for child in node.orelse for n in (child, *run_time_nodes(child)))
        else:
            yield node
            yield from run_time_nodes(node)


def imports(path: Path) -> set[str]:
    """Full names of all modules (and of names that may be modules) that a file imports."""
    found = set()
    for node in run_time_nodes(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def names(path: Path) -> set[str]:
    """Every dotted name a file writes."""
    return {
        ast.unparse(node)
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Attribute)
    }


def test_every_file_has_a_floor():
    assert {inhabitant(path) for path in FILES} <= set().union(*FLOORS) | OUTSIDE


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_knows_only_lower_floors(path):
    who = inhabitant(path)
    if who in OUTSIDE:
        return
    floor = next(i for i, floor in enumerate(FLOORS) if who in floor)
    allowed = set().union(*FLOORS[:floor])
    if path.parent != PACKAGE:
        allowed.add(who)  # files of one folder know each other
    if who in KNOWS_THE_CORE:
        allowed.add("_C")
    for name in imports(path):
        package, *rest = name.split(".")
        if package == "soco":
            assert rest, "imports soco itself, which stands above all floors"
            assert rest[0] in allowed, f"imports soco.{rest[0]}"
        if package == "transformers":
            assert who in KNOW_TRANSFORMERS, "imports transformers"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_torch_ops_are_written_in_one_file(path):
    mine = [name for name in names(path) if name.startswith("torch.ops")]
    assert inhabitant(path) in KNOW_TORCH_OPS or not mine


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_has_a_test_file(path):
    if path.stem in ("__init__", "__main__"):  # test_processes.py runs the latter
        return
    stem = path.stem.removeprefix("_")
    wanted = [f"test_{stem}.py"]
    if path.parent != PACKAGE:  # a folder's files may share the folder's test file
        wanted = [f"test_{path.parent.name}_{stem}.py", f"test_{path.parent.name}.py"]
    assert any((ROOT / "tests" / name).is_file() for name in wanted), f"missing: tests/{wanted[0]}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_opens_with_one_sentence(path):
    docstring = ast.get_docstring(ast.parse(path.read_text("utf-8")))
    assert docstring
    assert docstring.split("\n\n")[0].endswith((".", "?"))


@pytest.mark.parametrize(
    "path",
    [p for kind in ("h", "cpp", "cu", "cuh") for p in (ROOT / "csrc").rglob(f"*.{kind}")],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_the_core_is_free_of_torch(path):
    included = [line for line in path.read_text("utf-8").splitlines() if "#include" in line]
    assert not [line for line in included if "torch" in line or "ATen" in line or "c10" in line]
