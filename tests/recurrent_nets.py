"""Small networks with recurrent layers, each the smallest that shows one way their channels can be wired.

``RECURRENT[name]()`` returns a model in eval mode with seeded weights, and example inputs of batch 2. Like ``zoo``,
this module does not import secateur.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from zoo import randomize_all

STEPS, BATCH = 5, 2


class With(nn.Module):
    """Modules and numbers by name, and a function of them and the input."""

    def __init__(self, compute: Callable[..., Any], **parts: Any):
        super().__init__()
        self.compute = compute
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.compute(self, x)


class Between(nn.Module):
    """A recurrent layer between two linear ones; the time comes first unless it says otherwise."""

    def __init__(self, layer: nn.RNNBase):
        super().__init__()
        self.inner = nn.Linear(5, 6)
        self.layer = layer
        width = (layer.proj_size or layer.hidden_size) * (1 + layer.bidirectional)
        self.outer = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        if not self.layer.batch_first:
            x = x.transpose(0, 1)
        return self.outer(torch.tanh(self.layer(self.inner(x))[0]))


class CRNN(nn.Module):
    """Text recognition: the height of the features goes into the channels, and the width is read as time."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.body = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.first = kind(6 * 4, 7, bidirectional=True)
        self.middle = nn.Linear(14, 5)
        self.second = kind(5, 7, bidirectional=True)
        self.head = nn.Linear(14, 9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x))
        b, c, h, w = x.shape
        x = x.permute(3, 0, 1, 2).reshape(w, b, c * h)
        x = self.middle(self.first(x)[0])
        return self.head(self.second(x)[0])


class CellLoop(nn.Module):
    """A cell that a Python loop runs over time."""

    def __init__(self, cell: nn.RNNCellBase):
        super().__init__()
        self.inner, self.cell, self.outer = nn.Linear(5, 6), cell, nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        outs: list[Tensor] = []
        for step in self.inner(x).unbind(1):
            state = self.cell(step, state)
            outs.append(state[0] if isinstance(state, tuple) else state)
        return self.outer(torch.stack(outs, 1))


class Seq2Seq(nn.Module):
    """The states at the end of the encoder are those at the begin of the decoder."""

    def __init__(self, kind: type[nn.RNNBase]):
        super().__init__()
        self.source, self.target = nn.Linear(5, 6), nn.Linear(5, 4)
        self.encoder, self.decoder = kind(6, 7, 2, batch_first=True), kind(4, 7, 2, batch_first=True)
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        _, state = self.encoder(self.source(x))
        return self.head(self.decoder(self.target(x), state)[0])


class Bridge(nn.Module):
    """The encoder reads both ways; a linear layer makes the decoder's first state of both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.GRU(5, 7, batch_first=True, bidirectional=True)
        self.bridge, self.decoder, self.head = nn.Linear(14, 6), nn.GRU(5, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        _, ends = self.encoder(x)
        state = torch.tanh(self.bridge(torch.cat([ends[0], ends[1]], 1)))
        return self.head(self.decoder(x, state[None])[0])


class Attended(nn.Module):
    """Attention over the outputs, as pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(5, 6, batch_first=True, bidirectional=True)
        self.score = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 1))
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        outs, _ = self.layer(x)
        weights = torch.softmax(self.score(outs), 1)
        return self.head((weights * outs).sum(1))


class Translator(nn.Module):
    """Embedded tokens, and a decoder cell that attends to the encoder's outputs at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.encoder = nn.GRU(6, 8, batch_first=True)
        self.decoder = nn.GRUCell(6 + 8, 8)
        self.head = nn.Linear(8, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        words = self.embed(tokens)
        memory, end = self.encoder(words)
        state, outs = end[0], []
        for step in range(3):
            weights = torch.softmax(torch.bmm(memory, state[:, :, None]), 1)
            context = (weights * memory).sum(1)
            state = self.decoder(torch.cat([words[:, step], context], 1), state)
            outs.append(self.head(state))
        return torch.stack(outs, 1)


class DualPath(nn.Module):
    """Separation: one layer along the frames within a chunk, one across the chunks, each with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.begin = nn.Conv1d(3, 8, 1)
        self.within, self.across = (nn.GRU(8, 6, batch_first=True, bidirectional=True) for _ in range(2))
        self.mix_within, self.mix_across = nn.Linear(12, 8), nn.Linear(12, 8)
        self.end = nn.Conv1d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.begin(x)
        b, c, t = x.shape
        grid = x.reshape(b, c, t // 4, 4).permute(0, 2, 3, 1)
        rows = grid.reshape(-1, 4, c)
        grid = grid + self.mix_within(self.within(rows)[0]).reshape(grid.shape)
        columns = grid.transpose(1, 2).reshape(-1, t // 4, c)
        mixed = self.mix_across(self.across(columns)[0]).reshape(b, 4, t // 4, c).transpose(1, 2)
        return self.end((grid + mixed).permute(0, 3, 1, 2).reshape(b, c, t))


class Packed(nn.Module):
    """Sequences of several lengths."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, **settings: Any):
        super().__init__()
        self.inner, self.layer = nn.Linear(5, 6), kind(6, 7, batch_first=True, **settings)
        self.outer = nn.Linear(7 * (1 + self.layer.bidirectional), 4)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.inner(x), lengths, batch_first=True, enforce_sorted=False)
        outs, _ = self.layer(packed)
        return self.outer(pad_packed_sequence(outs, batch_first=True)[0])


class Recognizer(nn.Module):
    """Speech: batch norms between bidirectional layers whose directions are added, and flattened steps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 4, 3, (2, 1), 1, bias=False), nn.BatchNorm2d(4), nn.Hardtanh(0, 20))
        self.layers = nn.ModuleList([nn.LSTM(16, 10, bidirectional=True), nn.GRU(10, 10, bidirectional=True)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(16), nn.BatchNorm1d(10)])
        self.head = nn.Sequential(nn.BatchNorm1d(10), nn.Linear(10, 5, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x.view(x.size(0), x.size(1) * x.size(2), x.size(3)).permute(2, 0, 1).contiguous()
        for layer, norm in zip(self.layers, self.norms, strict=True):
            steps, batch = x.size(0), x.size(1)
            x = norm(x.view(steps * batch, -1)).view(steps, batch, -1)
            x, _ = layer(x)
            x = x.view(steps, batch, 2, -1).sum(2).view(steps, batch, -1)
        return self.head(x.view(x.size(0) * x.size(1), -1)).view(x.size(0), x.size(1), -1).transpose(0, 1)


class Speaker(nn.Module):
    """Speech synthesis: two cells whose states begin with zeros of a size that the module knows, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.LSTM(5, 6, batch_first=True, bidirectional=True)
        self.begin = nn.Sequential(nn.Linear(4, 7), nn.ReLU())
        self.attend, self.decode = nn.LSTMCell(7 + 12, 9), nn.LSTMCell(9 + 12, 10)
        self.query, self.keys, self.score = nn.Linear(9, 8, bias=False), nn.Linear(12, 8), nn.Linear(8, 1)
        self.out = nn.Linear(10 + 12, 4)
        self.widths = [9, 10]

    def forward(self, x: Tensor) -> Tensor:
        memory, _ = self.memory(x)
        keys = self.keys(memory)
        attending, cell = (memory.new_zeros(x.size(0), self.widths[0]) for _ in range(2))
        decoding = tuple(memory.data.new(x.size(0), self.widths[1]).zero_() for _ in range(2))
        context, out, outs = memory.new_zeros(x.size(0), memory.size(2)), memory.new_zeros(x.size(0), 4), []
        for _ in range(3):
            attending, cell = self.attend(torch.cat((self.begin(out), context), -1), (attending, cell))
            scores = self.score(torch.tanh(self.query(attending[:, None]) + keys))
            context = (torch.softmax(scores, 1) * memory).sum(1)
            decoding = self.decode(torch.cat((attending, context), -1), decoding)
            out = self.out(torch.cat((decoding[0], context), 1))
            outs.append(out)
        return torch.stack(outs, 1)


class LanguageModel(nn.Module):
    """States that the model makes from one of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(8, 11)
        self.layer = nn.LSTM(6, 8, 2, dropout=0.2)
        self.width = 8

    def forward(self, tokens: Tensor) -> Tensor:
        weight = next(self.parameters())
        states = tuple(weight.new_zeros(2, tokens.size(0), self.width) for _ in range(2))
        outs, _ = self.layer(self.embed(tokens.t()), states)
        return self.head(outs.view(-1, self.width)).view(tokens.size(1), tokens.size(0), -1).transpose(0, 1)


def _weight_normed(parametrized: bool) -> nn.Module:
    layer = nn.LSTM(6, 7, batch_first=True)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        if parametrized:
            nn.utils.parametrizations.weight_norm(layer, name)
        else:
            # The older form, which many published models have, says that it is deprecated.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                nn.utils.weight_norm(layer, name)
    return With(lambda m, x: m.head(m.layer(m.inner(x))[0]), inner=nn.Linear(5, 6), layer=layer, head=nn.Linear(7, 3))


def _learned(model: Any, x: Tensor) -> Tensor:
    states = [state.expand(-1, x.size(0), -1).contiguous() for state in (model.h, model.c)]
    return model.head(model.layer(x, tuple(states))[0])


def _of_own_zeros(model: Any, x: Tensor) -> Tensor:
    zeros = torch.zeros(2, x.size(0), model.width)
    return model.head(model.layer(model.inner(x), (zeros, zeros))[0])


def _both_ways_added(model: Any, x: Tensor) -> Tensor:
    outs, width = model.layer(x)[0], model.layer.hidden_size
    return model.head(outs[..., :width] + outs[..., width:])


def _residual(model: Any, x: Tensor) -> Tensor:
    x = model.inner(x)
    x = x + model.first(x)[0]
    return model.head(model.norm(x + model.second(x)[0]))


def _per_channel(model: Any, x: Tensor) -> Tensor:
    x = model.inner(x).transpose(1, 2)
    b, c, t = x.shape
    ends = model.layer(x.reshape(b * c, t, 1))[1]
    return model.head(ends[-1].reshape(b, c * model.layer.hidden_size))


def _twice(model: Any, x: Tensor) -> Tensor:
    left, right = (model.layer(model.inner(part))[1][0][-1] for part in (x, x.flip(1)))
    return model.head(torch.cat([left, right, (left - right).abs()], 1))


def _conv_lstm(model: Any, x: Tensor) -> Tensor:
    h = c = torch.zeros(x.size(0), model.width, *x.shape[2:])
    for _ in range(2):
        i, f, o, g = torch.chunk(model.gates(torch.cat([x, h], 1)), 4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
    return model.head(h.mean((2, 3)))


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


_BUILDERS: Mapping[str, Callable[[], nn.Module]] = {
    "crnn_lstm": CRNN,
    "crnn_gru": lambda: CRNN(nn.GRU),
    "crnn_rnn": lambda: CRNN(nn.RNN),
    "lstm_cell": lambda: CellLoop(nn.LSTMCell(6, 7)),
    "lstm_cell_without_bias": lambda: CellLoop(nn.LSTMCell(6, 7, bias=False)),
    "gru_cell": lambda: CellLoop(nn.GRUCell(6, 7)),
    "rnn_cell": lambda: CellLoop(nn.RNNCell(6, 7)),
    "relu_cell": lambda: CellLoop(nn.RNNCell(6, 7, nonlinearity="relu")),
    "seq2seq_lstm": lambda: Seq2Seq(nn.LSTM),
    "seq2seq_gru": lambda: Seq2Seq(nn.GRU),
    "bridge": Bridge,
    "attended": Attended,
    "translator": Translator,
    "dual_path": DualPath,
    "recognizer": Recognizer,
    "speaker": Speaker,
    "language_model": LanguageModel,
    "weight_norm": lambda: _weight_normed(parametrized=True),
    "old_weight_norm": lambda: _weight_normed(parametrized=False),
    "packed_lstm": Packed,
    "packed_gru": lambda: Packed(nn.GRU, num_layers=2, bidirectional=True),
    "packed_rnn": lambda: Packed(nn.RNN),
    "final_state": lambda: With(
        lambda m, x: m.head(m.layer(x)[1][0].transpose(0, 1).reshape(x.size(0), -1)),
        layer=nn.LSTM(5, 6, 2, batch_first=True, bidirectional=True),
        head=nn.Linear(4 * 6, 3),
    ),
    "last_states_joined": lambda: With(
        lambda m, x: m.head(torch.cat([m.layer(x)[1][-2], m.layer(x)[1][-1]], 1)),
        layer=nn.GRU(5, 6, batch_first=True, bidirectional=True),
        head=nn.Linear(12, 3),
    ),
    "unbatched": lambda: With(
        lambda m, x: m.head(m.layer(m.inner(x[0]))[0]), inner=nn.Linear(5, 6), layer=nn.LSTM(6, 7), head=nn.Linear(7, 3)
    ),
    "learned_state": lambda: With(
        _learned,
        layer=nn.LSTM(5, 7, 2, batch_first=True),
        h=parameter(2, 1, 7),
        c=parameter(2, 1, 7),
        head=nn.Linear(7, 3),
    ),
    "own_zeros": lambda: With(
        _of_own_zeros, inner=nn.Linear(5, 6), layer=nn.LSTM(6, 7, 2, batch_first=True), head=nn.Linear(7, 3), width=7
    ),
    "both_ways_added": lambda: With(
        _both_ways_added, layer=nn.GRU(5, 7, batch_first=True, bidirectional=True), head=nn.Linear(7, 3)
    ),
    "residual": lambda: With(
        _residual,
        inner=nn.Linear(5, 8),
        first=nn.LSTM(8, 8, batch_first=True),
        second=nn.GRU(8, 8, batch_first=True),
        norm=nn.LayerNorm(8),
        head=nn.Linear(8, 3),
    ),
    "per_channel": lambda: With(
        _per_channel, inner=nn.Linear(5, 6), layer=nn.GRU(1, 4, batch_first=True), head=nn.Linear(24, 3)
    ),
    "twice": lambda: With(
        _twice, inner=nn.Linear(5, 6), layer=nn.LSTM(6, 7, batch_first=True), head=nn.Linear(21, 3)
    ),
    "conv_lstm": lambda: With(_conv_lstm, gates=nn.Conv2d(3 + 6, 24, 3, padding=1), head=nn.Linear(6, 3), width=6),
}  # fmt: skip


def _inputs(name: str) -> tuple[Tensor, ...]:
    if name.startswith(("crnn", "recognizer")):
        return (torch.randn(BATCH, 3, 8, 12),)
    if name in {"translator", "language_model"}:
        return (torch.randint(0, 11, (BATCH, STEPS)),)
    if name == "dual_path":
        return (torch.randn(BATCH, 3, 12),)
    if name == "conv_lstm":
        return (torch.randn(BATCH, 3, 4, 4),)
    sequences = torch.randn(BATCH, STEPS, 5)
    return (sequences, torch.tensor([4, 5])) if name.startswith("packed") else (sequences,)


def seeded(build: Callable[[], nn.Module], name: str = "") -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return a model whose weights are all loud, and its inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return randomize_all(build(), 1), _inputs(name)


RECURRENT: Mapping[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    name: lambda build=build, name=name: seeded(build, name) for name, build in _BUILDERS.items()
}
