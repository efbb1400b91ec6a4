"""What happened, once more: the state at any moment, the decisions of today's code, the training itself."""
