"""Installing models: resumed, checked, offline, licensed; tested against a server that misbehaves."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from dataclasses import replace

import pytest

from CTSegLogic.files import download as download_module
from CTSegLogic.files import weights
from CTSegLogic.files.weights import (
    cards,
    ensure,
    find_card,
    handle_of,
    home,
    install,
    installed,
    place_of,
    publish,
    remove,
)
from CTSegLogic.values.card import Card, FileSpec, Head, Intensity, License, Prepare
from CTSegLogic.values.errors import (
    CardInvalid,
    LicenseNotAccepted,
    OutputRefused,
    WeightsCorrupt,
    WeightsMissing,
)

BODY = bytes(range(256)) * 4000


class Server(http.server.BaseHTTPRequestHandler):
    """Serves BODY; `mood` says how badly."""

    mood = "good"
    asked: list[str]

    def do_GET(self):
        server = type(self)
        server.asked.append(self.headers.get("Range", ""))
        start = int(self.headers["Range"].split("=")[1].rstrip("-")) if "Range" in self.headers else 0
        if self.mood == "gone":
            self.send_error(404)
            return
        body = BODY if self.mood != "lies" else BODY[:-1] + b"x"
        if self.mood == "no ranges":
            start = 0
        part = body[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.mood == "breaks off":
            self.wfile.write(part[:200_000])
            self.close_connection = True
            return
        if self.mood == "stalls once" and len(server.asked) == 1:
            self.wfile.write(part[:1000])
            self.wfile.flush()
            server.released.wait(5)
            return
        if self.mood == "dead":
            self.close_connection = True
            return
        self.wfile.write(part)

    def log_message(self, *args):
        """Keeps quiet."""


@pytest.fixture
def a_server():
    handler = type("Handler", (Server,), {"asked": [], "released": threading.Event()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    handler.url = f"http://127.0.0.1:{server.server_address[1]}/w.safetensors"
    yield handler
    handler.released.set()
    server.shutdown()
    server.server_close()


def a_card(
    url: str,
    *,
    sha256: str | None = hashlib.sha256(BODY).hexdigest(),
    size: int | None = len(BODY),
    **changes,
) -> Card:
    card = Card(
        name="remote",
        version="1",
        title="t",
        system="clnet",
        modality=("CT",),
        heads=(Head(name="h", structures=("liver",), file="w"),),
        prepare=Prepare(spacing_mm=(3, 3, 3), patch_kji=(8, 8, 8), intensity=Intensity(clip=(0, 1))),
        files={"w": FileSpec(url=url, bytes=size, sha256=sha256)},
        license=License(name="Apache-2.0"),
    )
    return replace(card, **changes)


@pytest.mark.parametrize("mood", ["good", "breaks off", "no ranges", "stalls once"])
def test_a_download_arrives_whole_whatever_the_line(an_empty_home, a_server, mood, monkeypatch):
    a_server.mood = mood
    if mood == "stalls once":
        quick = download_module.download
        monkeypatch.setattr(download_module, "download", lambda *a, **k: quick(*a, stall_s=0.5, **k))
    card = a_card(a_server.url)
    if mood == "no ranges":
        place_of(card, "w").parent.mkdir(parents=True)
        place_of(card, "w").with_name("w.safetensors.download").write_bytes(BODY[:1000])
    sums = install(card)
    assert ensure(card)["w"].read_bytes() == BODY
    assert sums == {"w": hashlib.sha256(BODY).hexdigest()}
    if mood == "breaks off":
        assert len(a_server.asked) > 3
        assert a_server.asked[1] == "bytes=200000-"
    assert [p.name for p in place_of(card, "w").parent.iterdir()] == ["w.safetensors"]


def test_a_server_that_lies_leaves_nothing(an_empty_home, a_server):
    a_server.mood = "lies"
    card = a_card(a_server.url)
    with pytest.raises(WeightsCorrupt, match="damaged"):
        install(card)
    assert not installed(card)
    a_server.mood = "good"
    install(card)
    assert installed(card)


@pytest.mark.parametrize("mood", ["gone", "dead"])
def test_a_server_that_does_not_answer_is_said(an_empty_home, a_server, mood, monkeypatch):
    monkeypatch.setattr(download_module.time, "sleep", lambda s: None)
    a_server.mood = mood
    with pytest.raises(WeightsMissing) as caught:
        install(a_card(a_server.url))
    assert "offline" in caught.value.hint


def test_an_unknown_checksum_is_recorded_and_checked_from_then_on(an_empty_home, a_server):
    card = a_card(a_server.url, sha256=None, size=None)
    sums = install(card)
    assert json.loads((home() / "checksums.json").read_text())["remote/1/w"] == sums["w"]
    path = place_of(card, "w")
    path.write_bytes(BODY[:-1] + b"y")
    with pytest.raises(WeightsCorrupt, match="SHA-256"):
        ensure(card)


def test_offline_install_from_a_file_or_a_folder(an_empty_home, tmp_path):
    card = a_card("https://example.invalid/w.safetensors")
    given = tmp_path / "w.safetensors"
    given.write_bytes(BODY)
    install(card, source=given)
    assert remove(card) == len(BODY)
    assert not installed(card)
    install(card, source=tmp_path)
    assert installed(card)
    given.write_bytes(b"other")
    with pytest.raises(WeightsCorrupt):
        install(card, source=given)
    assert ensure(card)["w"].read_bytes() == BODY
    with pytest.raises(WeightsMissing, match="holds no"):
        install(card, source=tmp_path / "none")


def test_a_licence_is_asked_for_once(an_empty_home, tmp_path):
    terms = License(name="NC-1", use="non-commercial", text="Only for love.", ask=True)
    card = a_card("https://example.invalid/w.safetensors", license=terms)
    (tmp_path / "w.safetensors").write_bytes(BODY)
    with pytest.raises(LicenseNotAccepted, match="Only for love"):
        install(card, source=tmp_path)
    assert not installed(card)
    install(card, source=tmp_path, accept_license=True)
    ensure(card)
    with pytest.raises(LicenseNotAccepted):
        ensure(replace(card, license=replace(terms, name="NC-2")))


def test_what_is_not_installed_says_how(an_empty_home):
    with pytest.raises(WeightsMissing) as caught:
        ensure(a_card("https://example.invalid/w"))
    assert "ctseg install remote" in caught.value.hint


def test_shipped_models_are_ready_and_stay(an_empty_home):
    brought = {
        c for c, card in weights.cards().items() if "https" in str(card.files) or "given:" in str(card.files)
    }
    shipped = set(weights.cards()) - brought
    assert "body" in shipped
    for card in (weights.cards()[name] for name in shipped):
        assert installed(card)
        ensure(card)
        with pytest.raises(OutputRefused, match="part of the program"):
            remove(card)


def test_a_card_is_found_again_by_its_handle(a_tiny_card, an_empty_home):
    for card in (a_tiny_card, *cards().values()):
        assert find_card(handle_of(card)) == card


def test_cards_are_found_by_name_file_and_folder(an_empty_home, a_tiny_card):
    assert find_card("body").name == "body"
    assert find_card(str(a_tiny_card.folder)).name == "tiny"
    assert find_card(str(a_tiny_card.folder / "card.json")).name == "tiny"
    with pytest.raises(CardInvalid) as caught:
        find_card("bdy")
    assert "body" in caught.value.hint


def test_a_trained_model_is_published_once(an_empty_home, a_tiny_card):
    published = publish(a_tiny_card.folder)
    assert find_card("tiny").folder == home() / "cards" / "tiny"
    assert ensure(published).keys() == {"encoder", "kidneys", "livers"}
    with pytest.raises(CardInvalid, match="exists already"):
        publish(a_tiny_card.folder)


def test_a_card_cannot_reach_outside_its_folder(an_empty_home, a_tiny_card):
    evil = replace(a_tiny_card, files={**a_tiny_card.files, "encoder": FileSpec(url="file:../../etc/passwd")})
    with pytest.raises(CardInvalid, match="outside its folder"):
        place_of(evil, "encoder")


def test_a_damaged_weight_file_is_never_loaded(an_empty_home, a_tiny_card):
    from CTSegLogic.systems import open_system
    from CTSegLogic.values.run import Run

    path = a_tiny_card.folder / "encoder.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(WeightsCorrupt):
        open_system(a_tiny_card, Run(device="cpu"))


def test_a_damaged_table_of_licences_says_so(an_empty_home):
    (home() / "licenses.json").write_text("{")
    with pytest.raises(WeightsCorrupt, match="damaged"):
        weights.accepted(a_card("https://example.invalid/w"))
