"""API keys: who makes a call, and what is that caller's own.

    keys in use              who may call             who is admin
    none                     everybody                everybody
    an admin key alone       everybody                whoever sends the admin key
    API keys alone           whoever sends one        nobody
    API keys and an admin's  whoever sends one        whoever sends the admin key

A key file has one key a line, with an optional name before a colon:

    # after a # at the start of a line, or after a space, stands a comment
    team-a:sk-0123456789
    sk-abcdefghij

What a caller owns follows from its name, so that a new key under the old name still reaches it;
both may stand in the file while clients change over. The streams of a key without a name are that
key's.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sglang_stream.errors import Forbidden, InvalidRequest, Unauthorized

_ADMIN = "admin"
_COMMENT = re.compile(r"(^|\s)#.*")
_KEY = re.compile(r"[!-~]+")  # what a header can carry without a space


@dataclass(frozen=True)
class Caller:
    """Who makes a call.

    `name`: for logs; None where the key has none. `owner`: 8 bytes that a stream belongs to, the
    same in every router with the same keys; empty where no API keys are in use. `namespace`:
    SGLang's `extra_key` of the caller's prefix cache, None where prefixes are shared by all.
    """

    name: str | None
    owner: bytes
    namespace: str | None
    admin: bool

    def require_admin(self) -> None:
        """Raises Forbidden unless the caller is admin."""
        if not self.admin:
            raise Forbidden("this call needs the router's admin key, sent as a Bearer token")


class ApiKeys:
    """The keys of one router, kept as digests."""

    def __init__(self, callers: list[tuple[bytes, Caller]], *, required: bool) -> None:
        """`callers`: of each key's digest. `required`: a call needs one of the keys."""
        self._callers = callers
        self._required = required
        self._nobody = Caller(None, b"", None, admin=not callers)

    @classmethod
    def from_lines(
        cls, lines: Iterable[str] | None, admin_key: str | None, *, share_prefixes: bool = False
    ) -> ApiKeys:
        """The keys in `lines`, a key file's (None: no API keys), and the admin's.

        `share_prefixes`: one prefix cache for all callers. Raises InvalidRequest that names the
        line where one is not valid or repeats a key, and for a file without any key: an emptied
        file must not open the router to everybody.
        """
        callers: list[tuple[bytes, Caller]] = []
        taken: dict[bytes, str] = {}
        if admin_key is not None:
            if not _KEY.fullmatch(admin_key):
                raise InvalidRequest(
                    "the admin key must be printable ASCII without spaces: choose another"
                )
            taken[_digest(admin_key)] = "the admin key"
        for number, name, key in _entries(lines or ()):
            digest = _digest(key)
            if digest in taken:
                raise InvalidRequest(
                    f"line {number} of the API keys repeats {taken[digest]}: remove one of the two"
                )
            taken[digest] = f"line {number}"
            owner = _owner("key", key) if name is None else _owner("name", name)
            callers.append((digest, _caller(name, owner, share_prefixes, admin=False)))
        required = lines is not None
        if required and not callers:
            raise InvalidRequest("the API keys are empty: add a line KEY or NAME:KEY")
        if admin_key is not None:
            # Where the API is open, the admin's streams are everybody's, as all others are.
            owner = _owner("name of the admin", "") if required else b""
            callers.append((_digest(admin_key), _caller(_ADMIN, owner, share_prefixes, admin=True)))
        return cls(callers, required=required)

    def identify(self, authorization_header: str | None) -> Caller:
        """Who sent a request with this `Authorization` header. Raises Unauthorized."""
        if authorization_header is None:
            if self._required:
                raise Unauthorized("no API key: send the header 'Authorization: Bearer KEY'")
            return self._nobody
        scheme, _, key = authorization_header.strip().partition(" ")
        found = self._find(key.strip()) if scheme.lower() == "bearer" else None
        if found is not None:
            return found
        if not self._required:
            return self._nobody
        if scheme.lower() != "bearer":
            raise Unauthorized("the Authorization header must read 'Bearer KEY'")
        raise Unauthorized("unknown API key: check it, or ask the operator for one")

    def _find(self, key: str) -> Caller | None:
        """Whose key it is. The time taken tells nothing: all are compared, by digests."""
        presented = _digest(key)
        found = None
        for digest, caller in self._callers:
            if hmac.compare_digest(digest, presented):
                found = caller
        return found


def _entries(lines: Iterable[str]) -> Iterator[tuple[int, str | None, str]]:
    """Number, name and key of each line that has a key."""
    for number, line in enumerate(lines, 1):
        text = _COMMENT.sub("", line).strip()
        if not text:
            continue
        before, colon, after = text.partition(":")
        name, key = (before.strip(), after.strip()) if colon else (None, text)
        if name == "" or name == _ADMIN or not _KEY.fullmatch(key):
            # The line itself is not shown: it may hold a key.
            raise InvalidRequest(
                f"line {number} of the API keys must be KEY or NAME:KEY, the key printable ASCII "
                f"without spaces, the name neither empty nor '{_ADMIN}'"
            )
        yield number, name, key


def _caller(name: str | None, owner: bytes, share_prefixes: bool, *, admin: bool) -> Caller:
    shared = share_prefixes or not owner
    return Caller(name, owner, None if shared else _namespace(owner), admin)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _owner(kind: str, text: str) -> bytes:
    """8 bytes of `text`; `kind` keeps a key apart from another's name of the same letters."""
    return hashlib.blake2b(text.encode(), digest_size=8, key=kind.encode()).digest()


def _namespace(owner: bytes) -> str:
    return hashlib.blake2b(owner, digest_size=8, key=b"prefix cache").hexdigest()
