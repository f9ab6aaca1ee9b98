"""The records that a recipe is made of: which keys there are, of which type, with which defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from moezip.errors import RecipeError


def _listed(value: object) -> object:
    """One text, or a list of them, as the tuple that a frozen record holds."""
    if isinstance(value, str | Path):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _scalar(value: object) -> object:
    if not isinstance(value, bool | int | float | str):
        raise ValueError("it should be a number, a text, true or false")
    return value


# Strict everywhere else; a Path is only ever written as text.
File = Annotated[Path, Field(strict=False)]
Files = Annotated[tuple[File, ...], BeforeValidator(_listed)]
Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]
# Names become names of folders and statistics files.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


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

    ``calibration``: names whose statistics decide; all of them if left out. ``settings``: the method's own knobs.
    """

    method: str
    keep: int | None = Field(None, ge=1)
    ratio: float | None = Field(None, gt=0, lt=1)
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

    ``scope``: ``layer`` (as many experts in every layer) or ``model``. ``calibration``: names whose text decides; all
    of them if left out. ``settings``: the method's own knobs.
    """

    method: str
    keep: int | None = Field(None, ge=1)
    ratio: float | None = Field(None, gt=0, lt=1)
    scope: Literal["layer", "model"] = "layer"
    calibration: Names | None = None
    settings: dict[str, Annotated[Any, AfterValidator(_scalar)]] = {}

    @model_validator(mode="after")
    def _one_amount(self) -> Merge:
        if (self.keep is None) == (self.ratio is None):
            raise ValueError("merge needs either keep (experts per layer) or ratio (share merged away)")
        return self


class Quantize(_Record):
    """Store weights in ``bits`` bits, or in ``size``; after a prune or merge in the same job, those of what it leaves.

    ``size``: a share of the source's bytes, or bytes. ``allocate`` and ``granularity``: who gets how many bits.
    ``calibration``: names whose text the solver sees; all of them if left out. ``settings``: as ``--set`` takes them.
    """

    bits: float | None = Field(None, ge=1, le=16)
    size: float | None = Field(None, gt=0)
    solver: str = "gptq"
    allocate: Literal["uniform", "lp", "pmq", "outlier", "block"] = "uniform"
    granularity: Literal["role", "expert", "layer", "model"] = "role"
    group_size: int | None = Field(None, ge=0)
    calibration: Names | None = None
    settings: dict[str, Annotated[Any, AfterValidator(_scalar)]] = {}


class Evaluate(_Record):
    """Measure what the steps before it made.

    Attributes:
        data: files or folders of text for loss and perplexity, each file by itself.
        tasks: files or folders of questions.
        against: ``source`` (the recipe's model) or another checkpoint, for the divergence from it.
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


Action = Calibrate | Prune | Merge | Quantize | Evaluate


class Step(_Record):
    """One thing to do; exactly one of the five."""

    calibrate: Calibrate | None = None
    prune: Prune | None = None
    merge: Merge | None = None
    quantize: Quantize | None = None
    evaluate: Evaluate | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Step:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a step is one of {', '.join(type(self).model_fields)}, with its settings; found {given or 'none'}"
            )
        return self

    @property
    def verb(self) -> Literal["calibrate", "prune", "merge", "quantize", "evaluate"]:
        """Which of the five it is."""
        found = next(name for name in type(self).model_fields if getattr(self, name) is not None)
        return found  # type: ignore[return-value]

    @property
    def action(self) -> Action:
        """The step's settings."""
        action: Action = getattr(self, self.verb)
        return action


class Job(_Record):
    """A sequence of steps that ends in one output. ``needs``: names of jobs that have to be finished before it."""

    needs: Names = ()
    steps: Annotated[tuple[Step, ...], BeforeValidator(_listed), Field(min_length=1)]


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
    """

    version: Literal[1]
    model: str
    output: File | None = None
    seed: int = Field(0, ge=0)
    seq_len: int | None = Field(None, ge=2)
    calibration: dict[Name, Calibration] = {}
    jobs: dict[Name, Job] = Field(min_length=1)

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
                for needed in self.jobs[name].needs:
                    visit(needed, (*path, name))
                done.append(name)

        for name in self.jobs:
            visit(name, ())
        return done
