"""Text that appears while it is generated, and how fast it came."""

from __future__ import annotations

import time
from typing import Any

from transformers import TextStreamer


class TimedStreamer(TextStreamer):
    """Prints the prompt and then every word as soon as it is known; counts tokens and seconds.

    Args:
        tokenizer: Decodes the tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Called by ``generate`` with the prompt, then with every token."""
        self.times.append(time.perf_counter())
        super().put(value)  # type: ignore[no-untyped-call]

    def summary(self) -> str:
        """Tokens and tokens per second; the first token also waits for the prompt to be read."""
        begin, *tokens = self.times
        text = f"{len(tokens)} tokens, the first after {tokens[0] - begin:.2f} s"
        if len(tokens) > 1:
            pace = (len(tokens) - 1) / (tokens[-1] - tokens[0])
            text += f", then {pace:.1f} tokens/s"
        return text
