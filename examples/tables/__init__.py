"""One command from a table file to the table: `python -m examples.tables TABLE.yaml`. See README.md."""
