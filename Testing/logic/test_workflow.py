"""The workflow on GitHub: what it covers, that its Linux steps run here, and that every wheel was seen."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tools import wheels, workflow
from tools.workflow import Step, run_steps, steps_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tests_yml():
    return yaml.safe_load(workflow.FILE.read_text(encoding="utf-8"))


def test_three_systems_and_every_python_that_pyproject_names_are_tested(tests_yml):
    matrix = tests_yml["jobs"]["tests"]["strategy"]["matrix"]
    assert matrix["system"] == ["ubuntu-latest", "windows-latest", "macos-latest"]
    named = re.findall(
        r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text("utf-8")
    )
    assert matrix["python"] == named == list(wheels.PYTHONS)


def test_every_line_is_one_that_all_three_systems_can_run(tests_yml):
    assert tests_yml["defaults"]["run"]["shell"] == "bash"
    for job in tests_yml["jobs"].values():
        for step in (step for step in job["steps"] if "run" in step):
            line = step["run"]
            assert "\n" not in line.strip(), "one line each"
            assert "make " not in line
            assert line.startswith("python -m ") or (
                line.startswith("sudo") and step["if"] == "runner.os == 'Linux'"
            )


def test_the_steps_of_the_linux_job_are_those_a_runner_would_do(tests_yml):
    steps = steps_of(tests_yml, "tests", python="3.12")
    lines = [step.line for step in steps]
    assert any("apt-get" in line for line in lines)
    assert lines[-1] == 'python -m pytest -m "not slow"'
    assert 'python -m pip install -e ".[dev]"' in lines
    assert {step.environment["PIP_CONSTRAINT"] for step in steps} == {"constraints.txt"}


def test_conditions_and_the_matrix_are_read_and_an_unknown_condition_is_not_guessed():
    def of(step):
        return steps_of({"name": "t", "jobs": {"j": {"steps": [step]}}}, "j", python="3.13")

    (step,) = of(
        {"name": "a", "run": "echo ${{ matrix.python }} ${{matrix.system}}", "if": "runner.os == 'Linux'"}
    )
    assert step.line == "echo 3.13 ubuntu-latest"
    assert not of({"name": "a", "run": "x", "if": "runner.os != 'Linux'"})
    assert not of({"name": "a", "run": "x", "if": "runner.os == 'Windows'"})
    assert not of({"uses": "actions/checkout@v4"})
    with pytest.raises(ValueError, match="condition"):
        of({"name": "a", "run": "x", "if": "github.actor == 'me'"})


def test_the_first_step_that_fails_ends_the_run_and_installing_can_be_left_out(tmp_path, capfd):
    lines = ("python -m pip install x; touch a", 'test "$WORD" = here; touch b', "exit 7 | cat", "touch c")
    steps = [Step(name=f"s{n}", line=line, environment={"WORD": "here"}) for n, line in enumerate(lines)]
    path = {"PATH": workflow.os.environ["PATH"]}
    assert run_steps(steps, tmp_path, path, re.compile("pip install")) == 7
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b"]
    assert "s0: left out" in capfd.readouterr().out


def test_the_interpreter_and_the_home_of_the_steps_are_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    own = workflow.environment_of(Path("/some/bin"), tmp_path)
    assert own["PATH"].startswith(f"{Path('/some/bin')}{workflow.os.pathsep}")
    assert "PYTHONPATH" not in own
    assert own["CTSEG_HOME"] == str(tmp_path / "home")


@pytest.mark.slow
def test_the_linux_job_runs_here_in_a_clean_clone(tmp_path):
    """All but installing and the tests themselves, which are running already."""
    command = [sys.executable, str(ROOT / "Testing/tools/workflow.py"), "--python", sys.executable]
    done = subprocess.run(
        [*command, "--leave-out", "pytest"], capture_output=True, text=True, encoding="utf-8", cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Demo: code 0" in done.stdout


def test_every_default_dependency_has_a_wheel_of_its_pinned_version_on_three_systems():
    rows = re.findall(
        r"^\| (\S+)(?: \(needed by others\))? \| (\S+) \| (.+) \|$", wheels.PAGE.read_text("utf-8"), re.M
    )
    seen = {name: (version, cells) for name, version, cells in rows if name not in ("package", "---")}
    known = wheels.pins()
    for name in wheels.direct():
        version, cells = seen[name]
        assert version == known[name], f"{name}: run Testing/tools/wheels.py"
        assert cells.split(" | ") == [" ".join(wheels.PYTHONS)] * len(wheels.SYSTEMS), name
    assert not any("none for" in cells for _, cells in seen.values())


def test_halves_are_asked_until_the_package_without_a_wheel_is_found(monkeypatch):
    asked = []

    def asks(wanted, system, python):
        asked.append(len(wanted))
        return "bad" not in wanted

    monkeypatch.setattr(wheels, "_asks", asks)
    wanted = dict.fromkeys(("a", "b", "bad", "c"), "1")
    assert wheels.offered(wanted, "Windows x86_64", "3.12") == {"a", "b", "c"}
    assert asked[0] == 4
    table = {"torch": {"Windows x86_64": {"3.11": True, "3.12": False}}}
    monkeypatch.setattr(wheels, "direct", lambda: ["torch"])
    (row,) = (line for line in wheels.page(table).splitlines() if line.startswith("| torch"))
    assert row.endswith("| not needed | 3.11, **none for 3.12**, others do not need it | not needed |")


def test_what_a_package_needs_depends_on_the_system(monkeypatch):
    needs = {
        "torch": ['triton; platform_system == "Linux"', "jinja2"],
        "jinja2": ['old; python_version < "3.12"'],
    }
    monkeypatch.setattr(wheels, "direct", lambda: ["torch"])
    monkeypatch.setattr(wheels, "_required", lambda name: needs.get(name, ()))
    assert wheels.needed("Linux x86_64", "3.11") == ["torch", "triton", "jinja2", "old"]
    assert wheels.needed("Windows x86_64", "3.13") == ["torch", "jinja2"]
