"""The recurrent layers by name. A new layer is one file and one line here."""

from recurlm.model.layers.base import RecurrentLayer
from recurlm.model.layers.gru import GRU
from recurlm.model.layers.lstm import LSTM
from recurlm.model.layers.qrnn import QRNN
from recurlm.model.layers.rnn import RNN

LAYERS: dict[str, type[RecurrentLayer]] = {"lstm": LSTM, "gru": GRU, "qrnn": QRNN, "rnn": RNN}
