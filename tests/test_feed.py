"""Micro-batches on their way to the device: in order, one ahead, packs with their layout."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gemma_dist.model.attention import LAYOUT, Layout
from gemma_dist.train.feed import Feed, NoTransfer, transfer_to

NUM_BATCHES = 4


class Batches:
    """Rows of one number; what happens to them is written down."""

    def __init__(self, fails_at: int = NUM_BATCHES) -> None:
        self.said: list[str] = []
        self.fails_at = fails_at

    def __len__(self) -> int:
        return NUM_BATCHES

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        try:
            for number in range(NUM_BATCHES):
                if number == self.fails_at:
                    raise ValueError("damaged")
                yield {"input_ids": torch.tensor([[number]]), "attention_mask": torch.ones(1, 1)}
        finally:
            self.said.append("closed")


class Recorder:
    """A device that notes what is sent to it and received from it, and lets `wait` see how far the thread has come."""

    def __init__(self, said: list[str]) -> None:
        self.said, self.threads = said, {"send": set[int](), "receive": set[int]()}
        self.sent = threading.Semaphore(0)

    def send(self, batch: dict[str, Any]) -> dict[str, Any]:
        self.said.append(f"send {int(batch['input_ids'])}")
        self.threads["send"].add(threading.get_ident())
        self.sent.release()
        return batch

    def receive(self, sent: dict[str, Any]) -> dict[str, Any]:
        self.said.append(f"receive {int(sent['input_ids'])}")
        self.threads["receive"].add(threading.get_ident())
        return sent


def test_one_micro_batch_is_sent_while_another_is_worked_on() -> None:
    """Each step waits until all that may be sent ahead was sent, and a bit longer for what must not."""
    batches = Batches()
    device = Recorder(batches.said)
    for number, batch in enumerate(Feed(batches, device)):
        assert int(batch["input_ids"]) == number
        for _ in range(2 if number == 0 else 1 if number < NUM_BATCHES - 1 else 0):
            assert device.sent.acquire(timeout=60)
        assert not device.sent.acquire(timeout=0.1), "two ahead"
        batches.said.append(f"work {number}")
    of_numbers = [[word for word in batches.said if word.endswith(str(number))] for number in range(NUM_BATCHES)]
    assert of_numbers == [[f"{what} {number}" for what in ("send", "receive", "work")] for number in range(NUM_BATCHES)]
    for number in range(NUM_BATCHES - 1):
        assert batches.said.index(f"send {number + 1}") < batches.said.index(f"work {number}")
    assert device.threads["receive"] == {threading.get_ident()}
    assert len(device.threads["send"]) == 1
    assert device.threads["send"] != device.threads["receive"]


def test_an_error_comes_when_its_micro_batch_is_asked_for() -> None:
    batches = Batches(fails_at=2)
    feed = iter(Feed(batches, Recorder(batches.said)))
    next(feed)
    next(feed)
    with pytest.raises(ValueError, match="damaged"):
        next(feed)


def test_a_run_that_stops_early_closes_the_loader() -> None:
    batches = Batches()
    feed: Any = iter(Feed(batches, Recorder(batches.said)))
    next(feed)
    assert "closed" not in batches.said
    feed.close()
    assert batches.said[-1] == "closed"


def test_packs_come_with_their_layout_and_rows_do_not() -> None:
    packs = {"position_ids": torch.tensor([[0, 1, 2, 0, 1]]), "mm_token_type_ids": torch.tensor([[0, 1, 1, 0, 1]])}
    (batch,) = Feed([packs], NoTransfer())
    assert batch[LAYOUT] == Layout([(0, 3), (3, 5)], [0, 2, 2, 0, 3])
    (rows,) = Feed([packs | {"attention_mask": torch.ones(1, 5)}], NoTransfer())
    assert LAYOUT not in rows


def test_a_micro_batch_is_pinned_and_copied_by_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of the calls, with everything of CUDA replaced: `tests/gpu` runs the real ones."""
    said: list[str] = []

    def note(text: str, result: Any = None) -> Any:
        said.append(text)
        return result

    class Stream:
        device = torch.device("cuda", 1)

        def __init__(self, name: Any) -> None:
            self.name = name if isinstance(name, str) else "own"

        def record_event(self) -> str:
            return note(f"record on {self.name}", "event")

        def wait_event(self, event: str) -> None:
            note(f"{self.name} waits for {event}")

        def __enter__(self) -> None:
            note(f"on {self.name}")

        def __exit__(self, *error: object) -> None:
            note(f"off {self.name}")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: note("pin", tensor))
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *to, **how: note(f"copy to {to[0]} {how}", tensor))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: note(f"keep for {stream.name}"))
    transfer = transfer_to(torch.device("cuda", 1))
    sent = transfer.send({"input_ids": torch.ones(1), LAYOUT: Layout([], [])})
    copied = ["on own", "pin", "copy to cuda:1 {'non_blocking': True}", "record on own", "off own"]
    assert said == copied
    batch = transfer.receive(sent)
    assert said == [*copied, "main waits for event", "keep for main"]
    assert batch == {"input_ids": torch.ones(1), LAYOUT: Layout([], [])}


def test_on_the_cpu_nothing_is_copied() -> None:
    assert isinstance(transfer_to(torch.device("cpu")), NoTransfer)
