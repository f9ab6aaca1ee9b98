"""Text to token windows.

Documents are joined with the end-of-text token and cut into windows of ``seq_len`` tokens. One ``--data`` path is one
domain; a folder's files share its tokens evenly, so that the first file of a folder does not stand for all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moezip.errors import DataError

if TYPE_CHECKING:
    import torch

DEFAULT_TOKENS = 65_536
DEFAULT_SEQ_LEN = 2_048
SUFFIXES = (".jsonl", ".txt")


@dataclass(frozen=True, slots=True)
class Rows:
    """Token rows ready to run.

    Attributes:
        ids: [N, S] int64.
        mask: [N, S] bool, False on padding (either side); None where nothing is padded.
        domains: N names, equal names adjacent.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None
    domains: tuple[str, ...]

    def tokens(self, domain: str | None = None) -> int:
        """How many real tokens, of one domain or of all."""
        rows = [i for i, name in enumerate(self.domains) if domain in (None, name)]
        return len(rows) * self.ids.shape[1] if self.mask is None else int(self.mask[rows].sum())

    def scored(self, row: int) -> torch.Tensor:
        """Positions of one row whose successor is a real token, as they are themselves, [P]."""
        import torch

        if self.mask is None:
            return torch.arange(self.ids.shape[1] - 1)
        return torch.nonzero(self.mask[row, :-1] & self.mask[row, 1:])[:, 0]

    def fingerprint(self, domain: str | None = None) -> str:
        """Hex digest of the token ids (and padding) of one domain or of all."""
        rows = [i for i, name in enumerate(self.domains) if domain in (None, name)]
        digest = hashlib.sha256(repr(tuple(self.ids[rows].shape)).encode())
        digest.update(self.ids[rows].contiguous().numpy().tobytes())
        if self.mask is not None:
            digest.update(self.mask[rows].contiguous().numpy().tobytes())
        return digest.hexdigest()


def tokenizer_of(folder: Path) -> Any:
    """The checkpoint's tokenizer. Raises DataError if it has none that transformers can load."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as fault:  # the library raises many kinds; each means the same to the user
        raise DataError(
            f"no usable tokenizer beside the weights ({type(fault).__name__}: {str(fault).splitlines()[0]})",
            where=folder,
            next="copy tokenizer.json and tokenizer_config.json of the model into the folder",
        ) from fault


def default_seq_len(config: dict[str, Any]) -> int:
    """min(2048, the model's maximum)."""
    return min(DEFAULT_SEQ_LEN, int(config.get("max_position_embeddings") or DEFAULT_SEQ_LEN))


def text_files(path: Path) -> list[Path]:
    """The ``.txt`` and ``.jsonl`` files that a ``--data`` path stands for. Raises DataError if there is none."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise DataError("the folder holds no .txt or .jsonl file", where=path, next="name another --data path")
        return files
    if not path.is_file():
        raise DataError("there is no such data file", where=path, next="check the --data path")
    if path.suffix not in SUFFIXES:
        raise DataError(
            f"cannot read text from {path.suffix or 'a file without suffix'}", where=path,
            next="give .txt, .jsonl (one object with \"text\" or \"messages\" per line) or a folder of them",
        )  # fmt: skip
    return [path]


def documents(file: Path, tokenizer: Any) -> Iterator[str]:
    """The texts of one file: all of a ``.txt``, one per line of a ``.jsonl`` (chat rows through the template).

    Raises:
        DataError: not UTF-8, not JSON, neither ``text`` nor ``messages``, or messages without a chat template.
    """
    try:
        with file.open(encoding="utf-8") as lines:
            if file.suffix == ".txt":
                yield lines.read()
                return
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _row_text(line, f"{file}, line {number}", tokenizer)
    except UnicodeDecodeError as fault:
        raise DataError("the file is not UTF-8 text", where=file, next="convert it to UTF-8") from fault


def _row_text(line: str, where: str, tokenizer: Any) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as fault:
        raise DataError(f"not JSON: {fault}", where=where, next="each line must be one JSON object") from fault
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return str(row["text"])
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                "the row has messages, but the checkpoint's tokenizer has no chat template", where=where,
                next="give rows with \"text\", or add chat_template.jinja to the checkpoint",
            )  # fmt: skip
        return str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
    raise DataError('the row has neither "text" nor "messages"', where=where, next='write {"text": "..."} rows')


def token_stream(file: Path, tokenizer: Any, limit: int | None = None) -> list[int]:
    """The file's documents as one list of ids, each document followed by the end-of-text token, up to ``limit``."""
    ids: list[int] = []
    end, blank = tokenizer.eos_token_id, True
    for text in documents(file, tokenizer):
        blank = blank and not text.strip()
        ids += tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if end is not None:
            ids.append(end)
        if limit is not None and len(ids) >= limit:
            return ids[:limit]
    if blank or not [i for i in ids if i != end]:
        raise DataError("the text gives no tokens at all", where=file, next="the file is empty or of white space only")
    return ids


def windows(ids: Sequence[int], seq_len: int) -> list[list[int]]:
    """Full windows of ``seq_len``; a stream shorter than one window is one short window."""
    full = [list(ids[start : start + seq_len]) for start in range(0, len(ids) - seq_len + 1, seq_len)]
    return full or [list(ids)]


def stack(rows: Sequence[Sequence[int]], domains: Sequence[str], pad: int = 0) -> Rows:
    """Rows of any length as one batch, padded on the right where they differ."""
    import torch

    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[i, : len(row)] = True
    return Rows(ids, None if bool(mask.all()) else mask, tuple(domains))


def domain_names(paths: Sequence[Path]) -> list[str]:
    """One name per path: its stem, with a number where two stems are equal."""
    names: list[str] = []
    for path in paths:
        name, number = path.stem, 2
        while name in names:
            name, number = f"{path.stem}-{number}", number + 1
        names.append(name)
    return names


@dataclass(frozen=True, slots=True)
class DomainText:
    """Where the text of one domain comes from, and how many tokens of it to take."""

    name: str
    paths: tuple[Path, ...]
    tokens: int


def domains_of(paths: Sequence[Path], tokens: int) -> list[DomainText]:
    """One domain per ``--data`` path, ``tokens`` shared evenly over them."""
    share = max(tokens // len(paths), 1)
    return [DomainText(name, (path,), share) for path, name in zip(paths, domain_names(paths), strict=True)]


def load_rows(domains: Sequence[DomainText], tokenizer: Any, seq_len: int) -> Rows:
    """Windows of every domain. The files of a domain share its tokens evenly; the tail of a file that does not fill a
    window is left out, unless the whole file is shorter than one.

    Raises:
        DataError: a path that cannot be read, or text that gives no tokens.
    """
    rows: list[list[int]] = []
    names: list[str] = []
    for domain in domains:
        files = [file for path in domain.paths for file in text_files(path)]
        share = max(domain.tokens // len(files), 2)
        for file in files:
            found = windows(token_stream(file, tokenizer, share), seq_len)
            rows += found
            names += [domain.name] * len(found)
    return stack(rows, names)
