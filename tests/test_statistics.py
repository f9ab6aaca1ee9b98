"""Statistics are sums: they add up, they survive the disk, and nothing but real tokens is in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from moezip.calibrate.data import Rows
from moezip.calibrate.record import BY_NAME, RECORDS
from moezip.calibrate.run import calibrate
from moezip.calibrate.statistics import Domain, Statistics
from moezip.checkpoint.reader import Checkpoint
from moezip.errors import StatisticsError
from tests.tiny import token_ids

Tiny = Callable[..., Path]

# float64 sums of the very same terms, grouped differently.
REGROUPED = 1e-12
# The same tokens beside other rows or other padding: matrix products of other shapes round float32 differently, and
# three layers carry it on. Relative to the largest value of the record.
OTHER_COMPANY = 5e-5
# Layers that attend, slide, scan and recur treat padding each in their own way.
MIXERS = ("qwen3_moe", "deepseek_v3", "gpt_oss", "jamba", "qwen3_next")


def rows_of(ids: torch.Tensor, domains: tuple[str, ...] | None = None, mask: torch.Tensor | None = None) -> Rows:
    return Rows(ids, mask, domains or ("text",) * len(ids))


def differences(a: Domain, b: Domain) -> float:
    """The largest difference of any record, relative to the record's largest value; counts must agree exactly."""
    assert list(a.layers) == list(b.layers)
    worst = 0.0
    for layer, named in a.layers.items():
        assert set(named) == set(b.layers[layer]) == set(BY_NAME)
        for name, sums in named.items():
            other = b.layers[layer][name]
            if name in ("counts", "coactivation"):
                assert sums.tolist() == other.tolist(), (layer, name)
            worst = max(worst, float(np.abs(sums - other).max() / max(np.abs(other).max(), 1e-30)))
    return worst


def same(a: Statistics, b: Statistics) -> bool:
    """Bit for bit."""
    return [d.name for d in a.domains] == [d.name for d in b.domains] and all(
        sums.tobytes() == y.layers[layer][name].tobytes()
        for x, y in zip(a.domains, b.domains)
        for layer, named in x.layers.items()
        for name, sums in named.items()
    )


def small(source: str = "abc", name: str = "code", counts: Any = (1.0, 2.0), peak: Any = (3.0, 1.0)) -> Statistics:
    named = {"counts": np.array(counts), "output_max": np.array(peak)}
    return Statistics(source, (Domain(name, ("data",), 3, {1: named, 12: named}),), {"seq_len": 8})


# -- adding up ----------------------------------------------------------------------------------------------


def test_two_passes_add_up_to_one(tiny: Tiny) -> None:
    source, ids = Checkpoint.open(tiny("qwen3_moe")), token_ids(5, 8)
    one = calibrate(source, rows_of(ids), RECORDS, micro_rows=1)
    parts = [calibrate(source, rows_of(part), RECORDS, micro_rows=1) for part in (ids[:2], ids[2:])]
    both = parts[0] + parts[1]
    assert both.tokens == one.tokens == 40
    assert differences(both.domains[0], one.domains[0]) < REGROUPED
    assert both.domains[0].data == parts[0].domains[0].data + parts[1].domains[0].data
    # and not because one of the parts says nothing
    assert differences_of_counts(parts[0], one) > 0


def differences_of_counts(a: Statistics, b: Statistics) -> float:
    return float(np.abs(a.domains[0].layers[0]["counts"] - b.domains[0].layers[0]["counts"]).max())


def test_sums_are_added_and_maxima_compared() -> None:
    # counts (1, 2) + (10, 20); peaks: max of (3, 1) and (2, 5)
    both = small() + small(counts=(10.0, 20.0), peak=(2.0, 5.0))
    for layer in (1, 12):
        assert both.domains[0].layers[layer]["counts"].tolist() == [11, 22]
        assert both.domains[0].layers[layer]["output_max"].tolist() == [3, 5]
    assert both.tokens == 6
    assert both.domains[0].data == ("data", "data")


def test_domains_of_other_names_stand_side_by_side() -> None:
    both = small() + small(name="prose", counts=(5.0, 6.0))
    assert [domain.name for domain in both.domains] == ["code", "prose"]
    assert both.domains[0].layers[1]["counts"].tolist() == [1, 2]
    assert both.domains[1].layers[1]["counts"].tolist() == [5, 6]


def test_what_does_not_add_up() -> None:
    with pytest.raises(StatisticsError, match="two different checkpoints"):
        small() + small(source="another")
    fewer = Statistics("abc", (Domain("code", ("data",), 3, {1: {"counts": np.ones(2)}}),))
    with pytest.raises(StatisticsError, match=r"domain 'code' hold different layers or statistics"):
        small() + fewer


def test_linears_of_a_backward_pass_add_up_and_are_kept(tmp_path: Path) -> None:
    def one(*values: float) -> Statistics:
        return Statistics("abc", (Domain("code", ("data",), 3, {}, linears={"layers.0.q.weight": np.array(values)}),))

    both = one(1.0, 2.0) + one(10.0, 20.0)
    both.save(tmp_path / "stats")
    [domain] = Statistics.load(tmp_path / "stats").domains
    assert {name: sums.tolist() for name, sums in domain.linears.items()} == {"layers.0.q.weight": [11, 22]}
    assert domain.layers == {}
    with pytest.raises(StatisticsError, match="hold different layers or statistics"):
        both + Statistics("abc", (Domain("code", ("data",), 3, {}),))


# -- the file -----------------------------------------------------------------------------------------------


def test_round_trip_through_a_file_is_exact(tiny: Tiny, tmp_path: Path) -> None:
    rows = rows_of(token_ids(3, 8), ("b", "b", "a"))
    stats = calibrate(Checkpoint.open(tiny("deepseek_v3")), rows, RECORDS, settings={"note": "é"})
    first, second = tmp_path / "new" / "one.safetensors", tmp_path / "two.safetensors"
    stats.save(first)
    loaded = Statistics.load(first)
    loaded.save(second)
    assert same(stats, loaded)
    assert first.read_bytes() == second.read_bytes()
    assert loaded.source == stats.source
    assert loaded.settings == {"seq_len": 8, "dtype": "float32", "note": "é"}
    assert [(d.name, d.tokens, d.data) for d in loaded.domains] == [(d.name, d.tokens, d.data) for d in stats.domains]
    assert [d.name for d in loaded.domains] == ["b", "a"]
    assert all(s.dtype == np.float64 for d in loaded.domains for named in d.layers.values() for s in named.values())
    assert [path.name for path in first.parent.iterdir()] == ["one.safetensors"]


def test_layers_come_back_in_order_of_number(tmp_path: Path) -> None:
    small().save(tmp_path / "s")
    assert list(Statistics.load(tmp_path / "s").domains[0].layers) == [1, 12]


def with_about(path: Path, about: Any, key: str = "0/1/counts") -> Path:
    save_file({key: np.ones(2)}, path, {"moezip": about if isinstance(about, str) else json.dumps(about)})
    return path


GOOD = {"schema": 1, "source": "abc", "settings": {}, "domains": [{"name": "a", "data": ["d"], "tokens": 2}]}


def test_files_that_are_no_statistics(tmp_path: Path) -> None:
    file = tmp_path / "s.safetensors"
    assert Statistics.load(with_about(file, GOOD)).domains[0].layers[1]["counts"].tolist() == [1, 1]
    small().save(tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    (tmp_path / "text").write_text("these are no statistics")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "cut").write_bytes(whole[:-8])
    (tmp_path / "cut head").write_bytes(whole[:40])
    (tmp_path / "longer").write_bytes(whole + b"\0" * 8)
    save_file({"w": np.ones(2)}, tmp_path / "weights")
    for name in ("text", "empty", "cut", "cut head", "longer", "weights"):
        with pytest.raises(StatisticsError, match=r"no statistics file, or a damaged one") as caught:
            Statistics.load(tmp_path / name)
        assert caught.value.where == str(tmp_path / name)
        assert "moezip calibrate" in str(caught.value.next)
    with pytest.raises(StatisticsError, match="no such statistics file"):
        Statistics.load(tmp_path / "nowhere")
    with pytest.raises(StatisticsError):
        Statistics.load(tmp_path)  # a folder


@pytest.mark.parametrize(
    "about",
    [
        "not JSON",
        "[]",
        "null",
        *({k: v for k, v in GOOD.items() if k != missing} for missing in GOOD),
        {**GOOD, "domains": []},  # a tensor of a domain that is not listed
        {**GOOD, "domains": [{"name": "a"}]},
        {**GOOD, "domains": [7]},
        {**GOOD, "settings": 7},
    ],
    ids=str,
)
def test_damaged_descriptions(about: Any, tmp_path: Path) -> None:
    with pytest.raises(StatisticsError, match="damaged"):
        Statistics.load(with_about(tmp_path / "s", about))


@pytest.mark.parametrize("key", ["counts", "0/counts", "0/x/counts", "3/1/counts"])
def test_damaged_tensor_names(key: str, tmp_path: Path) -> None:
    with pytest.raises(StatisticsError, match="damaged"):
        Statistics.load(with_about(tmp_path / "s", GOOD, key))


def test_statistics_of_another_version(tmp_path: Path) -> None:
    with pytest.raises(StatisticsError, match="statistics of schema 2, this moezip reads 1"):
        Statistics.load(with_about(tmp_path / "s", {**GOOD, "schema": 2}))


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "s"
    small().save(file)
    before = file.read_bytes()

    def full(tensors: Any, path: Path, about: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(OSError, match="no space"):
        small(counts=(7.0, 7.0)).save(file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_what_is_missing_is_named() -> None:
    small().require(("counts", "output_max"))
    with pytest.raises(StatisticsError, match=r"lack norm_sum, gate_sum \(domain code, layer 1\)") as caught:
        small().require(("counts", "norm_sum", "gate_sum"), "stats.safetensors")
    assert caught.value.next == "calibrate again with --record norm_sum --record gate_sum"
    assert caught.value.where == "stats.safetensors"
    with pytest.raises(StatisticsError, match="hold no domain"):
        Statistics("abc", ()).require(("counts",))


def test_a_layer_that_is_missing_is_named() -> None:
    present = list(small().domains[0].layers)
    small().require((), layers=present)
    with pytest.raises(StatisticsError, match=r"lack layers \[99\]"):
        small().require((), layers=[*present, 99])


def test_statistics_of_another_checkpoint_are_refused(tiny: Tiny) -> None:
    rows = rows_of(token_ids(1, 4))
    stats = calibrate(Checkpoint.open(tiny("qwen3_moe")), rows, RECORDS)
    stats.require_source(Checkpoint.open(tiny("qwen3_moe")).fingerprint)
    other = Checkpoint.open(tiny("qwen3_moe", seed=1))
    with pytest.raises(StatisticsError, match=f"another checkpoint \\({stats.source[:12]}, not "):
        stats.require_source(other.fingerprint)


# -- what is counted ----------------------------------------------------------------------------------------


def padded(lengths: list[int], width: int, side: str) -> Rows:
    """The first ``lengths[i]`` tokens of row i, padded to ``width`` on one side."""
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.int64), torch.zeros(len(lengths), width, dtype=torch.bool)
    tokens = token_ids(len(lengths), width)
    for i, length in enumerate(lengths):
        place = slice(width - length, width) if side == "left" else slice(0, length)
        ids[i, place], mask[i, place] = tokens[i, :length], True
    return rows_of(ids, mask=mask)


@pytest.mark.parametrize("name", MIXERS)
def test_padding_on_either_side_changes_nothing(name: str, tiny: Tiny) -> None:
    source, lengths = Checkpoint.open(tiny(name)), [10, 4, 7]
    tokens = token_ids(3, 10)
    alone = [calibrate(source, rows_of(tokens[i : i + 1, :n]), RECORDS) for i, n in enumerate(lengths)]
    wanted = alone[0] + alone[1] + alone[2]
    top_k = int(source.config.get("num_experts_per_tok") or 2)
    for side in ("left", "right"):
        stats = calibrate(source, padded(lengths, 10, side), RECORDS)
        assert stats.tokens == wanted.tokens == 21
        assert differences(stats.domains[0], wanted.domains[0]) < OTHER_COMPANY, side
        for named in stats.domains[0].layers.values():
            assert named["counts"].sum() == 21 * top_k
            assert np.trace(named["coactivation"]) == 21 * top_k


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_the_ids_under_the_padding_do_not_matter(name: str, tiny: Tiny) -> None:
    source, rows = Checkpoint.open(tiny(name)), padded([10, 4, 7], 10, "left")
    assert rows.mask is not None
    other = rows_of(torch.where(rows.mask, rows.ids, 9), mask=rows.mask)
    assert not torch.equal(rows.ids, other.ids)
    found = [calibrate(source, each, RECORDS).domains[0] for each in (rows, other)]
    # padding is routed too, and so keeps the real tokens company
    assert differences(*found) < OTHER_COMPANY


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "jamba"])
def test_the_size_of_the_micro_batches_does_not_matter(name: str, tiny: Tiny) -> None:
    source, rows = Checkpoint.open(tiny(name)), rows_of(token_ids(7, 9))
    found = [calibrate(source, rows, RECORDS, micro_rows=step).domains[0] for step in (1, 2, 3, 7, 100)]
    assert max(differences(each, found[0]) for each in found[1:]) < OTHER_COMPANY


def test_domains_of_one_pass_stay_apart(tiny: Tiny) -> None:
    source, ids = Checkpoint.open(tiny("qwen3_moe")), token_ids(6, 8)
    names = ("a", "a", "a", "b", "c", "c")
    together = calibrate(source, rows_of(ids, names), RECORDS, micro_rows=2)
    assert [(domain.name, domain.tokens) for domain in together.domains] == [("a", 24), ("b", 8), ("c", 16)]
    for domain in together.domains:
        mine = [i for i, name in enumerate(names) if name == domain.name]
        alone = calibrate(source, rows_of(ids[mine], (domain.name,) * len(mine)), RECORDS, micro_rows=2)
        # no micro-batch crosses a domain, so these are the very same ones
        assert same(Statistics("", (domain,)), alone)
        assert domain.data == alone.domains[0].data


def test_fewer_records_are_the_same_numbers(tiny: Tiny) -> None:
    source, rows = Checkpoint.open(tiny("qwen3_moe")), rows_of(token_ids(2, 8))
    full = calibrate(source, rows, RECORDS).domains[0]
    part = calibrate(source, rows, [BY_NAME["norm_sum"]]).domains[0]
    for layer, named in part.layers.items():
        assert list(named) == ["norm_sum"]
        assert named["norm_sum"].tolist() == full.layers[layer]["norm_sum"].tolist()
