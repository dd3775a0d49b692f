"""What a checkpoint keeps of the trainer, without a trainer (tests/test_resume.py has it in whole runs)."""

from types import SimpleNamespace

import torch
from torch.nn import Parameter

from lamemo_fairseq.host.training_state import restore_training_state, training_state


def trainer_of(weights, flat=False, **optimizer):
    """A trainer whose optimizer holds float32 weights behind bfloat16 ones, in one tensor or one each."""
    masters = [Parameter(w.clone()) for w in weights]
    if flat:
        masters = {0: Parameter(torch.cat([w.flatten() for w in weights]))}
    rounded = [Parameter(w.bfloat16()) for w in weights]
    return trainer_with(fp32_params=masters, fp16_params=rounded, **optimizer)


class Trainer(SimpleNamespace):
    __hash__ = object.__hash__


def trainer_with(**optimizer):
    return Trainer(
        optimizer=SimpleNamespace(param_groups=[], **optimizer),
        lr_scheduler=SimpleNamespace(),
        cfg=SimpleNamespace(ema=SimpleNamespace(store_ema=False), dataset=SimpleNamespace(disable_validation=True)),
        _amp_retries=0,
    )


def rounded_again(weights):
    return [w.bfloat16().float() for w in weights]


def test_float32_weights_come_back_flat_or_not():
    weights = [torch.randn(3, 4), torch.randn(5)]
    for saved_flat in (False, True):
        state = training_state(trainer_of(weights, saved_flat))
        one, other = trainer_of(rounded_again(weights)), trainer_of(rounded_again(weights), flat=True)
        for trainer in (one, other):
            restore_training_state(trainer, state)
        assert all(torch.equal(p, w) for p, w in zip(one.optimizer.fp32_params, weights, strict=True))
        assert torch.equal(other.optimizer.fp32_params[0], torch.cat([w.flatten() for w in weights]))


def test_weights_that_were_changed_since_are_left_as_they_are(caplog):
    """An averaged checkpoint has the average of the models and the rest of one of them."""
    weights = [torch.randn(3, 4)]
    state = training_state(trainer_of([weights[0] + 1]))
    trainer = trainer_of(rounded_again(weights))
    restore_training_state(trainer, state)
    assert torch.equal(trainer.optimizer.fp32_params[0], rounded_again(weights)[0])
    assert "float32 weights" in caplog.text


def test_the_scale_of_amp_comes_back():
    before, after = (torch.amp.GradScaler("cpu", init_scale=4.0) for _ in range(2))
    before.scale(torch.ones(1))  # now it has one
    before.update(16.0)
    restore_training_state(trainer_of([], scaler=after), training_state(trainer_of([], scaler=before)))
    assert after.get_scale() == before.get_scale() == 16.0


def test_another_kind_of_optimizer_takes_what_it_has():
    state = training_state(trainer_of([torch.randn(2)], scaler=torch.amp.GradScaler("cpu")))
    restore_training_state(trainer_with(), state)


def test_a_batch_that_overflowed_is_tried_as_often():
    """fairseq's --amp counts the tries of several batches together."""
    before, after = trainer_with(), trainer_with()
    before._amp_retries = 2
    restore_training_state(after, training_state(before))
    assert after._amp_retries == 2
