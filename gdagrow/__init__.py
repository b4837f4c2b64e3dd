"""gdagrow: exact progressive growth for language models with grouped differential attention (GDA)."""

__version__ = "0.1.0"
