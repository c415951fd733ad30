"""The zoo's attention nets. See zoo.py."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Self-attention with fused qkv, written as timm writes it: head counts are python ints."""

    def __init__(self, width: int = 12, heads: int = 3):
        super().__init__()
        self.num_heads = heads
        self.head_dim = width // heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attention = (q * self.scale @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((attention @ v).transpose(1, 2).reshape(b, n, c))


class GroupedQueryAttention(nn.Module):
    """Four query heads share two key and value heads."""

    def __init__(self, width: int = 12, heads: int = 4, shared: int = 2, head_dim: int = 3):
        super().__init__()
        self.heads, self.shared, self.head_dim = heads, shared, head_dim
        self.q = nn.Linear(width, heads * head_dim)
        self.k = nn.Linear(width, shared * head_dim)
        self.v = nn.Linear(width, shared * head_dim)
        self.out = nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, self.head_dim).transpose(1, 2)
        k = self.k(x).view(b, n, self.shared, self.head_dim).transpose(1, 2)
        v = self.v(x).view(b, n, self.shared, self.head_dim).transpose(1, 2)
        repeats = self.heads // self.shared
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out(out.transpose(1, 2).reshape(b, n, -1))


class TransformerBlock(nn.Module):
    def __init__(self, attention: nn.Module, width: int = 12):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = attention
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 20), nn.GELU(), nn.Linear(20, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Patches, a class token, position embedding, one block, a head."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.patch = nn.Conv2d(3, 12, 4, 4)
        self.token = nn.Parameter(torch.empty(1, 1, 12))
        self.position = nn.Parameter(torch.empty(1, 5, 12))
        self.block = TransformerBlock(attention)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.block(x))[:, 0])
