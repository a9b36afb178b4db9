"""`lawcat pack`: an adapter ready to be given away."""

from __future__ import annotations

from pathlib import Path

from lawcat.cli.display import Display
from lawcat.convert.pack import pack_adapter
from lawcat.errors import DataError
from lawcat.files import human_bytes
from lawcat.tasks import builtin_source

# Ten characters a token are more than any tokenizer packs into one of prose.
_NUM_CHARS = 5120


def run_pack(
    source: Path,
    destination: Path,
    dtype: str,
    new_parameters: str,
    base: str | None,
    card: Path | None,
    check: bool,
) -> None:
    """See the command's help."""
    more = _read(card) if card is not None else None
    with Display() as display:
        report = pack_adapter(
            source,
            destination,
            dtype=dtype,
            new_parameter_dtype=new_parameters,
            base=base,
            card=more,
            check_text=builtin_source().text[:_NUM_CHARS] if check else None,
            progress=display.message,
        )
    print(
        f"{report.folder}: {human_bytes(report.folder_bytes)}, of them {human_bytes(report.lora_bytes)} LoRA "
        f"factors and {human_bytes(report.new_parameter_bytes)} new parameters; the tensors had "
        f"{human_bytes(report.num_bytes_before)}"
    )
    if report.change is not None:
        print(f"rounding: {report.change}")


def _read(card: Path) -> str:
    try:
        return card.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{card} is not UTF-8 text: {error}.") from error
