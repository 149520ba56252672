"""Apple's GPU, with stand-ins: what it lacks is found by trying, nothing needs float64."""

from __future__ import annotations

import phantoms
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from CTSegLogic.app import doctor
from CTSegLogic.app.session import Session
from CTSegLogic.engine import abilities, device
from CTSegLogic.engine.abilities import lacking
from CTSegLogic.engine.device import free_bytes, pick_device
from CTSegLogic.values.errors import CTSegError, out_of_memory
from CTSegLogic.values.prompt import Classes
from CTSegLogic.values.run import Request, Run

MPS, CPU = torch.device("mps"), torch.device("cpu")


@pytest.fixture
def a_mac(monkeypatch):
    """A computer that says it has Apple's GPU and no other; operations named in `without` fail on it."""
    without = set()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)

    def refusing(name, do):
        def act(x, w):
            act.tries += 1
            if name in without and act.tries % 2 == 0:  # each is done on the CPU first, then there
                message = f"The operator aten::{name} is not currently implemented for the MPS device"
                raise NotImplementedError(message)
            return do(x, w)

        act.tries = 0
        return act

    table = {name: refusing(name, do) for name, do in abilities.OPERATIONS.items()}
    monkeypatch.setattr(abilities, "OPERATIONS", table)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_: self)
    lacking.cache_clear()
    yield without
    lacking.cache_clear()


def test_auto_takes_apples_gpu_where_it_can_do_all(a_mac):
    assert lacking(MPS) == ""
    assert pick_device(Run(device="auto")) == MPS
    assert pick_device(Run(device="mps")) == MPS


def test_auto_takes_the_cpu_where_apples_gpu_lacks_a_convolution_and_a_named_one_is_refused(a_mac):
    a_mac.update({"conv_transpose3d", "max_pool3d"})
    assert lacking(MPS) == "conv_transpose3d, max_pool3d"
    assert pick_device(Run(device="auto")) == CPU
    with pytest.raises(CTSegError, match=r"cannot compute conv_transpose3d, max_pool3d on mps") as caught:
        pick_device(Run(device="mps"))
    assert "cpu" in caught.value.hint


def test_cuda_goes_before_apples_gpu(a_mac, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device(Run(device="auto")).type == "cuda"


def test_an_operation_that_answers_wrongly_counts_as_lacking(monkeypatch):
    lacking.cache_clear()
    right, asked = abilities.OPERATIONS["conv3d"], []

    def wrong(x, w):
        asked.append(1)
        return right(x, w) * (1.01 if len(asked) > 1 else 1.0)

    monkeypatch.setattr(abilities, "OPERATIONS", {**abilities.OPERATIONS, "conv3d": wrong})
    assert lacking(CPU) == "conv3d"
    lacking.cache_clear()


def test_this_computers_processor_can_do_all():
    assert lacking(CPU) == ""


def test_a_torch_without_apples_gpu_says_so_and_nothing_breaks():
    lacking.cache_clear()
    assert "conv3d" in lacking(MPS)


def test_the_doctor_tells_what_apples_gpu_can_do(a_mac, monkeypatch):
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 8 * 2**30)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 2**30)
    monkeypatch.setattr(device, "_free_ram", lambda: 64 * 2**30)
    assert doctor._devices(Run())["mps"] == "Apple GPU, 7.0 GiB free, no float64"
    lacking.cache_clear()
    a_mac.add("conv3d")
    assert doctor._devices(Run())["mps"] == "Apple GPU, cannot compute conv3d: auto takes the CPU"


def test_memory_of_apples_gpu_is_the_computers_and_never_more_than_the_user_says(monkeypatch):
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 20 * 2**30)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 0)
    monkeypatch.setattr(device, "_free_ram", lambda: 6 * 2**30)
    assert free_bytes(MPS, Run()) == 6 * 2**30
    assert free_bytes(MPS, Run(memory_gib=2)) == 2 * 2**30
    assert out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"))


def test_without_psutil_and_sysconf_a_cautious_amount_is_planned_for(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "psutil", None)
    monkeypatch.setattr(device.os, "sysconf_names", {}, raising=False)
    assert free_bytes(CPU, Run()) == 4 * 2**30


class _NoDoubles(TorchDispatchMode):
    """Fails at any result in double precision, as Apple's GPU does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                message = "Cannot convert a MPS Tensor to float64 dtype"
                raise TypeError(message)
        return out


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_no_step_of_a_run_needs_double_precision(a_tiny_card, activation):
    from dataclasses import replace

    heads = tuple(replace(head, activation=activation) for head in a_tiny_card.heads)
    card = replace(a_tiny_card, heads=heads)
    (card.folder / "card.json").write_text(card.to_json(), encoding="utf-8")
    request = Request(card=str(card.folder), prompt=Classes(("kidney_left", "liver")))
    scan = phantoms.ct_of(phantoms.tilted_grid((20, 24, 24), (5, 5, 5)), noise=8)
    with _NoDoubles(), pytest.raises(TypeError, match="float64"):
        torch.ones(2).double()
    with _NoDoubles():
        found = Session(Run(device="cpu", workers=1)).segment(scan, request)
    assert any(entry.confidence for entry in found.entries)
