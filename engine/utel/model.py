"""UTel (arXiv 2207.13979, a withdrawn preprint), a text-and-layout encoder: BERT's layers, absolute tables for the boxes'
edges, no absolute table of places in the sequence, and relative terms of boxes and places in every layer's attention.

Parameters carry the names of the released code, which are LayoutLM's and, layer by layer, BERT's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.utel.config import SIZE, UtelConfig
from engine.utel.relative import FastTerms, PlainTerms, Terms

__all__ = ["Utel", "UtelConfig", "initialise"]


class Utel(nn.Module):
    """The encoder. Any length; with an absolute table (see `UtelConfig.sequence_term`) up to the table's."""

    def __init__(self, config: UtelConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.pooler = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size)})
        initialise(self, config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        boxes: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, L, H] of `input_ids` [B, L] with `boxes` [B, L, 4] (x0, y0, x1, y1 as integers, cut to
        0..1000). `attention_mask` [B, L] is True where there is a token (default: everywhere); what comes out at padding
        means nothing. `position_ids` [B, L] are 0, 1, ... by default, and only their differences count.

        Raises ValueError for shapes and dtypes other than these, and for more than an absolute table holds.
        """
        _check_inputs(input_ids, boxes, attention_mask, position_ids)
        batch, length = input_ids.shape
        boxes = boxes.long().clamp(0, SIZE)
        if position_ids is None:
            position_ids = torch.arange(length, device=input_ids.device).expand(batch, length)
        mask = None if attention_mask is None else attention_mask.bool()
        hidden = self.embeddings(input_ids, boxes, position_ids)
        return self.encoder(hidden, self.embeddings.terms(boxes, position_ids, mask))

    def pooled(self, hidden: Tensor) -> Tensor:
        """What stands for the page [B, H], of its first token's hidden state."""
        return self.pooler["dense"](hidden[:, 0]).tanh()


class Embeddings(nn.Module):
    """Word, edges of the box (one table for left and right, one for top and bottom), type; and the relative terms."""

    def __init__(self, config: UtelConfig) -> None:
        super().__init__()
        self.config = config
        hidden, edges = config.hidden_size, config.max_2d_position_embeddings
        self.word_embeddings = nn.Embedding(config.vocab_size, hidden, padding_idx=config.pad_token_id)
        self.x_position_embeddings = nn.Embedding(edges, hidden)
        self.y_position_embeddings = nn.Embedding(edges, hidden)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.bbox_projection = nn.Linear(config.sinusoid_size, config.head_size, bias=False)
        if config.sequence_term == "relative":
            self.seq_projection = nn.Linear(config.sinusoid_size, config.head_size, bias=False)
        elif config.sequence_term == "absolute":
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, hidden)

    def forward(self, input_ids: Tensor, boxes: Tensor, position_ids: Tensor) -> Tensor:
        x0, y0, x1, y1 = boxes.unbind(-1)
        x, y = self.x_position_embeddings, self.y_position_embeddings
        total = self.word_embeddings(input_ids) + x(x0) + y(y0) + x(x1) + y(y1) + self.token_type_embeddings.weight[0]
        if self.config.sequence_term == "absolute":
            total = total + self.position_embeddings(self._in_table(position_ids))
        return functional.dropout(self.LayerNorm(total), self.config.hidden_dropout_prob, self.training)

    def terms(self, boxes: Tensor, position_ids: Tensor, mask: Tensor | None) -> Terms:
        """What the layers' attention shares."""
        box = self.bbox_projection.weight
        form = FastTerms if self.config.attention == "fast" else PlainTerms
        sequence = self.seq_projection.weight if self.config.sequence_term == "relative" else box
        return form(self.config, boxes=boxes, positions=position_ids, mask=mask, box=box, sequence=sequence)

    def _in_table(self, position_ids: Tensor) -> Tensor:
        size = self.config.max_position_embeddings
        first, last = int(position_ids.min()), int(position_ids.max())
        if first < 0 or last >= size:
            raise ValueError(
                f"position_ids: got {first} to {last}, expected 0 to {size - 1}, the entries of the absolute table"
            )
        return position_ids


class Encoder(nn.Module):
    def __init__(self, config: UtelConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden: Tensor, terms: Terms) -> Tensor:
        for layer in self.layer:
            hidden = layer(hidden, terms)
        return hidden


class Residual(nn.Module):
    """Post-LN: LayerNorm(x + dropout(dense(update)))."""

    def __init__(self, config: UtelConfig, inputs: int) -> None:
        super().__init__()
        self.dropout = config.hidden_dropout_prob
        self.dense = nn.Linear(inputs, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, update: Tensor, x: Tensor) -> Tensor:
        return self.LayerNorm(x + functional.dropout(self.dense(update), self.dropout, self.training))


class SelfAttention(nn.Module):
    def __init__(self, config: UtelConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.num_attention_heads, config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, terms: Terms) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query(x), self.key(x), self.value(x))
        )
        out = terms.attend(query, key, value, self.dropout if self.training else 0.0)
        return out.transpose(1, 2).flatten(2)


class Layer(nn.Module):
    def __init__(self, config: UtelConfig) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"self": SelfAttention(config), "output": Residual(config, config.hidden_size)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.intermediate_size)})
        self.output = Residual(config, config.intermediate_size)

    def forward(self, x: Tensor, terms: Terms) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, terms), x)
        return self.output(functional.gelu(self.intermediate["dense"](x)), x)


def initialise(module: nn.Module, deviation: float) -> None:
    """Fresh weights: normal of this standard deviation, biases 0, LayerNorms 1 and 0, the padding's embedding 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=deviation)
        if isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
        if isinstance(part, nn.Linear | nn.LayerNorm) and part.bias is not None:
            nn.init.zeros_(part.bias)
        if isinstance(part, nn.Embedding) and part.padding_idx is not None:
            with torch.no_grad():
                part.weight[part.padding_idx].zero_()


def _check_inputs(input_ids: Tensor, boxes: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> None:
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids: got shape {list(input_ids.shape)}, expected [B, L]")
    shape = list(input_ids.shape)
    expected = {
        "boxes": (boxes, [*shape, 4]),
        "attention_mask": (attention_mask, shape),
        "position_ids": (position_ids, shape),
    }
    for name, (tensor, wanted) in expected.items():
        if tensor is not None and list(tensor.shape) != wanted:
            raise ValueError(f"{name}: got shape {list(tensor.shape)}, expected {wanted}, as input_ids have {shape}")
    for name, integers in {"input_ids": input_ids, "boxes": boxes, "position_ids": position_ids}.items():
        if integers is not None and integers.is_floating_point():
            raise ValueError(f"{name}: got {integers.dtype}, expected integers")
