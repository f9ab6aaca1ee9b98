"""Reading a recipe: every fault is found before any work starts, and is told with its line."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from moezip import demo
from moezip.errors import DataError, RecipeError, UsageError
from moezip.recipe.shape import (
    JOB,
    RESERVED,
    VERBS,
    Action,
    Calibration,
    Evaluate,
    Export,
    Job,
    Merge,
    Prune,
    Quantize,
    Recipe,
    Step,
    keys_of,
)
from moezip.recipe.sweep import expand
from moezip.recipe.text import Loc, Places, parse, put
from moezip.registry import did_you_mean, lookup, parse_params, read_settings

# Things that people will look for here; saying "unknown key" would leave them guessing.
LATER = {"fit": "this version calibrates, prunes, merges, quantizes, evaluates and exports"}


def find(text: str) -> Path:
    """The file that a user means: a path, or the name of a recipe that comes with moezip, with or without its folder.

    Raises:
        RecipeError: neither; the message lists the names.
    """
    path = Path(text)
    if path.exists():
        return path
    shipped = demo.recipes()
    named = path.suffix in ("", ".yaml", ".yml") and path.parent.as_posix() in (".", "recipes")
    if named and path.stem in shipped:
        return shipped[path.stem]
    raise RecipeError(
        f"there is no recipe {text}",
        where=path.absolute(),
        next=f"{did_you_mean(path.stem, shipped)}give the path of a recipe, or one of those that come with moezip: "
        f"{', '.join(shipped)}",
    )


def load(path: Path | str, overrides: Mapping[str, str] | None = None) -> Recipe:
    """The recipe in a YAML file, checked and with every path absolute.

    Args:
        path: the file.
        overrides: ``--set`` texts: dotted key (list items by number) to YAML value.

    Raises:
        RecipeError: unreadable file, unknown key, wrong value, missing file, unknown method or name; the message
            has the line and the key's path.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe: {error}", where=path, next="check the path") from error
    raw, node = parse(text, path)
    places = Places(path, node, tuple(put(raw, key, value) for key, value in (overrides or {}).items()))
    expand(raw, places)
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise _explained(error, places) from error
    _check_names(recipe, places)
    return _resolved(recipe, places)


def dump(recipe: Recipe) -> str:
    """The recipe as YAML that ``load`` reads back to an equal one; packaged files keep their ``demo`` names, so that
    the text is the same on every machine."""
    packaged = {str(demo.checkpoint()): "demo"}
    roots = {str(demo.data(kind)): f"demo:{kind}" for kind in ("calib", "heldout", "tasks")}

    def portable(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: portable(item) for key, item in value.items()}
        if isinstance(value, list):
            return [portable(item) for item in value]
        if isinstance(value, str):
            for root, word in roots.items():
                if value == root or value.startswith(root + os.sep):
                    return word + value[len(root) :].replace(os.sep, "/")
            return packaged.get(value, value)
        return value

    record = portable(recipe.model_dump(mode="json", exclude_none=True, by_alias=True))
    return yaml.safe_dump(record, sort_keys=False, allow_unicode=True, width=120)


# -- errors of shape ----------------------------------------------------------------------------------------


def _record_at(loc: Sequence[str | int]) -> type[BaseModel] | None:
    """Which record the keys below ``loc`` belong to."""
    match tuple(loc):
        case ():
            return Recipe
        case ("calibration", _):
            return Calibration
        case ("jobs", _):
            return Job
        case ("jobs", _, "steps", _):
            return Step
        case ("jobs", _, "steps", _, verb):
            return VERBS.get(str(verb))
    return None


def _explained(error: ValidationError, places: Places) -> RecipeError:
    """The first fault of the file, in words, and how many more there are."""
    # a mistyped key is missing under its right name, too, and that is the lesser help
    faults = sorted(
        error.errors(),
        key=lambda fault: (fault["type"] == "missing", places.mark(fault["loc"]), len(fault["loc"])),
    )
    fault = faults[0]
    loc: Loc = fault["loc"]
    name = str(loc[-1]) if loc else "the recipe"
    kind, hint = fault["type"], None
    if kind == "extra_forbidden" and name in LATER:
        what, hint = f"{name!r} comes in a later version of moezip", LATER[name]
    elif kind == "extra_forbidden":
        record = _record_at(loc[:-1])
        known = [*keys_of(record), *(["sweep"] if record is Job else [])] if record else []
        what, hint = f"unknown key {name!r}", f"{did_you_mean(name, known)}available: {', '.join(known)}"
    elif kind == "missing":
        what, hint = f"the key {name!r} is missing", "it has no default"
    elif name == "[key]":
        loc = loc[:-1]
        what = f"{loc[-1]!r} cannot be a name"
        hint = "names are letters, digits, - and _, and start with a letter or digit: they become names of folders"
    elif kind == "value_error":
        what = str(fault["ctx"]["error"])
    else:
        should = fault["msg"].replace("Input should", "it should")
        if kind in ("model_type", "dict_type"):
            should = "it should be a mapping of keys to values"
        what = f"{name} is {fault['input']!r}: {should}"
    others = len({fault["loc"] for fault in faults}) - 1
    more = f"{others} more to mend after this one" if others else None
    return RecipeError(what, where=places.where(loc), next="; ".join(filter(None, (hint, more))) or None)


# -- errors of sense ----------------------------------------------------------------------------------------


def _actions(recipe: Recipe) -> Iterator[tuple[Loc, Action]]:
    for name, job in recipe.jobs.items():
        for i, step in enumerate(job.steps):
            action = step.action
            yield ("jobs", name, "steps", i, step.verb), action


def _check_names(recipe: Recipe, places: Places) -> None:
    """Every name that a job uses exists, and every method takes the settings it is given."""
    from moezip.export.formats import FORMATS
    from moezip.export.readers import READERS

    for name, job in recipe.jobs.items():
        for needed in job.needs:
            _require_job(needed, f"the job {name!r} needs", recipe, ("jobs", name, "needs"), places)
        if job.model is not None and job.model.startswith(JOB):
            used = job.model.removeprefix(JOB)
            _require_job(used, f"the job {name!r} works on", recipe, ("jobs", name, "model"), places)
        for i, step in enumerate(job.steps):
            against = None if step.evaluate is None else step.evaluate.against
            if against is not None and against.startswith(JOB):
                at: Loc = ("jobs", name, "steps", i, "evaluate", "against")
                _require_job(against.removeprefix(JOB), f"the job {name!r} compares with", recipe, at, places)
    for group, members in recipe.sweeps.items():
        for name in members:
            _require_job(name, f"the sweep {group!r} holds", recipe, ("sweeps", group), places)
    _check_outputs(recipe, places)
    try:
        recipe.order()
    except RecipeError as error:
        first = next(name for name, job in recipe.jobs.items() if job.before)
        raise RecipeError(error.what, where=places.where(("jobs", first, "needs")), next=error.next) from error
    for loc, action in _actions(recipe):
        if not isinstance(action, Evaluate | Export):
            for used in action.calibration or ():
                if used not in recipe.calibration:
                    raise RecipeError(
                        f"no calibration is called {used!r}",
                        where=places.where((*loc, "calibration")),
                        next=f"{did_you_mean(used, recipe.calibration)}calibration: "
                        f"{', '.join(recipe.calibration) or 'none'}",
                    )
        if isinstance(action, Prune | Merge | Quantize | Export) and action.reader is not None:
            _check_word(action.reader, READERS, "reader", (*loc, "for"), places)
        if isinstance(action, Export):
            _check_word(action.to, FORMATS, "format", (*loc, "to"), places)
            _check_export(action, loc, places)
        if isinstance(action, Prune | Merge):
            _check_method(action, recipe, loc, places)
        if isinstance(action, Quantize):
            _check_solver(action, recipe, loc, places)


def _require_job(name: str, what: str, recipe: Recipe, loc: Loc, places: Places) -> None:
    if name in recipe.jobs:
        return
    if name in recipe.sweeps:
        raise RecipeError(
            f"{what} {name!r}, which is a sweep of {len(recipe.sweeps[name])} jobs",
            where=places.where(loc),
            next=f"name one of them: {', '.join(recipe.sweeps[name])}",
        )
    raise RecipeError(
        f"{what} {name!r}, which is not there",
        where=places.where(loc),
        next=f"{did_you_mean(name, recipe.jobs)}jobs: {', '.join(recipe.jobs)}",
    )


def _check_word(word: str, known: Mapping[str, Any], kind: str, loc: Loc, places: Places) -> None:
    try:
        lookup(word, known, kind)
    except UsageError as error:
        raise RecipeError(error.what, where=places.where(loc), next=error.next) from error


def _check_export(action: Export, loc: Loc, places: Places) -> None:
    from moezip.export.formats import GGUF
    from moezip.export.gguf import GGUFParams

    where = places.where((*loc, "settings"))
    if action.settings and action.to != GGUF:
        raise RecipeError(f"an export to {action.to} has no settings", where=where, next="leave them away")
    try:
        read_settings(GGUFParams, {key: str(value) for key, value in action.settings.items()}, GGUF)
    except UsageError as error:
        raise RecipeError(error.what, where=where, next=error.next) from error


def _check_outputs(recipe: Recipe, places: Places) -> None:
    """Every name in the output folder is taken once."""
    taken = dict.fromkeys(RESERVED, "what the run itself writes")
    for name, job in recipe.jobs.items():
        exports = [(i, step.export) for i, step in enumerate(job.steps) if step.export is not None]
        outputs: list[tuple[str, Loc]] = [(name, ("jobs", name)), (f"{name}.evaluate.json", ("jobs", name))]
        outputs += [(export_name(name, export), ("jobs", name, "steps", i)) for i, export in exports]
        for output, loc in outputs:
            if output in taken:
                raise RecipeError(
                    f"{output!r} in the output folder would be {taken[output]}, too",
                    where=places.where(loc),
                    next="rename the job, or leave one of two exports away" if exports else "rename the job",
                )
            taken[output] = f"of the job {name!r}"


def export_name(job: str, export: Export) -> str:
    """The folder, beside the job's own, of one of its exports."""
    return f"{job}.{export.to}"


def _check_method(action: Prune | Merge, recipe: Recipe, loc: Loc, places: Places) -> None:
    from moezip import merge, prune  # numpy; only a recipe that prunes or merges has to wait for it

    methods, kind = (merge.METHODS, "merging") if isinstance(action, Merge) else (prune.METHODS, "pruning")
    try:
        method = lookup(action.method, {method.name: method for method in methods}, f"{kind} method")
    except UsageError as error:
        raise RecipeError(error.what, where=places.where((*loc, "method")), next=error.next) from error
    try:
        parse_params(method, {key: str(value) for key, value in action.settings.items()})
    except UsageError as error:
        raise RecipeError(error.what, where=places.where((*loc, "settings")), next=error.next) from error
    if method.reads_text and not (recipe.calibration if action.calibration is None else action.calibration):
        raise RecipeError(
            f"{method.name} reads statistics, and this {loc[-1]} has no calibration to gather them from",
            where=places.where(loc),
            next="name some text under `calibration`",
        )


def _check_solver(action: Quantize, recipe: Recipe, loc: Loc, places: Places) -> None:
    from moezip.plan.allocators import ALLOCATORS
    from moezip.quantize import METHODS
    from moezip.quantize.settings import split_settings

    try:
        method = lookup(action.solver, {method.name: method for method in METHODS}, "solver")
    except UsageError as error:
        raise RecipeError(error.what, where=places.where((*loc, "solver")), next=error.next) from error
    try:
        split_settings(method, {key: str(value) for key, value in action.settings.items()}, ALLOCATORS[action.allocate])
    except UsageError as error:
        raise RecipeError(error.what, where=places.where((*loc, "settings")), next=error.next) from error
    used = recipe.calibration if action.calibration is None else action.calibration
    if method.schedule == "layerwise" and not used:
        raise RecipeError(
            f"{method.name} reads text, and this quantize has no calibration to take it from",
            where=places.where(loc),
            next="name some text under `calibration`, or use `solver: rtn`",
        )


# -- paths --------------------------------------------------------------------------------------------------


def _resolved(recipe: Recipe, places: Places) -> Recipe:
    """The recipe with every path absolute and every default filled in that other keys decide."""
    model = _checkpoint(recipe.model, ("model",), places)
    calibration = {
        name: entry.model_copy(update={"data": _files(entry.data, ("calibration", name, "data"), places)})
        for name, entry in recipe.calibration.items()
    }

    def resolved_step(step: Step, source: str, loc: Loc) -> Step:
        action = _resolved_action(step.action, recipe, source, (*loc, step.verb), places)
        return step.model_copy(update={step.verb: action})

    def resolved_job(name: str, job: Job) -> Job:
        source = _checkpoint(recipe.source_of(name), ("jobs", name, "model"), places)
        steps = tuple(resolved_step(step, source, ("jobs", name, "steps", i)) for i, step in enumerate(job.steps))
        own = None if job.model is None else _checkpoint(job.model, ("jobs", name, "model"), places)
        return job.model_copy(update={"steps": steps, "model": own, "needs": job.before})

    jobs = {name: resolved_job(name, job) for name, job in recipe.jobs.items()}
    # The output is the user's, not the recipe's: a recipe inside an installed package must not write beside itself.
    output = None if recipe.output is None else Path(os.path.abspath(recipe.output.expanduser()))
    return recipe.model_copy(update={"model": model, "output": output, "calibration": calibration, "jobs": jobs})


def _resolved_action(action: Action, recipe: Recipe, source: str, loc: Loc, places: Places) -> Action:
    if isinstance(action, Export):
        return action
    if not isinstance(action, Evaluate):
        used = tuple(recipe.calibration) if action.calibration is None else action.calibration
        return action.model_copy(update={"calibration": used})
    against = action.against
    if against is not None:
        against = source if against == "source" else _checkpoint(against, (*loc, "against"), places)
    return action.model_copy(
        update={
            "data": _files(action.data, (*loc, "data"), places),
            "tasks": _files(action.tasks, (*loc, "tasks"), places),
            "against": against,
            "seq_len": action.seq_len or recipe.seq_len,
        }
    )


def _absolute(path: Path, loc: Loc, places: Places) -> Path:
    base = Path.cwd() if places.from_command_line(loc) else places.path.parent
    return Path(os.path.abspath(base / path.expanduser()))


def _checkpoint(text: str, loc: Loc, places: Places) -> str:
    """``demo``, a folder, or a hub id or a job's output left as it is."""
    if text.startswith(JOB):
        return text
    if text == "demo":
        return str(demo.checkpoint())
    folder = _absolute(Path(text), loc, places)
    if folder.exists():
        return str(folder)
    # Hub ids are NAME or OWNER/NAME; anything else can only have been meant as a path.
    if text.startswith((".", "~", "/")) or text.count("/") > 1 or not text:
        raise RecipeError(f"there is no checkpoint at {folder}", where=places.where(loc), next="correct the path")
    return text


def _files(paths: tuple[Path, ...], loc: Loc, places: Places) -> tuple[Path, ...]:
    return tuple(_file(path, loc, places) for path in paths)


def _file(path: Path, loc: Loc, places: Places) -> Path:
    try:
        packaged = demo.named(path.as_posix())
    except DataError as fault:
        raise RecipeError(fault.what, where=places.where(loc), next=fault.next) from fault
    if packaged is not None:
        return packaged
    found = _absolute(path, loc, places)
    if not found.exists():
        raise RecipeError(
            f"there is no file or folder {found}",
            where=places.where(loc),
            next="paths in a recipe are relative to the recipe's folder, those of --set to the current one",
        )
    return found
