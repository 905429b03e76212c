"""The training loop."""

from __future__ import annotations

from worldloom.training.callbacks.runner import CallbackRunner
from worldloom.training.interrupts import Interrupts
from worldloom.training.run_state import Run


def fit(run: Run, total_steps: int, callbacks: CallbackRunner, interrupts: Interrupts) -> None:
    """Train until ``total_steps`` updates are done in all, a callback asks to stop, or a signal arrives.

    One iteration is one compiled call of up to K updates, between which the host reads nothing from the device.

    Raises:
      NonFiniteError: a loss or gradient was not finite; the state is that of the last good update.
    """
    with run.batches(
        total_steps, callbacks.next_step, lambda: bool(callbacks.stop_reason or interrupts.received)
    ) as chunks:
        callbacks.on_train_begin(run)
        for chunk in chunks:  # from environments: steps them until an update is due
            output = run.update(chunk)  # consumes the state in run.learner, and puts the next one there
            run.writeback.submit(chunk.step, chunk.row_ids[: chunk.updates], output)
            run.metrics.add(chunk.step, chunk.updates, output.metrics)
            run.step += chunk.updates
            if chunk.callbacks_due:
                callbacks.on_step(run)
        run.sync()
        callbacks.on_train_end(run)
