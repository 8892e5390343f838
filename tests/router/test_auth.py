"""API keys: the file, who a caller is, and what is its own."""

from __future__ import annotations

import re

import pytest

from router.auth import ApiKeys, Caller
from sglang_stream.errors import Forbidden, InvalidRequest, Unauthorized, from_fields

FILE = """
# two teams
team-a:sk-a1
  team-b : sk-b   # spaces and a comment
team-a:sk-a2
sk#nameless
""".splitlines()


def bearer(key: str) -> str:
    return f"Bearer {key}"


def keys(admin_key: str | None = None, **options: bool) -> ApiKeys:
    return ApiKeys.from_lines(FILE, admin_key, **options)


def test_a_caller_is_known_by_its_key() -> None:
    assert keys().identify(bearer("sk-a1")).name == "team-a"
    assert keys().identify("bearer  sk-b ").name == "team-b"
    assert keys().identify(bearer("sk#nameless")).name is None


def test_what_is_owned_follows_the_name_and_is_the_same_in_every_router() -> None:
    old, new = (keys().identify(bearer(key)) for key in ("sk-a1", "sk-a2"))
    assert old == new
    moved = ApiKeys.from_lines(["team-b:x", "team-a:sk-a3"], None).identify(bearer("sk-a3"))
    assert moved == old
    assert old.owner.hex() == "e9340fad46fe70dc"  # must not change between versions


def test_callers_do_not_share() -> None:
    callers = [
        keys("root").identify(bearer(key)) for key in ("sk-a1", "sk-b", "sk#nameless", "root")
    ]
    assert len({caller.owner for caller in callers}) == 4
    assert {len(caller.owner) for caller in callers} == {8}
    assert len({caller.namespace for caller in callers}) == 4
    for caller in callers:
        assert caller.namespace is not None
        assert re.fullmatch(r"[0-9a-f]{16}", caller.namespace)
        assert caller.namespace != caller.owner.hex()


def test_a_key_is_not_the_name_of_the_same_letters() -> None:
    both = ApiKeys.from_lines(["one:key", "one"], None)
    assert both.identify(bearer("key")).owner != both.identify(bearer("one")).owner


def test_shared_prefixes_have_no_namespace_but_owners() -> None:
    a = keys(share_prefixes=True).identify(bearer("sk-a1"))
    b = keys(share_prefixes=True).identify(bearer("sk-b"))
    assert a.namespace is None
    assert b.namespace is None
    assert a.owner != b.owner


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (None, "Authorization: Bearer KEY"),
        ("", "must read 'Bearer KEY'"),
        ("Basic sk-a1", "must read 'Bearer KEY'"),
        ("sk-a1", "must read 'Bearer KEY'"),
        ("Bearer", "unknown API key"),
        ("Bearer sk-a", "unknown API key"),
        ("Bearer sk-a11", "unknown API key"),
        ("Bearer team-a:sk-a1", "unknown API key"),
        ("Bearer sk-\xe4\u20ac\ud800", "unknown API key"),
    ],
)
def test_a_call_without_a_known_key_is_refused(header: str | None, says: str) -> None:
    with pytest.raises(Unauthorized, match=says) as refused:
        keys("root").identify(header)
    fields = refused.value.to_fields()
    assert (refused.value.status, fields["code"]) == (401, "unauthorized")
    assert fields["type"] == "authentication_error"
    assert type(from_fields(fields)) is Unauthorized


@pytest.mark.parametrize("header", [None, "Bearer EMPTY", "Basic x"])
def test_without_keys_everybody_is_one_admin(header: str | None) -> None:
    caller = ApiKeys.from_lines(None, None).identify(header)
    assert caller == Caller(None, b"", None, admin=True)
    caller.require_admin()


@pytest.mark.parametrize("header", [None, "Bearer EMPTY", "Basic x"])
def test_an_admin_key_alone_leaves_ordinary_calls_open(header: str | None) -> None:
    keys = ApiKeys.from_lines(None, "root")
    anybody = keys.identify(header)
    assert anybody == Caller(None, b"", None, admin=False)
    with pytest.raises(Forbidden, match="admin key") as refused:
        anybody.require_admin()
    assert (refused.value.status, refused.value.code) == (403, "forbidden")
    admin = keys.identify(bearer("root"))
    admin.require_admin()
    assert (admin.owner, admin.namespace) == (b"", None)


def test_with_api_keys_only_the_admin_key_makes_an_admin() -> None:
    assert not keys().identify(bearer("sk-a1")).admin
    assert not keys("root").identify(bearer("sk-a1")).admin
    assert keys("root").identify(bearer("root")).admin
    with pytest.raises(Unauthorized):
        keys().identify(bearer("root"))


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["a:k1", "", "b:k1"], "line 3 .* repeats line 1"),
        (["a:k1", "root"], "line 2 .* repeats the admin key"),
        (["a:"], "line 1 .* must be KEY or NAME:KEY"),
        (["x", ":k"], "line 2 .* must be"),
        (["two words"], "line 1 .* must be"),
        (["schlüssel"], "line 1 .* must be"),
        (["admin:k"], "neither empty nor 'admin'"),
        (["# no key"], "are empty"),
        ([], "are empty"),
    ],
)
def test_a_file_that_is_not_right_is_refused(lines: list[str], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as refused:
        ApiKeys.from_lines(lines, "root")
    assert "k1" not in refused.value.message  # no key in a log
    assert "schl" not in refused.value.message


@pytest.mark.parametrize("admin_key", ["", "two words"])
def test_an_admin_key_that_no_header_can_carry_is_refused(admin_key: str) -> None:
    with pytest.raises(InvalidRequest, match="admin key"):
        ApiKeys.from_lines(None, admin_key)


def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(kept: bytes, presented: bytes) -> bool:
        compared.append(kept)
        return kept == presented

    monkeypatch.setattr("router.auth.hmac.compare_digest", compare)
    keys("root").identify(bearer("sk-a1"))
    assert len(compared) == 5
    assert {len(kept) for kept in compared} == {32}
