"""Check that a table's measure is the loss of what a token of its data is."""

from .table import MEASURES, Table
from .validation import TableError

_PIECES = {"bits-per-byte": ("bytes",), "bits-per-character": ("bytes", "characters")}


def check(table: Table, data: str) -> None:
    """Check the measure against the record of `python -m preprocess`, if *data* has one.

    fairseq-eval-lm reports the loss of a token, which is that of a byte or a character for some data only.

    Raises:
        TableError: the tokens are larger.
        ValueError: the record is damaged.
    """
    from lamemo_fairseq.data.text_encoding import read_text_encoding  # with fairseq, which takes seconds to import

    encoding, fitting = read_text_encoding(data), _PIECES.get(table.measure)
    # A text that was reduced to letters has a byte a letter.
    if encoding is None or fitting is None or encoding.pieces in fitting or encoding.normalized:
        return
    tokens = {"none": "words", "characters": "characters"}.get(encoding.pieces, "pieces of words")
    fine = [name for name in MEASURES if encoding.pieces in _PIECES.get(name, (encoding.pieces,))]
    raise TableError(
        f"measure: {table.measure}, but the tokens of {data} are {tokens}, of which losses are reported: write "
        f"{' or '.join(fine)}"
    )
