"""The records that a recipe is made of: which keys there are, of which type, with which defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from moezip.errors import RecipeError, UsageError
from moezip.sizes import share_or_size


def _listed(value: object) -> object:
    """One text, or a list of them, as the tuple that a frozen record holds."""
    if isinstance(value, str | Path):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _scalar(value: object) -> object:
    if not isinstance(value, bool | int | float | str):
        raise ValueError("it should be a number, a text, true or false")
    return value


def _sized(value: object) -> object:
    """``6GiB`` in bytes, ``40%`` as a share; numbers as they are."""
    if not isinstance(value, str):
        return value
    try:
        return float(share_or_size(value) or 0)
    except UsageError as error:
        raise ValueError(f"{error.what}: {error.next}") from error


# Strict everywhere else; a Path is only ever written as text.
File = Annotated[Path, Field(strict=False)]
Files = Annotated[tuple[File, ...], BeforeValidator(_listed)]
Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]
# Names become names of folders and statistics files.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
# Who must be able to read what a step makes; `for` in the file.
Reader = Annotated[str | None, Field(alias="for")]
JOB = "job:"  # before a job's name, where its output stands for a checkpoint
# What else lies in the output folder, so that no job can be called so.
RESERVED = ("statistics", "work", "recipe.yaml", "state.json", "summary.json", "summary.csv")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Calibration(_Record):
    """One domain of calibration text.

    Attributes:
        data: files or folders of text.
        tokens: how many to use.
        weight: its share where several domains make one decision; relative.
    """

    data: Annotated[Files, Field(min_length=1)]
    tokens: int = Field(65536, ge=1)
    weight: float = Field(1.0, gt=0)


class Calibrate(_Record):
    """Gather statistics now, for the steps and jobs after it. ``calibration``: names; all of them if left out."""

    calibration: Names | None = None


class Prune(_Record):
    """Keep ``keep`` experts per layer, or remove the share ``ratio``.

    ``scope``: ``layer`` (as many experts in every layer) or ``model`` (ranked over all layers). ``for``: who must read
    the output. ``calibration``: names whose statistics decide; all of them if left out. ``settings``: the method's own
    knobs.
    """

    method: str
    keep: int | None = Field(None, ge=1)
    ratio: float | None = Field(None, gt=0, lt=1)
    scope: Literal["layer", "model"] = "layer"
    reader: Reader = None
    calibration: Names | None = None
    settings: dict[str, Annotated[Any, AfterValidator(_scalar)]] = {}

    @model_validator(mode="after")
    def _one_amount(self) -> Prune:
        if (self.keep is None) == (self.ratio is None):
            raise ValueError("prune needs either keep (experts per layer) or ratio (share removed)")
        return self


class Merge(_Record):
    """Leave ``keep`` experts per layer, or merge the share ``ratio`` away; after a prune in the same job, of what it
    leaves, which is observed again.

    ``scope``: ``layer`` (as many experts in every layer) or ``model``. ``for``: who must read the output.
    ``calibration``: names whose text decides; all of them if left out. ``settings``: the method's own knobs.
    """

    method: str
    keep: int | None = Field(None, ge=1)
    ratio: float | None = Field(None, gt=0, lt=1)
    scope: Literal["layer", "model"] = "layer"
    reader: Reader = None
    calibration: Names | None = None
    settings: dict[str, Annotated[Any, AfterValidator(_scalar)]] = {}

    @model_validator(mode="after")
    def _one_amount(self) -> Merge:
        if (self.keep is None) == (self.ratio is None):
            raise ValueError("merge needs either keep (experts per layer) or ratio (share merged away)")
        return self


class Quantize(_Record):
    """Store weights in ``bits`` bits, or in ``size``; after a prune or merge in the same job, those of what it leaves.

    ``size``: a share of the source's bytes (with ``model: job:NAME`` of those of the model behind it, 0.4
    or 40%), or bytes (6GiB).
    ``allocate`` and ``granularity``: who gets how many bits. ``for``: who must read the output. ``calibration``: names
    whose text the solver sees; all of them if left out. ``settings``: as ``--set`` takes them.
    """

    bits: float | None = Field(None, ge=1, le=16)
    size: Annotated[float | None, BeforeValidator(_sized), Field(gt=0)] = None
    solver: str = "gptq"
    allocate: Literal["uniform", "lp", "pmq", "outlier", "block"] = "uniform"
    granularity: Literal["role", "expert", "layer", "model"] = "role"
    group_size: int | None = Field(None, ge=0)
    reader: Reader = None
    calibration: Names | None = None
    settings: dict[str, Annotated[Any, AfterValidator(_scalar)]] = {}


class Evaluate(_Record):
    """Measure what the steps before it made.

    Attributes:
        data: files or folders of text for loss and perplexity, each file by itself.
        tasks: files or folders of questions.
        against: ``source`` (the recipe's model), ``job:NAME`` (that job's output) or another checkpoint, for the
            divergence from it.
        tokens: at most this many per file; all if left out.
        seq_len: window in tokens; the recipe's if left out.
    """

    data: Files = ()
    tasks: Files = ()
    against: str | None = None
    tokens: int | None = Field(None, ge=1)
    seq_len: int | None = Field(None, ge=2)

    @model_validator(mode="after")
    def _something(self) -> Evaluate:
        if not self.data and not self.tasks:
            raise ValueError("evaluate needs data or tasks")
        if self.against is not None and not self.data:
            raise ValueError("evaluate compares with `against` on data, and there is none")
        return self


class Export(_Record):
    """Write what the steps before it made in the format ``to`` as well, into a folder ``JOB.FORMAT`` beside it.

    Of ``gguf`` that is a file. No weight changes but by what the format rounds. ``for``: who must be able to read it.
    ``settings``: as ``--set`` takes them; only gguf has any.
    """

    to: str
    reader: Reader = None
    settings: dict[str, Annotated[Any, AfterValidator(_scalar)]] = {}


Action = Calibrate | Prune | Merge | Quantize | Evaluate | Export
Verb = Literal["calibrate", "prune", "merge", "quantize", "evaluate", "export"]
VERBS: dict[str, type[_Record]] = {
    "calibrate": Calibrate, "prune": Prune, "merge": Merge, "quantize": Quantize, "evaluate": Evaluate,
    "export": Export,
}  # fmt: skip


def keys_of(record: type[BaseModel]) -> list[str]:
    """The keys of a record as the file spells them."""
    return [field.alias or name for name, field in record.model_fields.items()]


class Step(_Record):
    """One thing to do; exactly one of the six."""

    calibrate: Calibrate | None = None
    prune: Prune | None = None
    merge: Merge | None = None
    quantize: Quantize | None = None
    evaluate: Evaluate | None = None
    export: Export | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Step:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a step is one of {', '.join(type(self).model_fields)}, with its settings; found {given or 'none'}"
            )
        return self

    @property
    def verb(self) -> Verb:
        """Which of the six it is."""
        found = next(name for name in type(self).model_fields if getattr(self, name) is not None)
        return found  # type: ignore[return-value]

    @property
    def action(self) -> Action:
        """The step's settings."""
        action: Action = getattr(self, self.verb)
        return action


class Job(_Record):
    """A sequence of steps that ends in one output.

    ``needs``: names of jobs that have to be finished before it. ``model``: what it works on, in place of the recipe's
    model: ``job:NAME`` for that job's output (which it then needs), or another checkpoint. A ``sweep`` in the file has
    become several jobs here.
    """

    needs: Names = ()
    model: str | None = None
    steps: Annotated[tuple[Step, ...], BeforeValidator(_listed), Field(min_length=1)]

    @property
    def before(self) -> tuple[str, ...]:
        """Jobs that have to be finished before: those that it names, and those whose outputs it uses."""
        used = [self.model, *(step.evaluate.against for step in self.steps if step.evaluate is not None)]
        return tuple(dict.fromkeys((*self.needs, *(u.removeprefix(JOB) for u in used if u and u.startswith(JOB)))))


class Recipe(_Record):
    """A batch of jobs on one model.

    Attributes:
        version: of this shape.
        model: a folder, or a hub id.
        output: the folder that gets one folder per job; None leaves the choice to the caller.
        seed: the only source of chance.
        seq_len: window in tokens, for calibration and evaluation; None takes min(2048, the model's maximum).
        calibration: domains by name.
        jobs: by name, in the order of the file.
        sweeps: the jobs that each sweep became; filled in when a file is read.
    """

    version: Literal[1]
    model: str
    output: File | None = None
    seed: int = Field(0, ge=0)
    seq_len: int | None = Field(None, ge=2)
    calibration: dict[Name, Calibration] = {}
    jobs: dict[Name, Job] = Field(min_length=1)
    sweeps: dict[Name, Names] = {}

    def source_of(self, name: str) -> str:
        """The checkpoint that a job's output goes back to, through all jobs before it."""
        model = self.jobs[name].model or self.model
        return self.source_of(model.removeprefix(JOB)) if model.startswith(JOB) else model

    def order(self) -> list[str]:
        """Job names such that each comes after all that it needs, else in the order of the file.

        Raises:
            RecipeError: two jobs need each other.
        """
        done: list[str] = []

        def visit(name: str, path: tuple[str, ...]) -> None:
            if name in path:
                raise RecipeError(
                    f"jobs need each other in a circle: {' -> '.join((*path[path.index(name) :], name))}",
                    next="take one name out of `needs`",
                )
            if name not in done:
                for needed in self.jobs[name].before:
                    visit(needed, (*path, name))
                done.append(name)

        for name in self.jobs:
            visit(name, ())
        return done
