"""A callback for Hugging Face's Trainer, which needs transformers."""

from typing import Any

from transformers import TrainerCallback

from .diagnostics import unwrap


class GatherState(TrainerCallback):  # type: ignore[misc]
    """Gather the optimizer's state before Trainer saves a checkpoint, for which it calls `state_dict()` on rank 0 alone.

    Pass it as `Trainer(..., callbacks=[GatherState()])`, after callbacks that set `control.should_save`.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any, **_: Any) -> None:
        """Call `consolidate_state_dict()` if a checkpoint follows, or may follow an evaluation that finds a new best model."""
        if control.should_save or (control.should_evaluate and args.save_strategy == "best"):
            unwrap(optimizer).consolidate_state_dict(to=None if args.save_on_each_node or args.fsdp else 0)

    on_epoch_end = on_step_end
