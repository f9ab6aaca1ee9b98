"""One base error. Every message says what is wrong, where, and what to do next."""

from __future__ import annotations


class MoezipError(Exception):
    """A failure that the user can understand and act on.

    Args:
        what: the fault, in one sentence, with the numbers that show it.
        where: the file, tensor, layer or option it concerns.
        next: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: object = None, next: str | None = None):
        super().__init__(what)
        self.what = what
        self.where = None if where is None else str(where)
        self.next = next

    def __str__(self) -> str:
        lines = [self.what]
        if self.where is not None:
            lines.append(f"where: {self.where}")
        if self.next is not None:
            lines.append(f"next:  {self.next}")
        return "\n".join(lines)


class CheckpointError(MoezipError):
    """A checkpoint that cannot be read, trusted or written."""


class ArchitectureError(MoezipError):
    """A model that moezip does not know, or whose tensors disagree with its config."""


class DataError(MoezipError):
    """Calibration or evaluation text that cannot be used."""


class StatisticsError(MoezipError):
    """Statistics that are incomplete, damaged, or of another model."""


class PlanError(MoezipError):
    """A plan or a budget that cannot be carried out."""


class RecipeError(MoezipError):
    """A recipe with an unknown key, a wrong value, or a missing step."""


class UsageError(MoezipError):
    """A command line that asks for something that does not exist or does not fit together."""

    exit_code = 2
