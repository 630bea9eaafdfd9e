"""How closely a teacher card looks at a network."""

from __future__ import annotations

from pydantic import Field

from soteacher.settings import Settings


class CardConfig(Settings):
    """What a teacher card looks at, and how closely. All draws are random with a fixed seed."""

    examples: int | None = Field(default=2000, ge=2)
    """Images of each split that it looks at, a class-balanced random sample; null: all."""
    views: int = Field(default=6, ge=2, le=10)
    """Augmented views of each training image."""
    gradient_examples: int = Field(default=512, ge=1)
    """Training images at which the network's gradient is taken; fewer where the cost would pass its bound."""
    slope_examples: int = Field(default=128, ge=1)
    """Training images around which the steepest slope is searched; fewer where the cost would pass its bound."""
    slope_steps: int = Field(default=10, ge=1)
    """Steps of that search."""
    slope_radius: float = Field(default=0.5, gt=0)
    """How far from an image it goes: Euclidean distance of images in [0, 1]."""
    most_different: int = Field(default=12, ge=1, le=100)
    """Images of each split that are shown, of those whose prediction differs most from their known distribution."""
    seed: int = Field(default=0, ge=0)
    """Of all draws."""
