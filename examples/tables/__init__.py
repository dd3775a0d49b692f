"""Go from a table file to the table with one command: `python -m examples.tables TABLE.yaml`. See README.md."""
