"""The output layers by name. A new head is one file and one line here."""

from recurlm.model.heads.base import Head
from recurlm.model.heads.softmax import SoftmaxHead, TiedHead

HEADS: dict[str, type[Head]] = {"softmax": SoftmaxHead, "tied": TiedHead}
