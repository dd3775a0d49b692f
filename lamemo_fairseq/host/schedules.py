"""The state of a learning rate schedule.

fairseq saves one or two of its values, and steps the schedule anew at a resume.
"""

import copy
from typing import Any, Callable, Dict, List
from weakref import WeakKeyDictionary

import torch
from fairseq.optim.lr_scheduler import FairseqLRScheduler
from omegaconf import OmegaConf

# By trainer: the rates with which the epoch began, by which fairseq judges --stop-min-lr.
_RATES: "WeakKeyDictionary[Any, List[float]]" = WeakKeyDictionary()


def begin_epoch(trainer: Any) -> None:
    """Record the rates with which a trainer begins an epoch, or goes on with one."""
    _RATES[trainer] = _rates(trainer)


def schedule_state(trainer: Any) -> Dict[str, Any]:
    """Return the state of a schedule for a checkpoint, in plain containers."""
    schedules = _schedules(trainer.lr_scheduler)
    return {
        "options": {name: _options(schedule) for name, schedule in schedules.items()},
        "values": {name: _values(schedule) for name, schedule in schedules.items()},
        "rates": _RATES.get(trainer, _rates(trainer)),
    }


def restore_schedule(trainer: Any, saved: Dict[str, Any], ended: bool, epoch: int, loss: Any, again: bool) -> None:
    """Continue a schedule as if it had never stopped.

    Args:
        trainer: has read the checkpoint.
        saved: the result of `schedule_state`. If this run has other options, fairseq's schedule stays, and follows
            them.
        ended: the checkpoint was saved at the end of an epoch.
        epoch: the epoch in which it was saved.
        loss: of the validation before it was saved, None if there was none.
        again: the data is read from the start.
    """
    schedules = _schedules(trainer.lr_scheduler)
    same = saved.get("options") == {name: _options(schedule) for name, schedule in schedules.items()}
    if same:
        for name, schedule in schedules.items():
            _restore(schedule, saved["values"][name])
    for name, schedule in schedules.items():
        _take_new_rate(schedule, saved.get("options", {}).get(name, {}))
    if ended:  # fairseq saves before this step of its main loop, and skips the step after a resume
        trainer.lr_step(epoch, loss)
        return
    trainer.lr_step_update()
    if same and not again:
        _go_on_inside_epoch(trainer, saved["rates"])


def _take_new_rate(schedule: FairseqLRScheduler, then: Dict[str, Any]) -> None:
    """Begin with another ``--lr`` where a schedule never computes the rate, but lowers the optimizer's."""
    now = _options(schedule)
    if _is_torch_scheduler(getattr(schedule, "lr_scheduler", None)) and then.get("lr", now["lr"]) != now["lr"]:
        schedule.optimizer.set_lr(now["lr"][0])


def remember(trainer: Any) -> Callable[[], None]:
    """Return a function that puts a schedule and the rates back as they are now."""
    schedules = _schedules(trainer.lr_scheduler)
    rates, values = _rates(trainer), {name: copy.deepcopy(_values(schedule)) for name, schedule in schedules.items()}

    def put_back() -> None:
        for name, schedule in schedules.items():
            _restore(schedule, values[name])
        _set_rates(trainer, rates)

    return put_back


def _go_on_inside_epoch(trainer: Any, rates: List[float]) -> None:
    """Show fairseq's main loop the rates with which the epoch began, and do not begin it again."""
    now, scheduler = _rates(trainer), trainer.lr_scheduler

    def begin_once(epoch: int) -> float:
        del scheduler.step_begin_epoch
        _set_rates(trainer, now)
        return trainer.get_lr()

    _set_rates(trainer, rates)
    scheduler.step_begin_epoch = begin_once


def _rates(trainer: Any) -> List[float]:
    return [float(group["lr"]) for group in trainer.optimizer.param_groups]


def _set_rates(trainer: Any, rates: List[float]) -> None:
    for group, rate in zip(trainer.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _schedules(scheduler: Any) -> Dict[str, Any]:
    """Return the schedule and, with several optimizers, theirs by name."""
    own = getattr(getattr(scheduler, "optimizer", None), "lr_scheduler", None)
    return {"": scheduler, **getattr(own, "lr_schedulers", {})}


def _options(schedule: FairseqLRScheduler) -> Dict[str, Any]:
    if OmegaConf.is_config(getattr(schedule, "cfg", None)):
        options: Any = OmegaConf.to_container(schedule.cfg, resolve=True, enum_to_str=True)
        return options
    # A schedule without a dataclass holds the whole command line, and the values of --update2lr and the like.
    return {name: str(value) for name, value in vars(schedule).items() if isinstance(value, dict)}


def _values(schedule: FairseqLRScheduler) -> Dict[str, Any]:
    return {
        name: value.state_dict() if _is_torch_scheduler(value) else value
        for name, value in vars(schedule).items()
        if value is None or isinstance(value, (bool, int, float)) or _is_torch_scheduler(value)
    }


def _restore(schedule: FairseqLRScheduler, saved: Dict[str, Any]) -> None:
    for name in _values(schedule).keys() & saved.keys():
        current = getattr(schedule, name)
        if _is_torch_scheduler(current):
            current.load_state_dict(saved[name])
        else:
            setattr(schedule, name, saved[name])


def _is_torch_scheduler(value: Any) -> bool:
    return isinstance(value, torch.optim.lr_scheduler.LRScheduler)
