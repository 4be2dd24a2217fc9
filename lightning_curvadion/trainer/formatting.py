"""Numbers, sizes, times and lists as text, for the closing table, the report and the plan."""

from collections.abc import Iterable, Sequence
from typing import Any

_BYTE_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_BIT_RATE_UNITS = ((1e9, "Gbit/s"), (1e6, "Mbit/s"), (1e3, "kbit/s"))


def format_number(value: float) -> str:
    """A number with three significant digits.

    Example::

        >>> format_number(2.25678), format_number(1234.5), format_number(0.00012345), format_number(float("nan"))
        ('2.26', '1234', '0.000123', 'nan')
    """
    return f"{value:.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def byte_unit(size: float) -> tuple[float, str]:
    """The unit for a number of bytes, as (bytes per unit, name), in powers of 1000.

    Example::

        >>> byte_unit(5.2e9)
        (1000000000.0, 'GB')
    """
    return next((unit for unit in _BYTE_UNITS if size >= unit[0]), (1.0, "B"))


def format_bytes(size: float) -> str:
    """A number of bytes, in powers of 1000.

    Example::

        >>> format_bytes(1234), format_bytes(5.2e9), format_bytes(0)
        ('1.23 kB', '5.2 GB', '0 B')
    """
    scale, unit = byte_unit(size)
    return f"{format_number(size / scale)} {unit}"


def format_percent(share: float) -> str:
    """A share in percent.

    Example::

        >>> format_percent(0.01288), format_percent(1.0)
        ('1.29 %', '100 %')
    """
    return f"{format_number(100 * share)} %"


def format_duration(seconds: float) -> str:
    """How long a run took.

    Example::

        >>> format_duration(12.34), format_duration(252), format_duration(7300)
        ('12.3 s', '4 min 12 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{format_number(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def format_seconds(seconds: float) -> str:
    """A duration in seconds or milliseconds.

    Example::

        >>> format_seconds(1.5), format_seconds(0.02)
        ('1.50 s', '20.0 ms')
    """
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def format_bit_rate(bits_per_second: float) -> str:
    """The speed of a link.

    Example::

        >>> format_bit_rate(2.5e9), format_bit_rate(12e6)
        ('2.5 Gbit/s', '12 Mbit/s')
    """
    scale, unit = next((unit for unit in _BIT_RATE_UNITS if bits_per_second >= unit[0]), (1.0, "bit/s"))
    return f"{bits_per_second / scale:.3g} {unit}"


def format_table(rows: Iterable[Sequence[Any]], label_width: int = 34, cell_width: int = 16) -> list[str]:
    """Lines of a table: a label on the left, then right-aligned cells.

    Example::

        >>> format_table([("step", "time"), ("local", "32 ms")], label_width=8, cell_width=6)
        ['  step      time', '  local    32 ms']
    """
    return [f"  {label:<{label_width}}" + "".join(f"{cell:>{cell_width}}" for cell in cells) for label, *cells in rows]


def pluralize(count: int, noun: str) -> str:
    """A count with its noun.

    Example::

        >>> pluralize(1, "gap"), pluralize(2, "gap")
        ('1 gap', '2 gaps')
    """
    return f"{count} {noun}{'s' if count != 1 else ''}"


def join_words(words: Sequence[str]) -> str:
    """Words as an enumeration in a sentence.

    Example::

        >>> join_words(["a"]), join_words(["a", "b", "c"])
        ('a', 'a, b and c')
    """
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def shorten_names(names: Sequence[str], length: int = 24) -> list[str]:
    """Dotted names without their common prefix; of longer ones only the end.

    Example::

        >>> shorten_names(["model.gpt.blocks.0", "model.gpt.blocks.1"]), shorten_names(["a-rather-long-name"], 9)
        (['blocks.0', 'blocks.1'], ['…ong-name'])
    """
    parts = [name.split(".") for name in names]
    while all(len(part) > 2 for part in parts) and len({part[0] for part in parts}) == 1:
        parts = [part[1:] for part in parts]
    short = [".".join(part) for part in parts]
    return [name if len(name) <= length else f"…{name[1 - length :]}" for name in short]
