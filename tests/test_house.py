"""The house (docs/development.md): which room of the package may import which, and how large its pieces may be. Tests follow
it: a folder of tests/ is named after the room that it tests, and what belongs to no room lies in tests/ itself."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import quantiles

import pytest
from conftest import ROOT

PACKAGE = ROOT / "b2diffurl"
# Top down. What stands in one line may import each other, as long as no two modules do so in a circle.
FLOORS = (
    ("api",),
    ("__main__", "start", "resident", "report", "label", "export", "results"),
    ("phases",),
    ("reporting", "evaluation", "labelling"),
    ("models", "rewards"),
    ("configuration", "experiment"),
    ("objectives",),
    ("algorithm", "runtime"),
)
WORLD = "shapes"  # the embedded world: a project of its own, which rewards and tests look into
NO_ROOMS = {"benchmarks", "recorded", "faults"}  # of tests/: beside the package, data, runs of the whole
MAX_LINES, USUAL_LINES, MAX_FIELDS, MAX_CONFIG = 60, 20, 10, 24


def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name, without the embedded world."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if not name.startswith(f"b2diffurl.{WORLD}") and name != "b2diffurl":
            found[name] = ast.parse(path.read_text())
    return found


def imports(name: str, tree: ast.AST, known: set[str]) -> Iterator[str]:
    """The modules of the package that a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("b2diffurl"):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in known else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("b2diffurl"))


def room(name: str) -> str:
    return name.split(".")[1]


MODULES = modules()
GRAPH = {
    name: {found for found in imports(name, tree, set(MODULES)) if found not in (name, "b2diffurl")}
    for name, tree in MODULES.items()
}


def test_every_room_has_a_floor():
    assert {room(name) for name in MODULES} == {one for floor in FLOORS for one in floor}
    assert len(FLOORS) <= 8


def test_no_import_goes_up():
    floor = {one: number for number, rooms in enumerate(FLOORS) for one in rooms}
    up = [
        f"{name} imports {found}"
        for name, some in GRAPH.items()
        for found in some
        if room(found) != WORLD and floor[room(found)] < floor[room(name)]
    ]
    assert not up


def test_no_module_imports_itself_in_a_circle():
    left = {name: set(some) & set(MODULES) for name, some in GRAPH.items()}
    while free := [name for name, some in left.items() if not some & left.keys()]:
        for name in free:
            del left[name]
    assert not left


def test_tests_lie_in_the_room_they_test():
    """Every room has tests; and no test file shares its name with another, for they are imported by name."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.glob("[a-z]*"))}
    assert folders - NO_ROOMS == {path.name for path in PACKAGE.iterdir() if any(path.glob("*.py"))}


def test_the_embedded_world_is_looked_into_by_few():
    """It needs nothing above the runtime, and nobody but a reward and its features needs it; and who asks whether they can
    read the user's prompts."""
    for path in sorted((PACKAGE / WORLD).glob("*.py")):
        found = {room(one) for one in imports(path.stem, ast.parse(path.read_text()), set(MODULES))}
        assert found <= {WORLD, "runtime"}, path
    lookers = {name for name, some in GRAPH.items() if any(room(found) == WORLD for found in some)}
    assert lookers == {"b2diffurl.rewards.shapes", "b2diffurl.configuration.own_prompts"}


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) in ("algorithm", "objectives")])
def test_the_mathematics_imports_torch_alone(name):
    """Nor anything of the package beside it; objectives may look into the algorithm."""
    for node in ast.walk(MODULES[name]):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for found in names:
            top = found.split(".")[0]
            assert top in ("torch", "b2diffurl", "__future__") or top in sys.stdlib_module_names, f"{name} imports {found}"
    assert {room(found) for found in GRAPH[name]} <= {"algorithm", room(name)}


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name}.{node.name}", node


def test_functions_are_short():
    lines = {name: node.end_lineno - node.lineno + 1 for name, node in functions()}
    assert not {name: count for name, count in lines.items() if count > MAX_LINES}
    assert quantiles(lines.values(), n=10)[-1] <= USUAL_LINES


def test_no_class_has_many_fields():
    """Fields of a dataclass, and what its methods set."""
    found = {}
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                set_here = {
                    one.attr
                    for one in ast.walk(node)
                    if isinstance(one, ast.Attribute) and isinstance(one.ctx, ast.Store) and ast.unparse(one.value) == "self"
                }
                fields = {one.target.id for one in node.body if isinstance(one, ast.AnnAssign)}
                found[f"{name}.{node.name}"] = len(fields | set_here)
    assert not {name: count for name, count in found.items() if count > MAX_FIELDS}


def test_the_configuration_stops_at_the_boundary():
    """A ConfigDict is a parameter where scripts hand it over and where it becomes values; no table of keys is elsewhere."""
    takers = []
    for path in [*PACKAGE.rglob("*.py"), *ROOT.glob("run_*.py"), ROOT / "config" / "stage_process.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                given = [*node.args.args, *node.args.kwonlyargs]
                if any(
                    one.arg == "config" or "ConfigDict" in ast.unparse(one.annotation or ast.Constant("")) for one in given
                ):
                    takers.append((path.relative_to(ROOT), node.name))
    presets = Path("config", "stage_process.py")  # each is a function that changes a configuration
    assert len([path for path, _ in takers if path != presets]) < MAX_CONFIG, takers
    allowed = {Path(f"b2diffurl/{one}") for one in ("configuration", "start.py", "resident.py")}
    allowed |= {Path("config"), *(Path(path.name) for path in ROOT.glob("run_*.py"))}
    outside = [(str(path), name) for path, name in takers if not any(path.is_relative_to(place) for place in allowed)]
    assert not outside
