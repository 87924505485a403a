"""A program, its partitions as threads, and what they wait for."""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch import Tensor

from gluon_emulator.ptx import KernelError

TIMEOUT_S = 60.0


class Stopped(Exception):
    """Another partition has failed."""


class Issued(threading.local):
    """What a partition has begun."""

    def __init__(self) -> None:
        self.products: list[Any] = []
        self.stores: list[Callable[[], None]] = []
        self.unfenced: set[int] = set()
        """The allocations that it has stored to since its last fence."""
        self.waited_for: Barrier | None = None
        """Last."""

    def assert_fenced(self, *operands: Any) -> None:
        """The asynchronous units see what a partition has stored only after its fence."""
        if any(getattr(operand, "allocation", None) in self.unfenced for operand in operands):
            raise KernelError(f"{me()} lets a unit read what it has stored without a fence")


class Pauses:
    """Makes partitions wait now and then, so that they come in another order."""

    def __init__(self, longest_s: float = 0.0, rate: float = 0.2, seed: int = 0) -> None:
        self.longest_s, self.rate, self.random = longest_s, rate, random.Random(seed)

    def pause(self) -> None:
        if self.longest_s and self.random.random() < self.rate:
            time.sleep(self.random.random() * self.longest_s)


class Program:
    """One program of the grid: its partitions are threads, and whatever they wait for changes within ``changed``."""

    current: Program
    pauses = Pauses()

    def __init__(self, place: tuple[int, ...], grid: tuple[int, ...]) -> None:
        self.place, self.grid = place, grid
        self.changed = threading.Condition()
        self.waiting: dict[str, tuple[str, Callable[[], bool]]] = {}
        """Partition -> what it waits for."""
        self.num_live = 0
        self.error: BaseException | None = None
        self.turns: defaultdict[int, int] = defaultdict(int)
        self.num_barriers = 0
        self.issued = Issued()
        self.guarded: dict[Barrier, Tensor] = {}
        """Barrier that is waited for before a slot is filled -> the slot."""

    def pause(self) -> None:
        self.pauses.pause()
        if self.error is not None:
            raise Stopped

    def wait(self, what: str, holds: Callable[[], bool], *, then: Callable[[], None] | None = None) -> None:
        """Waits until a condition holds, and makes that known to the others if it changes something."""
        self.pause()
        until = time.monotonic() + TIMEOUT_S
        with self.changed:
            self.waiting[me()] = what, holds
            while not holds():
                if self.error is not None:
                    raise Stopped
                nobody_goes_on = len(self.waiting) == self.num_live and not any(
                    other() for _, other in self.waiting.values()
                )
                if nobody_goes_on or time.monotonic() > until:
                    waits = "; ".join(f"{name} for {what}" for name, (what, _) in self.waiting.items())
                    raise KernelError(f"everyone waits in program {self.place}: {waits}")
                self.changed.wait(1.0)
            del self.waiting[me()]
            if then is not None:
                then()
                self.changed.notify_all()

    def run(self, partitions: list[tuple[Callable[..., None], tuple[Any, ...]]], *_: Any) -> None:
        self.num_live = len(partitions)
        threads = [
            threading.Thread(target=self._live, args=partition, name=f"partition {index}", daemon=True)
            for index, partition in enumerate(partitions)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error

    def _live(self, partition: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        error = None
        try:
            partition(*arguments)
            if self.issued.products or self.issued.stores:
                raise KernelError(f"{me()} ends with work that it has not waited for")
        except Stopped:
            pass
        except BaseException as raised:
            error = raised
        with self.changed:
            self.error = self.error or error
            self.num_live -= 1
            self.waiting.pop(me(), None)
            self.changed.notify_all()


def me() -> str:
    return threading.current_thread().name


class Barrier:
    """An mbarrier."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0

    def init(self, count: int) -> None:
        self.count = self.pending = count
        self.phase, self.num_bytes = 0, 0

    def advance(self, *, arrivals: int = 0, num_bytes: int = 0) -> None:
        if not self.count:
            raise KernelError(f"{self.name} is used before it is initialised")
        changed = Program.current.changed
        with changed:
            self.pending -= arrivals
            self.num_bytes += num_bytes
            if self.pending < 0:
                raise KernelError(f"an arrival too many at {self.name}, by {me()}")
            if self.pending == 0 and self.num_bytes == 0:
                self.pending = self.count
                self.phase += 1
            changed.notify_all()

    def has_ended(self, parity: int) -> bool:
        """Whether the phase of a parity is not the current one."""
        return self.phase & 1 != parity


class Barriers:
    def __init__(self, name: str, num: int) -> None:
        self.shape = (num, 1)
        self.all = [Barrier(f"{name}[{slot}]") for slot in range(num)]

    def index(self, slot: Any) -> Barrier:
        return self.all[int(slot)]


def wait(barrier: Barrier, parity: int) -> None:
    parity = int(parity)
    Program.current.issued.waited_for = barrier
    Program.current.wait(f"{barrier.name}, parity {parity}", lambda: barrier.has_ended(parity))


def arrive(barrier: Barrier, *, count: int, pred: Any = True) -> None:
    if not pred:
        return
    program = Program.current
    tile = program.guarded.get(barrier)
    if tile is not None and any(product.reads(tile) for product in program.issued.products):
        raise KernelError(f"{me()} gives back {barrier.name}, whose tile a product still reads")
    program.pause()
    barrier.advance(arrivals=count)


def take_turn(name: int) -> None:
    program = Program.current

    def take() -> None:
        program.turns[name] -= 1

    program.wait(f"its turn at {name}", lambda: program.turns[name] > 0, then=take)


def pass_turn(name: int) -> None:
    program = Program.current
    program.pause()
    with program.changed:
        program.turns[name] += 1
        if program.turns[name] > 1:
            raise KernelError(f"{me()} passes a turn to {name} that has one")
        program.changed.notify_all()
