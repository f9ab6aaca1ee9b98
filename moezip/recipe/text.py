"""YAML with its lines kept, and ``--set`` on top: where every value of a recipe came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from moezip.errors import RecipeError

Loc = tuple[str | int, ...]


class Places:
    """Says where a value came from: a line of the file or a ``--set``."""

    def __init__(self, path: Path, node: yaml.Node, overridden: tuple[Loc, ...]):
        self.path, self.node, self.overridden = path, node, overridden
        # Places that the file does not have, of jobs that a sweep made, and where in the file they come from; the
        # longest that fits counts.
        self.origins: dict[Loc, Loc] = {}

    def origin(self, loc: Loc) -> Loc:
        for count in range(len(loc), 0, -1):
            if (found := self.origins.get(loc[:count])) is not None:
                return (*found, *loc[count:])
        return loc

    def from_command_line(self, loc: Loc) -> bool:
        loc = self.origin(loc)
        return any(loc[: len(key)] == key for key in self.overridden)

    def mark(self, loc: Loc) -> tuple[int, int]:
        """Line and column, from 1, of the key at ``loc``, or of the nearest thing around it that the file has."""
        node, mark = self.node, self.node.start_mark
        for part in self.origin(loc):
            if isinstance(node, yaml.MappingNode):
                found = next(((key, value) for key, value in node.value if key.value == str(part)), None)
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                found = (node.value[part], node.value[part])
            else:
                found = None
            if found is None:
                break
            mark, node = found[0].start_mark, found[1]
        return mark.line + 1, mark.column + 1

    def where(self, loc: Loc) -> str:
        dotted = ".".join(map(str, loc))
        if self.from_command_line(loc):
            return f"--set {dotted}"
        line, column = self.mark(loc)
        return f"{self.path}, line {line}, column {column}" + (f": {dotted}" if dotted else "")


def parse(text: str, path: Path) -> tuple[dict[str, Any], yaml.Node]:
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise RecipeError("a recipe is a mapping of keys to values", where=path, next="see recipes/demo.yaml")
        _refuse_repeats(node, path, ())
        raw = _unshared(loader.construct_document(node))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise RecipeError(
            f"not valid YAML: {getattr(error, 'problem', None) or error}",
            where=f"{path}, {_at(mark)}" if mark else path,
            next="mind the indentation and the colons",
        ) from error
    finally:
        loader.dispose()
    return raw, node


def _at(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"


def _refuse_repeats(node: yaml.Node, path: Path, inside: tuple[int, ...]) -> None:
    """YAML libraries take the last of two equal keys and drop the first without a word."""
    if id(node) in inside:
        raise RecipeError("an anchor that contains itself", where=f"{path}, {_at(node.start_mark)}")
    inside = (*inside, id(node))
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            if key.value in seen:
                raise RecipeError(
                    f"the key {key.value!r} is there twice, first in line {seen[key.value]}",
                    where=f"{path}, {_at(key.start_mark)}",
                    next="keep one of them",
                )
            seen[str(key.value)] = key.start_mark.line + 1
            _refuse_repeats(value, path, inside)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeats(item, path, inside)


def _unshared(value: Any) -> Any:
    """A copy in which two uses of one anchor are two values, so that ``--set`` reaches only the one it names."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unshared(item) for item in value]
    return value


def put(raw: dict[str, Any], key: str, text: str) -> Loc:
    """Puts the YAML value ``text`` at the dotted ``key`` and returns the key as a path."""
    where = f"--set {key}={text}"
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{text!r} is not a YAML value", where=where) from error
    at: Any = raw
    loc: list[str | int] = []
    parts = key.split(".")
    for i, part in enumerate(parts):
        step: str | int = part
        if isinstance(at, list):
            if not part.isdecimal() or int(part) >= len(at):
                raise RecipeError(
                    f"{'.'.join(parts[:i])} is a list of {len(at)}",
                    where=where,
                    next=f"{part!r} should be a number from 0 to {len(at) - 1}",
                )
            step = int(part)
        elif not isinstance(at, dict):
            raise RecipeError(f"{'.'.join(parts[:i])} holds one value and nothing below it", where=where)
        elif not part:
            raise RecipeError(
                "an empty part in the key", where=where, next="write it as jobs.NAME.steps.0.prune.keep=8"
            )
        loc.append(step)
        if i == len(parts) - 1:
            at[step] = value
        else:
            if isinstance(at, dict) and at.get(part) is None:
                at[part] = {}
            at = at[step]
    return tuple(loc)
