"""What crosses a process: the SDK's protocol buffers, and tink-train/1."""
