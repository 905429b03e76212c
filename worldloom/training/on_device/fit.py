"""The training loop where environments, replay and updates are on the device; the host acts between its calls."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from worldloom.config import check
from worldloom.errors import ConfigError, DataError, NonFiniteError
from worldloom.replay.ring import uniforms_of
from worldloom.training.callbacks.runner import CallbackRunner
from worldloom.training.collector import compiled_policy
from worldloom.training.interrupts import Interrupts
from worldloom.training.on_device.members import homes_of, member, mesh_of, stack
from worldloom.training.on_device.program import FINE, Chunk, ChunkOutput, Loop, LoopState
from worldloom.training.on_device.transfer import Transfer, why_on_host
from worldloom.training.run_state import Run
from worldloom.training.update_loop import CompiledUpdate, Learner

_log = logging.getLogger("worldloom")

_MOST_UPDATES = 256
"""Updates in one call at most; steps are limited by memory, see ``Transfer``."""
_SECONDS = 1.0
"""About how long a call may take: so long the host does not react to signals."""


class Pace:
    """How much one call may do, so that it takes about ``_SECONDS``.

    Args:
      first: for the first calls.
      most: at most.
    """

    def __init__(self, first: int, most: int):
        self.count, self._most, self._compiled = min(first, most), most, False

    def note(self, done: int, seconds: float) -> None:
        """Choose :attr:`count` for the next call; the first call compiles, and is not counted.

        A call that had less to do than :attr:`count` says how much is possible, but not how little.
        """
        if self._compiled:
            possible = int(np.clip(_SECONDS * done / seconds, 1, self._most))
            self.count = max(possible, self.count) if done < self.count and seconds < _SECONDS else possible
        self._compiled = True


def runs_on_device(run: Run) -> bool:
    """Whether the loop of ``run`` is the device's, as ``TrainingConfig.loop`` and what the run consists of say.

    Raises ``ConfigError`` if the config asks for the device and that is impossible.
    """
    if run.collector is None or run.config.loop == "host":
        check(run.config.loop != "device" or run.collector is not None, "loop='device' needs a JAX environment.")
        return False
    reason = why_on_host(run)
    check(run.config.loop != "device" or reason is None, f"loop='device' is impossible: {reason}.")
    if reason and "not in JAX" not in reason:
        _log.warning("The loop runs on the host: %s.", reason)
    return reason is None


def fit_on_device(run: Run, total_steps: int, callbacks: CallbackRunner, interrupts: Interrupts) -> None:
    """Train until ``total_steps`` updates are done in total, a callback requests a stop, or a signal arrives.

    Equal to :func:`worldloom.training.fit.fit` in all that it computes. Raises as it does.
    """
    fit_members([run], total_steps, [callbacks], interrupts, members=False)


def fit_members(
    runs: Sequence[Run],
    total_steps: int,
    callbacks: Sequence[CallbackRunner],
    interrupts: Interrupts,
    *,
    members: bool = True,
    make_update: Callable[[Any], CompiledUpdate] | None = None,
    settings: Sequence[Any] | None = None,
    devices: Sequence[jax.Device] = (),
) -> None:
    """:func:`fit_on_device` of several runs in one program; all end when one of them is stopped.

    Args:
      runs: runs of one model config and of one training config, but for their seeds and ``settings``.
      total_steps: updates.
      callbacks: of each run.
      interrupts: see :func:`fit_on_device`.
      members: whether the arrays have an axis of members.
      make_update: settings of a member → its update; None for those that all share.
      settings: of each member, pytrees of arrays; None for none.
      devices: those that the members are divided over, as many on each; none for the device of the runs.
    """
    device = Device(runs, total_steps, members, make_update, settings, devices)
    stopped = lambda: bool(interrupts.received or any(each.stop_reason for each in callbacks))  # noqa: E731
    for run, each in zip(runs, callbacks, strict=True):
        each.on_train_begin(run)
    try:
        if runs[0].step < total_steps and not stopped():
            device.collect_until_due(stopped)
        while runs[0].step < total_steps and not stopped():
            end = min([total_steps, *filter(None, (each.next_step(runs[0].step) for each in callbacks))])
            device.train(end)
            for run, each in zip(runs, callbacks, strict=True):
                each.on_call(run)
            if runs[0].step == end:
                device.download()
                device.give_learners()
                for run, each in zip(runs, callbacks, strict=True):
                    each.on_step(run)
    except BaseException as error:
        device.leave(error)
        raise
    device.give_learners()
    device.finish()
    for run, each in zip(runs, callbacks, strict=True):
        run.sync()
        each.on_train_end(run)


class Device:
    """The arrays of one or several runs on the device, and the compiled calls that change them.

    Args:
      runs, total_steps, members, make_update, settings, devices: see :func:`fit_members`.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        total_steps: int,
        members: bool,
        make_update: Callable[[Any], CompiledUpdate] | None = None,
        settings: Sequence[Any] | None = None,
        devices: Sequence[jax.Device] = (),
    ):
        self.runs, self.total, self._members = list(runs), total_steps, members
        self._mesh = mesh_of(devices)
        self._settings = None if settings is None else self._stack(settings)
        updates = [run.begin(total_steps) for run in runs]
        for run in runs:
            assert run.collector is not None
            run.collector.begin(run.state)  # the first rows, and the first actions
        ends = [run.ratio.decisions(max(0, total_steps - _before(run))) for run in runs]
        self._transfers = [Transfer(*each) for each in zip(runs, updates, ends, strict=True)]
        # All members' environments are of one kind.
        self._most_steps, self._room = self._transfers[0].most_steps, self._transfers[0].room
        # Seeds and settings may differ, so that one member ends after more decision steps than another.
        slots = max(each.spec.slots for each in self._transfers)
        for each in self._transfers:
            each.spec = each.spec._replace(slots=slots)
            each.write_back_from(functools.partial(self._ring, each))
        first, transfer = self.runs[0], self._transfers[0]
        self._loop = _compiled_loop(
            transfer.backend.env,
            transfer.backend.limit,
            transfer.spec,
            _policy(first, transfer.keeps_latents),
            make_update or updates[0],
            transfer.names,
            first.writeback.group,
            transfer.keeps_latents,
            first.unrolled,
            members,
            self._mesh,
        )
        homes = homes_of(len(self.runs), devices or [first.device])
        self.state: LoopState = self._stack(
            [each.upload(home) for each, home in zip(self._transfers, homes, strict=True)]
        )
        self.learner: Learner = self._stack([run.learner for run in self.runs])
        self.give_learners()
        self._updates = Pace(8, 1 if first.unrolled else _MOST_UPDATES)
        self._steps, self._random_steps = Pace(64, self._most_steps), Pace(64, self._most_steps)
        for run, each in zip(self.runs, self._transfers, strict=True):
            if not run.metrics.names:
                run.metrics.open(each.names, () if run.config.skip_nonfinite else each.guarded)

    # ---- calls ------------------------------------------------------------------------------------------------------

    def collect_until_due(self, stopped: Callable[[], bool] = lambda: False, due: Sequence[int] | None = None) -> None:
        """Step the environments until the first update is due (or ``due`` decision steps), and check that it can be."""
        collectors = [run.collector for run in self.runs]
        steps = [self._due(run, run.step) for run in self.runs] if due is None else list(due)
        while any(each.acts_randomly for each in collectors if each) and not stopped():
            limits = [min(step, each.prefill) for step, each in zip(steps, collectors, strict=True) if each]
            if all(each.decisions >= limit for each, limit in zip(collectors, limits, strict=True) if each):
                break
            self._collect_random(limits)
        while any(e.decisions < step for e, step in zip(collectors, steps, strict=True) if e) and not stopped():
            self._collect(steps)
        if not stopped() and due is None:
            for run in self.runs:
                self._check_windows(run)

    def train(self, end: int) -> None:
        """Do updates up to number ``end``, or fewer if they would take long."""
        step = self.runs[0].step
        count = min(end - step, self._updates.count)
        decisions, ends = (np.atleast_1d(x) for x in jax.device_get((self.state.actor.decisions, self.state.ring.end)))

        def missing(count: int) -> int:
            """Decision steps that a call of ``count`` updates takes."""
            due = (self._due(run, step + count - 1) - done for run, done in zip(self.runs, decisions, strict=True))
            return max(0, int(max(due)))

        def rows(count: int) -> int:
            """Rows that a call of ``count`` updates collects at most: an episode of n steps has n + 1."""
            return 2 * missing(count) + 2 * self._num_envs

        # Nothing ends a call within the steps between two updates: where they take long, they are calls of their own.
        longest = self._steps.count * self._num_envs
        if missing(2) - missing(1) > longest:
            count = 1
        while count > 1 and rows(count) > self._room:
            count //= 2
        if missing(1) > longest or rows(count) > self._room:
            self._collect([self._due(run, step) for run in self.runs])
            return
        if any(e - each.synced + rows(count) > each.spec.slots for e, each in zip(ends, self._transfers, strict=True)):
            self.download()
        chunk = self._chunk(step, count)
        started = time.perf_counter()
        self.learner, self.state, output = self._loop.train(self.learner, self.state, chunk, self._settings)
        trouble = np.atleast_1d(np.asarray(self.state.actor.trouble))
        self._updates.note(count, time.perf_counter() - started)
        if self._transfers[0].keeps_latents:
            ids = np.asarray(output.ids)
            for index, transfer in enumerate(self._transfers):
                transfer.note_updated((ids[index] if self._members else ids)[:count])
        if (trouble != FINE).any():
            self.give_learners()
        for index, run in enumerate(self.runs):
            mine: ChunkOutput = self._of(output, index)
            done = count if trouble[index] == FINE else int(run.state.step) - step
            if done:
                run.metrics.add(step, done, mine.metrics)
            run.step = step + done
        if (trouble != FINE).any():
            self.download()

    def download(self) -> None:
        """Bring all runs up to date on the host. Raises what went wrong in the environments."""
        for index, transfer in enumerate(self._transfers):
            transfer.download(self._of(self.state, index))

    def finish(self) -> None:
        """Leave all runs on the host as after a call of ``fit``."""
        self.download()
        self._detach()
        for run in self.runs:
            run.read_state()  # notes how many updates were skipped

    def leave(self, error: BaseException) -> None:
        """Leave what can be saved on the host after ``error``, so that training can go on in the same runs.

        After a NaN the rows and counts of the newest call are left behind, as the last update before it is the state.
        """
        self.give_learners()
        try:
            if not isinstance(error, NonFiniteError):
                with contextlib.suppress(DataError, ConfigError):  # of the environments, which were said already
                    self.download()
            self._detach()
        except Exception as also:  # what was donated to a failed call is gone
            _log.warning("Replay on the device could not be copied to the host after the error: %s", also)

    def _detach(self) -> None:
        """Copy rewritten latents to the buffers; from now on nothing is read from the device."""
        for transfer in self._transfers:
            transfer.write_back()
            transfer.write_back_from(None)

    def give_learners(self) -> None:
        """Let each run hold its own state: before anybody reads it, as cutting it out costs time at every call."""
        if self.learner.state.step.is_deleted():
            return  # A call failed, and what was donated to it is gone.
        for index, run in enumerate(self.runs):
            run.learner = self._of(self.learner, index)

    # ---- parts ------------------------------------------------------------------------------------------------------

    def _collect(self, due: Sequence[int]) -> None:
        started, before = time.perf_counter(), self._calls
        self.state = self._loop.collect(self.learner, self.state, self._each(due), np.int32(self._steps.count))
        self.download()
        self._steps.note(self._calls - before, time.perf_counter() - started)

    @property
    def _calls(self) -> int:
        """Steps of the environments so far, in the run that has taken most."""
        return max(run.collector.calls for run in self.runs if run.collector)

    @property
    def _num_envs(self) -> int:
        collector = self.runs[0].collector
        assert collector is not None
        return collector.env.num_envs

    def _collect_random(self, due: Sequence[int]) -> None:
        collectors = [run.collector for run in self.runs if run.collector]
        missing = max(limit - each.decisions for limit, each in zip(due, collectors, strict=True))
        started, before = time.perf_counter(), self._calls
        count = min(self._random_steps.count, -(-missing // self._num_envs) + 1)
        drawn = [each.draw_random_calls(each.calls + 1, count) for each in collectors]

        def padded(parts: list[np.ndarray]) -> np.ndarray:
            whole = np.zeros((self._most_steps, *parts[0].shape), parts[0].dtype)
            whole[:count] = parts
            return whole

        actions = self._stack([padded([action for action, _ in each]) for each in drawn])
        kept = self._stack([padded([again for _, again in each]) for each in drawn])
        self.state = self._loop.collect_random(self.state, actions, kept, self._each(due), np.int32(count))
        self.download()
        self._random_steps.note(self._calls - before, time.perf_counter() - started)
        if not any(each.acts_randomly for each in collectors):
            # The policy chooses the first actions after the prefill.
            self.state = self.state._replace(actor=self._loop.choose(self.learner, self.state.actor))
            self.download()

    def _check_windows(self, run: Run) -> None:
        """Raise ``DataError``, as the host does, if there is no window for the first batch."""
        assert run.sampler is not None
        assert run.collector is not None
        try:
            run.sampler.check_window(run.config.seed, run.step)
        except DataError as error:
            raise DataError(
                f"{error} So far {run.collector.decisions} decision steps were taken in "
                f"{run.collector.env.num_envs} environments; a larger prefill takes more before the first update."
            ) from None

    def _chunk(self, step: int, count: int) -> Chunk:
        capacity = 1 if self.runs[0].unrolled else _MOST_UPDATES

        def of(run: Run) -> tuple[np.ndarray, np.ndarray]:
            due = np.zeros(capacity, np.int32)
            uniforms = np.zeros((capacity, 2, 2, run.config.batch_size), np.uint32)
            for i in range(count):
                due[i] = self._due(run, step + i)
                uniforms[i] = uniforms_of(run.config.seed, step + i, run.config.batch_size)
            return due, uniforms

        due, uniforms = self._stack([of(run) for run in self.runs])
        return Chunk(np.int32(step), np.int32(count), due, uniforms)

    def _due(self, run: Run, step: int) -> int:
        """Decision steps at which the update after ``step`` updates is due."""
        return run.ratio.decisions(step + 1 - _before(run)) if step >= _before(run) else 0

    def _ring(self, transfer: Transfer) -> Any:
        return self._of(self.state.ring, self._transfers.index(transfer))

    def _each(self, values: Sequence[int]) -> Any:
        return np.array(values, np.int32) if self._members else np.int32(values[0])

    def _stack(self, trees: Sequence[Any]) -> Any:
        return stack(trees, self._mesh) if self._members else trees[0]

    def _of(self, tree: Any, index: int) -> Any:
        return member(tree, index, self._mesh) if self._members else tree


def _before(run: Run) -> int:
    assert run.collector is not None
    return run.collector.updates_before


def _policy(run: Run, keeps_latents: bool) -> Callable[..., Any]:
    algorithm = run.model.algorithm
    stored = algorithm.stored_latents if keeps_latents else None
    return compiled_policy(algorithm.policy, type(run.model), run.model.config, stored)


@functools.lru_cache(maxsize=16)
def _compiled_loop(
    env: Any,
    limit: int | None,
    spec: Any,
    act: Any,
    update: Any,
    names: tuple[str, ...],
    group: int,
    keeps_latents: bool,
    unrolled: bool,
    members: bool,
    mesh: Mesh | None,
) -> Loop:
    """The :class:`Loop` of these arguments, cached: runs in one process share its compiled programs."""
    options: dict[str, Any] = {"group": group, "keeps_latents": keeps_latents, "unrolled": unrolled}
    return Loop(env, limit, spec, act, update, names, **options, members=members, mesh=mesh)
