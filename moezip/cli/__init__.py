"""The command line: words in, words out. What a command does is in ``moezip.pipeline``.

One module per group of commands; ``COMMANDS`` has them in the order of ``moezip --help``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from moezip import __version__, console
from moezip.calibrate.memory import steady
from moezip.cli import batch, compress, look, measure, report, tasks, write
from moezip.console import logs
from moezip.errors import MoezipError


class _Interrupted(Exception):
    """Ctrl-C, which is its cause. Under its own name it would be swallowed by typer, and the advice with it."""


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise _Interrupted from stop


app = typer.Typer(
    name="moezip",
    cls=_Commands,
    help="Makes Mixture-of-Experts checkpoints small: measures experts on your text, keeps those that matter, writes a "
    "checkpoint that stock loaders read. Streams models larger than memory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        console.out.print(f"moezip {__version__}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    """Options of the program itself."""


COMMANDS: tuple[tuple[str, Callable[..., None]], ...] = (
    ("inspect", look.inspect),
    ("methods", look.methods),
    ("architectures", look.architectures),
    ("kernels", look.kernels_command),
    ("verify", look.verify),
    ("calibrate", measure.calibrate),
    ("prune", compress.prune),
    ("merge", compress.merge),
    ("quantize", compress.quantize),
    ("skip", compress.skip),
    ("apply", write.apply),
    ("export", write.export),
    ("evaluate", measure.evaluate),
    ("report", report.report),
    ("run", batch.run),
    ("demo", batch.demo),
)
for _name, _command in COMMANDS:
    app.command(_name)(_command)
app.add_typer(tasks.app, name="tasks")

# typer carries a click of its own in new versions and uses the installed one in old ones; either way a wrong command
# line is raised as this.
_Wrong: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def main() -> None:
    """The ``moezip`` command. Exit codes: 0 done, 1 our error, 2 usage, 130 interrupted."""
    debug = "--debug" in sys.argv
    steady()  # before any library starts threads
    try:
        logs.show(debug)
        code = app(prog_name="moezip", standalone_mode=False)
    except MoezipError as error:
        if debug:
            raise
        console.fail(error)
        code = error.exit_code
    except _Wrong as error:
        error.show()
        code = 2
    except (_Interrupted, KeyboardInterrupt, typer.Abort) as stop:
        notes = getattr(stop.__cause__ or stop, "__notes__", [])
        console.say("\n".join(["interrupted: no half-written output was left", *notes]))
        code = 130
    except Exception as error:
        if debug:
            raise
        first = (str(error).splitlines() or [""])[0]
        console.fail(MoezipError(
            f"moezip met something that it does not foresee ({type(error).__name__}: {first})",
            next="the same command with --debug shows where; please report it",
        ))  # fmt: skip
        code = 1
    sys.exit(code or 0)
