"""The file of tenants and keys: what is in it, what is wrong with it, and that its changes are taken."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import yaml

from app import tenants
from app.errors import ConfigError
from app.routing.decision import ServiceClass
from app.tenants import ANYONE, LOCAL, KeyRing, Tenant, digest, entry, new_key, parse_tenants, read_tenants
from tests.unit.waiting import until

HASH = digest(b"one").hex()
OTHER_HASH = digest(b"two").hex()


def file_of(*found: Tenant) -> str:
    return yaml.safe_dump({"tenants": [tenant.model_dump(exclude_defaults=True) for tenant in found]})


def test_an_entry_that_is_made_admits_its_key(tmp_path: Path) -> None:
    key = new_key()
    path = tmp_path / "keys.yaml"
    path.write_text("tenants:\n" + entry("search", key, admin=False) + entry("ops", "x", admin=True))
    ring = KeyRing(str(path))
    search, ops = ring.find(key.encode()), ring.find(b"x")
    assert search is not None
    assert ops is not None
    assert (search.name, search.admin, ops.name, ops.admin) == ("search", False, "ops", True)
    assert ring.find(b"") is None
    assert ring.find(key.encode() + b" ") is None
    assert ring.find(digest(b"x").hex().encode()) is None, "the hash itself opens nothing"
    assert key not in path.read_text()


def test_new_keys_differ_and_fit_into_a_header() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.isascii() and key.isprintable() and len(key) > 43 for key in keys)


def test_several_keys_of_one_tenant_are_valid_at_once(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(file_of(Tenant(name="a", keys=[HASH, OTHER_HASH])))
    ring = KeyRing(str(path))
    assert ring.find(b"one") is ring.find(b"two") is not None


WRONG: dict[str, tuple[str, str]] = {
    "empty": ("", "tenants"),
    "a list": ("- a", "tenants"),
    "no yaml": ("tenants: [", "no YAML"),
    "no tenants": ("tenants: []", "tenants"),
    "a name with a space": ("tenants: [{name: 'a b'}]", "tenants.0.name"),
    "no name": ("tenants: [{keys: []}]", "tenants.0.name"),
    "the same name twice": ("tenants: [{name: a}, {name: a}]", "the name a is there twice"),
    "the same key twice": (f"tenants: [{{name: a, keys: [{HASH}]}}, {{name: b, keys: [{HASH}]}}]", "is there twice"),
    "a key in clear": ("tenants: [{name: a, keys: [secret-secret]}]", "tenants.0.keys"),
    "an upper-case hash": (f"tenants: [{{name: a, keys: [{HASH.upper()}]}}]", "tenants.0.keys"),
    "an unknown field": ("tenants: [{name: a, wieght: 2}]", "tenants.0.wieght"),
    "no weight": ("tenants: [{name: a, weight: 0}]", "tenants.0.weight"),
    "an endless weight": ("tenants: [{name: a, weight: .inf}]", "tenants.0.weight"),
    "an endless limit": ("tenants: [{name: a, requests_per_s: .inf}]", "tenants.0.requests_per_s"),
    "more memory than there is": ("tenants: [{name: a, kv_share: 1.1}]", "tenants.0.kv_share"),
    "no memory": ("tenants: [{name: a, kv_share: 0}]", "tenants.0.kv_share"),
    "no share": ("tenants: [{name: a, kv_share: .nan}]", "tenants.0.kv_share"),
    "no such number": ("tenants: [{name: !!int x}]", "no YAML"),
    "nested too deeply": ("[" * 20_000, "no YAML"),
    "an unknown class": ("tenants: [{name: a, highest_class: first}]", "tenants.0.highest_class"),
    "a group like a path": ("tenants: [{name: a, cache_group: a/b}]", "tenants.0.cache_group"),
}


@pytest.mark.parametrize(("text", "named"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_with_a_file_is_named(text: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_tenants(text)
    assert str(caught.value).startswith("security.keys")
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "text", ["tenants: [{name: a, keys: [secret-secret]}]", "tenants: {secret-secret", "secret: 1"]
)
def test_no_error_shows_a_key(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_tenants(text)
    assert "secret-secret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.yaml cannot be read: No such file"):
        read_tenants(str(tmp_path / "nowhere.yaml"))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_tenants(str(tmp_path))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_tenants(str(tmp_path / "bytes"))
    with pytest.raises(ConfigError, match="BATON_NO_KEYS is not set"):
        read_tenants("env:BATON_NO_KEYS")
    monkeypatch.setenv("BATON_SOME_KEYS", file_of(Tenant(name="a", keys=[HASH])))
    assert KeyRing("env:BATON_SOME_KEYS").find(b"one") is not None


@asynccontextmanager
async def followed(path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[KeyRing]:
    monkeypatch.setattr(tenants, "RELOAD_S", 0.005)
    ring = KeyRing(str(path))
    task = asyncio.create_task(ring.follow())
    try:
        yield ring
    finally:
        task.cancel()


async def test_a_change_is_taken_without_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(file_of(Tenant(name="a", keys=[HASH])))
    async with followed(path, monkeypatch) as ring:
        path.write_text(file_of(Tenant(name="a", keys=[OTHER_HASH])))
        await until(lambda: ring.find(b"two") is not None)
        assert ring.find(b"one") is None
        new = tmp_path / "new"  # as Kubernetes changes a mounted secret
        new.write_text(file_of(Tenant(name="a", keys=[])))
        new.rename(path)
        await until(lambda: ring.find(b"two") is None)


async def test_after_a_bad_change_the_keys_of_before_stay_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(good := file_of(Tenant(name="a", keys=[HASH])))
    with caplog.at_level(logging.INFO, logger="baton.tenants"):
        async with followed(path, monkeypatch) as ring:
            path.write_text("tenants: [{name: a, keys: [in-clear]}]")
            await until(lambda: not ring.is_current)
            await asyncio.sleep(0.05)
            assert ring.find(b"one") is not None
            assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 1
            path.unlink()
            await until(lambda: "cannot be read" in caplog.text)
            assert ring.find(b"one") is not None
            path.write_text(good)
            await until(lambda: ring.is_current)
    assert "in-clear" not in caplog.text


CLASSES: list[tuple[ServiceClass, ServiceClass, ServiceClass]] = [
    ("priority", "priority", "priority"),
    ("priority", "flex", "flex"),
    ("default", "priority", "default"),
    ("default", "flex", "flex"),
    ("flex", "priority", "flex"),
    ("flex", "default", "flex"),
]


@pytest.mark.parametrize(("highest", "asked", "gets"), CLASSES)
def test_no_class_above_the_tenants_highest(highest: ServiceClass, asked: ServiceClass, gets: ServiceClass) -> None:
    tenant = Tenant(name="a", highest_class=highest)
    assert tenant.bound_class(asked) == gets
    assert tenant.bound_priority(-3) == (-3 if highest == "priority" else 0)
    assert tenant.bound_priority(3) == 3


def test_no_salt_is_another_tenants() -> None:
    """Whatever a client sends as its own salt."""
    one, two, grouped = Tenant(name="a"), Tenant(name="b"), Tenant(name="c", cache_group="a")
    asked = [None, "", "x", "tenant/a/", "tenant/b/", "group/a/", "a", "/", "b/x"]
    salts = [{tenant.cache_salt(each) for each in asked} for tenant in (one, two, grouped)]
    assert not salts[0] & salts[1]
    assert not salts[0] & salts[2]
    assert not salts[1] & salts[2]


def test_a_group_shares_its_cache_and_nothing_else() -> None:
    one, two = Tenant(name="a", cache_group="g"), Tenant(name="b", cache_group="g")
    assert one.cache_salt("x") == two.cache_salt("x") != one.cache_salt(None)
    assert one.session("s") != two.session("s")


@pytest.mark.parametrize("nobody", [LOCAL, ANYONE])
def test_without_keys_nothing_of_a_request_changes(nobody: Tenant) -> None:
    assert nobody.cache_salt(None) is None
    assert nobody.cache_salt("x") == "x"
    assert nobody.session("s") == "s"
    assert nobody.session(None) is None
    assert nobody.may_use("any")
    assert nobody.bound_class("priority") == "priority"


def test_only_models_of_the_list() -> None:
    assert [Tenant(name="a", models=["m"]).may_use(each) for each in ("m", "n")] == [True, False]
    assert not Tenant(name="a", models=[]).may_use("m")


def test_keys_are_not_in_a_tenants_repr() -> None:
    assert HASH not in repr(Tenant(name="a", keys=[HASH]))
