"""gatl finds by a genetic algorithm how to fine-tune a pretrained CNN on your images."""

__version__ = "0.1.0"
