"""Rules on the options of memories: which of them apply to the memory chosen."""

from dataclasses import fields
from typing import Iterator

from ..core.memory import MEMORIES
from ..core.memory.compressive.compressions import COMPRESSIONS
from ..core.positions import POSITIONS
from .option_rules import IGNORED, REFUSED, TRAINING, Rule, Settings, is_one, is_other, rule, with_all


def of_memories() -> Iterator[Rule]:
    """Yield the rules on options of memories. Every model has the options of all memories."""
    for name in MEMORIES.names():
        own = " ".join(f.name for f in fields(MEMORIES[name].options))
        if own:
            yield rule(IGNORED, own, TRAINING, f"it belongs to --memory {name}", is_other("memory", name))
    carrying = [name for name in MEMORIES.names() if MEMORIES[name].carries_gradient]
    yield rule(
        IGNORED,
        "bptt_segments",
        TRAINING,
        f"it belongs to --memory {', '.join(carrying)}",
        is_other("memory", *carrying),
    )
    yield from _of_slots()
    unlearned = [name for name in COMPRESSIONS.names() if not COMPRESSIONS[name].trains]
    yield rule(
        IGNORED,
        "compression_loss compression_loss_weight",
        TRAINING,
        f"--compression {', '.join(unlearned)} have nothing to train",
        is_one("compression", *unlearned),
    )
    yield rule(
        IGNORED,
        "clamp_len",
        TRAINING,
        "--position-encoding absolute knows no distances",
        is_one("position_encoding", "absolute"),
    )
    counting = [name for name in POSITIONS.names() if POSITIONS[name].reads_words]
    yield rule(
        IGNORED,
        "sentence_ends paragraph_ends",
        TRAINING,
        f"it belongs to --position-encoding {', '.join(counting)}",
        is_other("position_encoding", *counting),
    )
    yield rule(
        IGNORED, "preset_tokens_per_sample", TRAINING, "--tokens-per-sample is given", with_all("tokens_per_sample")
    )


def _of_slots() -> Iterator[Rule]:
    """Yield a rule for each memory without slots. A user who chooses a memory may take --mem-len for its length."""
    for name in MEMORIES.names():
        memory = MEMORIES[name]
        if memory.has_slots:
            continue
        if not memory.remembers:
            yield rule(IGNORED, "mem_len", TRAINING, f"--memory {name} has no slots", is_one("memory", name))
            continue

        def chosen(settings: Settings, name: str = name) -> bool:
            return str(settings.get("memory")) == name and settings.get("mem_len") != 0

        yield rule(REFUSED, "mem_len", TRAINING, f"--memory {name} has no slots: leave it out, or pass 0", chosen)
