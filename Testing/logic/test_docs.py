"""README and Resources/Docs: every command is parsed and run, or listed with what it needs; every message is
one that the code says; every picture, link and table is there and current."""

from __future__ import annotations

import json
import re
import tomllib

import pytest
from docs_pages import PAGES, ROOT, blocks, commands, messages, spans, words_of
from tools import make_model_table

from CTSegLogic.app.cli import parser
from CTSegLogic.train.grow import checked, read_table
from CTSegLogic.train.sweep import members_of
from CTSegLogic.values.card import card_from

DOCS = ROOT / "Resources/Docs"
TASK = ROOT / "Resources/Tasks/efficient-hn-1-coarse.json"
# Options that pages name and other programs take.
OTHERS = {
    "--head",
    "--no-main-window",
    "--python-script",
    "--backend-store-uri",
    "--full",
    "--data",
    "--results",
}


def options_of(parse):
    (actions,) = (a for a in parse._actions if a.dest == "command")
    return {name: set(sub._option_string_actions) for name, sub in actions.choices.items()}


def other_is_known(words):
    """Whether a line that is no command of ctseg names things that are there."""
    match words:
        case ["make", target, *_]:
            return re.search(rf"^{target}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE) is not None
        case ["python", "-m", "pip", "install", *rest]:
            project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
            return all(
                extra in project["optional-dependencies"]
                for word in rest
                for extra in re.findall(r"\[(\w+)\]", word)
            )
        case ["python", script, *_]:
            return (ROOT / script).is_file()
        case ["Slicer", "--no-main-window", "--python-script", script, *rest]:
            parser().parse_args(["batch", *rest])
            return (ROOT / script).is_file()
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_line_is_one_that_the_program_takes(page, capsys):
    for _block, line in commands(page):
        words = words_of(line)
        if words[0] != "ctseg":
            assert other_is_known(words), line
            continue
        try:
            parser().parse_args(words[1:])
        except SystemExit:
            pytest.fail(f"{page.name}: {line}\n{capsys.readouterr().err}")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_and_option_named_in_the_text_is_there(page):
    known = options_of(parser())
    every = set().union(*known.values()) | OTHERS
    for span in spans(page):
        words = span.split()
        if words[0] == "ctseg" and len(words) > 1:
            assert words[1] in {*known, "COMMAND", "..."}, f"{page.name}: {span}"
        command = words[1] if words[0] == "ctseg" and len(words) > 1 and words[1] in known else None
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", span):
            there = option in (known[command] if command else every) or option in OTHERS
            assert there, f"{page.name}: {span}"


def test_the_rules_above_refuse_what_is_not_there():
    assert not other_is_known(["make", "coffee"])
    assert not other_is_known(["python", "Testing/tools/nothing.py"])
    assert not other_is_known(["python", "-m", "pip", "install", ".[nothing]"])
    assert not other_is_known(["rm", "-rf", "x"])
    with pytest.raises(SystemExit):
        parser().parse_args(["segment", "a.nii.gz", "--flavour", "x"])


@pytest.mark.parametrize("block", blocks("json"), ids=lambda b: b.name)
def test_every_json_block_is_a_task_or_a_card(block):
    table = json.loads(block.text)
    if "format" in table:
        assert card_from(table).name
    elif "sweep" in table:  # added to a task: every combination is a task
        assert len(members_of(read_table(TASK) | table)) > 1
    else:
        assert checked(table)["head"]


@pytest.mark.parametrize("block", blocks("python"), ids=lambda b: b.name)
def test_every_snippet_is_python_and_small_ones_do_what_they_say(block, tmp_path, monkeypatch, capsys):
    code = compile(block.text, block.name, "exec")
    if "slicer" in block.text or "scan.nii.gz" in block.text:
        return  # the first need Slicer, Testing/modules runs such calls; the others run in test_docs_run
    monkeypatch.chdir(tmp_path)
    exec(code, {"__name__": "snippet"})
    if "print" in block.text:
        assert capsys.readouterr().out.strip()


def test_the_system_that_the_page_shows_runs_the_card_that_it_shows(a_tilted_ct):
    from CTSegLogic.values.prompt import Everything, resolve
    from CTSegLogic.values.run import Run

    (card,) = (card_from(json.loads(b.text)) for b in blocks("json") if "threshold" in b.text)
    (code,) = (b.text for b in blocks("python") if "class Threshold" in b.text)
    names: dict = {"__name__": "snippet"}
    exec(compile(code, "adding.md", "exec"), names)
    run = Run(device="cpu")
    found = names["open_card"](card, run).segment(a_tilted_ct, resolve(Everything(), card), run)
    assert found.grid.shape == a_tilted_ct.grid.shape
    assert found.entries[0].structure.key == "bone"
    assert (found.mask("bone") == (a_tilted_ct.array[0] > 200)).all()


def test_every_message_of_the_troubleshooting_page_is_said_by_the_code_with_that_hint():
    known = messages()
    rows = re.findall(
        r"^\| (.+?) \| (.+?) \|$", (DOCS / "troubleshooting.md").read_text("utf-8"), re.MULTILINE
    )
    rows = [row for row in rows if row[0] not in ("message", "---")]
    assert len(rows) > 40
    for message, remedy in rows:
        said, told = message.replace("...", "X"), remedy.replace("...", "X")
        hints = [hint for seen, hint in known if seen.fullmatch(said)]
        assert hints, f"nothing says {message!r}"
        assert any(hint.fullmatch(told) for hint in hints), f"{message!r} has another hint than {remedy!r}"


def test_a_message_or_hint_that_nothing_says_would_be_noticed():
    known = messages()
    assert not [1 for seen, _ in known if seen.fullmatch("The flux capacitor X is empty.")]
    (hint,) = (h for seen, h in known if seen.fullmatch("The disk is full: X was not written."))
    assert not hint.fullmatch("Buy a bigger disk.")


def test_the_table_of_models_is_current():
    assert make_model_table.PAGE.read_text("utf-8") == make_model_table.page(), (
        "run python Testing/tools/make_model_table.py"
    )


def test_every_link_and_picture_is_there_and_pictures_are_those_of_the_sample():
    for page in PAGES:
        for picture, target in re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", page.read_text("utf-8")):
            if not target.startswith("https://"):
                assert (page.parent / target).is_file(), f"{page.name}: {target}"
            if picture:
                assert (page.parent / target).resolve().parent == ROOT / "Resources/Screenshots", target


def test_the_guide_leads_to_every_page():
    text = (DOCS / "guide.md").read_text("utf-8")
    for page in DOCS.glob("*.md"):
        assert page.name == "guide.md" or f"({page.name})" in text, page.name


def test_what_the_guide_calls_things_in_the_panel_is_what_stands_there():
    ui = (ROOT / "CTSegExtension/CTSeg/Resources/UI/CTSeg.ui").read_text("utf-8")
    shown = {text.rstrip(".").lower() for text in re.findall(r"<string>([^<]+)</string>", ui)}
    rows = re.findall(r"^\| (\*.+?) \| (.+) \|$", (DOCS / "guide.md").read_text("utf-8"), re.MULTILINE)
    names = {name for cell, _ in rows for name in re.findall(r"\*([^*]+)\*", cell)}
    assert len(names) > 10
    for name in names:
        assert name.lower() in shown, name


NETWORK = re.compile(
    r"\b(urllib\.request|urlopen|requests\.(get|post)|http\.client|socket\.|smtplib|ftplib)\b"
)


def test_one_file_opens_addresses_as_the_privacy_page_says():
    opening = {
        path.relative_to(ROOT).as_posix()
        for folder in ("CTSegLogic", "CTSegExtension")
        for path in (ROOT / folder).rglob("*.py")
        if NETWORK.search(path.read_text("utf-8"))
    }
    assert opening == {"CTSegLogic/files/download.py", "CTSegLogic/app/cluster.py"}
    for path in opening:
        assert f"`{path}`" in spans_text("privacy.md")


def test_temporary_folders_are_those_that_the_privacy_page_names():
    page, made = spans_text("privacy.md"), set()
    for folder in ("CTSegLogic", "CTSegExtension"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text("utf-8")
            made |= {
                (path.name, n) for n in re.findall(r"tempfile\.(mkdtemp|mkstemp|TemporaryDirectory)", text)
            }
    assert made == {
        ("atomic.py", "mkstemp"),  # .part-
        ("atomic.py", "mkdtemp"),  # the same of a folder
        ("flare.py", "TemporaryDirectory"),  # segmentations of `evaluate --flare`, to be measured
        ("jobs.py", "mkdtemp"),  # ctseg-job-
        ("export.py", "mkdtemp"),  # ctseg-dicom-
        ("strip.py", "TemporaryDirectory"),  # HD-BET
        ("install.py", "TemporaryDirectory"),  # constraints for pip, nothing of a patient
        ("CTSegTrain.py", "TemporaryDirectory"),  # the pair of the console's call
    }
    for name in ("`.part-`", "`ctseg-job-...`", "`ctseg-dicom-...`", "HD-BET", "--flare"):
        assert name in page, name


def spans_text(name):
    return (DOCS / name).read_text("utf-8")
