"""Generating with experts that stay on disk: peak memory, hit rate, bytes read and speed by size of the cache.

    python benchmarks/paged.py --work CACHE

1. The ``large`` model of ``models.py`` in bf16 (1.6 GB) and the packed one of ``load.py`` (1.3 GB), random weights: 16
   tokens of prompt, 32 generated, in processes of their own, with all experts in memory and with caches of a few sizes.
   The peak is the system's own figure for the process (``ru_maxrss``), interpreter and libraries inside; the table has
   what the imports alone take. Files come from the page cache wherever the system has them there, so speed is that of
   copying rather than of the disk; ``--cold`` empties it before every run (Linux, as root).
2. With ``--model CKPT --text FILE``, a trained model (random weights route more evenly than trained ones do): hit rate
   by share of the experts that the cache holds, over 200 generated tokens behind a prompt from the text; and, of the
   same uses, what one common queue over all layers would have.
"""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import load
import measure

MIB = measure.MIB
IMPORTS = """
import json, sys, time
import torch, transformers, moezip
import transformers.models.qwen3_moe.modeling_qwen3_moe
import moezip.runtime.load
"""
RUN = f"""{IMPORTS}
folder, cache = sys.argv[1:]
where = {{}} if cache == "ram" else {{"experts": "mmap", "cache": cache}}
model = moezip.load(folder, **where)
prompt = torch.arange(1, 17)[None]
with torch.inference_mode():
    begun = time.perf_counter()
    model.generate(prompt, max_new_tokens=1, min_new_tokens=1, do_sample=False, pad_token_id=0)
    first = time.perf_counter() - begun
    pages = getattr(model, "moezip_experts", None)
    if pages is not None:
        pages.reset_stats()
    begun = time.perf_counter()
    model.generate(prompt, max_new_tokens=32, min_new_tokens=32, do_sample=False, pad_token_id=0)
    seconds = time.perf_counter() - begun
found = {{"seconds": seconds, "first": first, "tokens": 32}}
if pages is not None:
    stats = pages.stats()
    found |= {{"hit_rate": stats.hit_rate, "bytes_read": stats.bytes_read, "most_held": stats.most_held}}
print(json.dumps(found))
"""
CACHES = ("64MiB", "256MiB", "768MiB")
SHARES = (0.06, 0.125, 0.25, 0.5, 0.75)


def run(folder: Path, cache: str, cold: bool) -> dict[str, Any]:
    if cold:
        measure.process(["sh", "-c", "sync; echo 3 > /proc/sys/vm/drop_caches"])
    command = [sys.executable, "-c", RUN, folder, cache]
    done = measure.process(command, HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    return {**json.loads(done.output.splitlines()[-1]), "peak_rss_bytes": done.peak_rss_bytes}


def memory_and_speed(work: Path, rounds: int, cold: bool) -> dict[str, Any]:
    """Prints the first table."""
    measure.say("making the checkpoints, unless they are there")
    measure.process([sys.executable, measure.HERE / "models.py", "large", "--work", work])
    measure.process([sys.executable, measure.HERE / "load.py", "--make", "--work", work])
    imports = measure.process([sys.executable, "-c", IMPORTS], HF_HUB_OFFLINE="1").peak_rss_bytes
    rows, values = [], {}
    for name in ("large", load.NAME):
        size = sum(file.stat().st_size for file in (work / name).glob("*.safetensors"))
        arms = {cache: partial(run, work / name, cache, cold) for cache in ("ram", *CACHES)}
        values[name] = measure.in_turns(rounds, arms)
        for cache, runs in values[name].items():
            peak = measure.median([each["peak_rss_bytes"] for each in runs])
            speed = [each["tokens"] / each["seconds"] for each in runs]
            paged = "hit_rate" in runs[0]
            rows.append((
                name, f"{size / MIB:.0f}", cache, f"{(peak - imports) / MIB:.0f}", f"{peak / MIB:.0f}",
                f"{runs[0]['hit_rate']:.1%}" if paged else "",
                f"{runs[0]['bytes_read'] / 32 / MIB:.0f}" if paged else "",
                f"{measure.median(speed):.1f}", measure.all_of(speed, 1),
            ))  # fmt: skip
    head = ("model", "MiB on disk", "cache", "peak MiB beyond imports", "peak MiB", "hits", "MiB read per token",
            "tokens/s", "all")  # fmt: skip
    print(measure.table(head, rows))
    print(f"\nThe imports alone peak at {imports / MIB:.0f} MiB.\n")
    return {"imports": imports, **values}


def hit_rates(folder: Path, text: Path) -> list[dict[str, Any]]:
    """Prints the second table."""
    import torch
    from transformers import AutoTokenizer

    import moezip
    from moezip.runtime.paged import PagedExperts
    from moezip.runtime.pages import Pages

    line = text.read_text(encoding="utf-8").splitlines()[0]
    words = str(json.loads(line)["text"]) if text.suffix == ".jsonl" else line
    ids = AutoTokenizer.from_pretrained(folder)(words, return_tensors="pt").input_ids[:, :64]
    uses: list[tuple[int, int]] = []
    lend = Pages.lend

    def noted(self: Pages, key: tuple[int, int], *given: Any) -> Any:
        uses.append(key)
        return lend(self, key, *given)

    rows, values = [], []
    whole = moezip.load(folder, experts="mmap", cache="1GiB")
    layers = [module for module in whole.modules() if isinstance(module, PagedExperts)]
    total = sum(module.size(expert) for module in layers for expert in range(module.num_experts))
    count = sum(module.num_experts for module in layers)
    Pages.lend = noted  # type: ignore[method-assign,assignment]
    for share in SHARES:
        uses.clear()
        model = moezip.load(folder, experts="mmap", cache=int(share * total) + 1)
        with torch.inference_mode():
            model.generate(ids, max_new_tokens=200, min_new_tokens=200, do_sample=True, pad_token_id=0)
        stats = model.moezip_experts.stats()
        common = one_queue(uses, int(share * count))
        rows.append((f"{share:.1%}", f"{stats.hit_rate:.1%}", f"{common:.1%}", f"{stats.bytes_read / MIB:.0f}"))
        values.append({"share": share, "hit_rate": stats.hit_rate, "one_queue": common})
    Pages.lend = lend  # type: ignore[method-assign]
    print(measure.table(("cache, of all experts", "hits", "hits of one common queue", "MiB read"), rows))
    return values


def one_queue(uses: list[tuple[int, int]], room: int) -> float:
    """Hit rate of a plain LRU over all layers with room for so many experts."""
    held: OrderedDict[tuple[int, int], None] = OrderedDict()
    hits = 0
    for use in uses:
        hits += use in held
        held[use] = None
        held.move_to_end(use)
        if len(held) > room:
            held.popitem(last=False)
    return hits / len(uses)


def main() -> None:
    parser = measure.options(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="empty the page cache before every run; needs root")
    parser.add_argument("--model", type=Path, help="a trained checkpoint, for hit rates")
    parser.add_argument("--text", type=Path, help="its prompt")
    given = parser.parse_args()
    if (given.model is None) != (given.text is None):
        parser.error("--model and --text belong together")
    values: dict[str, Any] = {}
    with measure.work_folder(given.work) as work:
        values["memory"] = memory_and_speed(work, given.rounds, given.cold)
    if given.model is not None:
        values["hit_rates"] = hit_rates(given.model, given.text)
    measure.save(given.json, {"paged": values})


if __name__ == "__main__":
    main()
