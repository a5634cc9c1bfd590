"""Where a merged token is: rotations and members that stand for a group."""

from __future__ import annotations

import torch
from torch import Tensor

from tome_ext import MergePlan
from tome_ext.patch.common.positions import SHORT, of_grid, of_length_1, representatives


def table(angles: Tensor) -> Tensor:
    """Cosines and sines (B, M, 2) of angles (B, M)."""
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def test_means_of_rotations_are_rotations_again() -> None:
    angles = torch.tensor([[0.3, 0.7]])
    mean = of_length_1(table(angles).mean(1, keepdim=True))
    torch.testing.assert_close(torch.cat(mean, dim=-1), table(torch.tensor([[0.5]])))


def test_rotations_around_the_whole_circle_leave_no_noise() -> None:
    # Half a circle apart, or three thirds of one: DINOv3's first frequency does that to tokens a
    # quarter of the picture apart. What is left of the sum is rounding, and differs by device.
    for count in (2, 3, 5):
        angles = 0.4 + torch.arange(count) * (2 * torch.pi / count)
        mean = of_length_1(table(angles[None]).mean(1, keepdim=True))
        assert torch.cat(mean).abs().max() < 1e-5
    # Nothing jumps on the way there.
    lengths = torch.linspace(0, 4 * SHORT, 400)
    found, _ = of_length_1(torch.stack((lengths, torch.zeros(400)), dim=-1)[None])
    torch.testing.assert_close(found[0, :, 0], (lengths / SHORT).clamp_max(1.0))


def test_the_member_nearest_to_the_centroid_stands_for_a_row() -> None:
    generator = torch.Generator().manual_seed(0)
    for side, rows in ((1, 1), (3, 2), (5, 9), (8, 20), (8, 3)):
        places = of_grid(side, side, 1, torch.device("cpu"))
        shape = (3, side * side + 1)
        assign = torch.randint(-1, rows, shape, generator=generator)
        found = representatives(MergePlan.from_assign(assign, rows), places)
        assert found.shape == (3, rows)
        for image in range(3):
            for row in range(rows):
                members = (assign[image] == row).nonzero().flatten()
                if len(members) == 0:
                    assert found[image, row] == 0
                    continue
                points = places[members].double()
                away = (points - points.mean(0)).square().sum(1)
                nearest = members[away < away.min() + 1e-9]
                assert found[image, row] == nearest[0]  # of equals, the first
