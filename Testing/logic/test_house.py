"""The house: layers, light imports, sizes, documented names. Reads code as text; runs in seconds."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "CTSegLogic"
FILES = sorted(PACKAGE.rglob("*.py"))
ALL_PYTHON = sorted(p for d in ("CTSegLogic", "CTSegExtension", "Testing") for p in (ROOT / d).rglob("*.py"))

# What each layer may import of this package; everything else is an arrow that points the wrong way.
MAY_IMPORT = {
    "values": {"values"},
    "files": {"values", "files"},
    "nets": set(),
    "engine": {"values", "engine"},
    "systems": {"values", "files", "engine", "nets", "systems", "systems.tensors"},
    "train": {"values", "files", "engine", "nets", "systems", "train"},
    "app": {"values", "files", "engine", "systems", "train", "app"},
    "": {"values", "files", "app"},
}
HEAVY = {
    "torch",
    "contourpy",
    "monai",
    "SimpleITK",
    "nibabel",
    "scipy",
    "pydicom",
    "highdicom",
    "matplotlib",
    "cc3d",
    "isal",
    "openvino",
}
STDLIB = set(sys.stdlib_module_names)


def imports_of(path: Path, *, top_level: bool = False) -> set[str]:
    """Absolute names of everything a file imports; only what runs at import when `top_level`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} uses a relative import"
            module = node.module or ""
            found |= {f"{module}.{alias.name}" for alias in node.names} if module.count(".") < 2 else {module}
    return found


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 2 or (PACKAGE / parts[-1]).is_dir() else ""


def ours(path: Path) -> set[str]:
    return {name for name in imports_of(path) if name.startswith("CTSegLogic.")}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_point_down(path):
    layer = layer_of(module_of(path)) if path.parent != PACKAGE else ""
    for name in ours(path):
        target = name.split(".")[1]
        if layer == "nets":
            assert name.startswith("CTSegLogic.nets.blocks"), f"{path.name} imports {name}"
            continue
        assert target in MAY_IMPORT[layer], f"{path.name} ({layer}) imports {name}"
        if layer == "systems" and target == "systems":
            own = ".".join(module_of(path).split(".")[:3])
            assert name in ("CTSegLogic.systems", "CTSegLogic.systems.tensors") or name.startswith(own), (
                f"{path.name} imports another system"
            )


def test_a_session_never_imports_training():
    assert not any(".train" in name for name in ours(PACKAGE / "app" / "session.py"))


def test_no_two_files_import_each_other_not_even_in_a_ring():
    modules = {module_of(path): ours(path) for path in FILES}
    edges = {
        # A sibling inside a package is no import of the package itself.
        m: {
            t
            for n in names
            for t in modules
            if n == t or (n.startswith(t + ".") and t.count(".") == 2 and not m.startswith(t + "."))
        }
        - {m}
        for m, names in modules.items()
    }
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way, module))
        if module not in done:
            for target in edges[module]:
                visit(target, (*way, module))
            done.add(module)

    for module in modules:
        visit(module, ())


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.parent.name in ("values", "files")], ids=lambda p: p.name
)
def test_values_and_files_start_with_numpy_alone(path):
    top = {name.split(".")[0] for name in imports_of(path, top_level=True)}
    assert top <= STDLIB | {"CTSegLogic", "numpy"}, top - STDLIB
    everywhere = {name.split(".")[0] for name in imports_of(path)}
    assert "torch" not in everywhere
    if path.parent.name == "values":
        assert everywhere <= STDLIB | {"CTSegLogic", "numpy"}


def test_nothing_here_knows_slicer():
    for path in FILES:
        assert not {n.split(".")[0] for n in imports_of(path)} & {"slicer", "vtk", "qt", "ctk"}, path


def test_the_package_and_its_catalogue_open_without_torch():
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({sorted(HEAVY)!r}))\n"
        "import CTSegLogic as c; from CTSegLogic.app.cli import main\n"
        "assert c.understand('both parotids').clear; c.vocabulary(); c.Grid.of((2, 2, 2))\n"
        "sys.exit(main(['list', 'models']) or main(['explain', 'liver']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "'liver': liver" in done.stdout


def test_public_names_are_few_sorted_and_documented():
    package = importlib.import_module("CTSegLogic")
    assert list(package.__all__) == sorted(package.__all__)
    assert len(package.__all__) <= 24
    for name in package.__all__:
        thing = getattr(package, name)
        assert inspect.getdoc(thing), name
    with pytest.raises(AttributeError):
        package.nonsense  # noqa: B018
    assert dir(package) == list(package.__all__)


def functions(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def length(node) -> int:
    doc = (
        node.body[0]
        if isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)
        else None
    )
    return node.end_lineno - node.lineno + 1 - (doc.end_lineno - doc.lineno + 1 if doc else 0)


@pytest.mark.parametrize("path", ALL_PYTHON, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    lines = path.read_text(encoding="utf-8").count("\n")
    tests = "Testing" in path.parts
    assert lines <= (500 if path.parent.name == "nets" or tests else 400), f"{path.name} has {lines} lines"
    for node in functions(path):
        limit = 60 if path.parent.name == "nets" and node.name == "__init__" else 50
        assert length(node) <= limit, f"{path.name}: {node.name} has {length(node)} lines"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_public_things_say_what_they_are_and_are_typed(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if path.name != "__init__.py" or tree.body:
        assert ast.get_docstring(tree), f"{path.name} has no text at its top"
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}: class {node.name}"
            members = [n for n in node.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            members = [node]
        else:
            continue
        for member in members:
            if member.name == "forward" or (isinstance(node, ast.ClassDef) and node.name.startswith("_")):
                continue
            assert ast.get_docstring(member), f"{path.name}: {member.name} has no docstring"
            assert member.returns is not None, f"{path.name}: {member.name} does not say what it returns"


FORBIDDEN = {
    r"\bprint\(": "print outside the command line",
    r"load_state_dict\([^)]*strict=False": "a load that does not check",
    r"weights_only=False": "a load that runs code",
    r"\bpickle\b(?! is| file|s | import UnpicklingError)": "pickle",
    r"except:\s*$": "a bare except",
    r"except Exception": "an except that hides everything",
    r"\bexec\(|\beval\((?!\))": "code from data",
}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_habits_that_hurt_are_absent(path):
    text = "\n".join(
        line for line in path.read_text(encoding="utf-8").splitlines() if not line.strip().startswith("#")
    )
    for pattern, what in FORBIDDEN.items():
        if what == "an except that hides everything" and path.name == "worker.py":
            continue  # the one place where a fault is turned into a message
        if what == "pickle" and path.name == "unpickled.py":
            continue  # the one place where such a file is read, by a list of names that make only data
        hit = re.search(pattern, text, re.MULTILINE)
        assert not (hit and not hit.group().startswith(".eval")), f"{path.name}: {what}"


def test_the_environment_and_the_command_line_are_read_in_their_places():
    for path in FILES:
        text, name = path.read_text(encoding="utf-8"), str(path.relative_to(PACKAGE)).replace("\\", "/")
        if name not in ("files/weights.py", "train/importers.py"):
            assert not re.search(r"os\.environ|os\.getenv", text), name
        if name != "app/cli.py":
            assert "sys.argv" not in text, name


def tracked() -> list[Path]:
    """Files under version control; all files when there is none (a release archive)."""
    done = subprocess.run(["git", "ls-files", "-z"], capture_output=True, cwd=ROOT)
    if done.returncode:
        return [p for p in ROOT.rglob("*") if p.is_file() and ".venv" not in p.parts]
    return [ROOT / name for name in done.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


BINARY = (".safetensors", ".gz", ".png", ".npz", ".bin")


def test_the_repository_stays_small():
    """What a fresh clone holds: a folder that was worked in keeps objects twice until git packs them."""
    files = tracked()
    tree = {p: p.stat().st_size for p in files}
    binaries, history = sum(size for p, size in tree.items() if p.suffix in BINARY), 0
    if (ROOT / ".git").exists():
        every = told("git", "rev-list", "--objects", "HEAD")
        form = "--batch-check=%(objectsize) %(objectsize:disk) %(rest)"
        ever = [line.split(" ", 2) for line in told("git", "cat-file", form, typed=every).splitlines()]
        binaries = sum(int(size) for size, _, path in ever if Path(path).suffix in BINARY)
        history = sum(int(size) for _, size, _ in ever)
    assert binaries <= 35e6, f"{binaries / 1e6:.1f} MB of weights, samples and pictures, ever committed"
    assert sum(tree.values()) + history <= 90e6, f"{(sum(tree.values()) + history) / 1e6:.0f} MB"


def told(*words: str, typed: str = "") -> str:
    """What a program prints."""
    return subprocess.run(words, input=typed, capture_output=True, text=True, cwd=ROOT, check=True).stdout


def test_text_files_end_lines_as_git_expects():
    for path in tracked():
        if path.suffix in (".py", ".md", ".json", ".csv", ".toml", ".txt"):
            raw = path.read_bytes()
            assert b"\r" not in raw, path
            assert not raw or raw.endswith(b"\n"), path
