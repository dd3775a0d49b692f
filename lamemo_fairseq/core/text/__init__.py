"""Text to word ids and back, as the data of a model was encoded. It needs neither a host nor the model."""

from .encoding import TextEncoding
from .tokenizer import END, Tokenizer

__all__ = ["END", "TextEncoding", "Tokenizer"]
