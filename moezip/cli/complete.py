"""What a shell offers after TAB: the names that a table of the program has, and checkpoints by their folders."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

Offered = list[tuple[str, str]]  # (word, what it means)


def _starting(incomplete: str, entries: Iterable[tuple[str, str]]) -> Offered:
    return [(word, meaning) for word, meaning in entries if word.startswith(incomplete)]


def _methods_of(*rooms: str) -> Callable[[str], Offered]:
    def offered(incomplete: str) -> Offered:
        from importlib import import_module

        every = [method for room in rooms for method in import_module(f"moezip.{room}").METHODS]
        return _starting(incomplete, [(method.name, method.summary) for method in every])

    return offered


pruning = _methods_of("prune")
merging = _methods_of("merge")
solvers = _methods_of("quantize")
methods = _methods_of("prune", "merge", "quantize")


def allocators(incomplete: str) -> Offered:
    from moezip.plan.allocators import ALLOCATORS

    return _starting(incomplete, [(name, "") for name in ALLOCATORS])


def rules(incomplete: str) -> Offered:
    from moezip.pipeline.skip import RULES

    return _starting(incomplete, [(rule.name, rule.summary) for rule in RULES.values()])


def readers(incomplete: str) -> Offered:
    from moezip.export.readers import READERS

    return _starting(incomplete, READERS.items())


def formats(incomplete: str) -> Offered:
    from moezip.export.formats import FORMATS

    return _starting(incomplete, FORMATS.items())


def checkpoints(incomplete: str) -> Offered:
    """``demo``, and folders; those with a config.json are checkpoints."""
    return [*_starting(incomplete, [("demo", "the model of the package")]), *_folders(incomplete)]


def recipes(incomplete: str) -> Offered:
    """The names of those that come with moezip, YAML files, and the folders on the way to them."""
    from moezip import demo

    named = _starting(incomplete, [(name, "comes with moezip") for name in demo.recipes()])
    files = [(word, "") for word in _paths(incomplete) if word.endswith((".yaml", ".yml"))]
    return [*named, *files, *_folders(incomplete)]


def texts(incomplete: str) -> Offered:
    """Text of the package by its names, files that may hold text, and folders."""
    if incomplete.startswith("demo:"):
        from moezip import demo

        kinds = [f"demo:{kind}" for kind in ("calib", "heldout")]
        files = [
            f"demo:{kind}/{file.name}" for kind in ("calib", "heldout") for file in sorted(demo.data(kind).iterdir())
        ]
        return _starting(incomplete, [(word, "") for word in (*kinds, *files)])
    own = _starting(incomplete, [("demo:", "text of the package")])
    beside = [(word, "") for word in _paths(incomplete) if word.endswith((".txt", ".jsonl"))]
    return [*own, *beside, *_folders(incomplete)]


def _folders(incomplete: str) -> Offered:
    found = [word for word in _paths(incomplete) if word.endswith("/")]
    return [(word, "a checkpoint" if (Path(word) / "config.json").is_file() else "") for word in found]


def _paths(incomplete: str) -> list[str]:
    """What lies where the word points to, as it would go on; folders end in a slash, hidden things are left out."""
    head, slash, name = incomplete.rpartition("/")
    folder = Path(head + slash).expanduser() if slash else Path()
    if not folder.is_dir():
        return []
    return [
        head + slash + path.name + ("/" if path.is_dir() else "")
        for path in sorted(folder.iterdir())
        if path.name.startswith(name) and (name.startswith(".") or not path.name.startswith("."))
    ]
