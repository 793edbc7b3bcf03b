"""Python files of the interpreter's library and packages, as tokens."""

import hashlib
import random
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SEPARATOR = "<|endoftext|>"  # between documents
SAMPLE_BYTES = 20_000_000  # of text that the tokenizer learns from


def read_texts(folders: list[str], limit: float, seed: int) -> tuple[list[str], list[str]]:
    """Return training and validation texts: different Python files in random order, up to `limit` bytes."""
    paths = sorted({(str(path.relative_to(folder)), path) for folder in map(Path, folders) for path in folder.rglob("*.py")})
    random.Random(seed).shuffle(paths)
    texts: tuple[list[str], list[str]] = ([], [])
    seen, size = set(), 0
    for name, path in paths:
        content = path.read_bytes()
        digest = hashlib.sha256(content).digest()
        if size + len(content) <= limit and digest not in seen:
            seen.add(digest)
            size += len(content)
            held_out = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 50 == 0
            texts[held_out].append(content.decode(errors="replace"))
    return texts


def sample(texts: list[str], size: int) -> Iterator[str]:
    """Yield the first texts, `size` characters or a little more in total."""
    for text in texts:
        if size <= 0:
            return
        size -= len(text)
        yield text


def tokenize(texts: tuple[list[str], list[str]], vocabulary: int) -> tuple[Tensor, Tensor]:
    """Return the tokens of training and validation texts as int32 vectors, with a separator after each document."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        sample(texts[0], SAMPLE_BYTES), vocabulary, min_frequency=2, show_progress=False, special_tokens=[SEPARATOR]
    )
    end = [tokenizer.token_to_id(SEPARATOR)]

    def encode(part: list[str]) -> Tensor:
        chunks = (part[i : i + 1000] for i in range(0, len(part), 1000))
        codes = [np.array(each.ids + end, np.int32) for chunk in chunks for each in tokenizer.encode_batch(chunk)]
        return torch.from_numpy(np.concatenate([np.empty(0, np.int32), *codes]))

    return encode(texts[0]), encode(texts[1])


def epoch(tokens: Tensor, context: int, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets, (batch, context) int64, of windows side by side, each once, in random order.

    Raises ValueError if the tokens do not fill a batch.
    """
    size = (len(tokens) - 1) // context
    if size < batch:
        raise ValueError(
            f"{len(tokens):,} tokens, training or validation, fill no batch of {batch} x {context}: "
            "lower --batch or --context, raise --megabytes, or add --folders"
        )
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).to(tokens.device)
    places = torch.arange(context + 1, device=tokens.device)
    for rows in order[: size - size % batch].split(batch):
        spans = tokens[context * rows.unsqueeze(1) + places].long()
        yield spans[:, :-1].contiguous(), spans[:, 1:].contiguous()


def batches(tokens: Tensor, context: int, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of one epoch after another, with seeds from `seed`."""
    return chain.from_iterable(epoch(tokens, context, batch, each) for each in count(seed))
