"""The schedule of a pipeline, by its own arithmetic."""

import dataclasses

import pytest

from jaxlm.config import TransformerConfig
from jaxlm.models import pipeline

CFG = TransformerConfig(layers=12)


@pytest.mark.parametrize("stages, repeats, rows, wanted, microbatches, steps", [
    (4, 1, 16, 0, 16, 19), (4, 1, 64, 0, 16, 19), (4, 3, 8, 8, 8, 27), (2, 3, 6, 4, 3, 10), (4, 3, 2, 0, 2, 2 * 4 + 2 + 3), (3, 2, 1, 0, 1, 3 + 1 + 2)])
def test_plan(stages, repeats, rows, wanted, microbatches, steps):
    plan = pipeline.plan(dataclasses.replace(CFG, pipeline_repeats=repeats, pipeline_microbatches=wanted), stages, rows)
    assert (plan.microbatches, plan.steps, plan.layers) == (microbatches, steps, 12 // stages // repeats)
    # A slower way to the same: mark who works when.
    busy = {((r * plan.period + m) + s, s) for r in range(repeats) for m in range(microbatches) for s in range(stages)}
    assert len(busy) == repeats * microbatches * stages and max(t for t, _ in busy) == steps - 1
    assert plan.bubble == pytest.approx(1 - len(busy) / (steps * stages))


def test_more_groups_shrink_the_bubble():
    of = lambda repeats: pipeline.plan(dataclasses.replace(CFG, pipeline_repeats=repeats, pipeline_microbatches=4), 4, 4).bubble
    assert of(1) == pytest.approx(3 / 7) and of(3) == pytest.approx(3 / 15)
