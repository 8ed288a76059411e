"""Functions for `fine_tune(observe=…)`: metrics to TensorBoard."""

import os
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxarith.train.run import Observe


def tensorboard(folder: str | os.PathLike) -> Observe:
    """Writes the metrics that `fine_tune` observes for TensorBoard, by task.

    Needs the package tensorboardX from the extra `tensorboard`. Of several processes
    the first one writes.

    Args:
      folder: folder of the event files, for `tensorboard --logdir`.

    Returns:
      A function for the argument `observe` of `fine_tune`. It never ends the training.

    Raises:
      ImportError: tensorboardX is not installed.

    Example:
      >>> observe = tensorboard("runs/events")  # doctest: +SKIP
      >>> taus = fine_tune(..., observe=observe, observe_every=10)  # doctest: +SKIP
    """
    try:
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2
    except ImportError as error:
        raise ImportError(
            "train.tensorboard needs tensorboardX, which is not installed. Install "
            "jaxarith[tensorboard]."
        ) from error
    if jax.process_index() > 0:
        return lambda done, taus, metrics: None
    Path(folder).mkdir(parents=True, exist_ok=True)
    # Not SummaryWriter, whose thread writes later: a run may be killed at any moment.
    writer = event_file_writer.EventsWriter(str(Path(folder) / "events"))

    def observe(done, taus, metrics):
        for tag, value in _scalars(metrics).items():
            found = summary.scalar(tag, value)
            # protobuf defines its classes at run time.
            event = event_pb2.Event(  # pyright: ignore[reportAttributeAccessIssue]
                wall_time=time.time(), step=done, summary=found
            )
            writer.write_event(event)
        writer.flush()

    weakref.finalize(observe, writer.close)
    return observe


def _scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics by tag: `loss/dtd` of a task, `learning_rate` of all."""
    found = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{task}": number for task, number in value.items()}
        elif name != "step":
            found[name] = value
    return found
