"""Bad input as a user meets it: the exit code, one message that says what, where and what next, and nothing left.

What exactly each reader refuses is tested beside it (checkpoints, writer, verify, recipes); here each fault goes
through the command line.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command import Answer, Cli, files_of, model_files, process, tree, write_text

TOKENS = 256
Tiny = Callable[..., Path]
INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00003.safetensors"


@pytest.fixture
def model(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    copy = tmp_path / "model"
    shutil.copytree(tiny("qwen3_moe"), copy)
    for file in copy.iterdir():
        file.chmod(0o644)
    return copy


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "words.jsonl")


def refused(answer: Answer, out: Path, *said: str, code: int = 1) -> None:
    """One message with what, where or what next, no traceback, and neither output nor leftovers beside it."""
    assert answer.code == code, answer.err
    assert answer.out == "" and "Traceback" not in answer.err
    assert answer.err.count("error:") == 1 and ("where:" in answer.err or "next:" in answer.err)
    for words in said:
        assert words in answer.err, answer.err
    assert not out.exists()
    assert not [name for name in tree(out.parent) if "staging" in name or name.endswith(".part")]


def edit_header(shard: Path, change: Callable[[dict[str, dict[str, list[int]]]], None]) -> None:
    """Rewrites the header of a safetensors file; the data stays."""
    content = shard.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    change(header)
    new = json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + length :])


def change_tensor(folder: Path, name: str, value: float) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name].view(-1)[3] = value
    save_file(tensors, file, {"format": "pt"})


# -- checkpoints that cannot be trusted ---------------------------------------------------------------------


def missing_shard(folder: Path) -> None:
    (folder / FIRST).unlink()


def truncated_shard(folder: Path) -> None:
    content = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes(content[:-100])


def lying_header_length(folder: Path) -> None:
    content = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes(struct.pack("<Q", 2**60) + content[8:])


def overlapping_offsets(folder: Path) -> None:
    def change(header: dict[str, dict[str, list[int]]]) -> None:
        one, two = [name for name in header if name != "__metadata__"][:2]
        size = header[two]["data_offsets"][1] - header[two]["data_offsets"][0]
        start = header[one]["data_offsets"][0]
        header[two]["data_offsets"] = [start, start + size]

    edit_header(folder / FIRST, change)


def index_names_the_wrong_shard(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    name = next(name for name, file in index["weight_map"].items() if file == FIRST)
    index["weight_map"][name] = FIRST.replace("00001-of", "00002-of")
    (folder / INDEX).write_text(json.dumps(index))


def wrong_expert_count(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_experts": 6}))


def pickle_only(folder: Path) -> None:
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "qwen3_mo"}))


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


DAMAGE: tuple[tuple[Callable[[Path], None], tuple[str, ...]], ...] = (
    (missing_shard, ("1 of 3 shards missing", FIRST, "download")),
    (truncated_shard, (FIRST, "download")),
    (lying_header_length, (FIRST, "header")),
    (overlapping_offsets, (FIRST, "overlap")),
    (index_names_the_wrong_shard, (INDEX, "does not hold it")),
    (wrong_expert_count, ("has 8 experts, the config says 6", "config.json")),
    (pickle_only, ("pytorch_model.bin", "safe_serialization")),
    (unknown_architecture, ("qwen3_mo", "did you mean 'qwen3_moe'")),
    (no_config, ("config.json",)),
)


@pytest.mark.parametrize(("damage", "said"), DAMAGE, ids=lambda value: getattr(value, "__name__", ""))
def test_a_damaged_checkpoint_is_refused_before_the_text_is_read(
    cli: Cli, model: Path, tmp_path: Path, damage: Callable[[Path], None], said: tuple[str, ...]
) -> None:
    damage(model)
    out = tmp_path / "out"
    refused(cli("prune", model, out, "--keep", 4, "--data", tmp_path / "unread.jsonl"), out, *said)
    refused(cli("prune", model, out, "-m", "random", "--keep", 4), out, *said)
    refused(cli("inspect", model), out, *said)
    assert cli("verify", model).code == 1
    assert tree(tmp_path) == ["model", *(f"model/{name}" for name in tree(model))]


def test_nan_in_an_expert_is_found_while_calibrating(cli: Cli, model: Path, text: Path, tmp_path: Path) -> None:
    # an expert that some token is routed to: poison all of layer 1
    for expert in range(8):
        change_tensor(model, f"model.layers.1.mlp.experts.{expert}.down_proj.weight", float("nan"))
    out = tmp_path / "out"
    answer = cli("prune", model, out, "--keep", 4, "--data", text, "--tokens", TOKENS)
    refused(answer, out, "decoder layer 1", "not finite", "moezip verify")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_a_tensor_that_is_only_copied_is_found_while_writing(
    cli: Cli, model: Path, tmp_path: Path, value: float
) -> None:
    change_tensor(model, "model.embed_tokens.weight", value)
    out = tmp_path / "out"
    refused(
        cli("prune", model, out, "-m", "random", "--keep", 4), out, "model.embed_tokens.weight", "NaN or infinity"
    )  # fmt: skip
    found = cli("verify", model)
    assert found.code == 1 and "model.embed_tokens.weight" in found.out


# -- text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", b"", ("no tokens at all", "empty.txt")),
        ("empty.jsonl", b"", ("no tokens at all", "empty.jsonl")),
        ("blank.jsonl", b'{"text": ""}\n{"text": "  "}\n', ("no tokens at all", "blank.jsonl")),
        ("broken.jsonl", b'{"text": "fine"}\n{"text": \n', ("not JSON", "line 2")),
        ("keys.jsonl", b'{"words": "a"}\n', ("neither", "line 1")),
        ("latin.txt", b"caf\xe9", ("not UTF-8", "latin.txt")),
        ("text.pdf", b"%PDF", (".pdf", ".jsonl")),
    ],
)
@pytest.mark.parametrize("command", ["prune", "calibrate", "evaluate"])
def test_text_that_gives_nothing(
    cli: Cli, model: Path, tmp_path: Path, command: str, name: str, content: bytes, said: tuple[str, ...]
) -> None:
    (tmp_path / name).write_bytes(content)
    out = tmp_path / "out"
    words = {"prune": (out, "--keep", 4), "calibrate": ("--out", out), "evaluate": ()}[command]
    refused(cli(command, model, *words, "--data", tmp_path / name), out, *said)


def test_a_folder_without_text(cli: Cli, model: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    out = tmp_path / "out"
    refused(cli("prune", model, out, "--keep", 4, "--data", tmp_path / "texts"), out, "no .txt or .jsonl")


# -- what does not fit together -----------------------------------------------------------------------------


def test_statistics_of_another_model(cli: Cli, tiny: Tiny, model: Path, text: Path, tmp_path: Path) -> None:
    stats, out = tmp_path / "stats", tmp_path / "out"
    other = tiny("qwen3_moe", seed=1)
    assert cli("calibrate", other, "--data", text, "--tokens", TOKENS, "--out", stats).code == 0
    refused(cli("prune", model, out, "--keep", 4, "--stats", stats), out, "another checkpoint", str(stats))
    refused(
        cli("prune", model, out, "--keep", 4, "--stats", stats, "--dry-run"), out, "another checkpoint", str(stats)
    )  # fmt: skip
    refused(cli("prune", model, out, "--keep", 4, "--stats", text), out, "no statistics file", "moezip calibrate")
    refused(cli("prune", model, out, "--keep", 4, "--stats", tmp_path / "gone"), out, "no such statistics file")
    both = cli("prune", model, out, "--keep", 4, "--stats", stats, "--data", text)
    refused(both, out, "both --data and --stats", code=2)


def test_statistics_that_lack_what_the_method_reads(cli: Cli, model: Path, text: Path, tmp_path: Path) -> None:
    stats, out = tmp_path / "stats", tmp_path / "out"
    words = ("--data", text, "--tokens", TOKENS, "--out", stats)
    assert cli("calibrate", model, *words, "--record", "counts").code == 0
    refused(cli("prune", model, out, "-m", "reap", "--keep", 4, "--stats", stats), out, "lack", "--record")
    # the guard reads the largest outputs, whatever the method reads
    guarded = ("prune", model, out, "-m", "frequency", "--keep", 4, "--stats", stats)
    refused(cli(*guarded), out, "output_max", "--set guard=false")
    assert cli(*guarded, "--set", "guard=false").code == 0


@pytest.mark.parametrize(
    ("amount", "said", "code"),
    [
        (("--keep", 1), ("cannot keep 1", "2", "keep at least 2"), 1),
        (("--ratio", 0.9), ("cannot keep 1", "keep at least 2"), 1),
        (("--keep", 9), ("cannot keep 9 of 8", "between 2 and 8"), 1),
        (("--ratio", 1.0), ("--ratio 1",), 2),
        (("--ratio", "nan"), ("--ratio nan",), 2),
        ((), ("--keep N or --ratio R",), 2),
        (("--keep", 4, "--ratio", 0.5), ("--keep N or --ratio R",), 2),
    ],
)
def test_impossible_amounts_are_refused_before_any_text_is_read(
    cli: Cli, model: Path, tmp_path: Path, amount: tuple[object, ...], said: tuple[str, ...], code: int
) -> None:
    unreadable, out = tmp_path / "unreadable.jsonl", tmp_path / "out"
    unreadable.write_bytes(b"\xff\xfe not text")
    for more in ((), ("--dry-run",), ("--plan-only",)):
        refused(cli("prune", model, out, *amount, "--data", unreadable, *more), out, *said, code=code)


def test_groups_are_refused_with_the_arithmetic(cli: Cli, tiny: Tiny, tmp_path: Path) -> None:
    grouped = tiny("deepseek_v3", experts=16, top_k=4, n_group=4, topk_group=2)
    out = tmp_path / "out"
    uneven = cli("prune", grouped, out, "-m", "random", "--keep", 10)
    refused(uneven, out, "10 / 4 = 2.5", "keep 8 or 12")
    # two of four groups serve 4 experts per token, so each group needs 2: 4 experts leave 1
    few = cli("prune", grouped, out, "-m", "random", "--keep", 4)
    refused(few, out, "1 in each of 4 groups", "keep at least 8")
    assert cli("prune", grouped, out, "-m", "random", "--keep", 8).code == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("-m", "easy-epp"), ("unknown pruning method", "did you mean 'easy-ep'")),
        (("-m", "reap", "--set", "gaurd=false"), ("unknown setting of reap", "did you mean 'guard'")),
        (("-m", "reap", "--set", "guard=perhaps"), ("does not read as bool", "--set guard=perhaps")),
        (("-m", "reap", "--set", "mtp=maybe"), ("mtp is drop or keep",)),
    ],
)
def test_unknown_names(
    cli: Cli, model: Path, tmp_path: Path, text: Path, words: tuple[str, ...], said: tuple[str, ...]
) -> None:
    out = tmp_path / "out"
    refused(cli("prune", model, out, "--keep", 4, "--data", text, *words), out, *said, code=2)


def test_an_unknown_record(cli: Cli, model: Path, tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    answer = cli("calibrate", model, "--data", text, "--out", out, "--record", "count")
    refused(answer, out, "did you mean 'counts'", code=2)


def test_a_method_that_reads_text_needs_some(cli: Cli, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for more in ((), ("--dry-run",)):
        refused(cli("prune", model, out, "--keep", 4, *more), out, "needs calibration text", "--stats", code=2)


def test_too_little_memory_is_said_with_the_numbers(cli: Cli, model: Path, tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    answer = cli("prune", model, out, "--keep", 4, "--data", text, "--max-memory", "64MiB")
    refused(answer, out, "less than one layer", "allow at least")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, ("cannot be read",)),
        ("{", ("no plan", "JSONDecodeError")),
        ("[]", ("no plan",)),
        ('{"schema": 99}', ("schema 99",)),
    ],
)
def test_a_plan_that_is_none(cli: Cli, model: Path, tmp_path: Path, content: str | None, said: tuple[str, ...]) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    if content is not None:
        plan.write_text(content)
    refused(cli("apply", model, plan, out), out, str(plan), *said)


def test_a_plan_of_another_checkpoint(cli: Cli, tiny: Tiny, model: Path, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    assert cli("prune", tiny("qwen3_moe", seed=1), plan, "-m", "random", "--keep", 4, "--plan-only").code == 0
    refused(cli("apply", model, plan, out), out, "another checkpoint")


# -- outputs ------------------------------------------------------------------------------------------------


def test_an_output_that_exists_stays_as_it_is(cli: Cli, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli("prune", model, out, "-m", "random", "--keep", 4).code == 0
    before = files_of(out)
    plan = out / "moezip/plan.json"
    for words in (("prune", model, out, "-m", "random", "--keep", 5), ("apply", model, plan, out)):
        answer = cli(*words)
        assert answer.code == 1 and "exists" in answer.err and "--overwrite" in answer.err and str(out) in answer.err
    same = cli("prune", model, model, "-m", "random", "--keep", 4, "--overwrite")
    assert same.code == 1 and "where the source is read" in same.err
    assert files_of(out) == before
    assert cli("prune", model, out, "-m", "random", "--keep", 5, "--plan-only").code == 2


def test_the_disk_fills_up_while_writing(
    cli: Cli, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    from moezip.checkpoint import writer

    room = 100_000  # of the 155 kB that five of eight experts take
    write = os.write

    def full(descriptor: int, piece: bytes) -> int:
        nonlocal room
        if len(piece) > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room -= len(piece)
        return write(descriptor, piece)

    out = tmp_path / "out"
    words = ("prune", model, out, "--keep", 5, "--data", text, "--tokens", TOKENS)
    with monkeypatch.context() as patched:
        patched.setattr(writer.os, "write", full)
        answer = cli(*words)
    refused(answer, out, "the disk is full", "free some space", "statistics are kept", "--resume")
    assert cli(*words, "--resume").code == 0 and cli("verify", out).code == 0
    assert tree(tmp_path) == sorted(["model", "out", "words.jsonl", *(f"model/{name}" for name in tree(model)),
                                     *(f"out/{name}" for name in tree(out))])  # fmt: skip


@pytest.mark.parametrize("moment", ["while a shard is written", "before the output appears"])
def test_a_killed_run_leaves_no_output_and_the_same_command_succeeds(
    cli: Cli, model: Path, tmp_path: Path, moment: str
) -> None:
    before = (
        "import os, signal; from moezip.checkpoint import writer\n"
        "def die(*_): os.kill(os.getpid(), signal.SIGKILL)\n"
        + ("writer._FinitePieces.update = die" if "shard" in moment else "writer.Staging.publish = die")
    )
    out = tmp_path / "out"
    words = ("prune", model, out, "-m", "random", "--keep", 4)
    assert process(*words, before=before).code == -9
    left = [name for name in tree(tmp_path) if not name.startswith("model")]
    assert left and all(name.startswith(".out.moezip-staging-") for name in left)  # hidden, so no loader takes it
    assert cli(*words).code == 0 and cli("verify", out).code == 0
    assert not [name for name in tree(tmp_path) if "staging" in name]
    assert cli("prune", model, tmp_path / "straight", *words[3:]).code == 0
    assert model_files(out) == model_files(tmp_path / "straight")


# -- recipes ------------------------------------------------------------------------------------------------


def test_a_recipe_with_an_unknown_key(cli: Cli, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("version: 1\nmodel: demo\noutput: out\njob: {}\n")
    answer = cli("run", recipe)
    refused(answer, tmp_path / "out", "unknown key 'job'", "did you mean 'jobs'", "line 4")
