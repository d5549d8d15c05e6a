from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from parscale_ear.autoencoder.blocks import BottleneckBlock, ResidualBlock, conv_flops
from parscale_ear.autoencoder.config import ParScaleEARConfig
from parscale_ear.autoencoder.litevae import LiteVAE, LiteVAEConfig
from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.autoencoder.posterior import LatentPosterior


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape) * 2 - 1


class TestShapes:
    @pytest.mark.parametrize("size", [(16, 16), (48, 80), (256, 256)])
    @pytest.mark.parametrize("batch", [1, 3])
    def test_any_multiple_of_16(self, tiny: ParScaleEAR, size: tuple[int, int], batch: int) -> None:
        height, width = size
        x = images(batch, 3, height, width)
        posterior = tiny.encode(x)
        expected = (batch, 4, height // 16, width // 16)
        assert posterior.mean.shape == expected
        assert posterior.sample().shape == expected
        assert posterior.kl().shape == expected
        assert tiny(x).shape == x.shape

    def test_forward_is_the_way_by_hand(self, tiny: ParScaleEAR) -> None:
        x = images(2, 3, 64, 64)
        by_hand = tiny.decode(tiny.enhance(tiny.encode(x).mode()))
        assert torch.equal(tiny(x), by_hand)
        assert torch.equal(tiny(x, clamp=True), by_hand.clamp(-1, 1))

    def test_forward_runs_the_branches_that_are_asked_for(self, tiny: ParScaleEAR) -> None:
        x = images(2, 3, 32, 48)
        latent = tiny.encode(x).mode()
        for branches in ((), {"coarse"}, {"fine"}):
            expected = tiny.decode(tiny.enhance(latent, branches=branches))
            assert torch.equal(tiny(x, branches=branches), expected)
            assert not torch.equal(tiny(x), expected)

    def test_every_level_of_the_encoder_sees_its_bands(self, tiny: ParScaleEAR) -> None:
        seen = {}
        for name in ("level3", "level4"):
            level = getattr(tiny.encoder, name)
            level.register_forward_hook(lambda _, inputs, __, k=name: seen.update({k: inputs[0]}))
        tiny.encode(torch.full((1, 3, 32, 32), 0.25))
        for name, gain in (("level3", 8), ("level4", 16)):  # a level of the transform doubles
            torch.testing.assert_close(
                seen[name][:, :3], torch.full_like(seen[name][:, :3], 0.25 * gain)
            )
            assert seen[name][:, 3:].abs().max() < 1e-5  # a flat picture has no details

    def test_clamps_only_when_asked(self, tiny: ParScaleEAR) -> None:
        latent = torch.randn(1, 4, 4, 4) * 1000
        assert tiny.decode(latent).abs().max() > 1
        assert tiny.decode(latent, clamp=True).abs().max() <= 1

    def test_the_batch_does_not_matter(self, tiny: ParScaleEAR) -> None:
        x = images(3, 3, 64, 64)
        torch.testing.assert_close(tiny(x)[1:2], tiny(x[1:2]), atol=1e-5, rtol=1e-5)

    def test_without_hybrid_and_normalisation_it_is_the_litevae(self, tiny: ParScaleEAR) -> None:
        config = ParScaleEARConfig(litevae=tiny.config.litevae, hybrid=None)
        model, litevae = ParScaleEAR(config), LiteVAE(tiny.config.litevae)
        litevae.load_state_dict(model.state_dict(), strict=False)
        x = images(2, 3, 64, 64)
        torch.testing.assert_close(model(x), litevae(x), atol=1e-6, rtol=1e-5)
        assert model.flops(64, 64) == litevae.flops(64, 64)

    @pytest.mark.parametrize("size", [(17, 16), (100, 75), (33, 64)])
    def test_padding_takes_any_size(self, tiny: ParScaleEAR, size: tuple[int, int]) -> None:
        x = images(2, 3, *size)
        with pytest.raises(ValueError, match="multiples of 16"):
            tiny(x)
        padded = torch.nn.functional.pad(x, (0, -size[1] % 16, 0, -size[0] % 16), mode="replicate")
        assert torch.equal(tiny(x, pad=True), tiny(padded)[..., : size[0], : size[1]])
        latent = tiny.encode(x, pad=True).mode()
        assert latent.shape[2:] == (-(-size[0] // 16), -(-size[1] // 16))
        assert tiny.decode(latent, size=size).shape == x.shape
        with pytest.raises(ValueError, match="size must be"):
            tiny.decode(latent, size=(1000, 16))

    def test_without_hybrid_enhance_hands_on(self) -> None:
        model = ParScaleEAR(ParScaleEARConfig(hybrid=None))
        latent = torch.randn(1, 32, 2, 2)
        assert model.enhance(latent) is latent


class TestRefinements:
    def test_each_adds_what_the_encoder_misses_in_the_reconstruction(
        self, tiny: ParScaleEAR
    ) -> None:
        x = images(2, 3, 32, 48)
        first = tiny.encode(x)
        latent = first.mode()
        for times in (0, 1, 2):
            refined = tiny.encode(x, refinements=times)
            torch.testing.assert_close(refined.mode(), latent, atol=1e-5, rtol=1e-5)
            assert torch.equal(refined.log_variance, first.log_variance)
            restored = tiny.decode(tiny.enhance(latent))
            latent = latent + first.mode() - tiny.encode(restored).mode()
        assert not torch.allclose(latent, first.mode(), atol=1e-2)
        by_hand = tiny.decode(tiny.enhance(tiny.encode(x, refinements=2).mode()))
        assert torch.equal(tiny(x, refinements=2), by_hand)

    def test_the_same_latent_where_the_reconstruction_is_the_picture(
        self, tiny: ParScaleEAR
    ) -> None:
        x = tiny(images(1, 3, 32, 32))
        first = tiny.encode(x)
        assert torch.equal(tiny.refined(first, first, x).mode(), first.mode())

    def test_padded_pictures(self, tiny: ParScaleEAR) -> None:
        x = images(1, 3, 20, 33)
        padded = torch.nn.functional.pad(x, (0, 15, 0, 12), mode="replicate")
        expected = tiny(padded, refinements=1)[..., :20, :33]
        assert torch.equal(tiny(x, refinements=1, pad=True), expected)

    def test_shipped_weights_come_closer_to_the_pictures(
        self, shipped: ParScaleEAR, photographs: torch.Tensor
    ) -> None:
        x = photographs[::3].float() / 127.5 - 1
        with torch.inference_mode():
            errors = [
                (shipped(x, refinements=times) - x).square().mean(dim=(1, 2, 3)) for times in (0, 1)
            ]
        assert (errors[1] < errors[0]).all()

    @pytest.mark.parametrize("times", [-1, 0.5, "1"])
    def test_counts_alone(self, tiny: ParScaleEAR, times: object) -> None:
        with pytest.raises(ValueError, match="refinements must be a"):
            tiny.encode(images(1, 3, 16, 16), refinements=times)  # type: ignore[arg-type]

    def test_flops_equal_pytorch(self) -> None:
        model = ParScaleEAR().to("meta")
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 64, 144, device="meta"), refinements=2)
        assert model.flops(64, 144, refinements=2) == counter.get_total_flops()
        with pytest.raises(ValueError, match="refinements must be at least 0"):
            model.flops(64, 144, refinements=-1)


def test_compiles_as_one_graph(tiny: ParScaleEAR) -> None:
    compiled = torch.compile(tiny, fullgraph=True, backend="eager")
    x = images(1, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), tiny(x))


@pytest.mark.parametrize("kind", [ResidualBlock, BottleneckBlock])
def test_fresh_blocks_are_nearly_the_identity(
    kind: type[ResidualBlock] | type[BottleneckBlock],
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 64, 16, 16)
    with torch.no_grad():
        added = kind(64)(x) - x
        varying = added - added.mean((0, 2, 3), keepdim=True)  # without the bias
    assert 0.001 < float(varying.norm() / x.norm()) < 0.02


class TestPosterior:
    def test_normalisation_moves_latents_not_pictures(self, tiny: ParScaleEAR) -> None:
        plain = ParScaleEAR(
            ParScaleEARConfig(litevae=tiny.config.litevae, hybrid=tiny.config.hybrid)
        )
        plain.load_state_dict(tiny.state_dict())
        plain.latent_mean.zero_()
        plain.latent_std.fill_(1)
        x = images(2, 3, 64, 64)
        ours, raw = tiny.encode(x), plain.encode(x)
        torch.testing.assert_close(ours.mean * tiny.latent_std + tiny.latent_mean, raw.mean)
        torch.testing.assert_close(ours.kl(), raw.kl(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            tiny.decode(ours.mode()), plain.decode(raw.mode()), atol=1e-5, rtol=1e-4
        )

    def test_kl_equals_pytorch(self, tiny: ParScaleEAR) -> None:
        posterior = tiny.encode(images(1, 3, 64, 64))
        mean = posterior.mean * tiny.latent_std + tiny.latent_mean
        deviation = (0.5 * posterior.log_variance).exp() * tiny.latent_std
        expected = torch.distributions.kl_divergence(
            torch.distributions.Normal(mean, deviation), torch.distributions.Normal(0.0, 1.0)
        )
        torch.testing.assert_close(posterior.kl(), expected, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("value", [-1e6, 1e6])
    def test_no_variance_is_without_bounds(self, tiny: ParScaleEAR, value: float) -> None:
        bias = tiny.encoder.moments.bias
        assert bias is not None
        bias.data[4:] = value
        posterior = tiny.encode(images(1, 3, 32, 32))
        assert posterior.sample().isfinite().all()
        assert posterior.kl().isfinite().all()

    def test_samples_have_the_stated_moments(self, tiny: ParScaleEAR) -> None:
        posterior = tiny.encode(images(1, 3, 16, 16).expand(20_000, -1, -1, -1))
        sample = posterior.sample(torch.Generator().manual_seed(1))
        torch.testing.assert_close(sample.mean(0), posterior.mean[0], atol=0.05, rtol=0)
        deviation = (0.5 * posterior.log_variance[0]).exp()
        torch.testing.assert_close(sample.std(0), deviation, atol=0, rtol=0.03)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_has_the_same_noise_and_kl_in_fp32(self, dtype: torch.dtype) -> None:
        mean, log_variance = images(2, 4, 2, 2).to(dtype), images(2, 4, 2, 2).to(dtype) - 8
        shift, scale = torch.full((4, 1, 1), 30.0), torch.full((4, 1, 1), 20.0)
        half = LatentPosterior(mean, log_variance, shift.to(dtype), scale.to(dtype))
        whole = LatentPosterior(mean.float(), log_variance.float(), shift, scale)
        assert half.kl().dtype == torch.float32
        assert torch.equal(half.kl(), whole.kl())
        samples = [p.sample(torch.Generator().manual_seed(1)) for p in (half, whole)]
        assert samples[0].dtype == dtype
        error = (samples[0].float() - samples[1]).abs().max()
        assert error < 4 * torch.finfo(dtype).eps  # values are below 4

    def test_a_seed_is_no_generator(self, tiny: ParScaleEAR) -> None:
        with pytest.raises(TypeError, match=r"generator must be a torch\.Generator or None, got 0"):
            tiny.encode(images(1, 3, 16, 16)).sample(0)  # type: ignore[arg-type]

    def test_a_generator_decides_the_sample(self, tiny: ParScaleEAR) -> None:
        posterior = tiny.encode(images(1, 3, 32, 32))
        first, second, other = (
            posterior.sample(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
        )
        assert torch.equal(first, second)
        assert not torch.equal(first, other)


class TestErrors:
    @pytest.mark.parametrize(
        ("x", "message"),
        [
            (torch.zeros(3, 32, 32), r"shape \(B, 3, height, width\), got \(3, 32, 32\)"),
            (torch.zeros(1, 4, 32, 32), r"got \(1, 4, 32, 32\)"),
            (torch.zeros(1, 3, 30, 32), r"multiples of 16.*got \(1, 3, 30, 32\)"),
            (torch.zeros(0, 3, 32, 32), "batch of at least 1"),
            (torch.zeros(1, 3, 32, 32).half(), r"torch\.float32.*got torch\.float16"),
            (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r"got torch\.uint8"),
            (torch.zeros(1, 3, 32, 32, dtype=torch.bool), r"got torch\.bool"),
            (torch.zeros(1, 3, 32, 32, device="meta"), "device, cpu, got meta"),
        ],
    )
    def test_says_what_came(self, tiny: ParScaleEAR, x: torch.Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            tiny(x)
        if not x.is_floating_point():
            with pytest.raises(ValueError, match=message):
                tiny(x[..., :30], pad=True)

    def test_latents_are_checked_too(self, tiny: ParScaleEAR) -> None:
        for call in (tiny.enhance, tiny.decode):
            with pytest.raises(ValueError, match=r"latent must have shape \(B, 4"):
                call(torch.zeros(1, 5, 2, 2))

    @pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
    def test_what_autocast_cannot_cast_is_refused(
        self, tiny: ParScaleEAR, dtype: torch.dtype
    ) -> None:
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(ValueError, match=r"under torch\.autocast"),
        ):
            tiny(torch.zeros(1, 3, 32, 32, dtype=dtype))

    def test_finiteness_only_when_asked(self, tiny: ParScaleEAR) -> None:
        x = torch.full((1, 3, 32, 32), float("nan"))
        tiny(x)
        with pytest.raises(ValueError, match="finite"):
            tiny(x, check_finite=True)

    def test_finiteness_of_latents_when_asked(self, tiny: ParScaleEAR) -> None:
        latent = torch.full((1, 4, 2, 2), torch.inf)
        for call in (tiny.enhance, tiny.decode):
            call(latent)
            with pytest.raises(ValueError, match="latent must be finite"):
                call(latent, check_finite=True)

    @pytest.mark.parametrize("part", ["encoder", "hybrid"])
    def test_finiteness_is_checked_on_the_way(self, tiny: ParScaleEAR, part: str) -> None:
        x = images(1, 3, 32, 32)
        tiny(x, check_finite=True)
        for parameter in getattr(tiny, part).parameters():
            parameter.data.fill_(torch.nan)
        with pytest.raises(ValueError, match="latent must be finite"):
            tiny(x, check_finite=True)

    def test_checks_read_metadata_alone(self, tiny: ParScaleEAR) -> None:
        # A meta tensor has no values: whatever looks at one raises NotImplementedError.
        model = tiny.to("meta")
        assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 3, 32, 32)
        with pytest.raises(ValueError, match="multiples of 16"):
            model(torch.empty(2, 3, 33, 32, device="meta"))
        for pad in (False, True):
            with pytest.raises(ValueError, match="images"):
                model.encode(torch.empty(2, 3, 0, 32, device="meta"), pad=pad)
            with pytest.raises(ValueError, match=r"must be a torch\.Tensor, got list"):
                model.encode([[0.0]], pad=pad)  # type: ignore[arg-type]
        latent = torch.empty(1, 4, 2, 2, device="meta")
        for size in ((10,), 10, (10.0, 10.0), (0, 4), (33, 4)):
            with pytest.raises(ValueError, match=r"size must be \(H, W\) in 1\.\.32"):
                model.decode(latent, size=size)  # type: ignore[arg-type]

    def test_shipped_decoders_do_not_go_with_a_path(self, tmp_path: Path) -> None:
        for choice in ({"decoder": "sharp"}, {"variant": "baseline"}):
            with pytest.raises(ValueError, match="leave them out where a path is given"):
                ParScaleEAR.from_pretrained(tmp_path, **choice)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("fields", "name"),
        [
            ({"litevae": LiteVAEConfig(latent_channels=8)}, "latent_channels"),
        ],
    )
    def test_config_names_the_bad_field(self, fields: dict[str, object], name: str) -> None:
        with pytest.raises(ValueError, match=name):
            ParScaleEARConfig(**fields)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("latent_channels", 0),
            ("encoder_widths", (1, 2)),
            ("encoder_widths", (8.0, 8, 8)),
            ("decoder_blocks", (1, -1, 1)),
        ],
    )
    def test_litevae_config_names_the_bad_field(self, field: str, value: object) -> None:
        with pytest.raises(ValueError, match=field):
            LiteVAEConfig(**{field: value})  # type: ignore[arg-type]


class TestCost:
    def test_parameters(self) -> None:
        counts = ParScaleEAR().parameter_count()
        assert counts["encoder"] + counts["decoder"] == pytest.approx(1_600_000, rel=0.05)
        assert counts["hybrid"] == pytest.approx(200_000, rel=0.05)
        assert counts["total"] == sum(p.numel() for p in ParScaleEAR().parameters())

    @pytest.mark.parametrize("size", [(256, 256), (64, 144)])
    @pytest.mark.parametrize("with_hybrid", [True, False])
    def test_flops_equal_pytorch(self, size: tuple[int, int], with_hybrid: bool) -> None:
        config = ParScaleEARConfig() if with_hybrid else ParScaleEARConfig(hybrid=None)
        model = ParScaleEAR(config).to("meta")
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, *size, device="meta"))
        assert model.flops(*size) == counter.get_total_flops()

    @pytest.mark.parametrize("size", [(250, 256), (256, 250), (0, 16)])
    def test_flops_are_of_whole_latents(self, size: tuple[int, int]) -> None:
        with pytest.raises(ValueError, match="multiples of 16"):
            ParScaleEAR().flops(*size)

    def test_flops_of_grouped_convolutions_equal_pytorch(self) -> None:
        grouped = torch.nn.Conv2d(8, 12, 3, padding=1, groups=4, device="meta")
        with FlopCounterMode(display=False) as counter:
            grouped(torch.empty(1, 8, 10, 6, device="meta"))
        assert conv_flops(grouped, 10, 6) == counter.get_total_flops()

    def test_one_image_takes_at_most_4_5_gflop(self) -> None:
        assert ParScaleEAR().flops(256, 256) <= 4.5e9

    def test_every_parameter_gets_a_gradient(self) -> None:
        model = ParScaleEAR()
        x = images(2, 3, 128, 128)
        posterior = model.encode(x)
        restored = model.decode(model.enhance(posterior.sample()))
        ((restored - x).square().mean() + posterior.kl().mean()).backward()
        without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert without == []


class TestPrecision:
    @pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 0.005), (torch.bfloat16, 0.03)])
    def test_half_on_the_cpu(
        self, shipped: ParScaleEAR, photographs: torch.Tensor, dtype: torch.dtype, limit: float
    ) -> None:
        x = photographs[:2].float() / 127.5 - 1
        half = ParScaleEAR.from_pretrained(dtype=dtype)
        with torch.inference_mode():
            exact, ours = shipped(x), half(x.to(dtype)).float()
        assert 0 < (ours - exact).norm() / exact.norm() < limit

    def test_autocast(self, shipped: ParScaleEAR, photographs: torch.Tensor) -> None:
        x = photographs[:1].float() / 127.5 - 1
        with torch.inference_mode():
            exact = shipped(x)
            with torch.autocast("cpu", torch.bfloat16):
                ours = shipped(x)
        assert ours.dtype == torch.float32
        assert (ours - exact).norm() / exact.norm() < 0.03


class TestShippedWeights:
    def test_all_share_one_latent_space(self, photographs: torch.Tensor) -> None:
        models = [
            ParScaleEAR.from_pretrained(variant="baseline"),
            ParScaleEAR.from_pretrained(decoder="faithful"),
            ParScaleEAR.from_pretrained(decoder="sharp"),
        ]
        assert models[0].hybrid is None
        x = photographs[:1].float() / 127.5 - 1
        with torch.inference_mode():
            latents = [m.encode(x).mode() for m in models]
        for model, latent in zip(models[1:], latents[1:], strict=True):
            assert model.latent_fingerprint() == models[0].latent_fingerprint()
            assert torch.equal(latent, latents[0])
        assert not torch.equal(models[1](x), models[2](x))

    def test_latents_are_normalised(self, shipped: ParScaleEAR, photographs: torch.Tensor) -> None:
        with torch.inference_mode():
            latent = shipped.encode(photographs.float() / 127.5 - 1).mode()
        values = latent.transpose(0, 1).flatten(1)
        assert values.mean(1).abs().max() < 0.5
        assert 0.8 < values.std(1).min() < values.std(1).max() < 1.1

    def test_a_shift_by_16_pixels_shifts_the_latent(
        self, shipped: ParScaleEAR, photographs: torch.Tensor
    ) -> None:
        x = photographs[:1].float() / 127.5 - 1
        with torch.inference_mode():
            here = shipped.encode(x[..., :-16]).mode()
            there = shipped.encode(x[..., 16:]).mode()
        k = shipped.encoder.radius()  # what the border reaches
        torch.testing.assert_close(
            here[..., k:-k, k + 1 : -k], there[..., k:-k, k : -k - 1], atol=1e-4, rtol=1e-4
        )


def test_readme_states_the_size() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    model = ParScaleEAR()
    head = " ".join(itertools.islice(text.split(), 60))
    stated = re.search(r"([\d.]+) M parameters, ([\d.]+) GFLOP", head)
    assert stated is not None
    assert stated[1] == f"{model.parameter_count()['total'] / 1e6:.1f}"
    assert stated[2] == f"{model.flops() / 1e9:.1f}"
