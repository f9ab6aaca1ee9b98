"""What commands have in common: their options, and words of the command line made into values."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moezip.cli import complete
from moezip.errors import UsageError
from moezip.sizes import size_of

if TYPE_CHECKING:
    from moezip.pipeline import Common
    from moezip.progress import Watch


def packaged(paths: list[Path] | None) -> list[Path] | None:
    """Paths as they are, but for those of the packaged text. Raises DataError for one that is not there."""
    from moezip import demo

    return None if paths is None else [demo.named(path.as_posix()) or path for path in paths]


Ckpt = Annotated[
    str,
    typer.Argument(
        metavar="CKPT",
        autocompletion=complete.checkpoints,
        help="A checkpoint folder, a hub id (ORG/NAME or ORG/NAME@REVISION), or demo.",
    ),
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")]
Data = Annotated[
    list[Path] | None,
    typer.Option(
        "--data",
        callback=packaged,
        autocompletion=complete.texts,
        help="Text: .txt, .jsonl or a folder of them. One path is one domain; repeat for several. "
        "demo:calib/python.jsonl is of the package.",
    ),
]
Tokens = Annotated[int, typer.Option("--tokens", min=2, help="Calibration tokens, shared over the domains.")]
SeqLen = Annotated[
    int | None, typer.Option("--seq-len", min=2, help="Window in tokens. Default min(2048, the model's maximum).")
]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting; repeat for several.")]
Device = Annotated[str, typer.Option("--device", help="Where layers are computed, one at a time: cpu, cuda, ...")]
MaxMemory = Annotated[
    str | None, typer.Option("--max-memory", help="Ceiling of the process, such as 8GiB. Default 80% of what is free.")
]
Workdir = Annotated[Path | None, typer.Option("--workdir", help="Where interrupted work waits. Default beside OUT.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from an interrupted run of the same command.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="The only source of chance.")]
For = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="READER",
        autocompletion=complete.readers,
        help="Who must read OUT: transformers, vllm, sglang, llamacpp or moezip.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Data as JSON on stdout, talk on stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no talk.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and a log of what is done.")]


def settings_of(texts: Sequence[str] | None) -> dict[str, str]:
    """``KEY=VALUE`` texts as a dict. Raises UsageError for one without ``=``, or a key given twice."""
    settings: dict[str, str] = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"{text!r} is no setting", where=f"--set {text}", next="write --set KEY=VALUE")
        if key in settings:
            raise UsageError(f"the setting {key} is given twice", where=f"--set {text}", next="give it once")
        settings[key] = value
    return settings


def common_of(watch: Watch, **options: Any) -> Common:
    from moezip.pipeline import Common

    max_memory = size_of(options.pop("max_memory", None))
    command = shlex.join(["moezip", *sys.argv[1:]])
    return Common(watch=watch, max_memory=max_memory, command=command, **options)
