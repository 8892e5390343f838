r"""KV tokens of a worker: free, used by requests that run, or cached in the tree of a query.

    root --[opening]--[page 1]--[page 2 ...]        one node a document, cached from its beginning
               \--[page 3]                          another branch: the list before an update

As SGLang's radix tree with our holds (`sglang_stream/engine/cache.py`), with documents in place of
tokens: no two queries share any, so each has a tree of its own. Locked nodes are not evicted;
others are, leaves first, those that updates left behind before all others, then the least recently
used. A page that two branches share in part counts once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush

from experiments.workload.shapes import Document

Prompt = tuple[Document, ...]


class Node:
    """A document behind those of its parents. `cached`: tokens of it; `left`: an update left it
    behind; `access`: when it was last used, in accesses of the pool."""

    __slots__ = ("access", "cached", "children", "document", "left", "locks", "parent")

    def __init__(self, parent: Node | None = None, document: Document | None = None) -> None:
        self.parent = parent
        self.document = document
        self.cached = 0
        self.locks = 0
        self.children: dict[Document, Node] = {}
        self.left = False
        self.access = 0


@dataclass(frozen=True)
class Hold:
    """A locked prefix: its deepest node and its length in tokens, whole pages. `found`: tokens of
    it that an update had left behind."""

    node: Node
    length: int
    found: int = 0


class Pool:
    """`free + used + evictable + protected == size` tokens at any time."""

    def __init__(self, size: int, page: int = 1) -> None:
        self.size = size
        self.page = page
        self.free = size
        self.used = 0
        self.evictable = 0
        self.protected = 0
        self._accesses = 0
        self._pushed = 0
        self._left = 0
        self._leaves: list[tuple[bool, int, int, Node]] = []

    @property
    def available(self) -> int:
        """Tokens that are free or can be evicted at once."""
        return self.free + self.evictable

    # --- the tree -----------------------------------------------------------------------------

    def match(self, root: Node, prompt: Prompt) -> tuple[Node, int]:
        """The deepest node of the cached prefix of a prompt, and the prefix's length in tokens."""
        self._accesses += 1
        node, length = root, 0
        for document in prompt:
            child = node.children.get(document)
            if child is None:
                break
            node = child
            node.access = self._accesses
            length += node.cached
            if node.cached < document.tokens:
                break
        return node, length - length % self.page

    def take(self, root: Node, prompt: Prompt, old: Hold | None = None) -> Hold | None:
        """Holds the longest cached prefix in place of `old`; None if nothing is cached."""
        node, length = self.match(root, prompt)
        hold = None
        if length:
            hold = Hold(node, length, self._found(node))
            self.lock(node)
        self.release(old)
        return hold

    def release(self, hold: Hold | None) -> None:
        """Gives a hold back; its KV stays cached until it is evicted."""
        if hold is not None:
            self.unlock(hold.node)

    def lock(self, node: Node) -> None:
        for locked in _path(node):
            if locked.locks == 0:
                self.evictable -= locked.cached
                self.protected += locked.cached
            locked.locks += 1

    def unlock(self, node: Node) -> None:
        for locked in _path(node):
            locked.locks -= 1
            if locked.locks == 0:
                self.evictable += locked.cached
                self.protected -= locked.cached
                self._offer(locked)

    def unlocked(self, node: Node) -> int:
        """Tokens of the path to `node` that nobody has locked."""
        return sum(n.cached for n in _path(node) if not n.locks)

    def insert(self, root: Node, prompt: Prompt, end: int, used: int) -> Node:
        """Caches the first `end` tokens of a prompt, `used` of which have just been computed.
        What is there already is given back. Returns the deepest node."""
        self._accesses += 1
        node, at, added = root, 0, 0
        for document in prompt:
            if at >= end:
                break
            child = node.children.get(document)
            if child is None:
                child = node.children[document] = Node(node, document)
            node = child
            node.access = self._accesses
            more = min(document.tokens, end - at) - node.cached
            if more > 0:
                node.cached += more
                added += more
                if node.locks:
                    self.protected += more
                else:
                    self.evictable += more
            at += document.tokens
        self._offer(node)
        self.used -= used
        self.free += used - added
        return node

    def prune(self, leaf: Node, keep: Hold | None) -> None:
        """Frees the dead branch from `leaf` upward, up to what `keep` holds."""
        for node in _dead_branch(leaf, keep):
            if node.children:
                break
            self._remove(node)

    def leave(self, leaf: Node, keep: Hold | None) -> None:
        """Leaves that branch in the tree, as the first to be evicted."""
        for node in _dead_branch(leaf, keep):
            if not all(child.left for child in node.children.values()):
                break
            if not node.left:
                node.left = True
                self._left += 1
            self._offer(node)

    def _found(self, node: Node) -> int:
        """Tokens up to `node` that had been left behind; they are no longer."""
        if not self._left:
            return 0
        again = [n for n in _path(node) if n.left]
        for n in again:
            n.left = False
        self._left -= len(again)
        return sum(n.cached for n in again)

    # --- memory -------------------------------------------------------------------------------

    def allocate(self, tokens: int) -> None:
        """Takes tokens for a request that runs, evicting what nobody holds. Raises RuntimeError if
        they are not there, which a scheduler must not let happen."""
        if not self.make_free(tokens):
            raise RuntimeError(f"{tokens} KV tokens are wanted, {self.available} can be had")
        self.free -= tokens
        self.used += tokens

    def give_back(self, tokens: int) -> None:
        """Frees tokens of a request that ran and are not cached."""
        self.used -= tokens
        self.free += tokens

    def make_free(self, tokens: int) -> bool:
        """Evicts until so many tokens are free; False, and nothing evicted, if they cannot be."""
        if tokens > self.available:
            return False
        while self.free < tokens:
            was_kept, access, _, node = heappop(self._leaves)
            if node.locks or node.children or not _is_in_tree(node):
                continue
            if (was_kept, access) != (not node.left, node.access):
                self._offer(node)  # used since it was offered
                continue
            self._remove(node)
        return True

    def _offer(self, node: Node) -> None:
        """Lets a leaf that nobody holds be evicted."""
        if not node.locks and not node.children and node.parent is not None:
            self._pushed += 1
            heappush(self._leaves, (not node.left, node.access, self._pushed, node))

    def _remove(self, leaf: Node) -> None:
        assert leaf.parent is not None
        assert leaf.document is not None
        del leaf.parent.children[leaf.document]
        self.evictable -= leaf.cached
        self.free += leaf.cached
        if leaf.left:
            self._left -= 1
        self._offer(leaf.parent)


def _path(node: Node) -> Iterator[Node]:
    """The nodes from `node` upward, without the root."""
    while node.parent is not None:
        yield node
        node = node.parent


def _is_in_tree(node: Node) -> bool:
    assert node.parent is not None
    assert node.document is not None
    return node.parent.children.get(node.document) is node


def _dead_branch(leaf: Node, keep: Hold | None) -> Iterator[Node]:
    """The nodes from `leaf` upward that nobody holds, up to `keep`'s node."""
    stop = None if keep is None else keep.node
    node = leaf
    while node is not stop and node.parent is not None:
        parent = node.parent
        if node.locks or not _is_in_tree(node):
            return
        yield node
        node = parent
