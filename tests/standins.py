"""Stand-ins that several tests share: verdicts, the table of a GPU, a separate cache.

A test file that imports a fixture from here can use it; an autouse fixture then applies to all its tests.
"""

from __future__ import annotations

import pytest

from jasper_fast.dispatch import choose
from jasper_fast.dispatch.verdict import GOOD, Verdict
from jasper_fast.kernels import tables

GPU_NAME = "NVIDIA Imaginary 9000"


def verdict(op: str = "conv1d", status: str = GOOD, face: str = "triton", **more) -> Verdict:
    """The verdict of a full check in bf16, with the fields in `more` changed."""
    values = {"quick": False, "checked": 3, "failure": "" if status == GOOD else "dgrad (2, 64->48, 37) wrong: 7 %"}
    values |= {"dtype": "bfloat16", **more}
    return Verdict(op, face, status=status, **values, date="2026-01-01T00:00:00+00:00")


@pytest.fixture(name="own_cache", autouse=True)
def verdicts_of_its_own(tmp_path, monkeypatch):
    """Gives the test a cache of its own and clears the choices of dispatch."""
    monkeypatch.setenv("JASPER_FAST_CACHE", str(tmp_path / "cache"))
    choose.forget()
    yield tmp_path / "cache"
    monkeypatch.undo()
    choose.forget()


@pytest.fixture(name="put_table")
def imaginary_gpus_table(tmp_path, monkeypatch):
    """Writes a table of these rows where look-ups for the imaginary GPU find it; gives its path."""
    where = tmp_path / "tables"
    monkeypatch.setenv("JASPER_FAST_TABLES", str(where))
    monkeypatch.setattr(tables, "_gpu_name", lambda index: GPU_NAME)
    tables._index.cache_clear()

    def put(rows: list[tables.Row], **header: str):
        path = where / f"{tables.slug(GPU_NAME)}.json"
        named = {"gpu": GPU_NAME, "capability": "sm_90"}
        tables.write(path, dict.fromkeys(tables.HEADER, "x") | named | header, rows)
        tables._index.cache_clear()
        return path

    yield put
    tables._index.cache_clear()


def wrap(monkeypatch, owner: object, name: str, around) -> None:
    """Replaces `owner.name` by `around(right, *args, **more)`, where `right` is the original."""
    right = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **more: around(right, *args, **more))


def spied(monkeypatch, owner: object, name: str, note=lambda *args, **more: args) -> list:
    """Collects `note(...)` of the arguments of each call of `owner.name`, which still works."""
    calls: list = []

    def around(right, *args, **more):
        calls.append(note(*args, **more))
        return right(*args, **more)

    wrap(monkeypatch, owner, name, around)
    return calls
