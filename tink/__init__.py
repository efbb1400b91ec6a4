"""Tink: a worker for LLM fine-tuning and RL that never loses a job and never repeats a step."""

__version__ = "0.1.0"
