"""Changes of a prefix cache: collected one event at a time, and merged for a frontend that is behind."""

from __future__ import annotations

from app.messages import KvUpdate


def merge_updates(*updates: KvUpdate) -> KvUpdate:
    """Return one update that does what `updates` do one after the other, for a frontend that is behind.

    Each must be the exact change since the one before, as `EventTranslator` returns them.  The result then names no
    more blocks than were there before the first and are there after the last, however many updates it stands for.
    """
    change = Change()
    for update in updates:
        if update.is_reset:
            change.reset()
        for name in update.removed:
            change.remove(name)
        for name in update.stored:
            change.store(name)
    return change.as_update()


def merge_waiting(updates: list[KvUpdate]) -> KvUpdate | None:
    """Return what `merge_updates` makes of those that wait; None if none does."""
    if len(updates) < 2:
        return updates[0] if updates else None
    return merge_updates(*updates)


class Change:
    """Collects the net effect of changes that happen one after the other."""

    def __init__(self) -> None:
        # Sets that keep the order of insertion: PrefixIndex takes less memory if a prompt's blocks stay together.
        self._stored: dict[int, None] = {}
        self._removed: dict[int, None] = {}
        self._is_reset = False

    def store(self, name: int) -> None:
        """Add a block that was not there."""
        if name in self._removed:
            del self._removed[name]
        else:
            self._stored[name] = None

    def remove(self, name: int) -> None:
        """Remove a block that was there."""
        if name in self._stored:
            del self._stored[name]
        else:
            self._removed[name] = None

    def reset(self) -> None:
        """Remove all blocks."""
        self._stored.clear()
        self._removed.clear()
        self._is_reset = True

    def as_update(self) -> KvUpdate:
        return KvUpdate(stored=list(self._stored), removed=list(self._removed), is_reset=self._is_reset)
