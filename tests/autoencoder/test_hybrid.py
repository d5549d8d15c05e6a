from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from parscale_ear.autoencoder.hybrid import HybridConfig, HybridLatent
from parscale_ear.autoencoder.model import ParScaleEAR


@pytest.fixture
def hybrid() -> HybridLatent:
    return HybridLatent(HybridConfig(latent_channels=4, coarse_width=8, fine_width=8))


def test_is_the_sum_of_its_branches(hybrid: HybridLatent) -> None:
    latent = torch.randn(2, 4, 16, 16)
    coarse, fine = hybrid.coarse(latent), hybrid.fine(latent)
    torch.testing.assert_close(hybrid(latent), latent + coarse + fine)
    torch.testing.assert_close(hybrid(latent, {"coarse"}), latent + coarse)
    torch.testing.assert_close(hybrid(latent, ["fine"]), latent + fine)
    assert torch.equal(hybrid(latent, ()), latent)


@pytest.mark.parametrize("branches", ["coarse", {"coars"}, ["fine", "both"]])
def test_refuses_unknown_branches(hybrid: HybridLatent, branches: object) -> None:
    with pytest.raises(ValueError, match=r"a set or list out of \['coarse', 'fine'\]"):
        hybrid(torch.zeros(1, 4, 8, 8), branches)


def test_the_coarse_branch_sees_far_and_the_fine_one_near(hybrid: HybridLatent) -> None:
    latent = torch.zeros(1, 4, 32, 32)
    touched = latent.clone()
    touched[..., 0, 0] = 1.0
    for branch, reach in ((hybrid.coarse, 12), (hybrid.fine, 5)):
        changed = (branch(touched) - branch(latent)).abs().amax(dim=(0, 1)) > 1e-9
        rows = changed.any(dim=1).nonzero()
        assert rows.max().item() + 1 == reach


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (4, 6), (16, 16)])
def test_any_latent_size(hybrid: HybridLatent, size: tuple[int, int]) -> None:
    latent = torch.randn(1, 4, *size)
    assert hybrid(latent).shape == latent.shape


@pytest.mark.parametrize(
    ("field", "value"), [("latent_channels", 0), ("coarse_width", -1), ("fine_width", -1)]
)
def test_config_names_the_bad_field(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=field):
        HybridConfig(**{field: value})


@pytest.mark.parametrize(("absent", "left"), [("coarse", "fine"), ("fine", "coarse")])
def test_a_branch_can_be_left_out(absent: str, left: str) -> None:
    widths = {"coarse_width": 8, "fine_width": 8, f"{absent}_width": 0}
    hybrid = HybridLatent(HybridConfig(latent_channels=4, **widths))
    assert {name.split(".")[0] for name, _ in hybrid.named_parameters()} == {left}
    latent = torch.randn(1, 4, 8, 8)
    assert torch.equal(hybrid(latent), hybrid(latent, {left}))
    assert torch.equal(hybrid(latent, {absent}), latent)
    assert hybrid.flops(8, 8) == hybrid.flops(8, 8, {left}) > hybrid.flops(8, 8, {absent}) == 0


@pytest.mark.parametrize("size", [(5, 7), (4, 6)])
def test_beyond_its_edge_a_latent_goes_on_as_it_ends(
    hybrid: HybridLatent, size: tuple[int, int]
) -> None:
    latent = torch.randn(1, 4, *size)
    height, width = size
    padded = torch.nn.functional.pad(latent, (0, -width % 4, 0, -height % 4), mode="replicate")
    expected = hybrid.coarse(padded)[..., :height, :width]
    torch.testing.assert_close(hybrid.coarse(latent), expected)


def test_what_has_no_hybrid_refuses_unknown_branches_all_the_same(tiny: ParScaleEAR) -> None:
    alone = ParScaleEAR(replace(tiny.config, hybrid=None))
    latent = torch.zeros(1, 4, 2, 2)
    assert alone.enhance(latent, branches={"fine"}) is latent
    for branches in ({"fime"}, None):
        with pytest.raises(ValueError, match="branches must be a set or list"):
            alone.enhance(latent, branches=branches)  # type: ignore[arg-type]
