"""``sweep:`` in a job: one job per combination of values, before anything else is read of it.

    prune:
      sweep: {ratio: [0.25, 0.5], method: [reap, easy-ep]}     # 4 jobs: prune-ratio0.25-reap, ...
      steps: [{prune: {calibration: code}}]

A key is a path inside the job (``steps.0.prune.ratio``, ``model``), a verb and a key (``prune.ratio``), or the key
alone where only one step has it. Values are a list, or a mapping from the label that the job's name gets to the value.
A list of mappings, ``sweep: [{ratio: 0.25, method: reap}, ...]``, is one job per mapping instead of every combination.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moezip.errors import RecipeError
from moezip.recipe.shape import JOB, VERBS, keys_of
from moezip.recipe.text import Loc, Places
from moezip.registry import did_you_mean

MOST = 500  # jobs of one sweep; more is a slip of the keyboard


@dataclass(frozen=True, slots=True)
class _Value:
    """One value of one key: where in the job it goes, where in the file it stands, what the job's name says of it."""

    target: Loc
    origin: Loc
    label: str
    value: Any


def expand(raw: dict[str, Any], places: Places) -> None:
    """Puts the jobs that a sweep makes in its place, and their names where the sweep is needed.

    Raises:
        RecipeError: a key that matches nothing, or several things; no values; jobs of one name; too many jobs.
    """
    jobs = raw.get("jobs")
    if not isinstance(jobs, dict) or not any(isinstance(job, dict) and "sweep" in job for job in jobs.values()):
        return
    found: dict[Any, Any] = {}
    made: dict[str, list[str]] = {}
    for name, job in jobs.items():
        if not isinstance(job, dict) or "sweep" not in job:
            _refuse_clash(str(name), found, ("jobs", name), places)
            found[name] = job
            continue
        made[str(name)] = []
        for each, values in _combinations(str(name), job, places):
            _refuse_clash(each, {**jobs, **found}, ("jobs", name, "sweep"), places)
            found[each] = _with_values(job, values)
            made[str(name)].append(each)
            places.origins[("jobs", each)] = ("jobs", name)
            for value in values:
                places.origins[("jobs", each, *value.target)] = value.origin
    for job in found.values():
        if isinstance(job, dict) and isinstance(needs := job.get("needs"), str | list):
            listed = [needs] if isinstance(needs, str) else needs
            job["needs"] = [one for each in listed for one in made.get(str(each), [each])]
    raw["jobs"] = found
    raw["sweeps"] = {**raw.get("sweeps", {}), **made}


def _refuse_clash(name: str, others: Mapping[Any, Any], loc: Loc, places: Places) -> None:
    if name in others:
        raise RecipeError(
            f"two jobs would be called {name!r}",
            where=places.where(loc),
            next="rename one, or write the values as a mapping from a label of your own to the value",
        )


def _with_values(job: Mapping[str, Any], values: Sequence[_Value]) -> dict[str, Any]:
    result: dict[str, Any] = copy.deepcopy({key: value for key, value in job.items() if key != "sweep"})
    for value in values:
        at: Any = result
        for part in value.target[:-1]:
            if isinstance(at, dict) and at.get(part) is None:
                at[part] = {}
            at = at[part]
        at[value.target[-1]] = copy.deepcopy(value.value)
    return result


# -- values -------------------------------------------------------------------------------------------------


def _combinations(name: str, job: Mapping[str, Any], places: Places) -> Iterator[tuple[str, list[_Value]]]:
    """Name and values of every job that the sweep makes."""
    loc: Loc = ("jobs", name, "sweep")
    sweep = job["sweep"]
    if isinstance(sweep, dict) and sweep:
        axes = []
        for key, given in sweep.items():
            target = _target(str(key), job, (*loc, key), places)
            axes.append(_axis(str(key), given, target, (*loc, key), places))
        count = math.prod(map(len, axes))
        if count > MOST:
            raise RecipeError(
                f"the sweep makes {count:,} jobs ({' x '.join(str(len(axis)) for axis in axes)}), and {MOST} is the "
                "most that is taken for meant",
                where=places.where(loc),
                next="give fewer values, or several sweeps",
            )
        groups: Iterator[Sequence[_Value]] = itertools.product(*axes)
    elif isinstance(sweep, list) and sweep and all(isinstance(entry, dict) and entry for entry in sweep):
        listed = []
        for i, entry in enumerate(sweep):
            targets = {key: _target(str(key), job, (*loc, i, key), places) for key in entry}
            listed.append([
                _Value(target, (*loc, i, key), _label(target, entry[key]), entry[key])
                for key, target in targets.items()
            ])  # fmt: skip
        groups = iter(listed)
    else:
        raise RecipeError(
            "a sweep is a mapping of keys to lists of values, or a list of mappings of keys to values",
            where=places.where(loc),
            next="write it like sweep: {ratio: [0.25, 0.5], method: [reap, easy-ep]}",
        )
    for group in groups:
        twice = [value.target for value in group]
        if len(set(twice)) != len(twice):
            raise RecipeError("two keys of the sweep mean the same value", where=places.where(loc), next="keep one")
        labels = [_told_apart(value, twice) for value in group]
        yield "-".join([name, *filter(None, labels)]), list(group)


def _axis(key: str, given: Any, target: Loc, loc: Loc, places: Places) -> list[_Value]:
    if isinstance(given, list) and given:
        return [_Value(target, (*loc, i), _label(target, value), value) for i, value in enumerate(given)]
    if isinstance(given, dict) and given:
        return [_Value(target, (*loc, label), _slug(str(label)), value) for label, value in given.items()]
    raise RecipeError(
        f"{key} has no values to sweep over",
        where=places.where(loc),
        next=f"give a list, such as {key}: [{given if given not in (None, [], {}) else '...'}, ...]",
    )


def _label(target: Loc, value: Any) -> str:
    """What a job's name says of a value: a text itself, a number behind its key."""
    key = str(target[-1])
    if isinstance(value, bool):
        return key if value else f"no-{key}"
    if isinstance(value, int | float):
        return f"{key}{value:g}" if isinstance(value, float) else f"{key}{value}"
    if value is None:
        return f"no-{key}"
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return _slug("-".join(value)) if value else f"no-{key}"
    return _slug(value.removeprefix(JOB)) if isinstance(value, str) else ""


def _told_apart(value: _Value, targets: Sequence[Loc]) -> str:
    """The label, behind its verb where two steps are swept over keys of one name."""
    alike = [target for target in targets if target[-1] == value.target[-1]]
    verb = value.target[2] if len(value.target) > 3 else None
    return f"{verb}-{value.label}" if len(alike) > 1 and verb is not None else value.label


def _slug(text: str) -> str:
    """The text as part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-._")


# -- keys ---------------------------------------------------------------------------------------------------


def _target(key: str, job: Mapping[str, Any], loc: Loc, places: Places) -> Loc:
    """Where in the job a key of the sweep goes."""
    parts = key.split(".")
    given = job.get("steps")
    steps = given if isinstance(given, list) else [given]
    if parts[0] in ("model", "needs") and len(parts) == 1:
        return ("model",) if parts[0] == "model" else ("needs",)
    mappings = [(i, step) for i, step in enumerate(steps) if isinstance(step, dict)]
    verbs = [(i, verb, action) for i, step in mappings for verb, action in step.items()]
    if parts[0] == "steps":
        return _full(key, parts, steps, loc, places)
    exact: list[Loc] = []
    possible: list[Loc] = []
    for i, verb, action in verbs:
        record = VERBS.get(str(verb))
        if record is None:
            continue
        inside = action if isinstance(action, dict) else {}
        rest = parts[1:] if parts[0] == verb else parts
        at: Loc = ("steps", i, verb)
        if not rest:
            possible.append(at)
        elif rest[0] in keys_of(record) and (len(rest) == 1 or rest[0] == "settings"):
            (exact if rest[0] in inside and parts[0] != verb else possible).append((*at, *rest))
        elif len(rest) == 1 and rest[0] in (inside.get("settings") or {}):
            exact.append((*at, "settings", rest[0]))
    found = exact or possible
    if len(found) == 1:
        return found[0]
    if found:
        spelled = " or ".join(".".join(map(str, each)) for each in found)
        raise RecipeError(f"{key!r} could be {spelled}", where=places.where(loc), next="write one of these as the key")
    known = list(dict.fromkeys(k for _, verb, _ in verbs if verb in VERBS for k in keys_of(VERBS[verb])))
    known += [str(verb) for _, verb, _ in verbs if verb not in known] + ["model", "needs"]
    last = parts[1] if len(parts) > 1 and parts[0] in VERBS else parts[0]
    raise RecipeError(
        f"no step of this job has a {last!r} to sweep over",
        where=places.where(loc),
        next=f"{did_you_mean(last, known)}available: {', '.join(known)}, and settings.KEY",
    )


def _full(key: str, parts: Sequence[str], steps: Sequence[Any], loc: Loc, places: Places) -> Loc:
    """A key that is spelled out from the job on."""
    if len(parts) == 1:
        raise RecipeError("steps as a whole cannot be swept over", where=places.where(loc), next="write steps.0")
    if not parts[1].isdecimal() or int(parts[1]) >= len(steps):
        raise RecipeError(
            f"the job has {len(steps)} steps", where=places.where(loc),
            next=f"{parts[1]!r} should be a number from 0 to {len(steps) - 1}",
        )  # fmt: skip
    number = int(parts[1])
    if len(parts) == 2:
        return ("steps", number)
    step = steps[number] if isinstance(steps[number], dict) else {}
    if parts[2] not in step or parts[2] not in VERBS:
        raise RecipeError(
            f"steps.{number} has no {parts[2]!r}", where=places.where(loc),
            next=f"{did_you_mean(parts[2], map(str, step))}available: {', '.join(map(str, step))}",
        )  # fmt: skip
    rest, known = parts[3:], keys_of(VERBS[parts[2]])
    if rest and (rest[0] not in known or (len(rest) > 1 and rest[0] != "settings")):
        raise RecipeError(
            f"unknown key {'.'.join(rest)!r} of {parts[2]}", where=places.where(loc),
            next=f"{did_you_mean(rest[0], known)}available: {', '.join(known)}",
        )  # fmt: skip
    return ("steps", number, parts[2], *rest)
