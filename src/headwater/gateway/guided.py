"""Answers that keep to a grammar. The only file that imports ``llguidance``.

https://github.com/guidance-ai/llguidance: a grammar and the bytes of what was generated say which tokens may follow.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from headwater.gateway.engine_types import GrammarInvalid, GuideMissing

if TYPE_CHECKING:
    import llguidance
    from torch import Tensor


class Guides:
    """Makes guides for one tokenizer; which is read once, at the first one (about a second).

    Args:
        tokenizer: a fast one of ``transformers``.
        vocabulary: number of logits.
        eos: ids that end an answer.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, eos: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._eos = sorted(eos)
        self._made: llguidance.LLTokenizer | None = None

    def make(self, grammar: str) -> Guide:
        """A guide at a grammar's beginning. Not for two threads at once.

        Raises ``GrammarInvalid`` with the library's reason; ``GuideMissing`` if it is not installed, or does not know
        this kind of tokenizer.
        """
        try:
            import llguidance
        except ImportError:
            raise GuideMissing(
                "JSON and tools need llguidance, which is not installed where this server runs; nothing was queued: "
                "pip install 'headwater[serve]' there, or leave response_format and tools out"
            ) from None
        if self._made is None:
            self._made = self._read()
        matcher = llguidance.LLMatcher(self._made, llguidance.LLMatcher.grammar_from_lark(grammar), log_level=0)
        if matcher.is_error():
            raise GrammarInvalid(f"no answer can be held to this schema: {_reason(matcher)}; nothing was queued")
        return Guide(matcher, self._vocabulary)

    def _read(self) -> llguidance.LLTokenizer:
        import llguidance
        from llguidance import hf

        try:
            spelt = hf.from_tokenizer(self._tokenizer, self._vocabulary, self._eos or None)
            words = llguidance.TokenizerWrapper(_Words(self._tokenizer, spelt, self._eos))
            return llguidance.LLTokenizer(words, self._vocabulary, eos_token=self._eos or None)
        except (ValueError, RuntimeError, TypeError) as error:
            raise GuideMissing(
                f"JSON and tools are not supported for this model's tokenizer ({error}); nothing was queued: leave "
                "response_format and tools out"
            ) from None


class _Words:
    """A tokenizer as the library wants one of another kind: the bytes of each token, and how it cuts a text.

    Its own reading of ours takes every added token such as ``<tool_call>`` for a special one, which no text can hold;
    then, where a grammar leaves one text alone, it cuts that with these tokens, and the answer fails.
    """

    def __init__(self, tokenizer: Any, spelt: llguidance.LLTokenizer, eos: Sequence[int]) -> None:
        self.eos_token_id = eos[0] if eos else spelt.eos_token
        self.bos_token_id = None
        self.tokens = [spelt.decode_bytes([token]) for token in range(spelt.vocab_size)]
        self.special_token_ids = sorted(
            {*eos, *(token for token, added in tokenizer.added_tokens_decoder.items() if added.special)}
        )
        self._spelt = spelt
        self._backend = copy.copy(tokenizer.backend_tokenizer)
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = True

    def __call__(self, text: bytes) -> list[int]:
        ids: list[int] = self._backend.encode(text.decode(), add_special_tokens=False).ids
        whole = b"".join(self.tokens[token] for token in ids) == text  # some put a blank before every text
        return ids if whole else self._spelt.greedy_tokenize(text.decode())


class Guide:
    """One answer's place in its grammar: an ``engine_types.Guide``."""

    def __init__(self, matcher: llguidance.LLMatcher, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    def copy(self) -> Guide:
        """For another answer, from the same place on."""
        return Guide(self._matcher.deep_copy(), self._vocabulary)

    def allowed(self) -> Tensor:
        """Which tokens may follow, (vocabulary,) bool. Raises ``GrammarInvalid`` if none may."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        mask = torch.from_numpy(np.unpackbits(bits, count=self._vocabulary, bitorder="little")).bool()
        self._check()
        return mask

    def push(self, token: int) -> None:
        """This token came."""
        self._matcher.consume_token(token)
        self._check()

    @property
    def complete(self) -> bool:
        """Whether nothing can follow."""
        return self._matcher.is_stopped()

    @property
    def warnings(self) -> list[str]:
        """What of the schema is not enforced."""
        return self._matcher.get_grammar_warnings()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarInvalid(f"the answer cannot keep to its schema: {_reason(self._matcher)}; it was given up")


def _reason(matcher: llguidance.LLMatcher) -> str:
    """The library's, without its place in the grammar, which no client has seen."""
    said = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", matcher.get_error())
    return re.split(r"\n\s*\d+ \||\n<state>", said)[0].strip()
