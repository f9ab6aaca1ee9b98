"""Logits of a GGUF file by llama.cpp itself; runs in an environment that holds llama.cpp's Python wheel and numpy.

    python -m venv ENV && ENV/bin/pip install xllamacpp numpy        # or llama-cpp-python, which compiles for minutes
    ENV/bin/python benchmarks/llamacpp_logits.py MODEL.gguf ROWS.npy OUT.npy [--text TEXT.json]

ROWS.npy holds token ids [rows, length]; OUT.npy becomes the logits [rows, length, vocabulary], float32. With ``--text``
(a JSON list of strings) the token ids that llama.cpp's own tokenizer gives each are printed as JSON.

Only llama.cpp's C interface is called, by ctypes. Its parameter structures differ between versions; they are passed on
as its own functions filled them in, in blocks larger than any of them. Two choices are changed: keys and values are
kept in 32 bits, and attention is computed step by step, so that what remains is the difference between the models.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np

CONTEXT = 512  # llama.cpp's own default, which is not changed: rows must be shorter


class _Parameters(ctypes.Structure):
    """A structure of llama.cpp whose fields are left alone."""

    _fields_ = [("content", ctypes.c_uint64 * 256)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


def library() -> Any:
    """llama.cpp's library out of whichever wheel is installed."""
    for package, pattern in (("llama_cpp", "lib/libllama.so"), ("xllamacpp", "*.so")):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        for file in Path(spec.origin).parent.glob(pattern):
            return _declared(ctypes.CDLL(str(file)))
    raise SystemExit("neither xllamacpp nor llama-cpp-python is installed here")


def _declared(lib: Any) -> Any:
    pointer, integer = ctypes.c_void_p, ctypes.c_int32
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "llama_backend_init": (None, []),
        "llama_model_default_params": (_Parameters, []),
        "llama_context_default_params": (_Parameters, []),
        "llama_model_load_from_file": (pointer, [ctypes.c_char_p, _Parameters]),
        "llama_init_from_model": (pointer, [pointer, _Parameters]),
        "llama_model_get_vocab": (pointer, [pointer]),
        "llama_vocab_n_tokens": (integer, [pointer]),
        "llama_tokenize": (
            integer,
            [pointer, ctypes.c_char_p, integer, ctypes.POINTER(integer), integer, ctypes.c_bool, ctypes.c_bool],
        ),
        "llama_batch_init": (_Batch, [integer, integer, integer]),
        "llama_decode": (integer, [pointer, _Batch]),
        "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [pointer]),
        "llama_get_memory": (pointer, [pointer]),
        "llama_memory_clear": (None, [pointer, ctypes.c_bool]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def _exact(parameters: _Parameters) -> _Parameters:
    """Keys and values in 32 bits, no flash attention.

    The fields are found by the defaults around them: rope scaling, pooling, attention and flash attention are four
    neighbours of -1 ("automatic"), and the types of keys and values the first two neighbours of 1 (F16) behind them.
    """
    words = np.frombuffer(parameters, dtype=np.int32)  # type: ignore[call-overload]  # the fields as they lie
    automatic = [place for place in range(64) if (words[place : place + 4] == -1).all()]
    behind = range(automatic[-1] + 4, 64) if automatic else ()
    types = [place for place in behind if (words[place : place + 2] == 1).all()]
    if len(automatic) != 1 or not types:
        raise SystemExit("this version of llama.cpp lays out its parameters in a way that is not known here")
    words[automatic[0] + 3] = 0
    words[types[0] : types[0] + 2] = 0
    return parameters


class Model:
    """One GGUF file, loaded."""

    def __init__(self, file: str):
        self.lib = library()
        self.lib.llama_backend_init()
        self.model = self.lib.llama_model_load_from_file(file.encode(), self.lib.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {file}; what it says of it is above")
        self.context = self.lib.llama_init_from_model(self.model, _exact(self.lib.llama_context_default_params()))
        if not self.context:
            raise SystemExit(f"llama.cpp makes no context for {file}")
        self.vocab = self.lib.llama_model_get_vocab(self.model)
        self.size = self.lib.llama_vocab_n_tokens(self.vocab)

    def logits(self, row: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """[length, vocabulary] of one row of token ids."""
        length = len(row)
        if length > CONTEXT:
            raise SystemExit(f"rows of at most {CONTEXT} tokens, please")
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        batch = self.lib.llama_batch_init(length, 0, 1)
        batch.n_tokens = length
        for place, token in enumerate(row):
            batch.token[place], batch.pos[place] = int(token), place
            batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
        if self.lib.llama_decode(self.context, batch):
            raise SystemExit("llama.cpp could not run the row")
        found = np.ctypeslib.as_array(self.lib.llama_get_logits(self.context), (length, self.size))
        return found.copy()

    def tokens(self, text: str) -> list[int]:
        """The ids of a text, with no special token put before or behind it."""
        content = text.encode()
        room = len(content) + 8
        ids = (ctypes.c_int32 * room)()
        count = self.lib.llama_tokenize(self.vocab, content, len(content), ids, room, False, False)
        if count < 0:
            raise SystemExit(f"llama.cpp finds {-count} tokens in {room - 8} bytes")
        return list(ids[:count])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("out")
    parser.add_argument("--text", help="JSON list of strings: print the tokens of each")
    words = parser.parse_args()
    model = Model(words.model)
    np.save(words.out, np.stack([model.logits(row) for row in np.load(words.rows)]))
    if words.text:
        print(json.dumps([model.tokens(text) for text in json.loads(Path(words.text).read_text())]))


if __name__ == "__main__":
    main()
