"""What Slicer's build and its extension index check: CMake lists, .ui files, index entry, imports."""

from __future__ import annotations

import ast
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(p.parent for p in (ROOT / "CTSegExtension").glob("*/CMakeLists.txt"))
SHIPPED = (
    "Cards",
    "Labels",
    "Pages",
    "Samples",
    "Tasks",
    "Weights",
)  # folders of Resources that go into the package
# What Slicer bundles or is part of it: all else is imported inside functions.
BUNDLED = {
    "slicer",
    "vtk",
    "qt",
    "ctk",
    "numpy",
    "SimpleITK",
    "CTSegLib",
    "CTSegLogic",
    "SegmentEditorEffects",
}
BUNDLED |= {"SegmentEditorCTSegLib", "SampleData", "CTSegTrainLib"}
QT_BOUND = {
    "QLineEdit",
    "QComboBox",
    "QCheckBox",
    "QPushButton",
    "QSpinBox",
    "QDoubleSpinBox",
    "QSlider",
    "QTextEdit",
}


def cmake_list(path: Path, name: str) -> set[str]:
    """The entries of a `set(NAME ...)` in a CMake file."""
    text = path.read_text(encoding="utf-8")
    module = re.search(r"set\(MODULE_NAME (\w+)\)", text)
    (body,) = re.findall(rf"set\({name}\s([^)]*)\)", text)
    return {entry.replace("${MODULE_NAME}", module.group(1) if module else "") for entry in body.split()}


def python_files(folder: Path) -> set[str]:
    return {
        str(p.relative_to(folder).as_posix()) for p in folder.rglob("*.py") if "__pycache__" not in p.parts
    }


@pytest.mark.parametrize("folder", MODULES, ids=lambda p: p.name)
def test_every_file_of_a_module_is_listed_and_every_listed_file_is_there(folder):
    assert cmake_list(folder / "CMakeLists.txt", "MODULE_PYTHON_SCRIPTS") == python_files(folder)
    resources = {
        str(p.relative_to(folder).as_posix()) for p in (folder / "Resources").rglob("*") if p.is_file()
    }
    assert cmake_list(folder / "CMakeLists.txt", "MODULE_PYTHON_RESOURCES") == resources
    assert f"add_subdirectory(CTSegExtension/{folder.name})" in (ROOT / "CMakeLists.txt").read_text()


def test_every_file_of_the_package_and_its_data_is_listed():
    path = ROOT / "CTSegLogic" / "CMakeLists.txt"
    assert cmake_list(path, "CTSegLogic_SCRIPTS") == python_files(ROOT / "CTSegLogic")
    data = {
        str(p.relative_to(ROOT / "Resources").as_posix())
        for folder in SHIPPED
        for p in (ROOT / "Resources" / folder).rglob("*")
        if p.is_file()
    }
    assert cmake_list(path, "CTSegLogic_RESOURCES") == data


def test_a_python_file_beside_a_module_would_be_taken_for_a_module():
    for folder in MODULES:
        assert [p.name for p in folder.glob("*.py")] == [f"{folder.name}.py"]


def test_root_cmake_says_what_the_index_reads():
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    entry = json.loads((ROOT / "CTSegExtension.json").read_text(encoding="utf-8"))
    (name,) = re.findall(r"project\((\w+)\)", text)
    assert (ROOT / f"{name}.json").is_file()
    assert not name.startswith("Slicer")
    for field in (
        "HOMEPAGE",
        "CATEGORY",
        "CONTRIBUTORS",
        "DESCRIPTION",
        "ICONURL",
        "SCREENSHOTURLS",
        "DEPENDS",
    ):
        assert re.search(rf'^set\(EXTENSION_{field} "[^"]+"\)$', text, re.MULTILINE), field
    icon, shot = (
        re.search(rf'EXTENSION_{f} "([^"]+)"', text).group(1) for f in ("ICONURL", "SCREENSHOTURLS")
    )
    for url in (icon, *shot.split()):
        assert url.endswith(".png")
        assert (ROOT / url.split("/main/")[1]).is_file(), url
    (depends,) = re.findall(r'EXTENSION_DEPENDS "([^"]*)"', text)
    assert depends.split() == entry["build_dependencies"] == ["PyTorch"]


def test_the_index_entry_has_the_schemas_fields_and_no_other():
    entry = json.loads((ROOT / "CTSegExtension.json").read_text(encoding="utf-8"))
    required = {"$schema", "category", "scm_url"}
    optional = {
        "build_dependencies",
        "build_subdirectory",
        "dicom_support_rule",
        "enabled",
        "scm_revision",
        "scm_type",
        "tier",
    }
    assert required <= entry.keys() <= required | optional
    assert entry["scm_url"].endswith(".git")
    assert entry["scm_url"].split("/")[-1].startswith("Slicer")
    assert entry["tier"] in (1, 3, 5)
    assert entry["category"] == "Segmentation"
    assert (ROOT / "LICENSE").is_file()


def parameter_names(folder: Path) -> set[str]:
    """Fields of the module's parameter node."""
    tree = ast.parse((folder / f"{folder.name}.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name.endswith("ParameterNode"):
            return {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}
    return set()


UI = sorted((ROOT / "CTSegExtension").rglob("*.ui"))


@pytest.mark.parametrize("path", UI, ids=lambda p: p.name)
def test_ui_files_declare_connect_and_bind_what_they_use(path):
    root = ElementTree.parse(path).getroot()
    declared = {w.findtext("class") for w in root.iter("customwidget")}
    widgets = {w.get("name"): w.get("class") for w in root.iter("widget")}
    assert len(widgets) == len(list(root.iter("widget"))), "two widgets share a name"
    assert {c for c in widgets.values() if not c.startswith("Q")} <= declared
    assert root.find("widget").get("class") == "qMRMLWidget"
    connected = [
        c.findtext("receiver") for c in root.iter("connection") if "mrmlSceneChanged" in c.findtext("signal")
    ]
    needing = [
        n for n, c in widgets.items() if c.startswith("qMRML") and n != root.find("widget").get("name")
    ]
    assert sorted(connected) == sorted(needing), "each MRML widget needs exactly one scene connection"
    known = parameter_names(path.parents[2])
    bound = {}
    for widget in root.iter("widget"):
        for prop in widget.findall("property"):
            if prop.get("name") == "SlicerParameterName":
                bound[prop.findtext("string")] = widget.get("class")
    assert set(bound) <= known, set(bound) - known
    assert all(c in QT_BOUND or c.startswith(("qMRML", "ctk")) for c in bound.values())


EXTENSION_FILES = sorted(p for p in (ROOT / "CTSegExtension").rglob("*.py") if "__pycache__" not in p.parts)


@pytest.mark.parametrize("path", EXTENSION_FILES, ids=lambda p: p.name)
def test_modules_start_with_what_slicer_bundles(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set()
    for node in tree.body:
        for inner in [node, *(node.body if isinstance(node, ast.Try) else [])]:
            if isinstance(inner, ast.Import):
                top |= {alias.name.split(".")[0] for alias in inner.names}
            elif isinstance(inner, ast.ImportFrom):
                top.add((inner.module or "").split(".")[0])
    assert top <= set(sys.stdlib_module_names) | BUNDLED, top - set(sys.stdlib_module_names) - BUNDLED


@pytest.mark.parametrize("path", EXTENSION_FILES, ids=lambda p: p.name)
def test_modules_know_the_packages_public_names_only(path):
    import CTSegLogic

    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("CTSegLogic"):
            assert node.module == "CTSegLogic", f"{path.name} reaches into {node.module}"
            assert {alias.name for alias in node.names} <= set(CTSegLogic.__all__)


@pytest.mark.parametrize("path", EXTENSION_FILES, ids=lambda p: p.name)
def test_names_that_only_the_wheel_spreads_are_not_used(path):
    """slicer-core puts slicer.util's functions into slicer itself; the application does not."""
    slicer = pytest.importorskip("slicer", reason="needs the slicer-core wheel")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "slicer":
            spread = hasattr(slicer.util, node.attr) and not hasattr(slicer.util, "__" + node.attr)
            allowed = node.attr.startswith(("vtk", "q")) or node.attr in (
                "util",
                "app",
                "modules",
                "mrmlScene",
            )
            assert allowed or not spread, f"{path.name}: slicer.{node.attr}"


@pytest.mark.parametrize("path", EXTENSION_FILES, ids=lambda p: p.name)
def test_translated_texts_are_plain_strings(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_":
            assert not isinstance(node.args[0], ast.JoinedStr), (
                f"{path.name}:{node.lineno}: f-string inside _()"
            )


def test_at_most_six_packages_are_mandatory_and_torch_is_not_among_them():
    text = (ROOT / "CTSegExtension/CTSeg/Resources/requirements.txt").read_text(encoding="utf-8")
    names = [re.split(r"[<>=!~ ]", line)[0] for line in text.splitlines() if line.strip()]
    assert len(names) <= 6
    assert not {"torch", "numpy", "scipy", "simpleitk", "requests", "pydicom", "vtk"} & {
        n.lower() for n in names
    }
    assert all("#" not in line and not line.startswith("-") for line in text.splitlines())
