"""The training loop."""

from __future__ import annotations

from worldloom.distributed import StopVote
from worldloom.training.callbacks.runner import CallbackRunner
from worldloom.training.interrupts import Interrupts
from worldloom.training.run_state import Run


def fit(run: Run, total_steps: int, callbacks: CallbackRunner, interrupts: Interrupts) -> None:
    """Train until ``total_steps`` updates are done in total, a callback requests a stop, or a signal arrives.

    One iteration is one compiled call of up to K updates; the host reads nothing from the device in between.

    Raises:
      NonFiniteError: a loss or gradient was not finite; the state is that of the last good update.
    """
    vote = StopVote()  # All processes of a run stop after the same update.

    def stop_requested() -> bool:
        wanted = bool(callbacks.stop_reason or interrupts.received)
        decided = vote(wanted)
        if decided and not wanted:
            callbacks.stop_reason = "Another process was asked to stop"
        return decided

    with run.batches(total_steps, callbacks.next_step, stop_requested) as chunks:
        callbacks.on_train_begin(run)
        for chunk in chunks:  # online: steps the environments until an update is due
            output = run.update(chunk)  # donates run.learner and replaces it
            run.writeback.submit(chunk.step, chunk.row_ids[: chunk.updates], output)  # latents return to replay
            run.metrics.add(chunk.step, chunk.updates, output.metrics)
            run.step += chunk.updates
            callbacks.on_call(run)
            if chunk.callbacks_due:
                callbacks.on_step(run)
        run.sync()  # a non-finite update in the last calls raises here
        callbacks.on_train_end(run)
