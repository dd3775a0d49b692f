"""Models for lm-evaluation-harness.

`answers.py` needs the core alone; importing `model.py` makes ``lamemo`` one of the harness's models.
`python -m lamemo_fairseq.lm_eval` is the harness's own command with this model.
"""
