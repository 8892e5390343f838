"""Requests in the order of a policy, kept while they change.

Each change costs two binary searches instead of a new sort of all requests: an iteration changes
a few of them.
"""

from __future__ import annotations

from bisect import bisect_left

from sglang_stream.policy.policies import Key, Policy
from sglang_stream.policy.types import View


class Order:
    """`views` is the ranked list, the first served first; not to be changed from outside."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._keys: list[Key] = []
        self._key_of: dict[str, Key] = {}
        self.views: list[View] = []

    def put(self, view: View) -> None:
        """Adds a request, or gives it the place that it has now."""
        key = self._policy(view)
        keys = self._keys
        before = self._key_of.get(view.id)
        if before is not None:
            index = bisect_left(keys, before)
            if before == key:
                self.views[index] = view
                return
            del keys[index], self.views[index]
        self._key_of[view.id] = key
        index = bisect_left(keys, key)
        keys.insert(index, key)
        self.views.insert(index, view)

    def drop(self, request_id: str) -> None:
        """Takes a request out, if it is there."""
        key = self._key_of.pop(request_id, None)
        if key is not None:
            index = bisect_left(self._keys, key)
            del self._keys[index], self.views[index]

    def place(self, request_id: str) -> int | None:
        """The place of a request, 0 for the first; None if it is not there."""
        key = self._key_of.get(request_id)
        return None if key is None else bisect_left(self._keys, key)
