"""``parscale-ear encode`` and ``decode``: a data set's latents, cached on disk."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from parscale_ear.places import check_folder
from parscale_ear.verbs.common import (
    Verbs,
    add_device,
    add_processes,
    add_refinements,
    add_weights,
    positive,
    weights_of,
)


def add_parser(verbs: Verbs) -> None:
    """Adds both verbs."""
    verb = verbs.add_parser(
        "encode",
        help="cache the latents of a data set",
        description="Encodes pictures to safetensors shards with an index, which LatentDataset "
        "reads. The same command goes on where a killed one stopped. Under torchrun or accelerate "
        "launch, the processes share the work.",
    )
    verb.add_argument(
        "images", nargs="+", metavar="DIR_OR_TAR", help="also several, or hf:DATASET[:SPLIT]"
    )
    verb.add_argument(
        "out", type=Path, metavar="OUT", help="folder for the latents, right behind the sources"
    )
    verb.add_argument("--side", type=positive, default=256, help="of the squares (default 256)")
    verb.add_argument("--mirror", action="store_true", help="also encode the mirrored pictures")
    verb.add_argument(
        "--batch", type=positive, help="pictures at a time (default 1 on the CPU, 32 on CUDA)"
    )
    verb.add_argument(
        "--shard", type=positive, default=512, help="pictures in a shard (default 512)"
    )
    verb.add_argument(
        "--readers", type=positive, default=2, help="reading threads a process (default 2)"
    )
    add_refinements(verb)
    add_weights(verb)
    add_device(verb)
    add_processes(verb)
    verb.set_defaults(run=_encode)

    verb = verbs.add_parser(
        "decode",
        help="decode cached latents to PNG files",
        description="Decodes a folder of latents to PNG files; those that are there stay.",
    )
    verb.add_argument("latents", type=Path, metavar="LATENTS", help="folder that encode wrote")
    verb.add_argument("out", type=Path, metavar="OUT", help="folder for the PNG files")
    verb.add_argument("--batch", type=positive, default=16, help="latents at a time (default 16)")
    add_weights(verb)
    add_device(verb)
    add_processes(verb)
    verb.set_defaults(run=_decode)


def _encode(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from parscale_ear.autoencoder.latent_cache import CacheOptions, encode_folder
    from parscale_ear.data.images import find_images
    from parscale_ear.device import default_dtype, resolve_device
    from parscale_ear.parallel import worker_devices

    device = resolve_device(arguments.device)
    options = CacheOptions(
        side=arguments.side,
        mirror=arguments.mirror,
        refinements=arguments.refinements,
        dtype=arguments.dtype or default_dtype(device),
        batch=arguments.batch or (32 if device.type == "cuda" else 1),
        shard=arguments.shard,
    )
    rank, world = _count_of("RANK", 0), _count_of("WORLD_SIZE", 1)
    if world > 1 and device.type == "cuda" and device.index is None:
        device = resolve_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    check_folder(arguments.out)
    refs = find_images(arguments.images)
    with tqdm(total=len(refs), unit="image", disable=rank > 0) as bar:
        result = encode_folder(
            refs,
            arguments.out,
            options,
            weights=weights_of(arguments),
            devices=worker_devices(device, arguments.processes),
            readers=arguments.readers,
            rank=rank,
            world=world,
            progress=bar.update,
        )
    for name, reason in result.skipped.items():
        print(f"parscale-ear: skipped {name}: {reason}", file=sys.stderr)
    rate = result.encoded / result.seconds if result.encoded else None
    if rate is not None:
        print(
            f"{result.encoded} pictures in {result.seconds:.1f} s, {rate:.1f} images/s, bound by "
            f"{result.bound_by} → {arguments.out}"
        )
    if not result.complete:
        print(
            f"parscale-ear: {arguments.out} is not finished yet: RANK {rank} of WORLD_SIZE {world} is done, "
            "other jobs have shards left (if none runs: unset both, and run this again)",
            file=sys.stderr,
        )
    print(
        json.dumps(
            {
                "complete": result.complete,
                "pictures": result.pictures,
                "encoded": result.encoded,
                "skipped": len(result.skipped),
                "seconds": result.seconds,
                "images_per_s": rate,
                "waiting_for_pictures": result.reading if result.encoded else None,
                "dtype": options.dtype,
                "device": str(device),
            }
        )
    )
    # torchrun takes any other exit code than 0 for a failure, and ends the other jobs.
    return 2 if result.skipped and world == 1 else 0


def _count_of(variable: str, default: int) -> int:
    """What a launcher says in the environment.

    Raises:
        UsageError: it is no number.
    """
    from parscale_ear.device import UsageError

    text = os.environ.get(variable) or str(default)
    if not text.isdecimal():
        raise UsageError(f"{variable}={text}: expected a whole number; unset it without a launcher")
    return int(text)


def _decode(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from parscale_ear.autoencoder.latent_decoding import decode_folder
    from parscale_ear.data.latents import LatentDataset
    from parscale_ear.device import default_dtype, resolve_device
    from parscale_ear.parallel import worker_devices

    device = resolve_device(arguments.device)
    check_folder(arguments.out)
    with tqdm(total=len(LatentDataset(arguments.latents)), unit="image") as bar:
        written = decode_folder(
            arguments.latents,
            arguments.out,
            weights=weights_of(arguments),
            dtype=arguments.dtype or default_dtype(device),
            devices=worker_devices(device, arguments.processes),
            batch=arguments.batch,
            progress=bar.update,
        )
    print(f"{written} pictures → {arguments.out}")
    return 0
