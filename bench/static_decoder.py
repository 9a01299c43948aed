"""Greedy decoding over buffers that stay where they are, so that a step of it can be captured as a CUDA graph."""

from __future__ import annotations

from typing import Any


class StaticDecoder:
    """Greedy decoding over a static cache, a step of which can be captured as a CUDA graph.

    Everything that a step reads or writes is a buffer that stays where it is. The hook at the layer adds rows of a table to the
    stream and projects it onto directions; both are there or not when the graph is captured.

    Args:
        model: Whose.
        rows: Of a batch; prompts of equal length need no padding.
        prompt, tokens: Of each row.
        layer: Where the hook is.
        push: What is added ``(rows, D)``, or None.
        onto: Directions ``(N, D)``, or None.
    """

    def __init__(
        self, model: Any, rows: int, *, prompt: int, tokens: int, layer: int, push: Any = None, onto: Any = None
    ) -> None:
        import torch
        from transformers import StaticCache

        device = model.device
        self.model, self.prompt, self.passes = model, prompt, tokens - 1 + (onto is not None)
        length = -(-(prompt + tokens + 1) // 64) * 64
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        self.token = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.place = torch.zeros(1, dtype=torch.long, device=device)
        self.number = torch.zeros(1, dtype=torch.long, device=device)
        self.mask = torch.zeros(1, 1, 1, length, dtype=torch.bool, device=device)
        self.replies = torch.zeros(rows, tokens + 1, dtype=torch.long, device=device)
        self.push, self.onto = push, onto
        self.scores = None if onto is None else torch.zeros(tokens + 1, rows, len(onto), device=device)
        self.decoding, self.graph = False, None
        taps = push is not None or onto is not None
        self._handle = model.get_decoder().layers[layer].register_forward_hook(self._tap) if taps else None

    def _tap(self, module: Any, args: Any, output: Any) -> Any:
        stream = output if self.push is None else output + self.push[:, None]
        if self.scores is not None and self.decoding:
            self.scores.index_copy_(0, self.number, (stream[:, -1].float() @ self.onto.T)[None])
        return stream

    def close(self) -> None:
        if self._handle is not None:
            self._handle.remove()

    def begin(self, ids: Any) -> None:
        """Run the prompts ``(rows, prompt)``; the first token of each reply follows from them."""
        import torch

        for layer in self.cache.layers:
            if layer.is_initialized:
                layer.cumulative_length.zero_()
        self.decoding = False
        positions = torch.arange(self.prompt, device=ids.device)[None]
        out = self.model(input_ids=ids, position_ids=positions, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token.copy_(out.logits[:, -1:].argmax(-1))
        self.decoding = True
        self.number.zero_()
        self.place.fill_(self.prompt)
        self.mask.zero_()
        self.mask[..., : self.prompt + 1] = True
        self.replies.index_copy_(1, self.number, self.token)

    def step(self) -> None:
        """One token more for each row."""
        out = self.model(
            input_ids=self.token,
            position_ids=self.place[None],
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.token.copy_(out.logits[:, -1:].argmax(-1))
        self.number.add_(1)
        self.place.add_(1)
        self.mask.index_fill_(3, self.place, True)
        self.replies.index_copy_(1, self.number, self.token)

    def capture(self, ids: Any) -> None:
        """Capture a step; on a processor steps are run one by one as they are."""
        import torch

        if not ids.is_cuda:
            return
        self.begin(ids)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # workspaces and plans of kernels are made before, not inside
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        self.graph = graph

    def run(self, ids: Any) -> list[list[int]]:
        """The replies."""
        self.begin(ids)
        advance = self.graph.replay if self.graph is not None else self.step
        for _ in range(self.passes):
            advance()
        if self.scores is not None:
            self.scores.cpu()
        return self.replies[:, : self.replies.shape[1] - 1].tolist()
