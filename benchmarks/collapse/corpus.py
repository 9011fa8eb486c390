"""A text as tokens: what to pretrain on, what is held out, the splits, and knowledge-retention items made from them."""

import hashlib
import random
import re
from collections import Counter, defaultdict
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor

PYDOC = "pydoc_data.topics"
WORD = re.compile(r"(?<= )[A-Za-z]{5,}(?![A-Za-z])")
WORDS_ASKED = 4  # the content word and those after it
COUNTS = range(4, 61)  # of a content word in the corpus: known, but no function word


class Items(NamedTuple):
    """Which of two continuations is the real one: tokens (n, 2, T), the real one first, zeros behind their ends.

    The tokens [:, :, context:ends] are what is scored; those before are the same in both.
    """

    tokens: Tensor
    context: int
    ends: Tensor  # (n, 2)


class Corpus(NamedTuple):
    pretraining: Tensor  # (n,) tokens
    validation: Tensor  # for choosing a checkpoint
    held_out: Tensor  # for measuring
    splits: Tensor  # (n_splits, split_tokens), whose text was never seen before its stage
    items: Items  # of split 0
    other_items: Items  # of all splits, the same number of each


def identity(paths: tuple[str, ...]) -> dict:
    """What a run's configuration says of its text: the paths as they were given, and the contents."""
    text = _text(paths)
    return dict(corpus=paths, sha256=_sha256(text))


def read(paths: tuple[str, ...], sha256: str) -> str:
    """The text of the files, or Python's own documentation if there are none."""
    text = _text(paths)
    if _sha256(text) != sha256:
        raise ValueError(f"the corpus must be what the run was planned with, {', '.join(paths) or PYDOC} has changed")
    return text


def _text(paths: tuple[str, ...]) -> str:
    if not paths:
        return "\n\n".join(topics[name] for name in sorted(topics))
    return "\n".join(Path(path).read_text(encoding="utf-8") for path in paths)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def split(
    text: str,
    vocabulary: int,
    n_splits: int,
    split_tokens: int,
    n_items: int,
    n_other_items: int,
    context: int,
    longest: int,
) -> Corpus:
    """The splits are the last tokens of the text; those held out come before them, a hundredth of all tokens twice.

    Items have `context` tokens before the word that is asked for, and at most `longest` in all. Everything follows
    from the text and the numbers.
    """
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text], vocab_size=vocabulary, show_progress=False)
    encoding = tokenizer.encode(text)
    tokens = torch.tensor(encoding.ids)
    n_before = len(tokens) - n_splits * split_tokens
    n_held_out = len(tokens) // 100
    if n_before < len(tokens) // 5:
        raise ValueError(
            f"the corpus must have at least {n_splits * split_tokens * 5 // 4} tokens for {n_splits} splits of "
            f"{split_tokens}, it has {len(tokens)}"
        )
    pretraining, validation, held_out = tokens[:n_before].split([n_before - 2 * n_held_out, n_held_out, n_held_out])
    questions = [q for q in _questions(text, tokenizer, encoding) if context + q.length() <= longest]
    starts = [n_before + k * split_tokens for k in range(n_splits)]
    per_split = [
        [q for q in questions if start + context <= q.start and q.end <= start + split_tokens] for start in starts
    ]
    for k, (found, wanted) in enumerate(zip(per_split, [n_items] + [n_other_items] * (n_splits - 1), strict=True)):
        if len(found) < wanted:
            raise ValueError(f"split {k} must have at least {wanted} content words to ask for, it has {len(found)}")
        random.Random(k).shuffle(found)
    return Corpus(
        pretraining=pretraining,
        validation=validation,
        held_out=held_out,
        splits=tokens[n_before:].view(n_splits, split_tokens),
        items=_items(per_split[0][:n_items], tokens, context),
        other_items=_items([q for found in per_split for q in found[:n_other_items]], tokens, context),
    )


class _Question(NamedTuple):
    start: int  # token at which the word begins, the space before it included
    word_end: int
    end: int  # token behind the last word that is scored
    false_word: list[int]  # tokens of what takes its place

    def length(self) -> int:
        """Tokens from the word on, of the longer side."""
        return self.end - min(self.start, self.word_end - len(self.false_word))


def _questions(text: str, tokenizer: ByteLevelBPETokenizer, encoding) -> list[_Question]:
    """All content words that have a double: a word of like count, the same case and length."""
    counts = Counter(WORD.findall(text))
    doubles = defaultdict(list)
    for word, count in sorted(counts.items()):
        if count in COUNTS:
            doubles[len(word), word[0].isupper(), word.isupper(), count.bit_length()].append(word)
    token_at = {start: i for i, (start, _) in enumerate(encoding.offsets)}
    token_before = {end: i + 1 for i, (_, end) in enumerate(encoding.offsets)}
    choice = random.Random(0)
    found = []
    for match in WORD.finditer(text):
        word = match[0]
        if counts[word] not in COUNTS:
            continue
        alike = [
            w for w in doubles[len(word), word[0].isupper(), word.isupper(), counts[word].bit_length()] if w != word
        ]
        rest = re.compile(rf"(?: [^\s]+){{{WORDS_ASKED - 1}}}").match(text, match.end())
        if not alike or not rest:
            continue
        start, word_end, end = (
            token_at.get(match.start() - 1),
            token_before.get(match.end()),
            token_before.get(rest.end()),
        )
        if None in (start, word_end, end):  # a token that is part of two words
            continue
        found.append(_Question(start, word_end, end, tokenizer.encode(" " + choice.choice(alike)).ids))
    return found


def _items(questions: list[_Question], tokens: Tensor, context: int) -> Items:
    pairs = []
    for q in questions:
        before, after = tokens[q.start - context : q.start], tokens[q.word_end : q.end]
        true, false = tokens[q.start : q.word_end], torch.tensor(q.false_word)
        pairs += [torch.cat([before, word, after]) for word in (true, false)]
    padded = torch.nn.utils.rnn.pad_sequence(pairs, batch_first=True)
    ends = torch.tensor([len(pair) for pair in pairs])
    return Items(padded.unflatten(0, (-1, 2)), context, ends.view(-1, 2))
