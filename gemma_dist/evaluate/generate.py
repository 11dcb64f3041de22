"""Let the model answer decision points: each shared beginning is read once, and many answers are written at a time.

The prompts of a few trajectories are read as one tree (`tree.py`), chunk by chunk. Each answer then gets a row of a
`RowCache`, and each pass writes one token in every row; all rows look at their prompts in the tree (`attention.py`),
which lives until its last answer is written. A row whose answer ends is given to the next prompt at once, so no answer
waits for the longest of its batch.

What is computed is what `model.generate` computes for one prompt after the other, but for the order of floating-point
sums. Its own loop cannot do this: it takes one cache for prompts of one length, `DynamicCache` cannot go back behind
the window of sliding layers, and transformers' paged caches know one size of heads, where Gemma 4 has two.

A model that is partitioned over the ranks (ZeRO-3, FSDP2) runs on all of them at once: before each pass they agree on
its kind, and who has nothing to do takes part with a token of no meaning. So there, too, prompts are read once.
"""

import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from gemma_dist import world
from gemma_dist.data.encode import Encoder, Prompt
from gemma_dist.errors import GemmaDistError
from gemma_dist.evaluate.attention import Sight, use_tree_attention
from gemma_dist.evaluate.cache import Masks, Place, RowCache, TreeCache
from gemma_dist.evaluate.chunk import CHUNK, chunk_of
from gemma_dist.evaluate.room import GROWTH, Room
from gemma_dist.evaluate.sampling import Sampling
from gemma_dist.evaluate.tree import grow_tree
from gemma_dist.gemma_format import STOP_TOKENS
from gemma_dist.model.zero3 import is_partitioned

TREE = 4096  # tokens; shorter trajectories are read as one up to that many: each tree costs a step in each layer


@dataclass(frozen=True)
class Answer:
    """What the model wrote."""

    text: str  # control tokens kept, the stop token included
    ids: list[int]
    stopped: bool  # False: cut off at max_new_tokens


@dataclass(frozen=True)
class Question:
    """A prompt that is to be answered."""

    prompt: Prompt
    key: str  # what its random numbers hang on, beside the number of the sample
    samples: Sequence[int] = (0,)  # the numbers of those that are wanted


@dataclass
class Counts:
    """What was done."""

    tokens_read: int = 0  # of prompts
    tokens_written: int = 0
    passes: int = 0  # of the model


@dataclass
class _Row:
    """An answer that is being written."""

    question: Question
    sample: int
    numbers: random.Random
    tree: TreeCache
    prompt: int  # of the tree
    ids: list[int] = field(default_factory=list)

    @property
    def place(self) -> Place:
        """Of its last token, which the next pass reads."""
        return Place(self.tree, self.prompt, len(self.ids) - 1)


@dataclass
class _Reading:
    """A tree that is being read: the questions of each trajectory in it, and what of it is left."""

    group: list[list[Question]]
    cache: TreeCache
    chunks: deque[tuple[int, int]]

    @property
    def questions(self) -> list[Question]:
        """In the order of the tree's prompts."""
        return [question for questions in self.group for question in questions]


class Generator:
    """Answers questions; `counts` says what it took.

    `failed` are the questions that could not be answered, with the reason. A model that is partitioned raises it
    instead: ranks that are out of step could only wait for one another.
    """

    def __init__(self, model: Any, encoder: Encoder, sampling: Sampling, room: Room, *, max_new_tokens: int) -> None:
        self.model, self.encoder, self.sampling, self.room = model, encoder, sampling, room
        self.max_new_tokens = max_new_tokens
        self.counts = Counts()
        self.failed: list[tuple[Question, str]] = []
        settings, own = model.generation_config, model.generation_config.eos_token_id
        own = [] if own is None else own if isinstance(own, list) else [own]
        self._stops = {*encoder.tokenizer.convert_tokens_to_ids(list(STOP_TOKENS)), *own}
        self._suppressed = settings.suppress_tokens or []
        self._in_step = is_partitioned(model)
        self._text, self._device = model.config.get_text_config(), model.device
        use_tree_attention(model)
        self._row_cache = RowCache(self._text, self._device)
        self._rows: list[_Row | None] = []  # of the cache; None: free
        self._waiting: deque[_Row] = deque()  # for a free one
        self._groups: deque[list[list[Question]]] = deque()  # that are not read yet: each makes a tree
        self._reading: _Reading | None = None
        self._next: _Reading | None = None  # as soon as there is room

    @torch.inference_mode()
    def answer(self, trajectories: Sequence[list[Question]]) -> Iterator[tuple[Question, int, Answer]]:
        """Question, number of the sample and answer, as they come. Trajectories are read in the order given. Each rank
        of a partitioned model calls this once, with trajectories or without."""
        self._groups.extend(_join(trajectories))
        while True:
            reads, writes = self._plan()
            if self._in_step:
                reads, writes = world.any_rank([reads, writes])
            if reads:
                yield from self._read_chunk()
            elif writes:
                yield from self._write_token()
            else:
                return

    def _plan(self) -> tuple[bool, bool]:
        """Give free rows to those that wait, or begin with the next tree; whether there is a chunk to be read, and
        whether there are answers to be written."""
        self._place_rows()
        if self._next is None and self._groups:
            group = self._groups.popleft()
            tree = grow_tree([question.prompt for questions in group for question in questions])
            cache = TreeCache(tree, self._text, self._device)
            self._next = _Reading(group, cache, deque(tree.chunks(CHUNK)))
        is_free = self._reading is None and not self._waiting
        if self._next is not None and is_free and self._has_room(1, self._next.cache):
            self._reading, self._next = self._next, None
        return self._reading is not None, any(self._rows)

    def _has_room(self, num_new: int, *new: TreeCache) -> bool:
        """Whether so many more answers fit, and these trees. Where nothing else is at work one does, or nothing
        would."""
        active = [row for row in self._rows if row]
        trees = {id(tree): tree for tree in [*new, *(row.tree for row in [*active, *self._waiting])]}
        sizes = [(len(tree.tree), tree.num_sliding) for tree in trees.values()]
        fits = self.room.fits(len(active) + num_new, self.max_new_tokens, sizes)
        return fits or (not active and num_new == 1)

    def _place_rows(self) -> None:
        """Give rows of the cache to as many waiting answers as fit, and make it larger or smaller where it must be."""
        kept = [number for number, row in enumerate(self._rows) if row]
        num_new = 0
        while num_new < len(self._waiting) and self._has_room(num_new + 1):
            num_new += 1
        new = [self._waiting.popleft() for _ in range(num_new)]
        num_rows = len(kept) + len(new)
        if num_rows == 0:
            return
        longest = max(len(row.ids) for row in [*self._rows, *new] if row)
        cache = self._row_cache
        too_small = num_rows > cache.num_rows or longest > cache.num_slots
        if too_small or 2 * num_rows <= cache.num_rows or 2 * (longest + GROWTH) <= cache.num_slots:
            cache.resize(kept, num_rows, min(longest + GROWTH, self.max_new_tokens))
            self._rows = [self._rows[number] for number in kept] + [None] * len(new)
        free = [number for number, row in enumerate(self._rows) if row is None]
        for number, row in zip(free, new, strict=False):
            self._rows[number] = row

    def _read_chunk(self) -> Iterator[tuple[Question, int, Answer]]:
        """Read the next chunk of the tree; behind its last, write the first token of each answer."""
        if self._reading is None:
            self._pretend(with_image=True)
            return
        reading = self._reading
        try:
            logits = self._read(reading.cache, *reading.chunks[0])
            if len(reading.chunks) == 1:
                reading.cache.close()
        except (RuntimeError, ValueError, GemmaDistError) as error:
            if self._in_step:
                raise
            self._reading = None
            self._give_up(reading, error)
            return
        reading.chunks.popleft()
        if reading.chunks:
            return
        self._reading = None
        rows = [
            _Row(question, sample, self.sampling.numbers(question.key, sample), reading.cache, prompt)
            for prompt, question in enumerate(reading.questions)
            for sample in question.samples
        ]
        yield from self._extend(rows, logits[[row.prompt for row in rows]])
        self._waiting += [row for row in rows if not self._has_ended(row)]

    def _read(self, cache: TreeCache, start: int, stop: int) -> torch.Tensor:
        """One pass over tokens of a tree: logits (P, V) behind the ends of its prompts, if they are among them."""
        tree = cache.tree
        chunk = chunk_of(cache, self.encoder, start, stop, always_image=self._in_step)
        keep = len(tree.paths) if stop == len(tree) else 1
        self.counts.tokens_read += stop - start
        return self._pass([chunk.input_ids], [chunk.positions], cache, chunk.masks, keep, chunk.pixels)[0]

    def _write_token(self) -> Iterator[tuple[Question, int, Answer]]:
        """Write a token in each row."""
        if not any(self._rows):
            self._pretend(with_image=False)
            return
        ids = [[row.ids[-1] if row else 0] for row in self._rows]
        places = [row.place if row else None for row in self._rows]
        positions = [[place.position if place else 0] for place in places]
        masks = self._row_cache.begin(places)
        try:
            logits = self._pass(ids, positions, self._row_cache, masks, 1, {})[:, -1]
        except torch.OutOfMemoryError:
            if self._in_step:
                raise
            self._begin_again()
            return
        finally:
            self._row_cache.end()
        numbers = [number for number, row in enumerate(self._rows) if row]
        rows = [row for row in self._rows if row]
        yield from self._extend(rows, logits[numbers])
        self._rows = [None if row is None or self._has_ended(row) else row for row in self._rows]

    def _pass(
        self,
        input_ids: list[list[int]],
        positions: list[list[int]],
        cache: TreeCache | RowCache,
        masks: Masks | dict[str, Sight],
        keep: int,
        pixels: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """A forward pass of the model over tokens (B, T): logits (B, `keep`, V) of the last ones."""
        self.counts.passes += 1
        logits = self.model(
            input_ids=torch.tensor(input_ids, device=self._device),
            position_ids=torch.tensor(positions, device=self._device),
            attention_mask=masks,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
            **{name: tensor.to(self._device) for name, tensor in pixels.items()},
        ).logits
        if self._suppressed:
            logits[..., self._suppressed] = -torch.inf
        return logits

    def _pretend(self, *, with_image: bool) -> None:
        """Take part in a pass of the other ranks."""
        bos = self.encoder.tokenizer.bos_token_id
        cache = TreeCache(grow_tree([Prompt([bos], [0], [], "", 1, [])]), self._text, self._device)
        if with_image:
            self._read(cache, 0, 1)
            self.counts.tokens_read -= 1
        else:
            self._pass([[bos]], [[0]], cache, cache.begin(0, 1), 1, {})

    def _extend(self, rows: list[_Row], logits: torch.Tensor) -> Iterator[tuple[Question, int, Answer]]:
        """Write the next token in each row, by its logits (B, V); the answers that end with it."""
        for row, token in zip(rows, self.sampling.pick(logits, [row.numbers for row in rows]), strict=True):
            row.ids.append(token)
            self.counts.tokens_written += 1
            if self._has_ended(row):
                text = self.encoder.tokenizer.decode(row.ids)
                yield row.question, row.sample, Answer(text, row.ids, row.ids[-1] in self._stops)

    def _has_ended(self, row: _Row) -> bool:
        return row.ids[-1] in self._stops or len(row.ids) == self.max_new_tokens

    def _give_up(self, reading: _Reading, error: Exception) -> None:
        """After a tree that could not be read: try each trajectory by itself, or later with less beside it."""
        is_memory = isinstance(error, torch.OutOfMemoryError)
        if is_memory:
            self.room.halve()
        if len(reading.group) > 1:
            self._groups.extendleft([questions] for questions in reversed(reading.group))
        elif is_memory and any(self._rows):
            self._groups.appendleft(reading.group)
        else:
            self.failed += [(question, str(error)) for question in reading.questions]

    def _begin_again(self) -> None:
        """After a token for which the memory was not enough: half of the answers are to be written later, those to
        prompts of a tree together."""
        self.room.halve()
        of_trees: dict[int, list[int]] = {}
        for number, row in enumerate(self._rows):
            if row:
                of_trees.setdefault(id(row.tree), []).append(number)
        num_active = sum(map(len, of_trees.values()))
        num_kept = num_active // 2
        for numbers in of_trees.values():
            later = numbers[num_kept:]
            num_kept -= len(numbers) - len(later)
            rows = [row for number in later if (row := self._rows[number])]
            questions = [replace(row.question, samples=[row.sample]) for row in rows]
            if num_active == 1:
                self.failed.append((questions[0], "the memory is not enough for this one alone"))
            elif questions:
                self._groups.append([questions])
            for number in later:
                self._rows[number] = None


def _join(trajectories: Sequence[list[Question]]) -> Iterator[list[list[Question]]]:
    """Neighbors that are short enough are read together."""
    group: list[list[Question]] = []
    num_tokens = 0
    for questions in filter(None, trajectories):
        longest = max(len(question.prompt.input_ids) for question in questions)
        if group and num_tokens + longest > TREE:
            yield group
            group, num_tokens = [], 0
        group.append(questions)
        num_tokens += longest
    if group:
        yield group
