"""Sample sheets, which are there to be looked at, are drawn in two steps instead of twenty."""

from functools import partial

import pytest

import paper.adapt


@pytest.fixture(scope="package", autouse=True)
def quick_sheets():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper.adapt, "generate", partial(paper.adapt.generate, steps=2))
        yield
