"""``parscale-ear generate``: pictures of a class."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parscale_ear.places import check_output
from parscale_ear.verbs.common import Verbs, add_device, positive, seed_number

if TYPE_CHECKING:
    import torch

    from parscale_ear.generator.ear import EnergyAR
    from parscale_ear.generator.var import VAR

# Options of one kind of model only, with their defaults.
VAR_OPTIONS = {"top_k": 900, "top_p": 0.95}
EAR_OPTIONS = {"temperature": None}  # the model's own, as its guidance is
GUIDANCE = {"VAR": 1.5, "EnergyAR": None}


def add_parser(verbs: Verbs) -> None:
    """Adds the verb."""
    verb = verbs.add_parser(
        "generate",
        help="draw pictures of a class with EnergyAR or VAR",
        description="Draws pictures of a class and writes them as one grid: a row a picture, or "
        "with --streams P in diverse mode a row of P pictures.",
    )
    model = verb.add_mutually_exclusive_group()
    model.add_argument(
        "--checkpoint",
        type=Path,
        help="an EnergyAR or a VAR in this package's format (default: the shipped EnergyAR)",
    )
    model.add_argument(
        "--official",
        nargs=2,
        type=Path,
        metavar=("VQVAE", "VAR"),
        help="the authors' vae_ch160v4096z32.pth and var_d*.pth",
    )
    verb.add_argument(
        "--class", dest="label", help="number or name of the class (default: no class)"
    )
    verb.add_argument("--count", type=positive, default=1, help="pictures or rows (default 1)")
    verb.add_argument("--batch", type=positive, default=4, help="labels at a time (default 4)")
    verb.add_argument("--streams", type=positive, help="P streams in one pass")
    verb.add_argument("--streams-weights", type=Path, help="trained streams")
    verb.add_argument("--mode", choices=("diverse", "aggregate"), default="diverse")
    verb.add_argument(
        "--guidance", type=float, help="0: none (default: EnergyAR what its weights say, VAR 1.5)"
    )
    verb.add_argument("--top-k", type=int, help="VAR: likeliest tokens, 0: all (default 900)")
    verb.add_argument("--top-p", type=float, help="VAR: their probability (default 0.95)")
    verb.add_argument(
        "--temperature", type=float, help="EnergyAR: of the noise (default: what its weights say)"
    )
    verb.add_argument(
        "--decoder", choices=("faithful", "sharp"), help="EnergyAR: which shipped decoder"
    )
    verb.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the blocks instead of packing weights; takes minutes first",
    )
    verb.add_argument(
        "--seed",
        type=seed_number,
        default=0,
        help="of the noise; draws the same with the same --count, --batch and --streams (default 0)",
    )
    verb.add_argument("--out", type=Path, required=True, help="PNG file")
    add_device(verb, dtype=False)
    verb.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        help="default: fp32 on the CPU, bf16 on CUDA from Ampere on, else fp32",
    )
    verb.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    import torch
    from tqdm import tqdm

    from parscale_ear.checkpoint import read_kind
    from parscale_ear.data.images import grid, save_png
    from parscale_ear.device import DTYPES, UsageError, resolve_device
    from parscale_ear.generator.ear import shipped_generator
    from parscale_ear.generator.streams import ParallelStreams

    if arguments.out.suffix.lower() != ".png":
        raise UsageError(f"--out {arguments.out}: name a .png file")
    check_output(arguments.out)
    device = resolve_device(arguments.device)
    dtype = DTYPES[arguments.dtype or _default_dtype(device)]
    assert dtype is not None
    path = arguments.checkpoint
    if path is None and not arguments.official:
        path = shipped_generator()
    kind = "VAR" if arguments.official else read_kind(path)
    if kind not in GUIDANCE:
        raise UsageError(f"{path}: is of kind {kind}, which draws no pictures")
    if arguments.mode == "aggregate" and arguments.streams_weights is None:
        raise UsageError("--mode aggregate joins trained streams; give --streams-weights")
    options = _options(arguments, kind)
    model = (_var if kind == "VAR" else _ear)(arguments, path, device)
    label = _label(arguments.label, model)
    streams: ParallelStreams | int | None = arguments.streams
    if arguments.streams_weights is not None:
        streams = ParallelStreams.from_pretrained(
            arguments.streams_weights, backbone=model.fingerprint(), device=device
        ).to(dtype)
        if arguments.streams not in (None, streams.count):
            raise UsageError(
                f"--streams {arguments.streams}: {arguments.streams_weights} holds "
                f"{streams.count} streams"
            )
    model.set_dtype(dtype)
    if arguments.compile:
        model.compile()
    else:
        _pack(model, device, dtype)
    draw: Callable[..., torch.Tensor] = partial(
        model.generate,
        generator=torch.Generator(device).manual_seed(arguments.seed),
        streams=streams,
        mode=arguments.mode,
        **options,
    )
    rows: list[list[torch.Tensor]] = []
    scales = len(model.transformer.config.counts)
    batches = -(-arguments.count // arguments.batch)
    with tqdm(total=batches * scales, unit="scale") as bar:
        while len(rows) < arguments.count:
            size = min(arguments.batch, arguments.count - len(rows))
            with _told_of_compiling():
                images = draw([label] * size, callback=lambda _: bar.update()).float()
            rows += [list(row if row.ndim == 4 else row[None]) for row in images.cpu()]
    save_png(grid(rows), arguments.out)
    pictures = sum(map(len, rows))
    print(f"{pictures} picture{'s' if pictures > 1 else ''} → {arguments.out}")
    return 0


@contextmanager
def _told_of_compiling() -> Iterator[None]:
    """What ``--compile`` fails at shows when the first scale is drawn."""
    from parscale_ear.device import UsageError

    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"--compile did not work here ({reason}); it needs a C++ compiler (on CUDA also Triton): "
            "install one, or leave --compile out"
        ) from error


def _options(arguments: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Arguments of ``generate`` that the kind of model has."""
    from parscale_ear.device import UsageError

    own, others = (VAR_OPTIONS, EAR_OPTIONS) if kind == "VAR" else (EAR_OPTIONS, VAR_OPTIONS)
    foreign = [name for name in others if getattr(arguments, name) is not None]
    if kind == "VAR" and arguments.decoder is not None:
        foreign.append("decoder")
    if foreign:
        raise UsageError(f"--{foreign[0].replace('_', '-')} does not go with {kind}; leave it out")
    given = {name: getattr(arguments, name) for name in own}
    guidance = arguments.guidance
    return {
        "guidance": GUIDANCE[kind] if guidance is None else guidance,
        **{name: own[name] if value is None else value for name, value in given.items()},
    }


def _var(arguments: argparse.Namespace, path: Path | None, device: torch.device) -> VAR:
    from parscale_ear import checkpoint
    from parscale_ear.device import UsageError
    from parscale_ear.generator.var import VAR

    if arguments.official:
        return VAR.from_official(*arguments.official, device=device)
    assert path is not None
    told = checkpoint.load(path)[1].get("training") or {}
    if told.get("stage") == "tokenizer":
        raise UsageError(f"{path}: only its tokenizer is trained; name var.safetensors of that run")
    return VAR.from_pretrained(path, device=device)


def _ear(arguments: argparse.Namespace, path: Path | None, device: torch.device) -> EnergyAR:
    from parscale_ear.generator.ear import EnergyAR

    return EnergyAR.from_pretrained(path, decoder=arguments.decoder, device=device)


def _label(text: str | None, model: VAR | EnergyAR) -> int | None:
    """The label that ``--class`` means; whether a number is in range, the model says."""
    from parscale_ear.device import UsageError
    from parscale_ear.generator.ear import EnergyAR

    if text is None:
        return None
    number = text.removeprefix("-").isdecimal()
    if isinstance(model, EnergyAR) and (not number or text in model.config.class_names):
        return model.label(text)
    if number:
        return int(text)
    raise UsageError(f"--class {text}: a VAR knows its classes by number only")


def _default_dtype(device: torch.device) -> str:
    from parscale_ear.device import multiplies_bf16

    return "bf16" if device.type == "cuda" and multiplies_bf16(device) else "fp32"


def _pack(model: VAR | EnergyAR, device: torch.device, dtype: torch.dtype) -> None:
    from parscale_ear.generator.packing import can_pack
    from parscale_ear.generator.var import VAR

    if isinstance(model, VAR) and device.type == "cpu" and can_pack(dtype):
        model.pack()
