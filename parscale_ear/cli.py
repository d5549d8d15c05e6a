"""The one command: ``parscale-ear VERB``.

Exit codes: 0 done, 1 something failed, 2 wrong use or missing data, 130 stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from parscale_ear import __version__

STOPPED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Args:
        argv: arguments after the program's name; None takes the process's.

    Returns:
        The exit code.
    """
    arguments = _parser().parse_args(argv)
    # PyTorch is imported below this line, so that --help and mistakes answer at once.
    from parscale_ear.checkpoint import CheckpointError
    from parscale_ear.data.images import ImageError
    from parscale_ear.device import UsageError

    try:
        return int(arguments.run(arguments))
    except (UsageError, CheckpointError, ImageError) as error:
        print(f"parscale-ear: {error}", file=sys.stderr)
        return 2
    except (ModuleNotFoundError, ValueError, OSError) as error:
        print(f"parscale-ear: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, OSError) else 2
    except KeyboardInterrupt:
        print("parscale-ear: stopped", file=sys.stderr)
        return STOPPED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="parscale-ear", description="A light-weight wavelet image tokenizer."
    )
    parser.add_argument("--version", action="version", version=f"parscale-ear {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    _add_reconstruct(verbs)
    _add_train(verbs)
    return parser


# --- reconstruct ---


def _add_reconstruct(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verb = verbs.add_parser(
        "reconstruct",
        help="encode pictures and decode them again",
        description="Encodes pictures to latents and decodes them again; prints the PSNR.",
    )
    verb.add_argument("images", nargs="+", metavar="IMAGE_OR_DIR", help="files, folders or tars")
    verb.add_argument("--out", required=True, type=Path, help="folder for the PNG files")
    verb.add_argument("--compare", action="store_true", help="also write original | reconstruction")
    which = verb.add_mutually_exclusive_group()
    which.add_argument("--weights", type=Path, help="weight file or folder (default: the shipped)")
    which.add_argument("--variant", choices=("hybrid", "baseline"), default="hybrid")
    verb.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    verb.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="default: by device")
    verb.set_defaults(run=_reconstruct)


def _reconstruct(arguments: argparse.Namespace) -> int:
    import torch
    from tqdm import tqdm

    from parscale_ear.autoencoder.model import ParScaleEAR
    from parscale_ear.autoencoder.reconstruct import reconstruct_image
    from parscale_ear.data import images as pictures
    from parscale_ear.device import DTYPES, UsageError, resolve_device
    from parscale_ear.metrics.reconstruction import psnr

    device = resolve_device(arguments.device)
    refs = pictures.find_images(arguments.images)
    if arguments.out.exists() and not arguments.out.is_dir():
        raise UsageError(f"--out {arguments.out} is a file; name a folder")
    names = pictures.output_names(refs)
    endings = (".png", "_compare.png") if arguments.compare else (".png",)
    results = [(arguments.out / f"{name}{end}").resolve() for name in names for end in endings]
    if not {ref.path.resolve() for ref in refs}.isdisjoint(results):
        raise UsageError(f"--out {arguments.out} would overwrite the pictures; name another folder")
    if len(set(results)) < len(results):
        raise UsageError("a picture is called like another's comparison; leave out --compare")
    model = ParScaleEAR.from_pretrained(
        arguments.weights, variant=arguments.variant, device=device, dtype=DTYPES[arguments.dtype]
    )
    rows: list[tuple[str, float]] = []
    failed = 0
    bar = tqdm(list(zip(refs, names, strict=True)), unit="picture")
    for ref, name in bar:
        try:
            original = pictures.to_tensor(ref.load())  # (3, H, W)
        except pictures.ImageError as error:
            failed += 1
            bar.write(f"parscale-ear: skipped {error}", file=sys.stderr)
            continue
        restored = reconstruct_image(model, original)
        pictures.save_png(restored, arguments.out / f"{name}.png")
        if arguments.compare:
            pair = torch.cat((original, torch.ones(3, original.shape[1], 8), restored), dim=2)
            pictures.save_png(pair, arguments.out / f"{name}_compare.png")
        pair_of_8_bits = (pictures.to_uint8(x)[None] for x in (restored, original))
        rows.append((name, float(psnr(*pair_of_8_bits)[0])))
    width = max([len(name) for name, _ in rows] + [4])
    for name, value in rows:
        print(f"{name:<{width}}  {value:6.2f} dB")
    if rows:
        mean = sum(value for _, value in rows) / len(rows)
        print(f"{'mean':<{width}}  {mean:6.2f} dB PSNR over {len(rows)} pictures → {arguments.out}")
    return 2 if failed else 0


# --- train ---


def _add_train(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verb = verbs.add_parser("train", help="train a model (needs the extra 'train')")
    models = verb.add_subparsers(metavar="MODEL", required=True)
    model = models.add_parser(
        "autoencoder",
        help="LiteVAE, then baseline and hybrid from the same encoder",
        description="Trains LiteVAE, then baseline and hybrid from the same encoder.",
    )
    model.add_argument("--images", nargs="+", required=True, metavar="DIR_OR_TAR")
    model.add_argument("--validation", nargs="+", default=[], metavar="DIR_OR_TAR")
    length = model.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=120.0, help="of all stages (default 120)")
    length.add_argument("--steps", type=int, help="of all stages together, instead of minutes")
    model.add_argument("--out", required=True, type=Path, help="the run's folder")
    model.add_argument("--resume", action="store_true", help="go on with the run in --out")
    model.add_argument("--batch", type=int, default=32, help="crops a step (default 32)")
    model.add_argument(
        "--crop", type=int, default=128, help="side in the first stage (default 128)"
    )
    model.add_argument("--final-crop", type=int, default=256, help="side later (default 256)")
    model.add_argument("--learning-rate", type=float, default=1e-3)
    model.add_argument("--decoder-rate", type=float, default=7e-4)
    model.add_argument("--kl-weight", type=float, default=1e-4)
    model.add_argument("--ssim-weight", type=float, default=0.1, help="after the first stage")
    model.add_argument("--seed", type=int, default=0)
    model.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    model.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    model.set_defaults(run=_train_autoencoder)


def _train_autoencoder(arguments: argparse.Namespace) -> int:
    from parscale_ear.device import UsageError, resolve_device
    from parscale_ear.training.autoencoder import Recipe, train_autoencoder
    from parscale_ear.training.loop import TrainingError

    sizes = ("crop", "final_crop", "batch", "seed")
    rates = ("learning_rate", "decoder_rate", "kl_weight", "ssim_weight")
    recipe = Recipe(
        images=tuple(arguments.images),
        validation=tuple(arguments.validation),
        minutes=arguments.minutes if arguments.steps is None else None,
        steps=arguments.steps,
        precision=arguments.precision,
        device=str(resolve_device(arguments.device)),
        **{name: getattr(arguments, name) for name in (*sizes, *rates)},
    )
    try:
        finished = train_autoencoder(recipe, arguments.out, resume=arguments.resume)
    except TrainingError as error:
        raise UsageError(str(error)) from error
    if not finished:
        print("parscale-ear: stopped; the same command with --resume goes on", file=sys.stderr)
        return STOPPED
    print(f"weights: {arguments.out}/hybrid.safetensors and baseline.safetensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
