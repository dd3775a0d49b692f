"""From text to fairseq's binary format: `python -m preprocess --help`, and README.md beside this file."""
