"""Several processes, one training: all that they tell each other, over torch.distributed.

Every exchange of data begins with an exchange of one number: whether all are well. So a process that fails has one
thing left to do, to say so at the next exchange of the others, wherever that is: then all of them end, before anything
was changed. Only numbers and JSON are exchanged, never pickled objects; no exchange waits longer than
``LIKELY_TIMEOUT``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from likely import launched, stops
from likely.errors import ConfigError, ResourceError, first_line
from likely.training.failures import CalledAwayError, error_of, exit_code_of, heard, told, was_heard
from likely.training.meeting import SILENCE, TIMEOUT, choose_device, open_store, seconds_of
from likely.training.signs import UNREACHABLE, Signs
from likely.types import FloatArray

BUCKET = 1 << 24  # numbers of small gradients that are summed at once: 64 MiB in float32
Result = TypeVar("Result")
POLL, NOT_YET = timedelta(seconds=0.5), "Operation timed out"  # torch's words where a wait was too short


class Ranks:
    """This process among those that train together; alone, where nobody else does.

    The methods that exchange something are called by all ranks in the same order. If a rank has failed, they raise: its
    own error there, and one of the same kind and exit code on the others.
    """

    def __init__(self, place: launched.Place | None = None) -> None:
        place = place or launched.Place()
        self.rank, self.world_size = place.rank, place.world_size
        self.local_rank, self.local_world_size = place.local_rank, place.local_world_size
        self.restarted = place.restarts > 0
        self._signs: Signs | None = None
        self._lost: ResourceError | None = None
        self._waiting = False
        self.shard, self.shards = self.rank, self.world_size
        self._inner: Any = None  # process groups; None is of all ranks
        self._host: Any = None
        self._across: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and speaks to people."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.world_size == 1

    def connect(self, place: launched.Place) -> None:
        """Find the others.

        Raises:
            ResourceError: they can't be reached.
        """
        timeout = timedelta(seconds=seconds_of(TIMEOUT))
        try:
            backend = choose_device(place)
            store, of_signs = (open_store(place, timeout, name) for name in ("ranks", "signs"))
            dist.init_process_group(
                backend, store=cast(Any, store), rank=self.rank, world_size=self.world_size, timeout=timeout
            )
        except RuntimeError as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise ResourceError(
                f"the {self.world_size} processes of this training can't find each other: {first_line(error)}",
                place=where,
                way_out="check that all of them run, and that their hosts reach each other",
            ) from error
        self._signs = Signs(of_signs, self.rank, self.world_size, seconds_of(SILENCE), self._abandon)

    def close(self) -> None:
        if self._signs is not None:
            self._signs.stop()
        if self._lost is None and dist.is_initialized():
            with suppress(RuntimeError):
                dist.destroy_process_group()

    @contextmanager
    def together(self) -> Iterator[None]:
        """What each rank does by itself inside is done by all of them afterwards, or all raise."""
        try:
            yield
        except BaseException as error:
            if not was_heard(error):
                self.agree(error)
            raise
        self.agree()

    def agree(self, error: BaseException | None = None) -> None:
        """Tell the others whether this rank is well; raise, if any is not."""
        if self.alone:
            if error is not None:
                raise error
            return
        with stops.shield():
            self._agree(error)

    def _agree(self, error: BaseException | None) -> None:
        # The lowest rank that failed by itself speaks for all; those that were called away count less.
        own = error is not None and not isinstance(error, CalledAwayError)
        if own and self._inner is not None and self._signs is not None:
            self._signs.tell_failure()
        status = torch.tensor([0 if error is None else (1 + own) * self.world_size - self.rank])
        try:
            self._exchange(lambda: dist.all_reduce(status, dist.ReduceOp.MAX))
        except ResourceError as lost:
            if isinstance(error, stops.Stopped):
                raise heard(stops.Stopped(error.signum, f"{error}; {lost.message}")) from lost
            raise lost from error
        if not int(status):
            return
        speaker = -int(status) % self.world_size
        words = self._spread(told(error) if error is not None else None, speaker)
        if speaker == self.rank and error is not None:
            raise heard(error)
        raise heard(error_of(speaker, **words)) from error

    def all_sum(self, values: FloatArray) -> FloatArray:
        """The sum over all ranks, the same bits on each."""
        if self.alone:
            return values
        total = torch.from_numpy(values.astype(np.float64))
        with stops.shield():
            self._agree(None)
            self._exchange(lambda: dist.all_reduce(total))
        return total.numpy()

    def all_of(self, true: bool) -> bool:
        """Whether it is true of all ranks."""
        return bool(self.all_sum(np.array([float(true)]))[0] == self.world_size)

    def first_says(self, value: Any) -> Any:
        """The first rank's value, which is made of what JSON knows; those of the others are not looked at."""
        if self.alone:
            return value
        with stops.shield():
            self._agree(None)
            return self._spread(value, 0)

    def gather(self, values: FloatArray) -> list[FloatArray]:
        """The numbers (any count) of each rank, on every rank."""
        if self.alone:
            return [values]
        with stops.shield():
            self._agree(None)
            parts = self._gather(torch.from_numpy(np.ascontiguousarray(values, np.float64)))
        return [part.numpy() for part in parts]

    def gather_json(self, value: Any) -> list[Any]:
        """Each rank's value, which is made of what JSON knows, on every rank."""
        if self.alone:
            return [value]
        with stops.shield():
            self._agree(None)
            parts = self._gather(torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8))
        return [json.loads(part.numpy().tobytes()) for part in parts]

    def require_same(self, what: str, value: Any) -> None:
        """Compare with the first rank's, by its JSON.

        Raises:
            ConfigError: a rank has another one.
        """
        text = json.dumps(value, sort_keys=True, default=repr)
        others = self.gather_json(hashlib.sha256(text.encode()).hexdigest())
        strange = [rank for rank, other in enumerate(others) if other != others[0]]
        if strange:
            raise heard(
                ConfigError(
                    f"{what} of rank {strange[0]} differ from those of rank 0",
                    way_out="give all hosts the same files and the same versions",
                )
            )

    def one_host_one_maker(self, load: Callable[[], Result]) -> Result:
        """What ``load`` gives, called first by one rank of each host: the others find what it leaves in the cache."""
        result = load() if self.local_rank == 0 else None
        self.agree()
        return result if result is not None else load()

    def shard_by_host(self) -> None:
        """Let each host hold all weights, sharded over its ranks: ``shard`` of ``shards`` is this rank's part then.
        Called by all, before the model is loaded.

        Raises:
            ConfigError: the hosts have different numbers of ranks.
        """
        size = self.local_world_size
        if not self.all_of(self.world_size % size == 0 and self.rank % size == self.local_rank):
            raise heard(
                ConfigError("shard is hybrid, and the hosts have different numbers of processes", way_out="use full")
            )
        self.shard, self.shards = self.local_rank, size
        hosts = [list(range(first, first + size)) for first in range(0, self.world_size, size)]
        self._inner, self._host = self._own_group(hosts), self._own_group(hosts)
        self._across = self._own_group([list(ranks) for ranks in zip(*hosts, strict=True)])

    def _own_group(self, parts: list[list[int]]) -> Any:
        """The process group of the part that this rank is in; all ranks make all of them."""
        timeout = timedelta(seconds=seconds_of(TIMEOUT))
        groups = [dist.new_group(ranks, timeout=timeout) for ranks in parts]
        return next(group for group, ranks in zip(groups, parts, strict=True) if self.rank in ranks)

    def gather_to(self, reader: int, values: Tensor) -> Tensor | None:
        """The rows of all shards, which are equally many, on one rank, in order; the others of its copy of the weights
        give theirs, and those of other copies do nothing. The caller has agreed that all is well."""
        if self.rank // self.shards != reader // self.shards:
            return None
        whole = values.new_empty(self.shards, *values.shape) if self.rank == reader else None
        parts = list(whole) if whole is not None else None
        self._exchange(lambda: dist.gather(values, parts, reader, group=self._host))
        return whole.flatten(0, 1) if whole is not None else None

    def inner_group(self) -> Any:
        """The process group of exchanges in the middle of a forward or a backward, which end unfinished if a rank
        fails, and must not stand in the way of the others then."""
        if self._inner is None:
            self._inner = self._own_group([list(range(self.world_size))])
        return self._inner

    def exchange_inside(self, start: Callable[[], Any]) -> None:
        """An exchange over the inner group, where nobody was asked before whether he is well.

        Raises:
            CalledAwayError: a rank has failed meanwhile.
            ResourceError: one has gone.
        """
        self._exchange(lambda: self._await(start()))

    def _await(self, work: Any) -> None:
        while True:
            try:
                work.wait(POLL)
                return
            except RuntimeError as error:
                if work.is_completed() or NOT_YET not in str(error):
                    raise
            if self._signs is not None and self._signs.failed:
                raise CalledAwayError

    def sum_gradients(self, gradients: Sequence[Tensor], *, of_shard: bool = False) -> None:
        """Add up each gradient over all ranks, or over those that hold the same shard, in place and in float32 or
        wider: plain sums, since every rank has divided by the one number of supervised weight of the whole step."""
        if self.world_size == (self.shards if of_shard else 1):
            return
        group = self._across if of_shard else None
        buckets = _buckets(gradients)
        # Memory is taken before the others are told that all is well.
        flat = [torch.cat([g.flatten() for g in b]) if len(b) > 1 else b[0].flatten() for b in buckets]
        with stops.shield():
            self._agree(None)
            for whole in flat:
                self._exchange(partial(dist.all_reduce, whole, group=group))
        for bucket, whole in zip(buckets, flat, strict=True):
            for gradient, part in zip(bucket, torch.split(whole, [g.numel() for g in bucket]), strict=True):
                if part.data_ptr() != gradient.data_ptr():
                    gradient.copy_(part.view_as(gradient))

    def _spread(self, value: Any, speaker: int) -> Any:
        data = bytearray(json.dumps(value).encode()) if self.rank == speaker else bytearray()
        size = torch.tensor([len(data)])
        self._exchange(lambda: dist.broadcast(size, speaker))
        text = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(int(size), dtype=torch.uint8)
        self._exchange(lambda: dist.broadcast(text, speaker))
        return json.loads(text.numpy().tobytes())

    def _gather(self, values: Tensor) -> list[Tensor]:
        """One-dimensional tensors of any lengths."""
        sizes = [torch.empty(1, dtype=torch.int64) for _ in range(self.world_size)]
        self._exchange(lambda: dist.all_gather(sizes, torch.tensor([len(values)])))
        widest = max(map(int, sizes))
        padded = torch.nn.functional.pad(values, (0, widest - len(values)))
        parts = [torch.empty_like(padded) for _ in sizes]
        if widest:
            self._exchange(lambda: dist.all_gather(parts, padded))
        return [part[: int(size)] for part, size in zip(parts, sizes, strict=True)]

    def _exchange(self, act: Callable[[], Any]) -> None:
        if self._lost is not None:
            raise self._lost
        assert self._signs is not None  # noqa: S101
        self._signs.arrived += 1
        self._waiting = True
        try:
            act()
        except RuntimeError as error:
            gone = self._signs.who_has_gone() or f"an exchange failed: {first_line(error)}"
            stops.excuse()  # a launcher stops those that are left meanwhile
            self._lost = heard(ResourceError(gone, way_out="see what it said last; a restart resumes"))
            raise self._lost from error
        finally:
            self._waiting = False

    def _abandon(self, words: str) -> None:
        """The main thread hangs with somebody who has gone. Between two exchanges weights may be half-changed."""
        stops.abandon(words if self._tells(words) else "", ResourceError.exit_code, rescue=self._waiting)

    def _tells(self, words: str) -> bool:
        """Whether this rank tells people who was lost: the first, or where it may be among the lost the first of each
        host, since what one host can see another can't."""
        if words == UNREACHABLE:
            return self.local_rank == 0
        return self.rank == 1 or self.local_rank == 0 if words.startswith("rank 0 ") else self.rank == 0

    @property
    def cut_off(self) -> bool:
        """Whether the others can't be spoken to any more."""
        return self._lost is not None

    @property
    def speaks(self) -> bool:
        """Whether this is the rank that tells people of an error."""
        return self._tells(self._lost.message if self._lost is not None else "")


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """All processes that a launcher started for one run, from the first exchange to the last: whatever ends one of them
    ends all, none before the first has saved what it can. Ranks after the first end by SystemExit instead of an error,
    which the first has told already.

    Raises:
        ConfigError, ResourceError: they can't find each other.
    """
    place = launched.place()
    ranks = Ranks(place)
    if ranks.alone:
        yield ranks
        return
    ranks.connect(place)
    try:
        with _ending_together(ranks):
            yield ranks
    except BaseException as error:
        if ranks.speaks:
            raise
        raise SystemExit(exit_code_of(error)) from error
    finally:
        ranks.close()


@contextmanager
def _ending_together(ranks: Ranks) -> Iterator[None]:
    try:
        with ranks.together():
            yield
    except BaseException as error:
        if not ranks.cut_off:
            ranks.agree(error)  # once more, now that the first rank has saved what it can
        raise


def _buckets(gradients: Sequence[Tensor]) -> list[list[Tensor]]:
    """Neighbours of one dtype, in lists of at most BUCKET numbers or one tensor."""
    buckets: list[list[Tensor]] = []
    for gradient in gradients:
        last = buckets[-1] if buckets else []
        fits = last and sum(g.numel() for g in last) + gradient.numel() <= BUCKET and last[0].dtype == gradient.dtype
        if fits:
            last.append(gradient)
        else:
            buckets.append([gradient])
    return buckets
