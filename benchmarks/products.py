"""Run the bare matrix products of the workload: the limit that no code of ours can beat.

A language model's layers and its head are products with weight matrices. What is run here is these
alone, with as many rows as the model's own passes have: no attention, no norms, no softmax, no
Python of the model. All products are PyTorch's `linear` and `mm`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Products:
    """The weight matrices of a model.

    Attributes:
        layers: The matrices of all layers, `[out, in]` each.
        head: The head's matrix, `[V, H]`.
    """

    layers: list[Tensor]
    head: Tensor

    @classmethod
    def of(cls, model: PreTrainedModel) -> Products:
        """Find the matrices of a model."""
        head = model.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        layers = [
            module.weight.detach()
            for module in model.modules()
            if isinstance(module, nn.Linear) and module is not head
        ]
        return cls(layers, head.weight.detach())

    @property
    def per_row(self) -> int:
        """Multiplications of one row in all layers and the head."""
        return sum(weight.numel() for weight in [*self.layers, self.head])

    @torch.no_grad()
    def forward(self, rows: int) -> None:
        """Multiply `rows` rows with each layer.

        Args:
            rows: Number of rows.
        """
        for weight in self.layers:
            functional.linear(torch.ones(rows, weight.shape[1]), weight)

    @torch.no_grad()
    def head_forward(self, rows: int, chunk: int = 128) -> None:
        """Multiply `rows` rows with the head, in chunks.

        Args:
            rows: Number of rows.
            chunk: Rows at once.
        """
        for i in range(0, rows, chunk):
            functional.linear(torch.ones(min(chunk, rows - i), self.head.shape[1]), self.head)

    @torch.no_grad()
    def backward(self, rows: int, trains: bool) -> None:
        """Multiply the gradient of `rows` rows with each layer's matrix, and with its inputs.

        Args:
            rows: Number of rows.
            trains: Whether the matrices get a gradient.
        """
        for weight in self.layers:
            slope = torch.ones(rows, weight.shape[0])
            torch.mm(slope, weight)
            if trains:
                torch.mm(slope.T, torch.ones(rows, weight.shape[1]))

    @torch.no_grad()
    def head_backward(self, rows: int, trains: bool, chunk: int = 128) -> None:
        """Multiply the gradient of `rows` rows of logits with the head, in chunks.

        Args:
            rows: Number of rows.
            trains: Whether the head gets a gradient.
            chunk: Rows at once.
        """
        into = torch.zeros_like(self.head) if trains else None
        for i in range(0, rows, chunk):
            size = min(chunk, rows - i)
            slope = torch.ones(size, self.head.shape[0])
            torch.mm(slope, self.head)
            if into is not None:
                into.addmm_(slope.T, torch.ones(size, self.head.shape[1]))

    def generate(self, texts: int, prompts: int, prompt: int, tokens: int) -> None:
        """Make the products of writing texts, one token at a time.

        Args:
            texts: Texts that are written side by side.
            prompts: Different prompts among them, which are read once.
            prompt: Tokens of a prompt.
            tokens: Tokens of a text.
        """
        self.forward(prompts * prompt)
        for _ in range(tokens):
            self.forward(texts)
            self.head_forward(texts)
