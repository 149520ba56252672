"""Analytic CTs: organs as spheres and cylinders of known place, size (mm) and HU, on any grid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from CTSegLogic.values.grid import Grid
from CTSegLogic.values.volume import Volume


@dataclass(frozen=True)
class Ball:
    """A sphere: centre in RAS mm, radius in mm, HU inside."""

    centre_ras: tuple[float, float, float]
    radius_mm: float
    hu: float

    @property
    def ml(self) -> float:
        """Volume of the ideal sphere."""
        return 4 / 3 * np.pi * self.radius_mm**3 / 1000


def world_of(grid: Grid) -> np.ndarray:
    """RAS mm of every voxel centre, (k, j, i, 3)."""
    return grid.world(np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij"), axis=-1))


def inside(ball: Ball, grid: Grid) -> np.ndarray:
    """The voxels whose centre lies in the ball."""
    return np.linalg.norm(world_of(grid) - np.asarray(ball.centre_ras), axis=-1) <= ball.radius_mm


def tilted_grid(
    shape: tuple[int, int, int] = (40, 48, 44), spacing: tuple[float, float, float] = (3, 2, 2.5)
) -> Grid:
    """An oblique grid, turned by 12 and 7 degrees, its centre near the world's origin."""
    a, b = np.radians(12), np.radians(7)
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    turn = turn @ np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    axes = turn @ np.array(
        [[0, 0, -1], [0, -1, 0], [1, 0, 0.0]]
    )  # k superior, j posterior, i left, then turned
    affine = np.eye(4)
    affine[:3, :3] = axes @ np.diag(spacing)
    affine[:3, 3] = -affine[:3, :3] @ (np.asarray(shape) - 1) / 2
    return Grid(shape=shape, affine=affine)


ORGANS = (Ball((-20, 0, 0), 14, 120.0), Ball((20, 0, 5), 12, 300.0))


def ct_of(
    grid: Grid, balls: tuple[Ball, ...] = ORGANS, *, body_mm: float = 200.0, noise: float = 0.0
) -> Volume:
    """A CT of balls in a body of water (a sphere of `body_mm` diameter) in air."""
    hu = np.full(grid.shape, -1000.0)
    hu[inside(Ball((0, 0, 0), body_mm / 2, 0), grid)] = 20
    for ball in balls:
        hu[inside(ball, grid)] = ball.hu
    if noise:
        hu += np.random.default_rng(0).normal(0, noise, grid.shape)
    return Volume(array=np.rint(hu).astype(np.int16)[None], grid=grid, modality="CT", name="phantom")


# Within a brain of 65 x 80 x 58 mm (half axes): dark ventricles, bright nuclei, none at a mirror's place.
NUCLEI = (Ball((-22, 18, 8), 13, 900.0), Ball((26, -28, -6), 11, 780.0), Ball((6, 38, 26), 9, 250.0))


def shell(grid: Grid, by_mm: float = 0.0, scale: float = 1.0) -> np.ndarray:
    """The voxels inside the phantom brain's ellipsoid, grown by so many mm."""
    axes = np.array([65.0, 80.0, 58.0]) * scale + by_mm
    return (np.square(world_of(grid) / axes)).sum(axis=-1) <= 1


def head_of(grid: Grid, *, skull: bool = True, air: float = 0.0, scale: float = 1.0) -> Volume:
    """A T1 of a brain with nuclei, and around it fluid, dark bone and bright scalp; `air` is noise in the
    air."""
    image = np.zeros(grid.shape)
    if skull:
        image[shell(grid, 16, scale)] = 1000
        image[shell(grid, 11, scale)] = 60
        image[shell(grid, 3, scale)] = 160
    image[shell(grid, 0, scale)] = 480
    image[shell(grid, -6, scale)] = 640
    # Without folds an ellipsoid lies on itself at any turn.
    x, y, z = np.moveaxis(world_of(grid), -1, 0)
    waves = np.sin(x / 6 + 1) * np.cos(y / 7) + np.sin(y / 5 - z / 8) + np.cos(z / 6 + x / 10 + 2)
    image[shell(grid, 0, scale)] += 70 * waves[shell(grid, 0, scale)]
    fissure = (np.abs(x - 2) < 2.5) & (z > 10) & shell(grid, 0, scale)
    image[fissure | (shell(grid, 0, scale) & (z < -38) & (y > 0))] = 160
    for ball in NUCLEI:
        image[inside(ball, grid)] = ball.hu
    if air:
        image += np.abs(np.random.default_rng(0).normal(0, air, grid.shape))
    return Volume(array=np.rint(image).astype(np.int16)[None], grid=grid, modality="MR", name="head")
