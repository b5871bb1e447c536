"""Keeps the screen for a run's own lines."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from nano3.imports import uncollected


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Around imports of NeMo, whose loggers cannot be told anything before they exist; errors still come through."""
    logging.disable(logging.WARNING)
    try:
        with uncollected():
            yield
    finally:
        logging.disable(logging.NOTSET)


def quiet() -> None:
    """Leaves NeMo and its dependencies their errors only; call it after they are imported.

    They say a hundred lines before the first step, some of them untrue here ("GPU available"). One, a telemetry client,
    reports every run that ends early as an error of its own spans. NeMo still writes its log files under OUT/nemo.
    """
    from nemo.utils import logging as nemo_logging

    nemo_logging.set_verbosity(logging.ERROR)
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("nv_one_logger"):
            logger = logging.getLogger(name)
            logger.setLevel(logging.CRITICAL)
            logger.addHandler(logging.NullHandler())  # without one it sets its level, slowly, at every call
        elif name.startswith(("lightning", "pytorch_lightning", "megatron", "nemo_run")):
            logging.getLogger(name).setLevel(logging.ERROR)
