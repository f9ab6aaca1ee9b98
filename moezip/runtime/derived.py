"""Modules of transformers whose ``forward`` runs here where it can: the same objects, of a class derived from theirs.

The class is made when the first such module is met, so nobody finds it by name; copies and pickles of a module make it
again from the class that it was derived from.
"""

from __future__ import annotations

from typing import Any

from torch import nn


class Derived:
    """A mixin: its subclasses define ``forward`` and call ``super().forward`` for what they do not do themselves."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        mixin, kind = type(self).__bases__
        return _new, (mixin, kind), self.__dict__


def untouched(module: nn.Module) -> bool:
    """Whether nobody listens to a module or has put something in front of it, so that it need not be called itself."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


_made: dict[tuple[type, type], type[nn.Module]] = {}


def derived(mixin: type[Derived], kind: type[nn.Module]) -> type[nn.Module]:
    """``kind`` with the ``forward`` of ``mixin``, under the same name; the same class each time."""
    return _made.setdefault((mixin, kind), type(kind.__name__, (mixin, kind), {"__module__": kind.__module__}))


def _new(mixin: type[Derived], kind: type[nn.Module]) -> nn.Module:
    made = derived(mixin, kind)
    return made.__new__(made)
