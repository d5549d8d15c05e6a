"""``parscale-ear reconstruct``: pictures through the autoencoder and back."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from parscale_ear.places import check_folder
from parscale_ear.verbs.common import (
    Verbs,
    add_device,
    add_refinements,
    add_weights,
    weights_of,
)


def add_parser(verbs: Verbs) -> None:
    """Adds the verb."""
    verb = verbs.add_parser(
        "reconstruct",
        help="encode pictures and decode them again",
        description="Encodes pictures to latents and decodes them again; prints the PSNR.",
    )
    verb.add_argument("images", nargs="+", metavar="IMAGE_OR_DIR", help="files, folders or tars")
    verb.add_argument("--out", required=True, type=Path, help="folder for the PNG files")
    verb.add_argument("--compare", action="store_true", help="also write original | reconstruction")
    verb.add_argument("--tile", type=int, help="side of a tile, pixels, for large pictures")
    add_refinements(verb)
    add_weights(verb)
    add_device(verb)
    verb.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    import torch
    from tqdm import tqdm

    from parscale_ear.autoencoder.model import ParScaleEAR
    from parscale_ear.autoencoder.reconstruct import reconstruct_image
    from parscale_ear.data import images as pictures
    from parscale_ear.device import DTYPES, UsageError, out_of_memory, resolve_device
    from parscale_ear.metrics.reconstruction import HIGHEST_PSNR, psnr

    device = resolve_device(arguments.device)
    refs = pictures.find_images(arguments.images)
    check_folder(arguments.out)
    if any(Path(searched).resolve() == arguments.out.resolve() for searched in arguments.images):
        raise UsageError(
            f"--out {arguments.out} holds the pictures themselves; name another folder"
        )
    names = pictures.output_names(refs)
    endings = (".png", "_compare.png") if arguments.compare else (".png",)
    results = [(arguments.out / f"{name}{end}").resolve() for name in names for end in endings]
    # Beside the pictures given, what is called like a result may be another original.
    beside = any(ref.path.parent.resolve() == arguments.out.resolve() for ref in refs)
    taken = {ref.path.resolve() for ref in refs}
    if not taken.isdisjoint(results) or (beside and any(path.exists() for path in results)):
        raise UsageError(f"--out {arguments.out} would overwrite the pictures; name another folder")
    if len(set(results)) < len(results):
        raise UsageError("a picture is called like another's comparison; leave out --compare")
    model = ParScaleEAR.from_pretrained(
        weights_of(arguments), device=device, dtype=DTYPES[arguments.dtype]
    )
    values: list[float] = []
    failed, width = 0, max(map(len, (*names, "mean")))
    bar = tqdm(list(zip(refs, names, strict=True)), unit="picture")
    for ref, name in bar:
        try:
            original = pictures.to_tensor(ref.load())  # (3, H, W)
            restored = reconstruct_image(
                model, original, refinements=arguments.refinements, tile=arguments.tile
            )
        except pictures.ImageError as error:
            failed += 1
            bar.write(f"parscale-ear: skipped {error}", file=sys.stderr)
            continue
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            failed += 1
            bar.write(
                f"parscale-ear: skipped {ref.name}: out of memory; try a smaller --tile than "
                f"{arguments.tile or 'the whole picture (512, say)'}",
                file=sys.stderr,
            )
            continue
        pictures.save_png(restored, arguments.out / f"{name}.png")
        if arguments.compare:
            pair = torch.cat((original, torch.ones(3, original.shape[1], 8), restored), dim=2)
            pictures.save_png(pair, arguments.out / f"{name}_compare.png")
        pair_of_8_bits = (pictures.to_uint8(x)[None] for x in (restored, original))
        values.append(float(psnr(*pair_of_8_bits)[0]))
        bar.write(
            f"{name:<{width}}  {values[-1]:6.2f} dB", file=sys.stdout
        )  # now: a later one may fail
    if values:
        mean = sum(min(value, HIGHEST_PSNR) for value in values) / len(values)
        print(
            f"{'mean':<{width}}  {mean:6.2f} dB PSNR over {len(values)} pictures → {arguments.out}"
        )
    return 2 if failed else 0
