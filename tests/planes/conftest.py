"""What several tests of this room need."""

import pytest


@pytest.fixture
def four_pixels(monkeypatch):
    """Phantoms of four random pixels: where the layout is the point, the picture takes its time."""
    monkeypatch.setattr(
        "planes.phantoms.phantom.phantom",
        lambda plane, site, patient, image: image.integers(0, 255, (2, 2), "uint8"),
    )
