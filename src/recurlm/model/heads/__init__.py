"""The output layers by name. A new head is one file and one line here."""

from recurlm.model.heads.adaptive import AdaptiveHead, TiedAdaptiveHead
from recurlm.model.heads.base import Head
from recurlm.model.heads.hierarchical import HierarchicalHead
from recurlm.model.heads.mixture import MixtureHead
from recurlm.model.heads.softmax import SoftmaxHead, TiedHead

HEADS: dict[str, type[Head]] = {
    "softmax": SoftmaxHead,
    "tied": TiedHead,
    "hierarchical": HierarchicalHead,
    "adaptive": AdaptiveHead,
    "tied-adaptive": TiedAdaptiveHead,
    "mixture": MixtureHead,
}
