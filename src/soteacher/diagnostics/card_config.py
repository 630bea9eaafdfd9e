"""How closely a teacher card looks at a network."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from soteacher.settings import Settings


class CardConfig(Settings):
    """What a teacher card looks at, and how closely. All draws are random with a fixed seed."""

    examples: int | None = Field(default=2000, ge=2)
    """Images of each split that it looks at, a random sample; null: all."""
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
    require_distribution: tuple[Literal["train", "test"], ...] = ()
    """Splits whose true label distribution must be known, so that the card has the distance to it; data without are
    refused."""
    seed: int = Field(default=0, ge=0)
    """Of all draws."""


class FoldConfig(Settings):
    """How the networks are trained whose predictions stand in for the true label distribution."""

    model: str
    """Network: a name that ``soteacher models`` lists, or ``timm/NAME``."""
    folds: int = Field(default=5, ge=2)
    """Parts that the training examples are cut into; each is predicted by networks trained on the others."""
    repeats: int = Field(default=3, ge=1)
    """Networks for each fold, of different seeds; their probabilities are averaged."""
    epochs: int = Field(default=30, ge=1)
    """Passes of each network over its training examples."""
    training: dict[str, Any] = {}
    """Further settings of their training."""
    seed: int = Field(default=0, ge=0)
    """Of the folds, and of the first repeat's networks; further repeats take the seeds after it."""
