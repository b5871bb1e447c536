"""Named data sets, one file each. A new one is a file here with a `Source`, and a line in `SOURCES`."""

from __future__ import annotations

from data_prep.sources import bfcl, champ, evals_sets, gsm8k, logiqa, lsat, math, medmcqa, mmlu_dev, svamp
from data_prep.sources.source import Source

SOURCES: tuple[Source, ...] = (
    medmcqa.SOURCE,
    gsm8k.SOURCE,
    gsm8k.STEPS,
    math.SOURCE,
    svamp.SOURCE,
    logiqa.LOGIQA,
    logiqa.LOGIQA2,
    logiqa.RECLOR,
    lsat.SOURCE,
    bfcl.SOURCE,
    mmlu_dev.SOURCE,
    champ.SOURCE,
    evals_sets.JEE,
    evals_sets.PARARULE,
)
