"""What ``moezip export`` says at its end."""

from __future__ import annotations

from dataclasses import asdict

from moezip import console
from moezip.report.report import Report

READ_BY = {
    "stock": "every loader of safetensors",
    "moezip": "moezip.load, or transformers after `import moezip`",
    "compressed-tensors": "vLLM, SGLang (4 and 8 bits), moezip.load",
    "gguf": "llama.cpp and what is built on it",
    "gptq": "vLLM and SGLang (without zeros), GPTQModel, moezip.load",
}


def show_export(report: Report, as_json: bool, quiet: bool) -> None:
    """Warnings are said even where nothing else is."""
    for note in report.notes:
        console.say(f"warning: {note}")
    if as_json:
        console.data(asdict(report))
        return
    if quiet:
        return
    console.pairs(
        report.out,
        {
            "size": f"{console.size(report.bytes_before)} to {console.size(report.bytes_after)}, "
            f"{report.bits_per_weight:.2f} bits per weight",
            "time": console.duration(report.seconds),
            "peak memory": console.size(report.peak_rss_bytes),
            "read by": READ_BY[report.form],
        },
    )
