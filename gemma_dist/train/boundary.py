"""Where a run stops that was asked to: after an optimizer step, on all ranks at once, with a checkpoint of that step.

Each rank says in the exchange of a step whether it was asked, so all of them know at its end, and no other step costs
anything. After a save, which may have taken long, they look once more. How long the last save took says whether another
one has time in what is left of the grace.
"""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from gemma_dist import exits, world
from gemma_dist.config import TrainConfig
from gemma_dist.train.checkpoint import read_marker
from gemma_dist.train.stop import StopRequests


class Boundary(TrainerCallback):
    """The end of each step: goes on, or lets Trainer save and stop."""

    def __init__(self, settings: TrainConfig, requests: StopRequests | None) -> None:
        self._settings = settings
        self.requests = requests or StopRequests()
        self.asked_anywhere = False  # as all ranks know since the last exchange
        self.stopped = ""  # what is to be said of it, once the run has
        self._saved_step, self._saved_in = 0, ""  # the newest complete checkpoint
        self._seconds_to_save: float | None = None  # it, on rank 0

    def begin(self, checkpoint: Path | None, step: int, num_steps: int) -> None:
        """The run is going to go on from `checkpoint`, which has `step` steps."""
        self.requests.begins_at(step + 1, num_steps)
        self._saved_step = step
        if checkpoint is not None:
            is_ours = checkpoint.parent.resolve() == self._settings.output_dir.resolve()
            self._saved_in = checkpoint.name if is_ours else str(checkpoint)
            self._seconds_to_save = read_marker(checkpoint).get("seconds_to_save")
        exits.note("step", step)

    def saved(self, step: int, seconds: float) -> None:
        """The checkpoint of `step` is complete."""
        self._saved_step, self._saved_in, self._seconds_to_save = step, f"checkpoint-{step}", seconds
        exits.note("step", step)

    def on_step_begin(self, args: object, state: Any, control: object, **kwargs: object) -> None:
        """From now on there is something to lose."""
        self.requests.at_work()

    def on_step_end(self, args: object, state: Any, control: Any, **kwargs: object) -> None:
        """Stop if any rank was asked to, unless the run ends here anyway."""
        if self.asked_anywhere and state.global_step < state.max_steps:
            self.stop(state, control)

    def on_save(self, args: object, state: Any, control: Any, **kwargs: object) -> None:
        """Stop if a rank was asked to while the checkpoint was written: there is no better moment."""
        if self.stopped or state.global_step >= state.max_steps:
            return
        (asked,) = world.any_rank([bool(self.requests.by())])
        if asked:
            self.stop(state, control)

    def stop(self, state: Any, control: Any) -> None:
        """Let Trainer log this step, save it, if that is not done and can be done in time, and stop. Every rank calls
        it; not at the last step, where a run ends anyway."""
        of_ranks = world.gather_objects((self.requests.by(), self.requests.seconds_left(self._settings.stop_grace_s)))
        seconds_to_save = world.gather_objects(self._seconds_to_save)[0]
        by = next(by for by, _ in of_ranks if by)
        left = min((seconds for _, seconds in of_ranks if seconds is not None), default=None)
        is_saved = self._saved_step == state.global_step
        in_time = left is None or seconds_to_save is None or seconds_to_save <= left
        control.should_log = control.should_training_stop = True
        control.should_save = in_time and not is_saved
        exits.note("asked", by)
        self.stopped = f"stopped after step {state.global_step} of {state.max_steps}, as {by} asked"
        if not in_time and not is_saved:
            left_words = f"{max(0.0, left or 0.0):.1f} s are left"
            self.stopped += f"; to save takes {seconds_to_save:.1f} s, and {left_words}, so that was not begun"

    def words(self, step: int) -> str:
        """What a run says that has stopped after `step`."""
        again = "the same command goes on from it"
        if self._settings.resume_from_checkpoint != "auto":
            again = "with train.resume_from_checkpoint: auto the same command goes on from it"
        if self._saved_step == step:
            return f"{self.stopped}: {self._saved_in} is complete ({self._seconds_to_save:.1f} s); {again}"
        lost = step - self._saved_step
        lost_words = "1 step is lost" if lost == 1 else f"{lost} steps are lost"
        if not self._saved_in:
            return f"{self.stopped}. There is no checkpoint: the same command begins anew, and {lost_words}"
        return f"{self.stopped}. The newest checkpoint is {self._saved_in}: {again}, and {lost_words}"
