"""Text to word ids and back, as the data of a model was encoded. The package needs neither a host nor the model."""

from .encoding import TextEncoding
from .tokenizer import END, Tokenizer

__all__ = ["END", "TextEncoding", "Tokenizer"]
