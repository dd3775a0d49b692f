"""``--bpe bytes`` and ``--bpe characters`` in fairseq's commands.

fairseq looks up the configuration of each choice. These two choices have none, so that a command that names them ends
with an error. An empty configuration is registered here.
"""

from fairseq.data.encoders import BPE_REGISTRY
from fairseq.dataclass import FairseqDataclass
from fairseq.registry import REGISTRIES
from hydra.core.config_store import ConfigStore

_KNOWN = REGISTRIES["bpe"]["dataclass_registry"]

for _name in ("bytes", "characters"):
    if _name in BPE_REGISTRY and _name not in _KNOWN:
        _KNOWN[_name] = FairseqDataclass
        _node = FairseqDataclass()
        _node._name = _name
        ConfigStore.instance().store(name=_name, group="bpe", node=_node, provider="fairseq")
