"""Text to lines of byte symbols for fairseq-preprocess, and back.

    python -m preprocess.byte_lines < book.txt > book.bytes
    python -m preprocess.byte_lines --decode < book.bytes > book.txt

Every byte becomes one of fairseq's byte symbols, unchanged. The line feed is the end of a line, which fairseq turns
into an end-of-sentence token. So a file that ends in a line feed has as many tokens as bytes.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator

from fairseq.data.encoders.byte_utils import BYTE_TO_BCHAR, SPACE, SPACE_ESCAPE

SYMBOLS = {**BYTE_TO_BCHAR, ord(SPACE): SPACE_ESCAPE}
BYTES = {symbol: byte for byte, symbol in SYMBOLS.items()}


def encode(lines: Iterable[bytes]) -> Iterator[str]:
    """Turn lines of bytes, with or without their line feed, into lines of symbols between spaces."""
    for line in lines:
        yield SPACE.join(line.removesuffix(b"\n").decode("latin-1").translate(SYMBOLS)) + "\n"


def decode(lines: Iterable[str]) -> Iterator[bytes]:
    """Turn lines of symbols into lines of bytes; words that are no byte, such as <unk>, become question marks."""
    for line in lines:
        yield bytes(BYTES.get(symbol, ord("?")) for symbol in line.split()) + b"\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="lines of text to lines of byte symbols, from stdin to stdout")
    parser.add_argument("--decode", action="store_true", help="byte symbols to text instead")
    if parser.parse_args().decode:
        symbols = open(  # noqa: SIM115
            sys.stdin.fileno(), encoding="utf-8-sig", errors="replace", newline=None, closefd=False
        )
        sys.stdout.buffer.writelines(decode(symbols))
    else:
        text = open(sys.stdout.fileno(), "w", encoding="utf-8", newline="\n", closefd=False)  # noqa: SIM115
        with text:
            text.writelines(encode(sys.stdin.buffer))


if __name__ == "__main__":
    main()
