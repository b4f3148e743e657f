"""A post-layer-norm transformer encoder that classifies: RoBERTa, BERT and MPNet.

    model = Transformer(Config(n_out=2))
    logits = model(input_ids, token_type_ids, attention_mask)       # (B, n_out)

BERT: Devlin et al. 2019, arXiv:1810.04805. RoBERTa: Liu et al. 2019, arXiv:1907.11692; its
positions start elsewhere, and its classification head has one more dropout. MPNet: Song et al.
2020, arXiv:2004.09297; it is RoBERTa with a relative position bias on the attention scores and
without token types. data/pretrained.py reads Hugging Face's weights into it.

Shapes: B sequences of T tokens, d = hidden_size, nh heads of size hs = d / nh.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    """Sizes and settings, BERT-base's by default; all but n_out are named as in config.json."""

    model_type: str = "bert"  # or "roberta" or "mpnet"
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    # In RoBERTa and MPNet the first pad_token_id + 1 hold no token: see Embeddings.forward.
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    pad_token_id: int = 0
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None  # the head's; None: hidden_dropout_prob
    initializer_range: float = 0.02
    n_out: int = 2  # classes, or 1 for regression

    @property
    def max_len(self):
        """The longest sequence that the position embeddings allow, in tokens."""
        unused = 0 if self.model_type == "bert" else self.pad_token_id + 1
        return self.max_position_embeddings - unused


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        d = config.hidden_size
        self.n_heads = config.num_attention_heads
        self.query = nn.Linear(d, d)
        self.key = nn.Linear(d, d)
        self.value = nn.Linear(d, d)
        self.out = nn.Linear(d, d)
        self.dropout = config.attention_probs_dropout_prob

    def forward(self, x, context, mask):
        """x (B, t, d) attends to context (B, T, d). x is all of context, or its first position.

        mask is added to the scores, and broadcast to (B, nh, t, T); or it is None.
        """
        q = self.heads(self.query(x))  # (B, nh, t, hs)
        k = self.heads(self.key(context))  # (B, nh, T, hs)
        v = self.heads(self.value(context))  # (B, nh, T, hs)
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, p)  # (B, nh, t, hs)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, t, d)

    def heads(self, x):  # (B, T, d) -> (B, nh, T, hs)
        return x.unflatten(2, (self.n_heads, -1)).transpose(1, 2)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        d, eps = config.hidden_size, config.layer_norm_eps
        self.attention = Attention(config)
        self.norm1 = nn.LayerNorm(d, eps)
        self.fc1 = nn.Linear(d, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, d)
        self.norm2 = nn.LayerNorm(d, eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x, context, mask):
        """New states (B, t, d) of the positions x (B, t, d), which attend to context (B, T, d).

        x is context; or in the last layer, with encode's first_only, its first position (t = 1).
        """
        # Post-layer-norm: each norm comes after the sum.
        x = self.norm1(x + self.dropout(self.attention(x, context, mask)))
        return self.norm2(x + self.dropout(self.fc2(F.gelu(self.fc1(x)))))


class Embeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        d = config.hidden_size
        self.config = config
        self.word = nn.Embedding(config.vocab_size, d)
        self.position = nn.Embedding(config.max_position_embeddings, d)
        if config.model_type != "mpnet":
            self.token_type = nn.Embedding(config.type_vocab_size, d)
        self.norm = nn.LayerNorm(d, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids, token_type_ids):  # both (B, T) -> (B, T, d)
        if self.config.model_type == "bert":
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        else:
            # Padding gets pad, other tokens pad + 1, pad + 2, ...: with pad 1, the ids
            # [0, 7, 2, 1, 1] have the positions [2, 3, 4, 1, 1].
            pad = self.config.pad_token_id
            is_token = (input_ids != pad).long()
            positions = is_token.cumsum(1) * is_token + pad
        x = self.word(input_ids)
        if self.config.model_type != "mpnet":
            if token_type_ids is None or self.config.type_vocab_size == 1:
                token_type_ids = torch.zeros_like(input_ids)
            x = x + self.token_type(token_type_ids)
        return self.dropout(self.norm(x + self.position(positions)))


BUCKETS, MAX_DISTANCE = 32, 128  # T5's


def relative_buckets(offset):
    """The bucket of key position - query position (T5's rule: Raffel et al. 2020, section 2.1).

    Buckets 0 to 15 are for keys before the query or at it, 16 to 31 for keys after it. In each half
    the distances up to 7 have a bucket each. Farther ones share the other 8, whose width grows
    logarithmically: distance 8 is in bucket 8, 16 in 10, 32 in 12, 64 in 14, 91 and more in 15.
    """
    distance = offset.abs()
    half = BUCKETS // 2  # 16
    near = half // 2  # 8
    # 0 at distance 8, 1/4 at 16 (8 + 8/4 is bucket 10), 1 at 128. Nearer ones do not use it.
    fraction = torch.log(distance.clamp(min=1).float() / near) / math.log(MAX_DISTANCE / near)
    far = (near + (fraction * (half - near)).long()).clamp(max=half - 1)
    return torch.where(distance < near, distance, far) + half * (offset > 0)


class Head(nn.Module):
    """RoBERTa's and MPNet's classification head, or BERT's pooler and classifier."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.n_out)
        p = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if p is None else p)
        # All but BERT also apply dropout to the dense layer's input.
        self.dropout_first = config.model_type != "bert"

    def forward(self, x):  # (B, T or 1, d) -> (B, n_out)
        # The head may train in float32 on a bfloat16 encoder.
        x = x[:, 0].to(self.dense.weight.dtype)
        if self.dropout_first:
            x = self.dropout(x)
        return self.out_proj(self.dropout(torch.tanh(self.dense(x))))


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.head = Head(config)
        if config.model_type == "mpnet":
            self.relative_bias = nn.Embedding(BUCKETS, config.num_attention_heads)
            position = torch.arange(config.max_len)
            offset = position[None, :] - position[:, None]  # key - query, (query, key)
            self.register_buffer("buckets", relative_buckets(offset), persistent=False)
        self.apply(self.initialize)

    def initialize(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def encode(self, input_ids, token_type_ids=None, attention_mask=None, first_only=False):
        """Last hidden states (B, T, d) of token ids (B, T).

        token_type_ids (B, T) are 0 by default; encoders with one type or none ignore them.
        attention_mask (B, T) is 1 for tokens and 0 for padding; without it every position is
        attended to. first_only gives the first token's state, (B, 1, d), and saves most of the last
        layer. Raises ValueError if T is more than the model's positions.
        """
        T = input_ids.shape[1]
        if T > self.config.max_len:
            raise ValueError(f"{T} tokens: the model has {self.config.max_len} positions")
        x = self.embeddings(input_ids, token_type_ids)
        mask = self.score_mask(T, attention_mask, x)
        *layers, last = self.layers
        for layer in layers:
            x = layer(x, x, mask)
        if not first_only:
            return last(x, x, mask)
        if mask is not None:
            mask = mask[:, :, :1]  # (B, 1, 1, T) as it is, or the first query's (..., nh, 1, T)
        # Contiguous: backward would keep all of a slice's storage.
        return last(x[:, :1].contiguous(), x, mask)

    def score_mask(self, T, attention_mask, x):
        """What is added to the attention scores (B, nh, T, T), in x's dtype, or None.

        It is (B, 1, 1, T); with MPNet's bias (1, nh, T, T) or (B, nh, T, T).
        """
        mask = None
        if attention_mask is not None:
            # 0 for tokens; for padding so low that softmax gives 0.
            mask = torch.zeros_like(attention_mask, dtype=x.dtype)
            mask.masked_fill_(attention_mask == 0, torch.finfo(x.dtype).min)
            mask = mask[:, None, None, :]  # (B, 1, 1, T)
        if self.config.model_type == "mpnet":
            bias = self.relative_bias(self.buckets[:T, :T])  # (T, T, nh)
            # Contiguous, as attention's fast kernels on a GPU want it.
            bias = bias.permute(2, 0, 1).contiguous()[None]
            mask = bias if mask is None else mask + bias  # (1 or B, nh, T, T)
        return mask

    def forward(self, input_ids, token_type_ids=None, attention_mask=None):
        """Logits (B, n_out); the arguments are encode's."""
        return self.head(self.encode(input_ids, token_type_ids, attention_mask, first_only=True))
