"""Who holds which page of the key-value cache: counted references, a prefix cache of full pages, eviction of the longest unused.

A full page is known by what stands in it and before it, so two prompts with one beginning share its pages. Plain Python, no device.
"""

import collections
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np


class Pages:
    """Pages 1 to `count`, of `size` tokens each; page 0 is padding's."""

    def __init__(self, count: int, size: int):
        self.count, self.size = count, size
        self._free = list(range(count, 0, -1))
        self._owners: dict[int, int] = collections.defaultdict(int)
        self._page: dict[bytes, int] = {}  # name of a full page -> page
        self._name: dict[int, bytes] = {}
        self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()  # named pages without an owner, the longest unused first

    @property
    def used(self) -> int:
        """Pages that somebody owns."""
        return self.count - len(self._free) - len(self._idle)

    def needed(self, tokens: int) -> int:
        """Pages for so many tokens."""
        return -(-tokens // self.size)

    def take(self, prompt: Sequence[int], tokens: int) -> tuple[list[int], int] | None:
        """Pages for a sequence of up to `tokens` tokens that begins with `prompt`, and how many of the prompt's tokens they hold already (never all: the last
        one must be fed to say what follows); None when there are too few."""
        shared = []
        for name in self._names(prompt[:-1]):
            if name not in self._page:
                break
            shared.append(self._page[name])
        for page in shared:
            self._own(page)
        more = self.needed(tokens) - len(shared)
        if more > len(self._free) + len(self._idle):
            self.give(shared)
            return None
        fresh = [self._fresh() for _ in range(more)]
        return shared + fresh, len(shared) * self.size

    def name(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Makes the full pages of these tokens, which stand in `pages`, known to later prompts."""
        for name, page in zip(self._names(tokens), pages):
            if name not in self._page and page not in self._name:
                self._page[name], self._name[page] = page, name

    def give(self, pages: Sequence[int]) -> None:
        """Gives pages back. Those with a name stay until others need the room, the end of a sequence before its beginning."""
        for page in reversed(pages):
            self._owners[page] -= 1
            assert self._owners[page] >= 0
            if not self._owners[page]:
                del self._owners[page]
                if page in self._name:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def _own(self, page: int) -> None:
        self._idle.pop(page, None)
        self._owners[page] += 1

    def _fresh(self) -> int:
        if not self._free:
            page, _ = self._idle.popitem(last=False)
            del self._page[self._name.pop(page)]
            self._free.append(page)
        page = self._free.pop()
        self._owners[page] = 1
        return page

    def _names(self, tokens: Sequence[int]) -> Iterator[bytes]:
        name = b""
        for start in range(0, len(tokens) - self.size + 1, self.size):
            name = hashlib.blake2b(name + np.asarray(tokens[start:start + self.size], np.int32).tobytes(), digest_size=16).digest()
            yield name
